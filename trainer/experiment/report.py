"""Write the result of an experiment as JSON, Markdown and HTML."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.report.html import Points, chart, data_uri, points, render_page, thumbnail
from pipeline.storage.files import write_json, write_text
from trainer.experiment.compare import Arm, compare, examples, read_arms, summarize
from trainer.experiment.runs import Run
from trainer.image_index import map_images

SHOWN_EXAMPLES = 12
MAX_CURVES_PER_CHART = 6
THUMBNAIL_BYTES = 16_384
# If the word counts of data entries differ by a larger share, the report says so.
MAX_WORD_DIFFERENCE = 0.05


def write_result(runs: list[Run], out: Path) -> dict[str, Any]:
    """Write experiment.json, .md and .html for finished runs. Returns the content of experiment.json."""
    arms = read_arms(runs)
    sizes = {run.cell.arm: (run.train_images, run.train_words) for run in runs}
    data = {
        run.cell.data: {"version": run.version.name, "digest": run.version.manifest["digest"]} for run in runs
    }
    result: dict[str, Any] = {
        "arms": [summarize(arm, *sizes[arm.key]) for arm in arms],
        "differences": compare(arms),
        "examples": examples([arm for arm in arms if arm.key[1:] == arms[0].key[1:]], SHOWN_EXAMPLES),
        "words_differ": _words_differ(runs),
        "data": data,
    }
    images = map_images(runs[0].version, "test")
    shown = [example["sample_id"] for example in result["examples"] if example["sample_id"] in images]
    page = render_page(
        "trainer.experiment",
        "experiment.html.j2",
        result=result,
        questions=sorted({kind for arm in result["arms"] for kind in arm["questions"]}),
        curves=list(_learning_curves(arms)),
        uris={name: data_uri(thumbnail(bytes(images[name].read()), THUMBNAIL_BYTES)) for name in shown},
        top=max(arm["interval"][1] for arm in result["arms"]) or 1.0,
    )
    write_json(out / "experiment.json", result)
    write_text(out / "experiment.md", markdown(result))
    write_text(out / "experiment.html", page)
    return result


def markdown(result: dict[str, Any]) -> str:
    """Format a result as Markdown tables."""
    lines = ["| arm | seeds | CIDEr-D [95 %] | shuffled | words | words learned |", "|---" * 6 + "|"]
    for arm in result["arms"]:
        low, high = arm["interval"]
        lines.append(
            f"| {_cell(arm['name'])} | {len(arm['seeds'])} | {arm['cider_d']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {arm['shuffled_cider_d']:.3f} | {arm['mean_words']:.1f} | {arm['caption_words_learned']:,} |"
        )
    if result["words_differ"]:
        lines += [
            "",
            "Each image keeps one caption, but the number of words differs between the kinds of data.",
        ]
    if result["differences"]:
        lines += ["", "| arm | than | difference [95 %] | verdict |", "|---" * 4 + "|"]
    for row in result["differences"]:
        low, high = row["interval"]
        lines.append(
            f"| {_cell(row['arm'])} | {_cell(row['than'])} | {row['difference']:+.3f} "
            f"[{low:+.3f}, {high:+.3f}] | {row['verdict']} |"
        )
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _words_differ(runs: Sequence[Run]) -> bool:
    """Return whether caption word counts differ clearly between runs with the same number of images."""
    sizes = {run.train_images for run in runs}
    counts = [[run.train_words for run in runs if run.train_images == images] for images in sizes]
    return any(max(words) > (1 + MAX_WORD_DIFFERENCE) * min(words) for words in counts)


def _learning_curves(arms: Sequence[Arm]) -> Iterator[dict[str, Any]]:
    """Yield charts of validation scores for each setting, with one curve per data entry."""
    for setting in dict.fromkeys(arm.key[1:] for arm in arms):
        setting_arms = [arm for arm in arms if arm.key[1:] == setting]
        title = f"CIDEr-D on the validation split: {setting_arms[0].name.partition(', ')[2]}"
        for start in range(0, len(setting_arms), MAX_CURVES_PER_CHART):
            chart_arms = setting_arms[start : start + MAX_CURVES_PER_CHART]
            yield chart(title, {arm.key[0]: _mean_curve(arm) for arm in chart_arms})


def _mean_curve(arm: Arm) -> Points:
    curves = [dict(points(lines, "validation_cider_d")) for lines in arm.curves]
    steps = sorted(set.intersection(*map(set, curves)))
    return [(step, sum(curve[step] for curve in curves) / len(curves)) for step in steps]
