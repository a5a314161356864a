"""Commands about finished datasets: check, diff, export, report, review."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from typer import Argument, BadParameter, Exit, Option

from pipeline.cli.options import DATASET_PATH, LAST_MADE, LOCAL_PATH, AsJson, DataDir, DataName, Images, open_data
from pipeline.cli.output import echo, last_dataset, note_other_data, print_run_result, say, show
from pipeline.progress import show_progress
from pipeline.storage.object_store import is_remote, parse_dataset_path

if TYPE_CHECKING:
    from pipeline.check import Checked
    from pipeline.dataset.version import Version
    from pipeline.storage.sidecars import Existing


def check(
    data: Annotated[
        str | None,
        Argument(
            metavar="[DIR|ORG/NAME@V]",
            help="A dataset folder or version, here or on the Hub; or a captioner.",
            show_default=LAST_MADE,
        ),
    ] = None,
    repair: Annotated[
        bool, Option("--repair", help="Replace a damaged journal by one of the replies that are intact; change nothing else.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Verify every reply, step file, version and captioner of a dataset; report damage and how to repair it.

    Exits with 1 if anything is damaged.
    """
    from pipeline.check import check_dataset, check_version, check_version_folder
    from pipeline.dataset.directory import DatasetDir, open_dataset, split_version
    from pipeline.dataset.version import MANIFEST
    from pipeline.errors import StoreError
    from pipeline.hub.pull import is_hub_name, pull_version
    from pipeline.storage.files import translate_disk_errors

    def results() -> "Iterator[Checked]":
        if data and is_hub_name(data):
            yield check_version(pull_version(data))
            return
        folder = parse_dataset_path(data) if data else last_dataset()
        with translate_disk_errors(folder):
            if split_version(folder)[1]:
                yield check_version(open_dataset(folder))
            elif not DatasetDir(folder).run_file.exists() and any(
                (folder / name).exists() for name in ("train.json", "model.safetensors", "resume.pt")
            ):
                yield _check_checkpoint(folder)
            elif (folder / MANIFEST).exists():
                yield check_version_folder(folder)
            else:
                yield from check_dataset(DatasetDir(folder), repair=repair)
                for trained in sorted(folder.glob("checkpoints/*/train.json"), key=str):
                    yield _check_checkpoint(trained.parent)

    checked = []
    for result in results():
        checked.append(result)
        if not as_json:
            echo(f"{'ok ' if result.is_ok else 'BAD'} {result.path}: {result.state}")
            if result.hint:
                echo(f"      {result.hint}")
    if not checked:
        raise StoreError(f"no dataset at {data}", hint="name a dataset folder: `synth versions list` shows the last one")
    if as_json:
        echo(json.dumps([asdict(result) for result in checked]))
    if not all(result.is_ok for result in checked):
        raise Exit(1)


