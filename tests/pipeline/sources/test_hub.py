"""Hub sources, read by the real client: each row is a sample in its true split, or is rejected."""

import io
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from pipeline.config.files import resolve
from pipeline.errors import ConfigError, SourceError
from pipeline.images.decode import deck_id, image_id
from pipeline.run import generate_dataset
from pipeline.sources import open_source
from pipeline.types import Rejected, Sample, Source, non_redistributable
from tests.hub import datasets
from tests.hub.app import TOKEN
from tests.hub.server import RunningHub, running_hub
from tests.pipeline.images.test_decode import bomb


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the client at an endpoint, as HF_ENDPOINT does at import."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningHub]:
    with running_hub(tmp_path / "hub") as running:
        point_at(running.endpoint, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def opened(source: str, **settings: Any) -> Source:
    return open_source(resolve(source=source, **settings))


def read(source: str, **settings: Any) -> tuple[list[Sample], list[Rejected]]:
    rows = list(opened(source, **settings).rows)
    return [s for s in rows if isinstance(s, Sample)], [r for r in rows if isinstance(r, Rejected)]


def reasons(rejected: list[Rejected]) -> Counter[str]:
    return Counter(row.reason for row in rejected)


def test_flickr30k_conversion_has_karpathys_split(hub: RunningHub) -> None:
    datasets.seed_flickr30k(hub.hub.storage, 20)
    samples, rejected = read("flickr30k")
    assert not rejected
    assert Counter(sample.split for sample in samples) == {"train": 12, "validation": 4, "test": 4}
    assert all(len(sample.references) == 5 for sample in samples)
    assert {sample.license for sample in samples} == {"flickr-terms"}
    assert samples[0].images == (datasets.photo(0),)
    branches = hub.hub.storage.repos["dataset", "nlphuji/flickr30k"].branches
    assert opened("flickr30k").revision == branches["refs/convert/parquet"]
    assert {sample.split for sample in read("flickr30k", source_split="test")[0]} == {"test"}
    train, _ = read("flickr30k", source_split="train")
    assert (len(train), {sample.split for sample in train}) == (12, {None})  # some get held out later
    assert (opened("flickr30k").count(), opened("flickr30k", source_split="test").count()) == (20, 4)


def test_flickr30k_copy_without_split_column_is_refused(hub: RunningHub) -> None:
    datasets.seed_flickr30k_without_split(hub.hub.storage, 10)
    for split in (None, "train"):
        with pytest.raises(SourceError, match="has no split column") as caught:
            opened("flickr30k:lmms-lab/flickr30k", source_split=split)
        assert "hub:lmms-lab/flickr30k" in caught.value.hint
    samples, _ = read("flickr30k:lmms-lab/flickr30k", source_split="test")
    assert {sample.split for sample in samples} == {"test"}


def test_vqav2_sample_is_a_photo_with_all_questions(hub: RunningHub) -> None:
    datasets.seed_vqav2(hub.hub.storage, images=6, questions=3)
    samples, rejected = read("vqav2", source_split="validation")
    assert not rejected
    assert len(samples) == len({sample.id for sample in samples}) == 6
    questions = {f"How many things of kind {k} are there?" for k in range(3)}
    for sample in samples:
        assert {qa.question for qa in sample.reference_qa or ()} == questions
        # Answers are normalized as in the official evaluation.
        assert {qa.answers for qa in sample.reference_qa or ()} == {("2", "2", "2")}
        assert (sample.split, sample.license) == ("validation", "flickr-terms")
    assert opened("vqav2", source_split="validation").count() == 6
    with pytest.raises(SourceError, match="has no split train") as caught:
        opened("vqav2", source_split="train")
    assert "validation" in caught.value.hint
    samples, _ = read("vqav2", source_split="test")
    assert {qa.answers for sample in samples for qa in sample.reference_qa or ()} == {()}


def seed_bad_vqav2(hub: RunningHub) -> None:
    """Seed six photos with three questions each. One question is not UTF-8, and one is too long."""
    table = pa.Table.from_pylist(datasets.vqa_rows(6, 3), schema=datasets.VQA)
    questions = [b"How many boats of kind %d are there?" % n for n in range(18)]
    questions[1], questions[16] = b"\xff\xfe", b"w" * 1_000_001
    texts = pa.array(questions, pa.binary()).view(pa.string())
    table = table.set_column(table.schema.names.index("question"), "question", texts)
    pq.write_table(table, file := io.BytesIO(), row_group_size=5)
    hub.hub.storage.seed("dataset", "lmms-lab/VQAv2", {"data/validation-0.parquet": file.getvalue()})


def test_benchmark_rejects_only_rows_with_bad_texts(hub: RunningHub, tmp_path: Path) -> None:
    seed_bad_vqav2(hub)
    samples, rejected = read("vqav2")
    assert [(row.source_row.partition(":")[2], row.reason) for row in rejected] == [
        ("1", "unreadable_row"),
        ("16", "row_too_large"),
    ]
    # A rejected row ends a group of adjacent rows.
    assert [len(sample.reference_qa or ()) for sample in samples] == [1, 1, 3, 3, 3, 3, 1, 1]
    # The read step joins rows that are not adjacent.
    version = generate_dataset(resolve(source="vqav2", tasks="none"), tmp_path / "d").version
    tables = [pq.read_table(file, columns=["reference_qa"]) for file in version.path.glob("*.parquet")]
    assert Counter(len(row["reference_qa"]) for table in tables for row in table.to_pylist()) == {3: 4, 2: 2}


@pytest.mark.parametrize("start", [1, 2, 3, 9, 21])
def test_benchmarks_resume_at_any_row(hub: RunningHub, start: int) -> None:
    seed_bad_vqav2(hub)
    datasets.seed_flickr30k(hub.hub.storage, 20)
    flickr30k = (("flickr30k", split) for split in (None, "train", "test"))
    for source, split in (("vqav2", "validation"), *flickr30k):
        whole = opened(source, source_split=split)
        assert list(whole.read(start)) == list(whole.rows)[start:], (source, split)


def test_benchmark_with_other_columns_is_refused(hub: RunningHub) -> None:
    datasets.seed_flickr30k_without_split(hub.hub.storage, repo="me/other")
    with pytest.raises(SourceError, match="no column is named image_id") as caught:
        opened("vqav2:me/other")
    assert "use hub:ORG/NAME with --columns" in caught.value.hint


def test_slidevqa_sample_is_a_deck_with_ordered_pages(hub: RunningHub) -> None:
    datasets.seed_slidevqa(hub.hub.storage, decks=2)
    hub.hub.granted.add("NTT-hil-insight/SlideVQA")
    samples, rejected = read("slidevqa", source_split="train")
    assert not rejected
    assert [len(sample.images) for sample in samples] == [20, 20]
    first = samples[0]
    assert first.images == tuple(datasets.photo(10_000 + n) for n in range(1, 21))
    assert first.id == deck_id([image_id(page) for page in first.images])
    asked = first.reference_qa or ()
    assert [one.question for one in asked] == [f"How much more is number {n} than the other?" for n in (0, 1)]
    assert [(one.answers, one.answer_type, one.evidence_pages, one.expression) for one in asked] == [
        (("12%",), "Single-Span", (2,), None), (("12%",), "Non-Span", (1, 3), "30% - 18%")
    ]  # fmt: skip


@pytest.mark.parametrize("token", [TOKEN, None])
def test_gated_dataset_error_has_a_hint(
    hub: RunningHub, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    datasets.seed_slidevqa(hub.hub.storage)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/does/not/exist")
    with pytest.raises(SourceError, match="gated") as caught:
        read("slidevqa")
    assert "/datasets/NTT-hil-insight/SlideVQA" in caught.value.hint
    assert "hf auth login" in caught.value.hint


PLAIN = pa.schema([("photo", datasets.IMAGE), ("alt_text", pa.string()), ("other", datasets.IMAGE)])


def seed_plain(
    hub: RunningHub, rows: list[dict[str, Any]], schema: pa.Schema = PLAIN, repo: str = "me/plain"
) -> None:
    files = {"data/train-00000-of-00001.parquet": datasets.parquet(rows, schema)}
    hub.hub.storage.seed("dataset", repo, {**files, "README.md": b"---\nlicense: apache-2.0\n---\n"})


def test_images_have_the_license_of_the_card(hub: RunningHub) -> None:
    seed_plain(hub, [{"photo": datasets.cell(n), "alt_text": f"Photo {n}."} for n in range(2)])
    samples, _ = read("hub:me/plain", columns={"image": "photo"})
    assert [(s.references, s.license, s.split) for s in samples] == [
        ((f"Photo {n}.",), "apache-2.0", "train") for n in range(2)
    ]


@pytest.mark.parametrize(("declared", "license_name"), [("[mit, 2]", "mit, 2"), ("2.0", "2.0")])
def test_license_that_is_not_a_text_is_read_as_text(
    hub: RunningHub, declared: str, license_name: str
) -> None:
    table = datasets.parquet([{"photo": datasets.cell(0)}], PLAIN)
    files = {"train.parquet": table, "README.md": f"---\nlicense: {declared}\n---\n".encode()}
    hub.hub.storage.seed("dataset", "me/odd", files)
    (sample,), _ = read("hub:me/odd", columns={"image": "photo"})
    assert sample.license == license_name


def test_numbered_page_columns_become_decks(hub: RunningHub) -> None:
    datasets.seed_slidevqa(hub.hub.storage, repo="me/slides")
    hub.hub.granted.add("me/slides")
    samples, _ = read("hub:me/slides", columns={"pages": "page_*"}, source_split="validation")
    # Without deck names, each question is a row of its own.
    assert [len(sample.images) for sample in samples] == [7, 7]
    assert non_redistributable([samples[0].license]) == ["gated, undeclared"]
    assert non_redistributable(["apache-2.0", "cc0-1.0", "unknown"]) == []


# The n-th file of the repository has photo n.
PATHS = ("en/train/0", "fr/train/0", "fr/test/0", "data/train-0", "data/train-more/train-0", "en/0", "fr/0")
FILES = tuple(f"{path}.parquet" for path in PATHS)
EN_AND_FR = FILES[:3]
FOLDER_AND_GLOB = "- {config_name: a, data_dir: ./en}\n- {config_name: b, data_files: ./fr/test/*}\n"
TWO = "- {config_name: english, data_files: en/train/*}\n- {config_name: french, data_files: fr/train/*}\n"


@pytest.mark.parametrize(
    ("files", "configs", "name", "expected"),
    [
        (EN_AND_FR, "", ":fr", {1: "train", 2: "test"}),
        (EN_AND_FR, "", ":de", "has no config de .*it has en, fr"),
        (FILES[5:], "", ":de", "has no config de .*it has en, fr"),
        (EN_AND_FR, "", "", "has several configs: en, fr .*--source hub:me/mixed:en"),
        (EN_AND_FR, TWO, "", "has several configs: english, french .*--source hub:me/mixed:english"),
        (EN_AND_FR, TWO, ":french", {1: "train"}),
        (EN_AND_FR, TWO.replace("fr/train/*", "fr/train/*, default: true"), "", {1: "train"}),
        (EN_AND_FR, TWO.replace("english", "default"), "", {0: "train"}),
        (EN_AND_FR, FOLDER_AND_GLOB, ":a", {0: "train"}),
        (EN_AND_FR, FOLDER_AND_GLOB, ":b", {2: "test"}),
        (EN_AND_FR,
         "- config_name: x\n  data_files: [{split: testA, path: [fr/train/*, fr/test/*]}]\n- nonsense\n", "",
         {1: "test", 2: "test"}),  # the card's split overrides the path
        (FILES[3:5],
         "- config_name: default\n"
         "  data_files: [{split: train, path: data/train-*}, {path: ./data/*.parquet}]\n",
         "", {3: "train"}),  # `*` matches no subfolders; a file that matches twice is read once
        (FILES[3:4], "- {config_name: x, data_files: data/*}\n- {config_name: y, data_files: data/*}\n", "",
         {3: "train"}),
    ],
)  # fmt: skip
def test_config_is_a_folder_or_declared_on_the_card(
    hub: RunningHub, files: tuple[str, ...], configs: str, name: str, expected: dict[int, str] | str
) -> None:
    tables = {file: datasets.parquet([{"photo": datasets.cell(FILES.index(file))}], PLAIN) for file in files}
    card = {"README.md": f"---\nconfigs:\n{configs}---\n".encode()} if configs else {}
    hub.hub.storage.seed("dataset", "me/mixed", {**tables, **card})
    if isinstance(expected, str):
        with pytest.raises(SourceError) as caught:
            opened(f"hub:me/mixed{name}")
        assert re.search(expected, f"{caught.value} {caught.value.hint}")
        return
    rows, _ = read(f"hub:me/mixed{name}", columns={"image": "photo"})
    splits = {row.images[0]: row.split for row in rows}
    assert splits == {datasets.photo(n): split for n, split in expected.items()}
    assert len(rows) == len(expected)


def test_partial_conversion_is_read_and_stated_on_the_card(hub: RunningHub, tmp_path: Path) -> None:
    rows = [{"photo": datasets.cell(n), "alt_text": f"Two red boats near pier {n}."} for n in range(3)]
    hub.hub.storage.seed("dataset", "me/large", {"large.py": datasets.SCRIPT})
    files = {
        "default/partial-train/0000.parquet": datasets.parquet(rows, PLAIN),
        "default/test/0000.parquet": datasets.parquet([], PLAIN),
    }
    hub.hub.storage.seed("dataset", "me/large", files, branch="refs/convert/parquet")
    columns = {"image": "photo", "references": "alt_text"}
    source = opened("hub:me/large", columns=columns)
    assert source.is_partial and "to read the rest" in source.messages[0]
    assert [row.split for row in source.rows if isinstance(row, Sample)] == ["train"] * 3
    config = resolve(source="hub:me/large", columns=columns, tasks="none")
    version = generate_dataset(config, tmp_path / "d").version
    assert version.manifest["source"]["partial"] is True
    assert "**only the first part of it**" in (version.path / "README.md").read_text()


def test_revision_is_a_pinned_commit(hub: RunningHub) -> None:
    seed_plain(hub, [{"photo": datasets.cell(0)}])
    first = hub.hub.storage.repos["dataset", "me/plain"].branches["main"]
    seed_plain(hub, [{"photo": datasets.cell(1)}, {"photo": datasets.cell(2)}])
    columns = {"image": "photo"}
    assert len(read("hub:me/plain", columns=columns)[0]) == 2
    assert len(read(f"hub:me/plain@{first}", columns=columns)[0]) == 1
    assert opened(f"hub:me/plain@{first}", columns=columns).revision == first


def test_reading_few_rows_downloads_only_a_part_of_the_files(hub: RunningHub) -> None:
    schema = pa.schema([("image", datasets.IMAGE)])
    cells = [{"bytes": datasets.photo(n, (600, 450)) + bytes(60_000), "path": None} for n in range(300)]
    table = datasets.parquet([{"image": cell} for cell in cells], schema, rows_a_group=30)
    files = {f"data/train-{k:05d}-of-00002.parquet": table for k in range(2)}
    hub.hub.storage.seed("dataset", "me/large", files)
    whole = sum(len(data) for data in files.values())
    hub.hub.sent_bytes = 0
    opened_rows = opened("hub:me/large").rows
    for _ in range(20):
        assert isinstance(next(opened_rows), Sample)
    opened_rows.close()  # type: ignore[attr-defined]  # a generator
    assert hub.hub.sent_bytes < whole / 4
    hub.hub.sent_bytes = 0
    assert len(list(opened("hub:me/large").read(560))) == 40  # the last rows of the second file
    assert hub.hub.sent_bytes < whole / 4


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("hub:me/nothing", "no dataset me/nothing"),
        ("hub:a/b/c", "not the name of a dataset"),
        ("hub:me/empty", "has no Parquet files"),
        ("hub:me/plain@nowhere", "me/plain has no revision nowhere"),
    ],
)
def test_missing_repository_or_revision_is_an_error(hub: RunningHub, source: str, what: str) -> None:
    seed_plain(hub, [{"photo": datasets.cell(0)}])
    hub.hub.storage.seed("dataset", "me/empty", {"script.py": datasets.SCRIPT})
    with pytest.raises(SourceError, match=what) as caught:
        opened(source)
    assert caught.value.hint


