"""Commands for existing datasets: check, diff, export, report, review."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, BadParameter, Exit, Option

from pipeline.cli.options import (
    DATASET_PATH,
    LAST_MADE,
    Append,
    AsJson,
    DataDir,
    DataName,
    Images,
    Overwrite,
    SkipExisting,
    open_data,
    option,
    path_option,
    read_existing,
    require_split,
)
from pipeline.cli.output import echo, last_dataset, note_training_data, print_run_result, say, show
from pipeline.errors import did_you_mean
from pipeline.progress import show_progress
from pipeline.storage.object_store import is_remote, parse_dataset_path

if TYPE_CHECKING:
    from pipeline.check import Checked
    from pipeline.dataset.version import Version

CHECKPOINT_FILES = ("train.json", "model.safetensors", "resume.pt")
CHECKED = Argument(
    metavar="[DIR|ORG/NAME@V]",
    help="Dataset folder or version, local or on the Hub, or a captioner.",
    show_default=LAST_MADE,
)
FORMAT = Option(
    "--format",
    metavar="FORMAT",
    help="Format: parquet, imagefolder, sidecar, webdataset, llava, sharegpt, coco, csv, cauldron, dpo or "
    "lance; for a captioner: onnx.",
    show_default="imagefolder",
)


def check(
    data: Annotated[str | None, CHECKED] = None,
    repair: Annotated[
        bool, Option("--repair", help="Rebuild a damaged journal from its intact replies.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check the replies, step files, versions and captioners of a dataset for damage.

    Exits with 1 if anything is damaged.
    """
    from pipeline.errors import StoreError

    results = []
    for result in _check_all(data, repair=repair):
        results.append(result)
        if not as_json:
            echo(f"{'ok ' if result.is_ok else 'BAD'} {result.path}: {result.state}")
            if result.hint:
                echo(f"      {result.hint}")
    if not results:
        raise StoreError(
            f"no dataset at {data}", hint="pass a dataset folder: `synth versions list` shows the last one"
        )
    if as_json:
        echo(json.dumps([asdict(result) for result in results]))
    if not all(result.is_ok for result in results):
        raise Exit(1)


def _check_all(data: str | None, *, repair: bool) -> Iterator["Checked"]:
    from pipeline.check import check_dataset, check_version, check_version_folder
    from pipeline.dataset.directory import DatasetDir, open_dataset, split_version
    from pipeline.dataset.version import MANIFEST
    from pipeline.hub.pull import is_hub_name, pull_version
    from pipeline.storage.files import translate_disk_errors

    if data and is_hub_name(data):
        yield check_version(pull_version(data))
        return
    folder = parse_dataset_path(data) if data else last_dataset()
    with translate_disk_errors(folder):
        has_run = DatasetDir(folder).run_file.exists()
        if split_version(folder)[1]:
            yield check_version(open_dataset(folder))
        elif not has_run and any((folder / name).exists() for name in CHECKPOINT_FILES):
            yield _check_checkpoint(folder)
        elif (folder / MANIFEST).exists():
            yield check_version_folder(folder)
        else:
            yield from check_dataset(DatasetDir(folder), repair=repair)
            for settings in sorted(folder.glob("checkpoints/*/train.json"), key=str):
                yield _check_checkpoint(settings.parent)


def _check_checkpoint(folder: Path) -> "Checked":
    from pipeline.check import Checked
    from pipeline.errors import SynthError
    from trainer.runtime.training_state import describe_checkpoint

    try:
        return Checked(str(folder), describe_checkpoint(folder))
    except SynthError as error:
        return Checked(
            str(folder), str(error), False, "train or download it again; resume.pt may still be intact"
        )


