"""Print the output of commands: data to stdout, messages to stderr."""

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

from pipeline.progress import duration

if TYPE_CHECKING:
    from pipeline.executors.base import RunResult


def print_prediction(estimate: dict[str, Any]) -> None:
    """Print the predicted cost of a whole run."""
    low, high = estimate["invalid_share"]
    say(f"{estimate['sampled_images']} images took {estimate['sampled_seconds']:.1f} s, {estimate['asked']} requests sent")
    say(f"all {estimate['images']} images: {estimate['requests']} requests, {duration(3600 * estimate['hours'])}")
    say(f"tokens: {estimate['prompt_tokens']:,} read, {estimate['reply_tokens']:,} written")
    say(f"dataset: about {estimate['bytes']:,} bytes")
    say(f"annotations that would be rejected: {low:.1%} to {high:.1%} (95 % interval)")


def print_scores(metrics: dict[str, Any]) -> None:
    """Print scores on own images beside those on shuffled images."""
    say(f"{metrics['split']}: {metrics['images']} images, {metrics['style']} captions, against {metrics['against']}")
    for name, value in metrics["scores"].items():
        low, high = metrics["intervals"].get(name, (None, None))
        interval = f"  [{low:.3f}, {high:.3f}]" if low is not None else ""
        say(f"  {name:<8} {value:6.3f}   with shuffled images {metrics['shuffled_scores'][name]:6.3f}{interval}")
    for kind, scores in metrics.get("questions", {}).items():
        say(
            f"  {kind:<8} {scores['accuracy']:6.3f}   with shuffled images {scores['shuffled']:6.3f}"
            f"   most frequent answer {scores['majority']:6.3f}   ({scores['count']} questions)"
        )


def say(text: str) -> None:
    """Print a message to stderr."""
    print(text, file=sys.stderr)


def print_run_result(result: "RunResult", *, as_json: bool) -> None:
    """Print what each stage did and which requests were sent to stderr, and the resulting version to stdout."""
    for step in result.funnel:
        lost = ", ".join(f"{count} {reason}" for reason, count in step.rejected.items())
        say(f"{step.stage}: {step.kept} of {step.input} {step.unit} kept{f' (rejected: {lost})' if lost else ''}")
    counts = result.stats
    known = "; the rest was in the journal" if counts.asked < counts.total else ""
    say(f"asked the model {counts.asked} times for {counts.total} replies{known}")
    if set(counts.attempts) - {1}:
        say("attempts: " + ", ".join(f"{count} took {attempt}" for attempt, count in sorted(counts.attempts.items())))
    if counts.flaws:
        say("not usable: " + ", ".join(f"{count} {flaw}" for flaw, count in counts.flaws.most_common()))
    name = result.version.name
    say(f"made {name}" if result.is_new else f"nothing new: {name} already holds exactly these rows")
    show({"version": name, "path": str(result.version.path), "digest": result.version.manifest["digest"]}, as_json, "path")


def show(values: dict[str, Any], as_json: bool, key: str) -> None:
    """Print data to stdout: all of it as JSON, or the one value that a script would want."""
    typer.echo(json.dumps(values) if as_json else str(values[key]))
