"""Tests of the comparison of two versions."""

from pathlib import Path

import pyarrow as pa

from pipeline.dataset.diff import diff_versions
from pipeline.tables import STRING, Extras, OwnColumn
from tests.scene_data import make_version, scene_samples, scored_captions, true_captions

SAMPLES = scene_samples(20)


def edited(table: pa.Table, sample_id: str, style: str, text: str) -> pa.Table:
    rows = table.to_pylist()
    for row in rows:
        if (row["sample_id"], row["style"]) == (sample_id, style):
            row["text"] = text
    return pa.Table.from_pylist(rows, schema=table.schema)


def test_diff_counts_added_and_removed_rows(tmp_path: Path) -> None:
    before, _ = make_version(tmp_path, SAMPLES)
    after, _ = make_version(tmp_path, [*SAMPLES[:2], *scene_samples(22)[3:]])
    diff = diff_versions(before, after)
    assert diff.counts == {"same": 19, "added": 2, "removed": 1, "changed": 0}
    (removed,) = (change for change in diff.changes if change.what == "removed")
    assert (removed.sample_id, removed.source_row) == (SAMPLES[2].id, SAMPLES[2].source_row)
    assert diff_versions(after, before).counts == {"same": 19, "added": 1, "removed": 2, "changed": 0}
    few = diff_versions(before, after, 1)
    assert few.counts == diff.counts and few.changes == diff.changes[:1]
    assert list(few.lines(1))[-1] == "and 2 more rows; --rows shows more, --json all"


def test_diff_shows_changed_text_without_control_characters(tmp_path: Path) -> None:
    captions = true_captions(SAMPLES)
    before, _ = make_version(tmp_path, SAMPLES)
    captions = edited(captions, SAMPLES[0].id, "brief", "A \x1b[31mred thing.")
    after, _ = make_version(tmp_path, SAMPLES, captions)
    diff = diff_versions(before, after)
    assert diff.fields == {"captions": 1}
    lines = list(diff.lines(10))
    assert any("+ captions: text A  [31mred thing., style brief" in line for line in lines)
    assert not any("\x1b" in line for line in lines)


def test_diff_of_same_text_shows_changed_prompt(tmp_path: Path) -> None:
    captions = true_captions(SAMPLES)
    before, _ = make_version(tmp_path, SAMPLES, captions)
    rows = captions.to_pylist()
    (row,) = (row for row in rows if (row["sample_id"], row["style"]) == (SAMPLES[4].id, "brief"))
    of_before, row["prompt_id"] = row["prompt_id"], "caption/v9@new"
    after, _ = make_version(tmp_path, SAMPLES, pa.Table.from_pylist(rows, schema=captions.schema))
    diff = diff_versions(before, after)
    removed, added = (line for line in diff.lines(10) if line.startswith(("  -", "  +")))
    assert f"prompt_id {of_before}" in removed and "prompt_id caption/v9@new" in added


def test_diff_shows_added_scores_as_setting_and_changed_scores_as_field(tmp_path: Path) -> None:
    versions = [make_version(tmp_path / "plain", SAMPLES)[0]]
    for name, coverage in (("half", 0.5), ("all", 1.0)):
        scored = scored_captions(SAMPLES, coverage)
        extras = Extras(("precision", "coverage"))
        versions.append(make_version(tmp_path / name, SAMPLES, scored, extras=extras)[0])
    measured = diff_versions(versions[0], versions[1])
    assert (measured.counts["changed"], measured.settings["scores"]) == (0, ([], ["precision", "coverage"]))
    assert diff_versions(versions[1], versions[2]).fields == {"captions": len(SAMPLES)}


def test_diff_shows_column_in_only_one_version_as_changed_setting(tmp_path: Path) -> None:
    captions = true_captions(SAMPLES).to_pylist()
    note = {"task": "note", "style": "", "text": None, "record": '"of a star"'}
    notes = [row | note for row in captions if row["style"] == "brief"]
    rows = [row | {"record": row.get("record")} for row in (*captions, *notes)]
    plain, _ = make_version(tmp_path / "plain", SAMPLES)
    own = (OwnColumn("note", STRING, "text", is_list=False),)
    noted, _ = make_version(tmp_path / "noted", SAMPLES, pa.Table.from_pylist(rows), extras=Extras(own=own))
    diff = diff_versions(plain, noted)
    assert (diff.counts["changed"], "note" in diff.settings["columns"][1]) == (0, True)
