"""The command that sends a version, a captioner or a page for one to the Hub."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option

from pipeline.cli.options import DATASET_PATH, AsJson, read_names
from pipeline.cli.output import note_previews, say, show
from pipeline.errors import SynthError
from pipeline.progress import WARNING, show_progress
from pipeline.storage.object_store import is_remote

if TYPE_CHECKING:
    from pipeline.dataset.version import Version
    from pipeline.hub.package import Package
    from pipeline.hub.push import PushResult


def push(
    data: Annotated[
        Path | None,
        Argument(
            **DATASET_PATH,
            help="Dataset folder, one of its versions, or a checkpoint.",
            show_default="the only one that was made here",
        ),
    ] = None,
    repo: Annotated[str, Option(help="Where to: ORG/NAME.")] = ...,  # type: ignore[assignment]
    version: Annotated[str | None, Option(help="Which version, or tag.", show_default="the newest")] = None,
    private: Annotated[
        bool | None,
        Option(
            "--private/--public",
            help="Who may see the repository.",
            show_default="private with images of unknown license, else public",
        ),
    ] = None,
    images: Annotated[
        bool | None,
        Option("--with-images/--no-images", help="Push pixels, or ids and texts only.", show_default="what may be passed on"),
    ] = None,
    acknowledge: Annotated[
        list[str] | None, Option(help="A license under which you hold the right to pass pixels on; the card states it.")
    ] = None,
    license_: Annotated[
        str | None, Option("--license", help="The license of images whose license is unknown, such as cc-by-4.0, for the card.")
    ] = None,
    license_link: Annotated[
        str | None, Option(help="Address of the terms of a license that the Hub has no name for: https://...")
    ] = None,
    title: Annotated[str | None, Option(help="The title of the card.", show_default="named after the source")] = None,
    language: Annotated[
        str | None, Option(help="The language of the texts, for the card: en, de, ...", show_default="that of the run")
    ] = None,
    space: Annotated[
        str | None, Option(help="Also push a page for this captioner, where anyone may try it, as a Space: ORG/NAME.")
    ] = None,
    also: Annotated[
        str | None,
        Option(metavar="FORMAT,...", help="Push the same rows in these formats, too: webdataset, cauldron, dpo, lance."),
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show the files to send, and send nothing.")] = False,
    repair: Annotated[
        bool, Option("--repair", help="If this version is damaged on the Hub, push its rows as the next patch.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Push a version of a dataset, or a trained captioner, to the Hugging Face Hub: one commit, one tag that never moves."""
    from pipeline.dataset.directory import DatasetDir, only_made
    from pipeline.dataset.integrity import make_repaired_version
    from pipeline.dataset.manifest import describe_data
    from pipeline.hub.pull import open_or_download
    from pipeline.hub.push import DamagedPushError, check_repo_name
    from pipeline.storage.files import translate_disk_errors

    check_repo_name(repo)
    if space:
        check_repo_name(space)
    if data and not is_remote(data) and (data / "train.json").exists():
        if license_ or license_link or title or language:
            raise BadParameter("--license, --license-link, --title and --language go with datasets", param_hint="PATH")
        if version or images is not None or acknowledge or also or repair:
            text = "--version, --with-images, --no-images, --acknowledge, --also and --repair go with datasets"
            raise BadParameter(text, param_hint="PATH")
        say(f"captioner: {data}")
        push_captioner(data, repo, space, private=private, dry_run=dry_run, as_json=as_json)
        return
    if space:
        raise BadParameter("goes with a captioner: name its folder", param_hint="--space")
    formats = read_names(also) or []
    _require_small_formats(formats)
    _require_card_values(license_, license_link, language)
    chosen_version = open_or_download(data or only_made(), version, previews=False)
    if version is None:
        note_previews(chosen_version, data)
    choices = {
        "images": images,
        "acknowledged": acknowledge or (),
        "stated": describe_data(license_, title, language, license_link),
    }

    def send_version(version: "Version") -> "PushResult | None":
        with _packed(version, repo, formats, choices) as package:
            return send(package, repo, private=private, dry_run=dry_run, as_json=as_json)

    try:
        pushed = send_version(chosen_version)
    except DamagedPushError as damage:
        if not repair:
            raise
        chosen_version = make_repaired_version(chosen_version, damage.files)
        say(f"{damage}; {chosen_version.name} has the same rows, and names the damage")
        pushed = send_version(chosen_version)
    if pushed:
        record_dir = data if data and is_remote(data) and data.parent.name != "versions" else chosen_version.dataset_dir
        try:
            with translate_disk_errors(record_dir):
                DatasetDir(record_dir).record_push(chosen_version.name, pushed.repo, pushed.commit)
        except SynthError as error:  # it is there all the same
            say(f"warning: the push is not recorded in the folder: {error}")
        say("load it with:\n  from datasets import load_dataset")
        say(f'  dataset = load_dataset("{pushed.repo}", revision="{pushed.tag}")')


