"""The ordered run: source, generate, then one plain function a stage, then a version. The sums are checked after each.

Every stage leaves `stages/<stage>/kept.parquet` and `rejected.parquet`, so that a run can start again from any of them.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from pipeline.balance import read_entries
from pipeline.card import CARD_SAMPLES
from pipeline.config import Config, resolve
from pipeline.errors import ConfigError, SynthError, TableError
from pipeline.fingerprint import file_digest
from pipeline.generate.ask import Counts
from pipeline.generate.checks import TASK as ANSWER
from pipeline.generate.engine import Choice, choose_engine
from pipeline.generate.journal import Journal
from pipeline.generate.requests import asked_of_each, check_prompts, prompt_texts
from pipeline.leakage import Banned
from pipeline.ledger import build_ledger
from pipeline.likeness import COMPARED, compare_samples
from pipeline.marks import check_edits, format_marks, merge_marks, name_of, read_marks
from pipeline.measure import Measure
from pipeline.review import count_marks
from pipeline.schema import wire_schema
from pipeline.source import open_source
from pipeline.stages import (
    ORDER,
    STAGES,
    Step,
    apply,
    batches,
    engine_of,
    generate,
    join_alignment,
    join_checks,
    join_likeness,
    join_marks,
    join_repeats,
    kind_of_images,
    public_name,
    read_banned,
    rejected,
    require_file,
    require_stage,
    step_of,
    write_banned,
    write_source,
)
from pipeline.store import (
    Folder,
    Version,
    dataset_folder,
    disk_errors,
    read_json,
    read_table,
    write_json,
    write_table,
    write_text,
)
from pipeline.tables import PIXELS
from pipeline.types import Sample, Silence, Source, Talk
from pipeline.version import Draft, Rows, build_rows, draft_version

LEFT_OUT = pa.schema([pa.field("sample_id", pa.string()), pa.field("reason", pa.string())])


@dataclass(frozen=True, slots=True)
class Result:
    """What a run made: the version, whether it is new, and how many requests it took."""

    version: Version
    is_new: bool
    counts: Counts
    funnel: list[Step]


def generate_version(
    config: Config, out: Path | None = None, from_stage: str | None = None, talk: Talk | None = None
) -> Result:
    """Run all stages in order and return the version that comes out.

    Args:
        config: what to make.
        out: the dataset folder; default `data/<source>`.
        from_stage: start at this stage from what the one before it left on the disk.
        talk: told about the progress of the slow stages.

    Raises:
        SynthError: whatever a user can mend; finished work stays on the disk.
    """
    folder = Folder(out or dataset_folder(config.source))
    if from_stage is not None and from_stage not in ORDER:
        raise ConfigError(f"unknown stage: {from_stage}", hint=f"stages in order: {', '.join(ORDER)}")
    start = ORDER.index(from_stage) if from_stage else 0
    check_prompts(config)
    read_entries(config.balance.entries)
    with disk_errors(folder.path):
        refuse_other_settings(folder, config, start)
    source = open_source(config) if start <= ORDER.index("source") else None
    with disk_errors(folder.path), folder.lock():
        return _run(folder, config, source, start, talk or Silence())


def apply_marks(folder: Folder, files: Sequence[Path], talk: Talk | None = None) -> Result:
    """Add files of marks to those of a dataset folder, and make the version that follows from them.

    Raises:
        ConfigError: a file holds no marks, an edit cannot be used, or no mark is about this dataset; then all is as it was.
        SynthError: see `generate_version`.
    """
    with disk_errors(folder.path):
        config = _settings_of(folder)
        new = [(mark, path) for path in files for mark in read_marks(path)]
        if not new:
            raise ConfigError(f"no mark in {', '.join(map(str, files))}", hint="mark texts in a report, then export the marks")
        with folder.lock() as check:
            if not folder.stage("split").exists() and not folder.finished.exists():
                raise ConfigError(f"{folder.path} has no finished run to review", hint="run `synth generate` in it first")
            before = read_marks(folder.marks) if folder.marks.exists() else []
            rows = {name_of(row): row for path in folder.stage_files("split") for row in read_table(path).to_pylist()}
            known = {*rows, *(mark.makes for mark in before)}
            if not any(mark.name in known for mark, _ in new):
                raise ConfigError(
                    f"none of the {len(new)} marks is about a text of {folder.path}",
                    hint="name the dataset folder that the report was made of",
                )
            merged = merge_marks(before, [mark for mark, _ in new], rows)
            for name, wrong in check_edits(merged, rows).items():
                mark, from_file = merged[name], {mark.makes: path for mark, path in new}
                said = mark.text or f"{mark.question} {mark.answer}"
                where = from_file.get(mark.makes, folder.marks)
                raise ConfigError(f"{where}: the edited text {said[:80]!r} cannot be used: {wrong}", hint="edit it again")
            write_text(folder.marks, format_marks(merged.values()))
            try:
                if folder.stage("split").exists():
                    return _run(folder, config, None, ORDER.index("review"), talk or Silence())
                from pipeline.cluster.run import review_on_cluster

                return review_on_cluster(config, folder, talk or Silence(), check)
            except SynthError:
                write_text(folder.marks, format_marks(before))
                raise


def _run(folder: Folder, config: Config, source: Source | None, start: int, talk: Talk) -> Result:
    asks = start <= ORDER.index("generate")
    choose = cache(partial(choose_engine, config, folder.server_log, talk))
    if asks:
        choose()  # before anything is written
    settings = config.model_dump(mode="json")
    if not folder.run_file.exists() or read_json(folder.run_file) != settings:
        # What other settings have made must not be taken for ours by a later run that starts in the middle.
        for name in ORDER[start:]:
            for which in ("kept", "rejected"):
                folder.stage(name, which).unlink(missing_ok=True)
    write_json(folder.run_file, settings)
    counts, funnel = Counts(), []
    if source is not None:
        never = write_banned(folder, config, talk)
        banned = Banned.of(read_banned(folder), kind_of_images(config))
        write_source(folder, source.rows, banned, config.limit, talk)
        about = {"name": source.name, "revision": source.revision, "decks": source.decks, "never": never}
        write_json(folder.made_by("source"), about | {"compared_as": kind_of_images(config)})
    elif config.never and read_json(require_file(folder.made_by("source"))).get("compared_as") != kind_of_images(config):
        raise ConfigError("dedupe.images has changed since images were compared with --never", hint="run without --from-stage")
    samples, lost = require_stage(folder, "source")
    funnel.append(step_of("source", "images", samples, lost))
    if asks:
        _take_from_shards(folder)
        with engine_of(choose) as engine:
            generate(folder, config, choose().revision, engine, samples, counts, talk)
        write_json(folder.made_by("generate"), {"name": public_name(choose().model), "revision": choose().revision})
    table = read_table(require_file(folder.stage("generate")))
    replies = len(table["request_id"].unique())
    if replies != samples * len(asked_of_each(config)):
        raise ConfigError("not every image has been asked about yet", hint="run once without --from-stage")
    funnel.append(step_of("generate", "requests", replies, {}))  # a reply that cannot be read is rejected by validate
    for name, stage in STAGES.items():
        if start <= ORDER.index(name):
            # What a stage needs beside its rows is joined before it, here, where effects are.
            if name == "filter":
                table = join_repeats(table, read_banned(folder))
            elif name == "verify":
                revision = read_json(require_file(folder.made_by("generate")))["revision"]
                with engine_of(partial(_same_model, choose, revision)) as engine:
                    table = join_checks(folder, config, revision, engine, table, counts, talk)
                table = join_alignment(folder, config, table, talk)
            elif name == "dedupe":
                looks = read_table(folder.stage("source"), columns=list(COMPARED))
                table = join_likeness(table, compare_samples(looks, kind_of_images(config)))
            elif name == "review":
                table = join_marks(folder, table, talk)
            apply(folder, name, stage(table, config), table)
        kept, lost = require_stage(folder, name)
        if kept + sum(lost.values()) != table.num_rows:
            raise TableError(f"stage {name} is not made from what the stage before it kept", hint="run without --from-stage")
        funnel.append(step_of(name, "annotations", kept, lost))
        table = read_table(folder.stage(name))
    version, is_new = _write_version(folder, config, table, samples, funnel)
    return Result(version, is_new, counts, funnel)


def _take_from_shards(folder: Folder) -> None:
    """Take over the replies of runs on a cluster in the same folder."""
    shards = sorted(folder.path.glob("shards/*/journal/local.sqlite"))
    if shards:
        with Journal(folder.journal) as journal:
            for path in shards:
                with Journal(path):
                    pass  # brings in what a killed worker has left beside it
                journal.take_from(path, "", "g")  # behind every digest


def _same_model(choose: Callable[[], Choice], revision: str) -> Choice:
    if choose().revision != revision:
        raise ConfigError("another model answers now than the one that wrote", hint="run without --from-stage")
    return choose()


def images_of_source(name: str) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """Yield (sample_id, images) of a source, all of it, for whoever joins them with a version that has none."""
    for row in open_source(resolve(source=name)).rows:
        if isinstance(row, Sample):
            yield row.id, row.images


def _write_version(
    folder: Folder,
    config: Config,
    annotations: pa.Table,
    samples: int,
    funnel: list[Step],
) -> tuple[Version, bool]:
    source, model = (read_json(require_file(folder.made_by(stage))) for stage in ("source", "generate"))
    with draft_version(folder) as draft:
        rows, measure, shown = fill_draft(draft, annotations, folder, source)
        lost = dict(Counter(row["reason"] for row in rows.rejected))
        step = step_of("version", "images", len(rows.digests), lost)
        if step.input != samples:
            raise TableError(f"stage version was given {samples} images and returned {step}", hint="please report this bug")
        funnel.append(step)
        left_out = {"version": pa.Table.from_pylist(rows.rejected, schema=LEFT_OUT)}
        images = annotations.group_by("image_group").aggregate([("sample_id", "count_distinct")])["sample_id_count_distinct"]
        groups = sum(count > 1 for count in images.to_pylist())
        leakage = leakage_of(source, funnel, groups, annotations.num_rows - annotations["repeats"].null_count)
        marked = [read_table(folder.stage("review", which), columns=["mark"]) for which in ("kept", "rejected")]
        made_by = about_run(config, source, model, funnel, measure.result(), leakage) | {"review": count_marks(*marked)}
        version, is_new = draft.publish(rows, made_by, build_ledger(rejected(folder) | left_out), shown)
    write_table(folder.stage("version", "rejected"), [left_out["version"]], LEFT_OUT)
    return version, is_new


def asked_tasks(config: Config) -> tuple[str, ...]:
    """Return all that a model is asked in a run."""
    return (*config.tasks, *([ANSWER] if set(config.verify.checks) - {"alignment"} else []))


def about_run(
    config: Config,
    source: dict[str, Any],
    model: dict[str, Any],
    funnel: list[Step],
    measured: dict[str, Any],
    leakage: dict[str, Any],
) -> dict[str, Any]:
    """Return what a manifest says of the run that made a version."""
    asked = asked_tasks(config)
    return {
        "source": {name: source[name] for name in ("name", "revision")},
        "model": model,
        "prompts": prompt_texts(asked, config),
        "schemas": {task: wire_schema(task) for task in asked},
        "config": _public(config, source["name"], model["name"]),
        "funnel": [asdict(step) for step in funnel],
        "measured": measured,
        "leakage": leakage,
    }


def fill_draft(
    draft: Draft, annotations: pa.Table, folder: Folder, source: dict[str, Any]
) -> tuple[Rows, Measure, list[dict[str, Any]]]:
    """Write the rows of a folder's samples; return what was learned of them, what was measured, and a few for the card."""
    rows, measure = Rows(), Measure()
    shown: list[dict[str, Any]] = []
    for table in build_rows(annotations, batches(folder), source["name"], rows, decks=bool(source.get("decks"))):
        draft.add(table)
        texts = table.drop_columns(list(PIXELS)).to_pylist()
        measure.add(texts)
        shown += texts[: CARD_SAMPLES - len(shown)]
    return rows, measure, shown


