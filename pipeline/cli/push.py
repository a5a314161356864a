"""The command `push`: send a version or a captioner to the Hub."""

import re
from typing import TYPE_CHECKING, Annotated, Any

from typer import BadParameter, Option

from pipeline.cli.options import ONLY_MADE, AsJson, dataset_argument, dataset_path, option
from pipeline.cli.output import note_previews, say, show
from pipeline.errors import SynthError
from pipeline.progress import WARNING, show_progress, size
from pipeline.storage.object_store import is_remote

if TYPE_CHECKING:
    from pipeline.dataset.version import Version
    from pipeline.hub.package import Package
    from pipeline.hub.push import PushResult

PRIVATE = Option(
    "--private/--public",
    help="Visibility of the repository.",
    show_default="private if the license of the images is unknown, else public",
)
WITH_IMAGES = Option(
    "--with-images/--no-images",
    help="Push images, or only ids and texts.",
    show_default="as the license of the images allows",
)


def push(
    name: Annotated[str | None, dataset_argument("DIR, DIR@VERSION, a captioner", ONLY_MADE)] = None,
    repo: Annotated[str, option("Repository to push to.", metavar="ORG/NAME")] = ...,  # type: ignore[assignment]
    private: Annotated[bool | None, PRIVATE] = None,
    images: Annotated[bool | None, WITH_IMAGES] = None,
    acknowledge: Annotated[
        list[str] | None,
        option("Restrictive license of the images, if you may redistribute them.", metavar="LICENSE"),
    ] = None,
    license_: Annotated[
        str | None,
        Option(
            "--license", help="License of the images (e.g. cc-by-4.0), if the dataset does not state one."
        ),
    ] = None,
    license_link: Annotated[str | None, option("URL of the license, if the Hub does not list it.")] = None,
    title: Annotated[str | None, option("Title of the card.", "named after the source")] = None,
    language: Annotated[
        str | None, option("Language of the texts: en, de, ...", "the language of the run")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="List the files, but send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Push a version or a captioner to the Hugging Face Hub as one commit with a permanent tag."""
    data = dataset_path(name, is_only=True)

    from pipeline.dataset.directory import DatasetDir, split_version
    from pipeline.dataset.manifest import describe_data
    from pipeline.hub.package import build_checkpoint_package, build_package
    from pipeline.hub.pull import open_or_download
    from pipeline.hub.push import check_repo_name
    from pipeline.storage.files import translate_disk_errors

    check_repo_name(repo)
    if not is_remote(data) and (data / "train.json").exists():
        if images is not None or any((license_, license_link, title, language, acknowledge)):
            raise BadParameter(f"{data} is a captioner; only --private, --public, --dry-run and --json apply")
        say(f"captioner: {data}")
        from trainer.config import DECODERS, ENCODERS
        from trainer.model.transformers_files import transformers_files

        if (data / "model.safetensors").is_file():
            from trainer.model.checkpoint import load_checkpoint  # imports torch

            # This call raises TrainError if the captioner is damaged.
            load_checkpoint(data)
        package = build_checkpoint_package(data, repo, transformers_files, {**ENCODERS, **DECODERS})
        send(package, repo, private=private, dry_run=dry_run, as_json=as_json)
        return
    _require_card_values(license_, license_link, language)
    chosen_version = open_or_download(data, previews=False)
    note_previews(chosen_version, data)
    stated = describe_data(license_, title, language, license_link)
    choices: dict[str, Any] = {"images": images, "acknowledged": acknowledge or (), "stated": stated}
    with build_package(chosen_version, repo, **choices) as package:
        _print_licenses(package, chosen_version, images)
        pushed = send(package, repo, private=private, dry_run=dry_run, as_json=as_json)
    if not pushed:
        return
    is_dataset_in_store = is_remote(data) and data.parent.name != "versions"
    folder = split_version(data)[0] if is_dataset_in_store else chosen_version.dataset_dir
    try:
        with translate_disk_errors(folder):
            DatasetDir(folder).record_push(chosen_version.name, pushed.repo, pushed.commit)
    except SynthError as error:
        say(f"warning: the push succeeded, but could not be recorded in the dataset folder: {error}")
    say("load it with:\n  from datasets import load_dataset")
    say(f'  dataset = load_dataset("{pushed.repo}", revision="{pushed.tag}")')


def _require_card_values(license_: str | None, license_link: str | None, language: str | None) -> None:
    """Raise BadParameter for a value that is invalid in a card."""
    from pipeline.config.sections import LANGUAGE, LICENSE, PATTERNS

    link = r"https?://[^\s\"'<>]{1,500}"
    wanted = PATTERNS | {link: "an address such as https://example.org/terms"}
    values = ((license_link, link), (license_, LICENSE), (language, LANGUAGE))
    for name, (value, pattern) in zip(("--license-link", "--license", "--language"), values, strict=True):
        if value is not None and not re.fullmatch(pattern, value):
            raise BadParameter(f"{value!r} is not {wanted[pattern]}", param_hint=name)


def _print_licenses(package: "Package", version: "Version", with_images: bool | None) -> None:
    from pipeline.dataset.card import card_licenses
    from pipeline.types import non_redistributable

    restricted = ", ".join(non_redistributable(version.manifest["licenses"]))
    rows = ", ".join(f"{count:,} {split}" for split, count in package.manifest["rows"].items() if count)
    say(f"version: {version.name}, {rows}")
    say(f"license of the images: {', '.join(card_licenses(package.manifest))}")
    if package.manifest.get("acknowledged"):
        say(f"note: images under {restricted} are pushed; the card says that you acknowledged the terms")
    elif restricted and with_images is None:
        say(f"note: images under {restricted} may not be redistributed; only ids and texts are pushed")


def send(
    package: "Package", repo: str, *, private: bool | None, dry_run: bool, as_json: bool
) -> "PushResult | None":
    """Push a package, and print its files and its URL. With `dry_run`, send nothing."""
    from pipeline.hub.push import push_package
    from pipeline.inference.model_licenses import NO_COMMERCIAL_USE

    sizes, is_unknown = package.file_sizes(), package.has_unknown_license
    reason = ""
    if private is None and is_unknown:
        remedy = "state it: --license" if package.kind == "dataset" else "to override: --public"
        reason = f": the license of the images is unknown, or the Hub does not list it ({remedy})"
    private = is_unknown if private is None else private
    say(f"files: {len(sizes)}, {size(sum(sizes.values()))}")
    say(f"repository: {repo}, {'private' if private else 'public'}{reason}")
    models = package.manifest.get("models") or {"": package.manifest.get("model", {})}
    restricted = [model for model in models.values() if NO_COMMERCIAL_USE in model.get("license", "")]
    for model in [] if private else restricted:
        say(f"warning: {model['name']} ({model['license']}) wrote the texts; the card states this", WARNING)
    if dry_run:
        say("dry run: nothing was sent")
        show({"files": sizes, "repo": repo, "version": package.name}, as_json, "repo")
        return None
    with show_progress() as progress:
        pushed = push_package(package, repo, private=private, progress=progress)
    if pushed.is_private and not private:
        say("note: the existing repository is private, and stays private", WARNING)
    if pushed.warning:
        say(f"warning: {pushed.warning}", WARNING)
    done = f"pushed {pushed.tag} as {pushed.commit}"
    say(done if pushed.is_new else f"nothing to do: {pushed.tag} already exists")
    result = {"url": pushed.url, "repo": pushed.repo, "tag": pushed.tag, "commit": pushed.commit}
    show(result, as_json, "url")
    return pushed
