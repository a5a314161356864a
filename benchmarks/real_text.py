"""Count the good texts that the text rules reject, the bad texts that they find, and unwanted phrases.

Also print the CPU time of the filter for short and long captions.

    python benchmarks/real_text.py FOLDER [--examples N]

FOLDER contains JSON Lines files (also `.gz`). Most texts in `captions_human` and `captions_vlm` (`text`) and
in `vqa` (`question`, `answer`, `answer_type`) are good, so rejected texts must be checked by eye. All texts
in `failures` (`kind`, and a text or a pair) are bad. Each text is parsed, validated and filtered.
"""

import argparse
import gzip
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config.sections import FilterConfig
from pipeline.filtering import filter_annotations, own_prompt_grams
from pipeline.steps.validate import validate_annotations
from pipeline.tables import ANNOTATION, HUMAN
from pipeline.tasks.replies import parse_reply
from pipeline.text.phrases import PHRASES, phrases_in
from pipeline.types import Reply, Request, Sampling

BATCH = 10_000
# The CPU time is measured for captions with these numbers of words.
LENGTHS = {"captions_human": range(10, 15), "captions_vlm": range(110, 151)}


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read the rows of a file."""
    path = next(folder.glob(f"{name}.jsonl*"))
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


def annotations(rows: list[dict[str, Any]], *, are_human: bool = False) -> pa.Table:
    """Convert rows to annotations, as if a model had replied with the same texts."""
    parsed: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        task = "caption" if "text" in row else "qa"
        kind = {"answer_type": row.get("answer_type", "other")}
        body = (
            {"caption": row["text"]}
            if task == "caption"
            else {"qa": [kind | {n: row[n] for n in ("question", "answer")}]}
        )
        style = "plain" if task == "caption" else ""
        request = Request(
            id=str(number),
            sample_id=str(number),
            task=task,
            style=style,
            prompt_id=f"{task}/v1",
            schema="",
            system="",
            text="",
            images=(),
            sampling=Sampling(temperature=0.0, max_tokens=256),
        )
        reply = Reply(
            request.id,
            attempt=0,
            text=json.dumps(body),
            finish_reason="stop",
            prompt_tokens=0,
            reply_tokens=0,
        )
        parsed += parse_reply(request, reply)
    for annotation in parsed:
        annotation["pages"] = 1
        annotation["prompt_id"] = HUMAN if are_human else annotation["prompt_id"]
    return pa.Table.from_pylist(parsed, schema=ANNOTATION)


def judge(rows: list[dict[str, Any]], *, are_human: bool = False) -> tuple[list[str | None], float]:
    """Return the rejection reason of each row, or None if it is kept, and the CPU seconds."""
    reasons: list[str | None] = []
    seconds = 0.0
    for first in range(0, len(rows), BATCH):
        table = annotations(rows[first : first + BATCH], are_human=are_human)
        invalid = validate_annotations(table)["reason"].to_pylist()
        started = time.process_time()
        filtered = filter_annotations(table, FilterConfig(), own_prompt_grams(("caption", "qa")))[
            "reason"
        ].to_pylist()
        seconds += time.process_time() - started
        reasons += [a or b for a, b in zip(invalid, filtered, strict=True)]
    return reasons, seconds


def lines(name: str, rows: list[dict[str, Any]], examples: int) -> Iterator[str]:
    """Yield lines about the rejected rows: counts by reason, and examples."""
    reasons, seconds = judge(rows)
    counts = Counter(reasons)
    lost = len(rows) - counts.pop(None)
    row_us = seconds / len(rows) * 1e6
    yield f"{name}: {lost:,} of {len(rows):,} lost ({lost / len(rows):.2%}), {row_us:.0f} us per row"
    for reason, count in counts.most_common():
        yield f"  {reason}: {count:,}"
        shown = [row for row, why in zip(rows, reasons, strict=True) if why == reason][:examples]
        yield from (f"      {row.get('text') or row['question'] + ' - ' + row['answer']!r}" for row in shown)


def phrase_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line with the shares of captions that have unwanted phrases, for each model."""
    by_model: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        by_model[row.get("model", "humans")].append(row["text"])
    for model, texts in by_model.items():
        counts = Counter(kind for text in texts for kind in phrases_in(text))
        shares = ", ".join(f"{kind} {counts[kind] / len(texts):.2%}" for kind in PHRASES)
        yield f"  {model}, {len(texts):,} captions: {shares}"


def main() -> None:
    """Print all results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--examples", type=int, default=0)
    options = parser.parse_args()
    for name in ("captions_human", "captions_vlm", "vqa"):
        rows = read(options.folder, name)
        print(*lines(name, rows, options.examples), sep="\n")
        if name == "vqa":
            print(f"  lost as human pairs: {sum(map(bool, judge(rows, are_human=True)[0]))}")
        if words := LENGTHS.get(name):
            print(*phrase_lines(rows), sep="\n")
            timed = [row for row in rows if len(row["text"].split()) in words]
            row_us = min(judge(timed)[1] for _ in range(5)) / len(timed) * 1e6
            print(f"  {words[0]} to {words[-1]} words, {len(timed):,} captions: {row_us:.1f} us per caption")
    failures = read(options.folder, "failures")
    reasons, _ = judge(failures)
    of_kind: dict[str, list[bool]] = defaultdict(list)
    for row, reason in zip(failures, reasons, strict=True):
        of_kind[row["kind"]].append(reason is not None)
        if reason is None and options.examples:
            print("  passes:", row)
    for is_pair, name in ((False, "captions"), (True, "pairs")):
        kinds = {kind: found for kind, found in of_kind.items() if kind.startswith("qa_") == is_pair}
        found, total = sum(map(sum, kinds.values())), sum(map(len, kinds.values()))
        print(f"bad {name}: {found} of {total} found ({found / total:.0%})")
        print("".join(f"  {kind}: {sum(one)} of {len(one)}\n" for kind, one in kinds.items()), end="")


if __name__ == "__main__":
    main()
