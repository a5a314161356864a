"""Videos and documents: frames of one video share a split, and decks contain all pages."""

import io
import json
from pathlib import Path
from typing import Any

from datasets import load_dataset
from PIL import Image

from pipeline.dataset.version import read_version
from pipeline.formats.export import export_version
from tests.chat.server import Act, ChatServer, running_chat, uuid_of
from tests.commands import read_result, run_synth
from tests.media import write_pdf, write_video


def caption(times: int, body: dict[str, Any]) -> Act | None:
    """Return a caption that is unique to the image, or the default reply to questions."""
    if body["response_format"]["json_schema"]["name"] != "caption":
        return None
    words = " ".join(f"word{digit}" for digit in uuid_of(body)[:6])
    return Act(json.dumps({"caption": f"A pattern of {words}."}))


def generate(folder: Path, chat: ChatServer, *options: str) -> dict[str, Any]:
    settings = "filter: {language: null}\ndedupe: {images: none}\nsplit: {test_frac: 0.4}\n"
    (folder / "s.yaml").write_text(settings)
    server = ("--base-url", chat.url, "--model", "model", "--config", "s.yaml", "--json")
    return read_result(run_synth("generate", *options, *server, cwd=folder))


def test_frames_of_one_video_share_a_split(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for number in range(5):
        write_video(tmp_path / "clips" / f"{number}.mp4", 3, (64, 48), rate=2, shift=100 * number)
    videos = ("--source", "video:clips", "--every", "1", "--tasks", "caption", "--styles", "plain")
    with running_chat(ChatServer(caption)) as chat:
        predicted = generate(tmp_path, chat, *videos, "--estimate")
        result = generate(tmp_path, chat, *videos)
        again = generate(tmp_path, chat, *videos)
        excluded = generate(tmp_path, chat, *videos, "--exclude", "video:clips/0.mp4", "--out", "e")
    assert predicted["images"] == 15 and excluded["steps"]["read"]["rejected"]["banned_image"] == 3
    assert (again["requests"]["asked"], again["is_new"]) == (0, False)
    export_version(read_version(tmp_path / result["path"]), "parquet", tmp_path / "flat")
    loaded = load_dataset(str(tmp_path / "flat"), cache_dir=str(tmp_path / "cache"))
    splits: dict[str, set[str]] = {}
    for split, rows in loaded.items():
        for name in rows["source_row"]:
            splits.setdefault(name.partition("/")[0], set()).add(split)
    assert sum(len(rows) for rows in loaded.values()) == 15 and len(splits) == 5
    assert all(len(of_video) == 1 for of_video in splits.values()) and len(set.union(*splits.values())) > 1


def test_documents_are_decks_with_all_pages(tmp_path: Path) -> None:
    (tmp_path / "talks").mkdir()
    write_pdf(tmp_path / "talks" / "long.pdf", 23)
    write_pdf(tmp_path / "talks" / "short.pdf", 3, first=30)
    (tmp_path / "talks" / "bad.pdf").write_bytes(b"%PDF-")
    with running_chat(ChatServer(caption)) as chat:
        result = generate(tmp_path, chat, "--source", "pdf:talks")
        sent = [[part["type"] for part in body["messages"][-1]["content"]] for body in chat.bodies]
        assert sorted(kinds.count("image_url") for kinds in sent) == [3, 3, 20]
    assert result["steps"]["read"] == {"input": 4, "kept": 3, "rejected": {"unreadable_file": 1}}
    export_version(read_version(tmp_path / result["path"]), "parquet", tmp_path / "flat")
    loaded = load_dataset(str(tmp_path / "flat"), cache_dir=str(tmp_path / "cache"))
    decks = {row["source_row"]: row["pages"] for rows in loaded.values() for row in rows}
    assert {name: len(pages) for name, pages in decks.items()} == {
        "long.pdf/0001-0020": 20, "long.pdf/0021-0023": 3, "short.pdf/0001-0003": 3,
    }  # fmt: skip
    assert sum("long" in "".join(rows["source_row"]) for rows in loaded.values()) == 1
    page = decks["short.pdf/0001-0003"][0]
    image = page if isinstance(page, Image.Image) else Image.open(io.BytesIO(page["bytes"]))
    assert image.size == (1536, 864)