def diff(
    names: Annotated[
        list[str],
        Argument(metavar="[DIR] V1 V2", help="Two versions of one dataset, or two ORG/NAME@VERSION."),
    ],
    rows: Annotated[int, option("Number of changed rows to print.", min=0)] = 10,
    as_json: AsJson = False,
) -> None:
    """Show the differences between two versions, field by field."""
    from pipeline.dataset.diff import diff_versions
    from pipeline.dataset.directory import split_version
    from pipeline.hub.pull import is_hub_name, open_or_download, pull_version

    folder = parse_dataset_path(names.pop(0)) if len(names) == 3 else None
    if len(names) != 2:
        raise BadParameter("pass two versions: [DIR] V1 V2", param_hint="V1 V2")

    def open_version(name: str) -> "Version":
        if is_hub_name(name):
            return pull_version(name)
        if (
            is_remote(parse_dataset_path(name))
            or Path(name).is_dir()
            or split_version(Path(name))[0].is_dir()
        ):
            return open_or_download(parse_dataset_path(name))
        return open_or_download(folder or last_dataset(), name)

    before, after = map(open_version, names)
    difference = diff_versions(before, after, None if as_json else rows)
    if not as_json:
        for line in difference.lines(rows):
            echo(line)
        return
    described = {name: getattr(difference, name) for name in ("before", "after", "same", "settings")}
    changes = [asdict(change) for change in difference.changes]
    echo(json.dumps(described | {"changes": changes, "counts": difference.counts()}))