def leakage_of(source: dict[str, Any], funnel: list[Step], groups: int, repeated_texts: int) -> dict[str, Any]:
    """Return what was done so that nothing held out is learned from, here or elsewhere.

    Args:
        source: what is known of the source.
        funnel: what each stage did.
        groups: how many groups of several images look alike.
        repeated_texts: how many texts stand in a data set of --never, too.
    """
    lost = {step.stage: step.rejected for step in funnel}
    return {
        "compared_as": source["compared_as"],
        "groups_of_images": groups,
        "near_held_out_annotations": lost["dedupe"].get("near_held_out_image", 0),
        "never": source["never"],
        "banned_images": lost["source"].get("banned_image", 0),
        "repeated_texts": repeated_texts,
    }


def _public(config: Config, source: str, model: str) -> dict[str, Any]:
    """Return the settings that may be published: a path of the user's is nobody's business."""
    settings = config.model_dump(mode="json", exclude={"base_url", "server"}) | {"source": source, "model": model}
    settings["never"] = [name for name in config.never if not name.startswith(("folder:", "parquet:"))]
    if config.split_list:
        settings["split_list"] = file_digest(config.split_list)
    if config.generate.prompts:
        settings["generate"]["prompts"] = config.generate.prompts.name
    if config.balance.entries:
        settings["balance"]["entries"] = file_digest(config.balance.entries)
    settings["verify"]["clip"] = public_name(config.verify.clip)
    return settings