def diff(
    names: Annotated[list[str], Argument(metavar="[DIR] V1 V2", help="Versions here, or ORG/NAME@VERSION on the Hub.")],
    rows: Annotated[int, Option(min=0, help="Show at most this many of the rows that differ.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show the differences between two versions, field by field."""
    from pipeline.dataset.diff import diff_versions
    from pipeline.dataset.directory import split_version
    from pipeline.hub.pull import is_hub_name, open_or_download, pull_version

    folder = parse_dataset_path(names.pop(0)) if len(names) == 3 else None
    if len(names) != 2:
        raise BadParameter("name two versions: [DIR] V1 V2", param_hint="V1 V2")

    def opened(name: str) -> "Version":
        if is_hub_name(name):
            return pull_version(name)
        if is_remote(parse_dataset_path(name)) or Path(name).is_dir() or split_version(Path(name))[0].is_dir():
            return open_or_download(parse_dataset_path(name))
        return open_or_download(folder or last_dataset(), name)

    before, after = map(opened, names)
    difference = diff_versions(before, after, None if as_json else rows)
    if as_json:
        described = {name: getattr(difference, name) for name in ("before", "after", "same", "settings")}
        counts = {"counts": difference.counts()}
        echo(json.dumps(described | {"changes": [asdict(change) for change in difference.changes]} | counts))
        return
    for line in difference.lines(rows):
        echo(line)


def export(
    captioner: Annotated[
        str | None, Argument(help="With --format onnx: a captioner folder, or ORG/NAME of the Hub.", show_default=False)
    ] = None,
    data: DataName = None,
    kind: Annotated[
        str | None,
        Option(
            "--format",
            metavar="FORMAT",
            help="parquet, imagefolder, sidecar, webdataset, llava, sharegpt, coco, csv, cauldron, dpo or lance; "
            "of a captioner: onnx.",
            show_default="imagefolder",
        ),
    ] = None,
    out: Annotated[
        Path | None, Option(**LOCAL_PATH, help="A new folder.", show_default="DATASET/exports/VERSION-FORMAT")
    ] = None,
    in_place: Annotated[
        Path | None,
        Option(**LOCAL_PATH, help="Write one text file next to each image of this folder, from which the dataset was made."),
    ] = None,
    style: Annotated[
        str | None, Option(help="Captions of this style alone.", show_default="all, or where one has room: plain, brief, ...")
    ] = None,
    split: Annotated[str | None, Option(help="train, validation or test.", show_default="all")] = None,
    images: Images = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace existing text files.")] = False,
    append: Annotated[bool, Option("--append", help="Add a line to existing text files.")] = False,
    skip_existing: Annotated[bool, Option("--skip-existing", help="Keep existing text files.")] = False,
    int8: Annotated[bool, Option("--int8", help="Also ONNX with weights of 8 bits: smaller, and less exact.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a version as files for other tools, its captions beside your own images, or a captioner as ONNX."""
    from pipeline.cli.captioners import export_captioner
    from pipeline.formats.export import export_version, write_beside
    from pipeline.formats.formats import FORMATS, PARQUET
    from pipeline.storage.files import translate_disk_errors
    from pipeline.tables import SPLITS

    chosen = [name for name, is_set in (("overwrite", overwrite), ("append", append), ("skip", skip_existing)) if is_set]
    if (captioner is not None) != (kind == "onnx") or (int8 and kind != "onnx"):
        raise BadParameter("a captioner, --format onnx and --int8 go together: synth export CAPTIONER --format onnx")
    if captioner is not None:
        if data or in_place or style or split or images or chosen:
            raise BadParameter("of a captioner, --out, --int8 and --json alone have a meaning", param_hint="--format")
        export_captioner(captioner, out, int8=int8, as_json=as_json)
        return
    if len(chosen) > 1 or (chosen and in_place is None):
        raise BadParameter("one of --overwrite, --append and --skip-existing goes with --in-place", param_hint="--in-place")
    if in_place is not None and (kind not in (None, "sidecar") or out or split):
        raise BadParameter("text files beside images have no --format, --out and --split", param_hint="--in-place")
    if (kind := kind or "imagefolder") not in (PARQUET, *FORMATS):
        raise BadParameter(f"{kind} is none of {', '.join([PARQUET, *FORMATS])}", param_hint="--format")
    if split and split not in SPLITS:
        raise BadParameter(f"{split} is none of {', '.join(SPLITS)}", param_hint="--split")
    version = open_data(data, images)
    folder = in_place or out or version.dataset_dir / "exports" / f"{version.name}-{kind}"
    with show_progress() as progress, translate_disk_errors(folder):
        if in_place is not None:
            existing = cast("Existing", chosen[0] if chosen else "refuse")
            done = write_beside(version, in_place, style=style, existing=existing, progress=progress)
        else:
            done = export_version(version, kind, folder, style=style, splits=(split,) if split else SPLITS, progress=progress)
    what = "files of texts" if in_place is not None else "images"
    say(f"wrote {done.images:,} {what}{f'; {done.without_text:,} images had no text for it' if done.without_text else ''}")
    show({"path": str(done.folder), "images": done.images, "without_text": done.without_text}, as_json, "path")


def report(
    data: DataDir = None,
    checkpoint: Annotated[
        Path | None, Option(**LOCAL_PATH, help="Show this training.", show_default="the last one of the dataset")
    ] = None,
    rows: Annotated[int, Option(min=1, help="Show at most this many images, drawn at random.")] = 10_000,
) -> None:
    """Write a page that shows a dataset and how a captioner learned from it; above 500 images, a folder.

    Texts can be reviewed there as good, bad or edited; `synth review apply` applies the reviews.
    """
    from pipeline.hub.pull import open_or_download
    from pipeline.report.build import newest_checkpoint, write_report
    from pipeline.storage.files import translate_disk_errors

    version = open_or_download(data or last_dataset())
    folder = version.dataset_dir
    if checkpoint is not None:
        note_other_data(checkpoint, version)
    with translate_disk_errors(folder):
        echo(write_report(version, folder, checkpoint or newest_checkpoint(folder), rows))


def review_apply(
    reviews: Annotated[list[Path], Argument(help="Files of reviews that a report exported; later ones win.")],
    data: Annotated[
        Path | None,
        Option(
            **DATASET_PATH, help="Dataset folder that the report was made of.", show_default="the only one that was made here"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Apply reviews: remove bad texts, insert edited texts, and make the next version. Later runs keep the reviews."""
    from pipeline.dataset.directory import DatasetDir, only_made
    from pipeline.executors.messages import describe_losses
    from pipeline.reviewing import apply_reviews
    from pipeline.run import STEPS

    with show_progress() as progress:
        result = apply_reviews(DatasetDir(data or only_made()), reviews, progress)
    print_run_result(result, list(describe_losses(STEPS, result.funnel)), shown=progress.warnings, as_json=as_json)


def _check_checkpoint(folder: Path) -> "Checked":
    """Return the state of a checkpoint folder."""
    from pipeline.check import Checked
    from pipeline.errors import SynthError
    from trainer.runtime.training_state import describe_checkpoint

    try:
        return Checked(str(folder), describe_checkpoint(folder))
    except SynthError as error:
        return Checked(str(folder), str(error), False, "train again, or fetch it again; resume.pt may still be good")
