"""Print the output of commands: data to stdout, messages to stderr."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pipeline.errors import SynthError
from pipeline.progress import LOSS, WARNING, duration, size
from pipeline.text.escape import printable

if TYPE_CHECKING:
    from pipeline.config.sections import Servers
    from pipeline.dataset.version import Version
    from pipeline.inference.queue import RequestStats
    from pipeline.preview import Preview
    from pipeline.run import RunResult


def find_checkpoint(captioner: str) -> Path:
    """Return a captioner's folder, local or from the Hub. Print a note if its training is not finished."""
    from trainer.runtime.checkpoint_folder import find_captioner

    folder = find_captioner(captioner)
    if (folder / "resume.pt").exists():
        command = f"synth train --resume --out {folder}"
        say(f"note: the training run in {folder} is not finished; `{command}` resumes it", WARNING)
    return folder


def note_training_data(captioner: Path, version: "Version", split: str = "test") -> None:
    """Print a note if a captioner was trained, or may have been trained, on this split."""
    from trainer.runtime.checkpoint_folder import read_data_digests

    digests, own = {*read_data_digests(captioner)}, version.manifest["digest"]
    if split == "train" and own in digests:
        say(f"note: {captioner} was trained on these images: the scores do not measure generalization")
    elif digests != {own}:
        used = f"on {version.path} and on" if own in digests else f"not on {version.path} but on"
        say(f"note: {captioner} was trained {used} other data, which may include these images")


def note_previews(version: "Version", path: Path | None = None) -> None:
    """Print a note if a version is a preview, or if `path` names no version and there is a newer preview."""
    from pipeline.dataset.directory import DatasetDir, split_version

    if version.is_preview:
        say(f"note: {version.name} is a preview: its run stopped at --limit", WARNING)
        return
    if path is not None and (split_version(path)[1] or path.name == version.name):
        return
    versions = DatasetDir(version.dataset_dir).versions()
    if later := [other for other in versions if other.number > version.number and other.is_preview]:
        preview = later[-1].name
        name = f"{version.dataset_dir}@{preview}"
        say(f"note: uses {version.name}: the newer {preview} is a preview (to use it, pass {name})", WARNING)


