"""Print the output of commands: data to stdout, messages to stderr."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pipeline.errors import SynthError
from pipeline.progress import LOSS, WARNING, duration
from pipeline.text.escape import printable

if TYPE_CHECKING:
    from pipeline.config.sections import ServerConfig
    from pipeline.dataset.version import Version
    from pipeline.preview import Preview
    from pipeline.run import RunResult


def last_dataset() -> Path:
    """Return the dataset folder that was made last, and print its path. Raises StoreError if there is none."""
    from pipeline.dataset.directory import last_made

    folder = last_made()
    say(f"dataset: {folder}", "dim")
    return folder


def find_checkpoint(captioner: str) -> Path:
    """Return the folder of a captioner, local or of the Hub; print a note if its training was interrupted."""
    from trainer.runtime.checkpoint_folder import find_captioner

    folder = find_captioner(captioner)
    if (folder / "resume.pt").exists():  # the best state so far is used
        say(f"note: the training of {folder} has not ended; `synth train --resume` goes on with it", WARNING)
    return folder


def note_other_data(captioner: Path, version: "Version") -> None:
    """Print a note if a captioner was trained on other data than a version."""
    from trainer.runtime.checkpoint_folder import read_data_digest

    if read_data_digest(captioner) not in (None, version.manifest["digest"]):
        say(f"note: {captioner} was trained on other data than {version.path}", WARNING)


def note_seen(captioner: Path, version: "Version", split: str) -> None:
    """Print a note if a captioner was trained on the images of a split, or may have been."""
    from trainer.runtime.checkpoint_folder import read_data_digest

    trained_on = read_data_digest(captioner)
    if trained_on != version.manifest["digest"]:
        say(f"note: {captioner} was trained on other data than {version.path}; the split may hold images it has seen")
    elif split == "train":
        say(f"note: {captioner} has learned from these images: the scores measure how well it remembers them")


def note_previews(version: "Version", path: Path | None = None) -> None:
    """Print a note if a version is a preview, or a newer preview was passed over and `path` does not name the version."""
    from pipeline.dataset.directory import DatasetDir, split_version

    if version.is_preview:
        say(f"note: {version.name} is a preview: its run stopped at --limit, and the source has more images", WARNING)
        return
    if path is not None and (split_version(path)[1] or path.name == version.name):
        return
    try:
        later = [other for other in DatasetDir(version.dataset_dir).versions() if other > version and other.is_preview]
    except SynthError:  # one of the others is damaged, and nobody has asked for it
        return
    if later:
        named = f"{version.dataset_dir}@{later[-1].name}"
        say(f"note: {later[-1].name} is newer, and a preview; {version.name} is taken (name the other: {named})", WARNING)


def print_prediction(prediction: dict[str, Any]) -> None:
    """Print the predicted cost and yield of a whole run."""
    p = prediction
    say(f"{p['sampled_images']} images took {p['sampled_seconds']:.1f} s, {p['asked']} requests sent; their replies are kept")
    verify = f" and {p['verify_requests']:,} of verify" if p["verify_requests"] else ""
    retries = f", and {p['retries']:,} retries" if p["retries"] else ""
    say(f"all {p['images']:,} images: {p['requests']:,} requests{verify}{retries}")
    cost = f", {p['cost']:,.2f} to pay" if p["cost"] is not None else ""
    say(
        f"to ask about, these included: {p['remaining_images']:,} images; {p['prompt_tokens']:,} tokens read, "
        f"{p['reply_tokens']:,} written{cost}, in {duration(3600 * p['hours'])}"
    )
    low, high = p["lost_share"]
    say(
        f"kept: {p['kept_images']:,} images with {p['kept_annotations']:,} of {p['annotations']:,} annotations; "
        f"{low:.0%} to {high:.0%} are rejected (95 % interval); in a larger set more texts repeat each other"
    )
    lost = ", ".join(
        f"{count} {reason.replace('_', ' ')}" for reason, count in sorted(p["lost_by"].items(), key=lambda i: -i[1])
    )
    if lost:
        say(f"rejected of this sample: {lost}", LOSS)
    say(f"dataset: about {p['bytes']:,} bytes")
    for text in p["texts"]:
        say(f"  {text}")


def print_preview(preview: "Preview") -> None:
    """Print the texts of a preview."""
    from pipeline.config import NO_MODEL
    from pipeline.tables import HUMAN

    for image in preview.images:
        say(f"\n{image.name}  {image.width_px} x {image.height_px} px")
        for reply in image.replies:
            took = "kept from before" if reply.seconds is None else f"{reply.seconds:.1f} s"
            cost = f"{reply.prompt_tokens} tokens read, {reply.reply_tokens} written, {took}"
            by_people = reply.style == HUMAN
            say(f"  {reply.task} {reply.style}".rstrip() + f" ({'written by people' if by_people else cost})", "dim")
            for text, reason in reply.texts:
                say(f"    {text}")
                if reason:
                    say(f"      would be rejected: {reason.replace('_', ' ')}", LOSS)
    for text in preview.skipped:
        say(f"not usable: {text}", WARNING)
    model = f"{preview.model} ({preview.engine}); prompts: {preview.prompt_sources}"
    say(f"\nmodel: {'none is asked' if preview.model == NO_MODEL else model}", "dim")


def print_scores(metrics: dict[str, Any]) -> None:
    """Print scores on own images beside those on shuffled images."""
    say(f"{metrics['split']}: {metrics['images']} images, {metrics['style']} captions, against {metrics['against']}")
    beams = metrics["num_beams"]
    say(f"  scores of captions written {'greedily' if beams == 1 else f'with {beams} beams'}")
    for name, value in metrics["scores"].items():
        low, high = metrics["intervals"].get(name, (None, None))
        interval = f"  [{low:.3f}, {high:.3f}]" if low is not None else ""
        say(f"  {name:<8} {value:6.3f}   with shuffled images {metrics['shuffled_scores'][name]:6.3f}{interval}")
    low, high = metrics.get("gain", {}).get("cider_d", (None, None))
    if low is not None and low <= 0:
        say(f"  the captions of other images score about as well (CIDEr-D by {low:.3f} to {high:.3f} less):", LOSS)
        say("  this captioner ignores its images, or there are too few of them to tell", LOSS)
    for kind, scores in metrics.get("questions", {}).items():
        say(
            f"  {kind:<8} {scores['accuracy']:6.3f}   with shuffled images {scores['shuffled']:6.3f}"
            f"   most frequent answer {scores['majority']:6.3f}   ({scores['count']} questions)"
        )


def say(text: str, style: str = "") -> None:
    """Print a message to stderr, on terminals in a style of rich; rich leaves colors out where NO_COLOR is set."""
    text = printable(text)
    if style and sys.stderr.isatty():
        from rich.console import Console

        Console(stderr=True, highlight=False).print(text, style=style, markup=False, soft_wrap=True)
        return
    print(text, file=sys.stderr)


def print_run_result(
    result: "RunResult",
    warnings: Sequence[str] = (),
    server: "ServerConfig | None" = None,
    *,
    shown: Sequence[str] = (),
    as_json: bool,
) -> None:
    """Print what each step did and which requests were sent to stderr, and the resulting version to stdout.

    In JSON, the warnings that were `shown` before stand before the others.
    """
    from pipeline.config import NO_MODEL
    from pipeline.dataset.integrity import missing_files
    from pipeline.run import STEPS
    from pipeline.sources.base import first_names

    choices = {step.name for step in STEPS if step.is_choice}
    for summary in result.funnel:
        lost = ", ".join(f"{count:,} {reason}" for reason, count in summary.rejected.items())
        text = f"{summary.step}: {summary.kept} of {summary.input} {summary.unit} kept{f' (rejected: {lost})' if lost else ''}"
        say(text, LOSS if 2 * summary.kept < summary.input and summary.step not in choices else "")
    counts = result.stats
    retries = counts.asked - sum(counts.attempts.values())
    in_journal = counts.total - sum(counts.attempts.values())
    known = f"; {in_journal:,} were in the journal" if in_journal > 0 else ""
    known += f"; {retries:,} were sent again" if retries > 0 else ""
    if result.version.manifest["model"]["name"] != NO_MODEL:
        say(f"asked the model {counts.asked} times for {counts.total} replies{known}")
    if counts.asked:
        cost = counts.cost(server) if server else None
        paid = f"; cost: {cost:,.2f}" if cost is not None else ""
        say(f"tokens: {counts.shown_about}{counts.prompt_tokens:,} read, {counts.reply_tokens:,} written{paid}")
    if set(counts.attempts) - {1}:
        say("attempts: " + ", ".join(f"{count} took {attempt}" for attempt, count in sorted(counts.attempts.items())))
    if counts.flaws:
        say("not usable: " + ", ".join(f"{count} {flaw}" for flaw, count in counts.flaws.most_common()))
    version = result.version
    folder = version.dataset_dir
    if gone := () if result.is_new else missing_files(version):
        damage = f"{version.name} is damaged: {first_names(gone)} is gone or of another size"
        warnings = [*warnings, f"{damage}; `synth check {folder}` says what can be rebuilt"]
    for text in warnings:
        say(f"warning: {text}", WARNING)
    say(f"made {version.name}" if result.is_new else f"nothing new: {version.name} already holds exactly these rows")
    note_previews(version, version.path)
    columns = {*version.manifest["columns"]}
    train = f", synth train --data {folder}" if columns & {"captions", "qa"} else ""  # which learns no values of own tasks
    say(f"next: synth report {folder}, synth push {folder} --repo ORG/NAME{train}", "dim")
    steps = {one.step: {"input": one.input, "kept": one.kept, "rejected": one.rejected} for one in result.funnel}
    described = {"version": version.name, "path": str(version.path), "digest": version.manifest["digest"]}
    requests = {"asked": counts.asked, "total": counts.total, "flaws": dict(counts.flaws)}
    show(
        {**described, "is_new": result.is_new, "steps": steps, "requests": requests, "warnings": [*shown, *warnings]},
        as_json,
        "path",
    )


def show(values: dict[str, Any], as_json: bool, key: str) -> None:
    """Print data to stdout: all of it as JSON, or the one value that a script would want (several are JSON, too)."""
    value = values if as_json else values[key]
    echo(value if isinstance(value, str) else json.dumps(value))


def echo(text: object) -> None:
    """Print data to stdout. Model texts and names of files may hold what a terminal obeys: that is escaped."""
    try:
        typer.echo(printable(str(text)))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SynthError(f"cannot write to the standard output: {error.strerror or error}", hint="free some space") from None
