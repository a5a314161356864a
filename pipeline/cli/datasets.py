"""Commands for existing datasets: check, export, report, review."""

import json
import sys
import webbrowser
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from typer import Argument, BadParameter, Context, Exit, Option

from pipeline.cli.options import (
    LAST_MADE,
    AnyDataset,
    AsJson,
    Dataset,
    Images,
    Split,
    dataset_path,
    open_data,
    option,
    path_option,
)
from pipeline.cli.output import echo, print_run_result, say, show
from pipeline.progress import WARNING, show_progress

if TYPE_CHECKING:
    from pipeline.check import Checked

REVIEWS = Argument(
    metavar="[DATASET] FILE...",
    help=f"Files with reviews of the dataset (default: {LAST_MADE}). Later files take precedence.",
)
Format = Literal[
    "parquet", "imagefolder", "sidecar", "webdataset", "llava", "sharegpt", "messages", "paligemma",
    "vlmevalkit", "coco", "csv", "cauldron", "dpo",
]  # fmt: skip
FORMAT = Option("--format", metavar="FORMAT", help=f"Format: {', '.join(get_args(Format))}.")


def check(
    data: AnyDataset = None,
    repair: Annotated[bool, Option("--repair", help="Remove damaged replies from journals.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the replies, step files and versions of a dataset for damage.

    Exits with 1 if anything is damaged.
    """
    from pipeline.dataset.directory import no_dataset

    results = []
    for result in _check_all(data, repair=repair):
        results.append(result)
        if not as_json:
            echo(f"{'ok ' if result.is_ok else 'BAD'} {result.path}: {result.state}")
            if result.hint:
                echo(f"      {result.hint}")
    if not results:
        raise no_dataset(dataset_path(data))
    if as_json:
        echo(json.dumps([asdict(result) for result in results]))
    if not all(result.is_ok for result in results):
        raise Exit(1)


def _check_all(data: str | None, *, repair: bool) -> Iterator["Checked"]:
    from pipeline.check import check_dataset, check_version
    from pipeline.dataset.directory import DatasetDir, open_dataset, split_version
    from pipeline.dataset.version import MANIFEST
    from pipeline.hub.pull import is_hub_name, pull_version
    from pipeline.storage.files import translate_disk_errors

    if data and is_hub_name(data):
        yield check_version(pull_version(data))
        return
    folder = dataset_path(data)
    with translate_disk_errors(folder):
        if split_version(folder)[1] or (folder / MANIFEST).exists():
            yield check_version(open_dataset(folder))
        else:
            yield from check_dataset(DatasetDir(folder), repair=repair)


def export(
    data: AnyDataset = None,
    kind: Annotated[Format, FORMAT] = "imagefolder",
    out: Annotated[Path | None, path_option("Folder to create.", "DATASET/exports/VERSION-FORMAT")] = None,
    style: Annotated[
        str | None, option("Caption style, or all.", "all, or one if the format has one caption")
    ] = None,
    trigger: Annotated[str, Option(help="Word that begins each caption, for a LoRA.")] = "",
    opening: Annotated[
        str, Option("--remove-opening", help="Words to remove from the beginning of captions.")
    ] = "",
    absolute: Annotated[bool, Option("--absolute", help="Write absolute paths of images.")] = False,
    names: Annotated[Literal["id", "source"], option("Name files by id, or as in the source.")] = "id",
    split: Annotated[Split | None, option("Split.", "all")] = None,
    images: Images = None,
    as_json: AsJson = False,
) -> None:
    """Convert a version to another format."""
    from pipeline.formats.export import export_version
    from pipeline.storage.files import translate_disk_errors
    from pipeline.tables import SPLITS

    version = open_data(data, images)
    folder = out or version.dataset_dir / "exports" / f"{version.name}-{kind}"
    with show_progress() as progress, translate_disk_errors(folder):
        splits = (split,) if split else SPLITS
        choices: dict[str, Any] = {"style": style, "splits": splits, "source_names": names == "source"}
        choices |= {"absolute": absolute, "trigger": trigger, "opening": opening}
        done = export_version(version, kind, folder, **choices, progress=progress)
    without_text = f"; skipped {done.without_text:,} images without a text" if done.without_text else ""
    wrote = f"wrote {done.images:,} images{without_text}"
    say(wrote if done.is_new else f"nothing to do: {folder} already has this export")
    if opening and not done.has_opening:
        say(f"note: no caption begins with {opening.strip()!r}", WARNING)
    values = {"path": str(done.folder), "images": done.images, "without_text": done.without_text}
    show(values, as_json, "path")


def report(
    data: Dataset = None,
    rejected: Annotated[Path | None, path_option("CSV file for all rejections of the last run.")] = None,
) -> None:
    """Write an HTML report on a dataset: one file that opens without a server.

    The page shows at most 10,000 images, drawn at random. You can mark texts as good, bad or edited.
    `synth review apply` applies these reviews.
    """
    from pipeline.hub.pull import open_or_download
    from pipeline.report.build import write_report
    from pipeline.report.rows import write_rejected
    from pipeline.storage.files import translate_disk_errors

    version = open_or_download(dataset_path(data))
    folder = version.dataset_dir
    if rejected is not None:
        with translate_disk_errors(rejected):
            write_rejected(folder, rejected)
        say(f"wrote {rejected}")
    with translate_disk_errors(folder):
        echo(write_report(version, folder))


def review_sample(
    data: Dataset = None,
    texts: Annotated[int, Option("-n", "--texts", help="Number of texts.", min=1)] = 200,
    seed: Annotated[int, option("Seed of the random choice. A new seed begins a new audit.", min=0)] = 0,
    tool: Annotated[
        Literal["page", "label-studio", "argilla"], option("Output: a web page, or tasks for a tool.")
    ] = "page",
) -> Path:
    """Draw texts of a version for reviewers to judge as right or wrong, a third from those that checks doubt.

    Some texts are shown twice, to measure the errors of reviewers. `synth review apply` reads the exported
    verdicts, and the next version states the share of wrong texts.
    """
    from pipeline.dataset.directory import DatasetDir, open_dataset
    from pipeline.report.audit_sample import write_audit
    from pipeline.storage.files import translate_disk_errors

    version = open_dataset(dataset_path(data), previews=False)
    dataset = DatasetDir(version.dataset_dir)
    with translate_disk_errors(dataset.path):
        path, drawn = write_audit(version, dataset, texts, seed, tool)
    fewer = "" if drawn == texts else ", which are all"
    where = "on this page" if tool == "page" else f"with these tasks for {tool}"
    say(f"drew {drawn} texts of {version.name}{fewer}; judge them {where}, then apply its exported file:")
    echo(path)
    return path


def review_open(context: Context) -> None:
    """Open 200 texts of the newest dataset in a browser, to judge them. Subcommands have more options."""
    if context.invoked_subcommand is None:
        page = review_sample()
        if sys.stderr.isatty():
            webbrowser.open(page.resolve().as_uri())


def review_apply(names: Annotated[list[str], REVIEWS], as_json: AsJson = False) -> None:
    """Make the next version without texts reviewed as bad, and with the edited texts.

    Verdicts of an audit only change the error rates in the next version. Later runs apply all reviews again.
    """
    from pipeline.dataset.directory import DatasetDir, split_version

    has_dataset = len(names) > 1 and not (names[0].endswith(".jsonl") or Path(names[0]).is_file())
    folder, version = split_version(dataset_path(names.pop(0) if has_dataset else None))
    if version:
        raise BadParameter(f"reviews apply to a dataset, not a version: pass {folder}", param_hint="DATASET")
    from pipeline.executors.messages import describe_losses
    from pipeline.reviewing import apply_reviews
    from pipeline.run import STEPS

    dataset = DatasetDir(folder)
    with show_progress() as progress:
        result = apply_reviews(dataset, list(map(Path, names)), progress)
    losses = list(describe_losses(STEPS, result.funnel))
    print_run_result(result, losses, shown=progress.warnings, as_json=as_json)