def print_estimate(estimate: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the cost of the sample, and the estimates. With `as_json`, also print JSON to stdout."""
    e, show_line = estimate, say if as_json else echo
    tokens = f"{e['prompt_tokens']:,} tokens read, {e['reply_tokens']:,} written"
    costs = (e["sampled_cost"], e["cost"], e["total_cost"])
    paid, cost, total_cost = (f", cost {value:,.4g}" if value is not None else "" for value in costs)
    spent = f"{duration(e['sampled_seconds'])}{paid}"
    show_line(f"sample: {e['sampled_images']:,} images, {e['asked']:,} requests, {spent}")
    show_line(
        f"still to do: {e['remaining_images']:,} images, about {e['remaining_requests']:,} requests, "
        f"{duration(3600 * e['hours'])}{cost} ({tokens})"
    )
    verify = f" and {e['verify_requests']:,} for --verify" if e["verify_requests"] else ""
    retries = f" and {e['retries']:,} retries" if e["retries"] else ""
    total = f", {duration(3600 * e['total_hours'])}, {e['total_tokens']:,} tokens{total_cost}"
    requests = f"{e['requests']:,} requests{verify}{retries}{total if e['total_tokens'] else ''}"
    show_line(f"whole run: {e['images']:,} images, about {requests}")
    low, high = e["lost_share"]
    show_line(
        f"kept: {e['kept_images']:,} images, {e['kept_annotations']:,} of {e['annotations']:,} annotations; "
        f"expect {low:.0%} to {high:.0%} to be rejected (95 % interval), or more if texts repeat each other"
    )
    for ladder in e["ladders"]:
        for choice in ladder["choices"]:
            price = f", cost {choice['cost']:,.4g}" if choice["cost"] is not None else ""
            asked = f"about {choice['requests']:,} requests{price} (checks not included)"
            show_line(f"{ladder['task']} by {choice['models']}: {asked}")
        for rung in ladder["rungs"]:
            low, high = rung["interval"]
            show_line(f"{ladder['task']}: {low:.0%} to {high:.0%} of {rung['model']}'s texts pass all checks")
    show_line(f"dataset: about {size(e['bytes'])}")
    reasons = sorted(e["lost_by"].items(), key=lambda item: -item[1])
    if reasons:
        lost = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in reasons)
        show_line(f"rejected in the sample: {lost}")
    if as_json:
        echo(json.dumps(estimate))


def print_preview(preview: "Preview") -> None:
    """Print the prompts and texts of a preview."""
    for name, prompt in preview.prompts.items():
        say(f"\nprompt of {name}:", "dim")
        say(prompt)
    for name, texts in preview.images.items():
        say(f"\n{name}", "dim")
        for text, reason, kind in texts:
            say(f"  {text}{f' ({kind})' if kind else ''}")
            if reason:
                say(f"    rejected by {reason}", LOSS)


def print_scores(metrics: Mapping[str, Any]) -> None:
    """Print scores next to the scores with shuffled images."""
    beams, style, reference = metrics["num_beams"], metrics["style"], metrics["against"]
    say(f"{metrics['split']}: {metrics['images']} images, {style} captions, scored against {reference}")
    say(f"  captions written {'greedily' if beams == 1 else f'with {beams} beams'}")
    for name, value in metrics["scores"].items():
        low, high = metrics["intervals"].get(name, (None, None))
        interval = f"  [{low:.3f}, {high:.3f}]" if low is not None else ""
        shuffled = metrics["shuffled_scores"][name]
        say(f"  {name:<8} {value:6.3f}{interval}   with shuffled images {shuffled:6.3f}")
    low, high = metrics.get("gain", {}).get("cider_d", (None, None))
    if low is not None and low <= 0:
        say(f"  captions of other images score about as well (CIDEr-D {low:.3f} to {high:.3f} less):", LOSS)
        say("  this captioner ignores its images, or the split has too few images to tell", LOSS)
    for kind, scores in metrics.get("questions", {}).items():
        say(
            f"  {kind:<8} {scores['accuracy']:6.3f}   with shuffled images {scores['shuffled']:6.3f}"
            f"   most frequent answer {scores['majority']:6.3f}   ({scores['count']} questions)"
        )


def print_run_result(
    result: "RunResult",
    warnings: Sequence[str] = (),
    servers: "Servers | None" = None,
    *,
    shown: Sequence[str] = (),
    as_json: bool,
) -> None:
    """Print the steps, requests and warnings of a run to stderr, and the resulting version to stdout.

    The JSON also contains the warnings in `shown`, which were printed during the run.
    """
    from pipeline.config import NO_MODEL
    from pipeline.dataset.audit import audit_in_words
    from pipeline.dataset.calibration import checks_in_words
    from pipeline.dataset.directory import DatasetDir
    from pipeline.dataset.integrity import damaged_files
    from pipeline.dataset.price import price_in_words
    from pipeline.sources.base import first_names
    from pipeline.tables import SPLITS

    version, folder, warnings = result.version, result.version.dataset_dir, list(warnings)
    if not result.is_new and (missing := damaged_files(version, by_size=True)):
        damage = f"{version.name} is damaged: {first_names(missing)} is missing or has the wrong size"
        warnings.append(f"{damage}; `synth check {folder}` shows how to repair it")
    asking_s = DatasetDir(folder).read_cost().get("asking_s", 0.0)
    rate, *details = audit_in_words(version.manifest.get("audit"))
    facts = [f"wrong texts: {rate}", *details, *checks_in_words(version.manifest)]
    facts += [f"price of {text}" for text in price_in_words(version.manifest, asking_s)]
    for summary in result.funnel:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in summary.rejected.items())
        rejected = f" (rejected: {reasons})" if reasons else ""
        say(f"{summary.step}: {summary.kept:,} of {summary.input:,} {summary.unit} kept{rejected}")
    if version.manifest["model"]["name"] != NO_MODEL:
        _print_requests(result.stats, servers)
    for text in warnings:
        say(f"warning: {text}", WARNING)
    say(f"made {version.name}" if result.is_new else f"nothing new: {version.name} already has these rows")
    note_previews(version, version.path)
    for text in facts:
        say(text)
    is_trainable = not {"captions", "qa"}.isdisjoint(version.manifest["columns"])
    is_trainable &= all(version.manifest["rows"].get(split) for split in SPLITS)
    train = f", synth train {folder}" if is_trainable else ""
    say(f"next: synth report {folder}, synth push {folder} --repo ORG/NAME{train}", "dim")
    steps = {
        one.step: {"input": one.input, "kept": one.kept, "rejected": one.rejected} for one in result.funnel
    }
    stats = result.stats
    values = {
        "version": version.name,
        "path": str(version.path),
        "digest": version.manifest["digest"],
        "is_new": result.is_new,
        "steps": steps,
        "requests": {"asked": stats.asked, "total": stats.total, "flaws": dict(stats.flaws)},
        "warnings": [*shown, *warnings],
    }
    show(values, as_json, "path")


def _print_requests(stats: "RequestStats", servers: "Servers | None") -> None:
    num_answered = sum(stats.attempts.values())
    notes = [f"{stats.total - num_answered:,} reused from the journal"] if stats.total > num_answered else []
    retries = stats.asked - num_answered
    notes += [f"{retries:,} {'retry' if retries == 1 else 'retries'}"] if retries > 0 else []
    details = f" ({', '.join(notes)})" if notes else ""
    say(f"sent {stats.asked:,} requests for {stats.total:,} replies{details}")
    if stats.asked:
        cost = stats.cost(servers) if servers else None
        paid = f"; cost: {cost:,.4g}" if cost is not None else ""
        say(f"tokens: {stats.shown_about}{stats.prompt_tokens:,} input, {stats.reply_tokens:,} output{paid}")
    if stats.flaws:
        say("unusable replies: " + ", ".join(f"{count} {flaw}" for flaw, count in stats.flaws.most_common()))


def say(text: str, style: str = "") -> None:
    """Print a message to stderr. On terminals, use a `rich` style."""
    text = printable(text)
    if style and sys.stderr.isatty():
        from rich.console import Console

        Console(stderr=True, highlight=False).print(text, style=style, markup=False, soft_wrap=True)
        return
    print(text, file=sys.stderr)


def show(values: dict[str, Any], as_json: bool, key: str) -> None:
    """Print to stdout: all values as JSON, or only the value of `key` for scripts."""
    value = values if as_json else values[key]
    echo(value if isinstance(value, str) else json.dumps(value))


def echo(text: object) -> None:
    """Print data to stdout with control characters escaped: model texts and file names are untrusted."""
    try:
        typer.echo(printable(str(text)))
    except BrokenPipeError:
        raise
    except OSError as error:
        problem = f"cannot write to standard output: {error.strerror or error}"
        raise SynthError(problem, hint="free some space") from None