def _settings_of(folder: Folder) -> Config:
    """Return the settings of the last run in a dataset folder."""
    if not folder.run_file.exists():
        raise ConfigError(f"{folder.path} is no folder that synth generate has written", hint="name one: --data DIR")
    try:
        return Config.model_validate_json(folder.run_file.read_bytes())
    except ValidationError:
        raise ConfigError(f"{folder.run_file} is of another synth", hint="run `synth generate` in this folder once") from None


def refuse_other_settings(folder: Folder, config: Config, start: int) -> None:
    """Refuse another source in the same folder, and, with --from-stage, settings that an earlier stage has not used."""
    if not folder.run_file.exists():
        return
    try:
        before = json.loads(folder.run_file.read_text(encoding="utf-8"))
        source = before["source"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder.run_file} is not ours", hint="choose another folder: --out DIR") from None
    if source != config.source:
        raise ConfigError(
            f"{folder.path} holds data from {source}, not {config.source}", hint="choose another folder: --out DIR"
        )
    free = {"base_url", "engine", "server", *ORDER[start:]}  # the settings of a stage that runs now may have changed
    now = config.model_dump(mode="json")
    changed = [name for name in now if start and name not in free and now[name] != before.get(name)]
    if changed:
        raise ConfigError(
            f"{changed[0]} has changed since the stages before {ORDER[start]} ran", hint="run without --from-stage"
        )