def test_unreachable_hub_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(SourceError, match=r"the Hub at http://127.0.0.1:9 does not answer") as caught:
        opened("flickr30k")
    assert "--source scenes" in caught.value.hint


def test_unsupported_options_are_refused() -> None:
    for settings, what in (
        ({"columns": {"image": "x"}, "source": "flickr30k"}, "flickr30k does not support --columns"),
        ({"source_split": "train", "source": "scenes-deck"}, "does not support --split"),
        ({"source": "hub:"}, "--source hub needs an argument: hub:ORG/NAME"),
        ({"source": "folder"}, "--source folder needs an argument: folder:PATH"),
        ({"source": "scenes", "tasks": ["deck_qa"]}, "consists of single images"),
        ({"source": "scenes-deck", "tasks": ["caption"]}, "consists of decks of pages"),
    ):
        with pytest.raises(ConfigError, match=what) as caught:
            open_source(resolve(**settings))
    assert "--tasks deck_qa" in caught.value.hint


def test_paths_and_urls_in_rows_are_never_opened(hub: RunningHub, tmp_path: Path) -> None:
    canary = tmp_path / "canary.png"
    canary.write_bytes(datasets.photo(7))
    connections: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as trap:
        address = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        watcher = threading.Thread(target=lambda: connections.append(trap.accept()), daemon=True)
        watcher.start()
        paths = [str(canary), f"file://{canary}", "../../canary.png", "/etc/passwd", address]
        paths.append("hf://datasets/me/other/x.png")
        rows = [{"photo": {"bytes": None, "path": path}, "alt_text": "x", "other": None} for path in paths]
        huge, empty = datasets.cell(1, bytes=bomb(10_000, 10_000)), {"bytes": b"", "path": None}
        seed_plain(hub, [*rows, *({"photo": cell} for cell in (huge, empty, None, datasets.cell(3)))])
        accessed = canary.stat().st_atime_ns
        samples, rejected = read("hub:me/plain", columns={"image": "photo"})
        assert not connections
    assert canary.stat().st_atime_ns == accessed
    assert [sample.images for sample in samples] == [(datasets.photo(3),)]
    expected = {"image_not_embedded": len(paths), "too_many_pixels": 1, "image_missing": 2}
    assert reasons(rejected) == expected
    assert str(canary) not in json.dumps([row.detail for row in rejected])
