"""Small datasets of scenes whose captions are true by construction: what a perfect teacher would have written."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config import SplitConfig
from pipeline.scenes.score import scene_of
from pipeline.scenes.text import STYLES, caption
from pipeline.source.scenes import draw_sample
from pipeline.split import split_of
from pipeline.store import Folder, Version
from pipeline.tables import LEDGER, SAMPLE
from pipeline.types import Sample
from pipeline.version import Rows, build_rows, draft_version

MADE_BY: dict[str, Any] = {
    "source": {"name": "scenes", "revision": "test"},
    "model": {"name": "facts", "revision": "test"},
    "prompts": {"caption/v1@test": "Task: caption"},
    "schemas": {},
    "config": {"tasks": ["caption"]},
    "funnel": [],
    "measured": {},
}


def scene_samples(count: int, seed: int = 0) -> list[Sample]:
    return [draw_sample(seed, index) for index in range(count)]


def sample_table(samples: list[Sample]) -> pa.Table:
    rows = [{"sample_id": s.id, **asdict(s)} for s in samples]
    return pa.Table.from_pylist(rows, schema=SAMPLE)


def true_captions(samples: list[Sample]) -> pa.Table:
    """Annotations as they come out of the split stage."""
    return pa.Table.from_pylist(
        [
            {
                "sample_id": sample.id,
                "task": "caption",
                "style": style,
                "text": caption(scene_of(sample.facts or {}), style),
                "prompt_id": "caption/v1@test",
                "split": split_of(sample.id, SplitConfig(), 0),
            }
            for sample in samples
            for style in STYLES
        ]
    )


def make_version(
    folder: Path,
    samples: list[Sample],
    annotations: pa.Table | None = None,
    ledger: pa.Table | None = None,
    funnel: Sequence[dict[str, Any]] = (),
) -> tuple[Version, bool]:
    """Write the samples as the next version of a dataset folder."""
    rows = Rows()
    shown: list[dict[str, Any]] = []
    annotations = true_captions(samples) if annotations is None else annotations
    with draft_version(Folder(folder)) as draft:
        for table in build_rows(annotations, sample_table(samples).to_batches(), "scenes", rows):
            draft.add(table)
            shown += table.drop_columns(["image", "pages"]).to_pylist()
        return draft.publish(
            rows, MADE_BY | {"funnel": list(funnel)}, LEDGER.empty_table() if ledger is None else ledger, shown[:5]
        )