def _require_small_formats(formats: Sequence[str]) -> None:
    """Raise BadParameter for a format of which a repository of the Hub cannot hold all files."""
    from pipeline.formats.formats import OF_FEW_FILES

    if unknown := [name for name in formats if name not in OF_FEW_FILES]:
        where = " is a config of every version" if unknown[0] == "messages" else f" is none of {', '.join(OF_FEW_FILES)}"
        raise BadParameter(f"{unknown[0]}{where}", param_hint="--also")


def _require_card_values(license_: str | None, license_link: str | None, language: str | None) -> None:
    """Raise BadParameter for what cannot stand in a card."""
    from pipeline.config.sections import LANGUAGE, LICENSE, PATTERNS

    if license_link is not None and not re.fullmatch(r"https?://[^\s\"'<>]{1,500}", license_link):
        raise BadParameter(f"{license_link!r} is not an address such as https://example.org/terms", param_hint="--license-link")
    for option, value, pattern in (("--license", license_, LICENSE), ("--language", language, LANGUAGE)):
        if value is not None and not re.fullmatch(pattern, value):
            raise BadParameter(f"{value!r} is not {PATTERNS[pattern]}", param_hint=option)


@contextmanager
def _packed(version: "Version", repo: str, formats: Sequence[str], choices: dict[str, Any]) -> Iterator["Package"]:
    """Yield what to push of a version, with its exports in other formats; say what it is, and what becomes of its pixels."""
    from pipeline.dataset.card import card_licenses
    from pipeline.formats.export import export_version
    from pipeline.hub.package import build_package
    from pipeline.types import non_redistributable

    restricted = non_redistributable(version.manifest["licenses"])
    with ExitStack() as stack:
        exports = {}
        if formats:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            progress = stack.enter_context(show_progress())
            exports = {name: export_version(version, name, folder / name, progress=progress).folder for name in formats}
        package = stack.enter_context(build_package(version, repo, exports=exports, **choices))
        rows = ", ".join(f"{count:,} {split}" for split, count in package.manifest["rows"].items() if count)
        say(f"dataset: {version.dataset_dir}")
        say(f"version: {version.name}, {rows}")
        say(f"license of the images: {', '.join(card_licenses(package.manifest))}")
        if package.manifest.get("acknowledged"):
            say(f"note: pixels under {', '.join(restricted)} are pushed; the card states that you acknowledged their terms")
        elif restricted and choices["images"] is None:
            say(f"note: pixels under {', '.join(restricted)} may not be passed on; ids and texts are pushed without them")
        yield package


def push_captioner(folder: Path, repo: str, space: str | None, *, private: bool | None, dry_run: bool, as_json: bool) -> None:
    """Push a captioner and, if it is named, a Space for it, which loads the very commit that was pushed."""
    from trainer.publish.captioner_package import package_captioner, package_space

    package = package_captioner(folder, repo)
    pushed = send(package, repo, private=private, dry_run=dry_run, as_json=as_json)
    if space:
        page = package_space(package, folder, repo, pushed.commit if pushed else package.name)
        send(page, space, private=private, dry_run=dry_run)


def send(
    package: "Package", repo: str, *, private: bool | None, dry_run: bool, as_json: bool | None = None
) -> "PushResult | None":
    """Print what is sent where, push it, and print where it is; with `dry_run` nothing is sent.

    The result goes to stdout; to stderr if `as_json` is None, beside the result of something else.
    """
    from pipeline.hub.push import push_package

    sizes, is_unknown = package.bytes(), package.has_unknown_license
    option = "--license" if package.kind == "dataset" else "--public"
    reason = (
        f", as the license of the images is not known, or not to the Hub ({option})" if private is None and is_unknown else ""
    )
    private = is_unknown if private is None else private
    say(f"files: {len(sizes)}, {sum(sizes.values()):,} bytes")
    say(f"repository: {repo}, {'private' if private else 'public'}{reason}")
    if dry_run:
        say("nothing is sent: this is a dry run")
        if as_json is not None:
            show({"files": sizes, "repo": repo, "version": package.name}, as_json, "repo")
        return None
    with show_progress() as progress:
        pushed = push_package(package, repo, private=private, progress=progress)
    if pushed.is_private and not private:
        say("note: the existing repository is private, and stays private", WARNING)
    if pushed.warning:
        say(f"warning: {pushed.warning}", WARNING)
    say(f"pushed {pushed.tag} as {pushed.commit}" if pushed.is_new else f"nothing to do: {pushed.tag} is there already")
    if as_json is None:
        say(f"the page: {pushed.url}")
    else:
        show({"url": pushed.url, "repo": pushed.repo, "tag": pushed.tag, "commit": pushed.commit}, as_json, "url")
    return pushed