def export(
    captioner: Annotated[
        str | None,
        Argument(help="Captioner, for --format onnx: a folder, or ORG/NAME on the Hub.", show_default=False),
    ] = None,
    data: DataName = None,
    kind: Annotated[str | None, FORMAT] = None,
    out: Annotated[Path | None, path_option("Folder to create.", "DATASET/exports/VERSION-FORMAT")] = None,
    in_place: Annotated[Path | None, path_option("Image folder to write text files into.")] = None,
    style: Annotated[str | None, option("Caption style.", "all, or the first of plain, brief, ...")] = None,
    names: Annotated[Literal["id", "source"], option("Name files by id, or as in the source.")] = "id",
    split: Annotated[str | None, option("Split: train, validation or test.", "all")] = None,
    images: Images = None,
    overwrite: Overwrite = False,
    append: Append = False,
    skip_existing: SkipExisting = False,
    int8: Annotated[bool, Option("--int8", help="Also write int8 ONNX: smaller, less accurate.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert a version to another format, or a captioner to ONNX, or write captions next to your images."""
    from pipeline.cli.captioners import export_captioner
    from pipeline.formats.export import export_version, write_beside
    from pipeline.formats.formats import FORMATS, PARQUET
    from pipeline.storage.files import translate_disk_errors
    from pipeline.tables import SPLITS

    if (captioner is not None) != (kind == "onnx") or (int8 and kind != "onnx"):
        raise BadParameter(
            "a captioner, --format onnx and --int8 go together: synth export CAPTIONER --format onnx "
            "(transformers loads the folder of a captioner as it is)"
        )
    if captioner is not None:
        has_names = names != "id"
        if any((data, in_place, style, has_names, split, images, overwrite, append, skip_existing)):
            raise BadParameter("--format onnx accepts only --out, --int8 and --json", param_hint="--format")
        export_captioner(captioner, out, int8=int8, as_json=as_json)
        return
    existing = read_existing(
        "--in-place", in_place is not None, skip=skip_existing, append=append, overwrite=overwrite
    )
    if in_place is not None and (kind not in (None, "sidecar") or out or split or names != "id"):
        excluded = "--format, --out, --split and --names"
        raise BadParameter(f"--in-place excludes {excluded}", param_hint="--in-place")
    if (kind := kind or "imagefolder") not in (PARQUET, *FORMATS):
        known = did_you_mean(kind, FORMATS, f"formats: {', '.join([PARQUET, *FORMATS])}")
        raise BadParameter(f"no format {kind}; {known}", param_hint="--format")
    require_split(split)
    version = open_data(data, images)
    folder = in_place or out or version.dataset_dir / "exports" / f"{version.name}-{kind}"
    with show_progress() as progress, translate_disk_errors(folder):
        if in_place is not None:
            done = write_beside(version, in_place, style=style, existing=existing, progress=progress)
        else:
            splits = (split,) if split else SPLITS
            choices: dict[str, Any] = {"style": style, "splits": splits, "source_names": names == "source"}
            done = export_version(version, kind, folder, **choices, progress=progress)
    without_text = f"; skipped {done.without_text:,} images without a text" if done.without_text else ""
    say(f"wrote {done.images:,} {'text files' if in_place is not None else 'images'}{without_text}")
    show(
        {"path": str(done.folder), "images": done.images, "without_text": done.without_text}, as_json, "path"
    )


def report(
    data: DataDir = None,
    checkpoint: Annotated[Path | None, path_option("Training to show.", "the last of the dataset")] = None,
    rows: Annotated[int, option("Number of images, drawn at random.", min=1)] = 10_000,
    rejected: Annotated[Path | None, path_option("CSV file for all rejections of the last run.")] = None,
) -> None:
    """Write an HTML report on a dataset and its captioner: one file that opens without a server.

    On the page, you can mark texts as good, bad or edited. `synth review apply` applies these reviews.
    """
    from pipeline.hub.pull import open_or_download
    from pipeline.report.build import newest_checkpoint, write_report
    from pipeline.report.rows import write_rejected
    from pipeline.storage.files import translate_disk_errors

    version = open_or_download(data or last_dataset())
    folder = version.dataset_dir
    if checkpoint is not None:
        note_training_data(checkpoint, version)
    if rejected is not None:
        with translate_disk_errors(rejected):
            write_rejected(folder, rejected)
        say(f"wrote {rejected}")
    with translate_disk_errors(folder):
        echo(write_report(version, folder, checkpoint or newest_checkpoint(folder), rows))


def review_sample(
    texts: Annotated[int, Option("-n", "--texts", help="Number of texts.", min=1)] = 200,
    seed: Annotated[int, option("Seed. Another seed begins another audit.", min=0)] = 0,
    data: Annotated[Path | None, option("Dataset folder.", LAST_MADE, **DATASET_PATH)] = None,
) -> None:
    """Draw texts of the newest version at random, and write a page to judge them as right or wrong.

    `synth review apply` reads the exported verdicts, and the next version states the share of wrong texts.
    """
    from pipeline.dataset.directory import DatasetDir
    from pipeline.report.audit_page import write_audit_page
    from pipeline.storage.files import translate_disk_errors

    dataset = DatasetDir(data or last_dataset())
    version = dataset.version(previews=False)
    with translate_disk_errors(dataset.path):
        page, drawn = write_audit_page(version, dataset, texts, seed)
    fewer = "" if drawn == texts else " (at most one of each image)"
    say(
        f"drew {drawn} texts of {version.name}{fewer}; judge them on this page, then apply the exported file:"
    )
    echo(page)


def review_apply(
    reviews: Annotated[
        list[Path], Argument(help="Files that a report or an audit exported; later ones win.")
    ],
    data: Annotated[Path | None, option("Dataset folder of the report.", LAST_MADE, **DATASET_PATH)] = None,
    as_json: AsJson = False,
) -> None:
    """Make the next version without texts reviewed as bad, and with the edited texts.

    Verdicts of an audit change no text: the next version states the error rates. Later runs apply all again.
    """
    from pipeline.dataset.audit import audit_in_words
    from pipeline.dataset.directory import DatasetDir
    from pipeline.executors.messages import describe_losses
    from pipeline.reviewing import apply_reviews
    from pipeline.run import STEPS

    with show_progress() as progress:
        result = apply_reviews(DatasetDir(data or last_dataset()), reviews, progress)
    print_run_result(
        result, list(describe_losses(STEPS, result.funnel)), shown=progress.warnings, as_json=as_json
    )
    if audit := result.version.manifest.get("audit"):
        say(f"wrong texts: {audit_in_words(audit)}")
