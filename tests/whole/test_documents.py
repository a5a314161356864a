"""Videos and documents to a version by commands: frames of one video share a split, and decks have all of their pages."""

import io
import json
from pathlib import Path
from typing import Any

from datasets import load_dataset
from PIL import Image

from pipeline.dataset.version import read_version
from pipeline.formats.export import export_version
from tests.chat.server import Act, ChatServer, running_chat, uuid_of
from tests.commands import run_synth
from tests.media import write_pdf, write_video


def caption(times: int, body: dict[str, Any]) -> Act | None:
    """Return a caption that no other image has; the usual reply to questions."""
    if body["response_format"]["json_schema"]["name"] != "caption":
        return None
    words = " ".join(f"word{digit}" for digit in uuid_of(body)[:6])
    return Act(json.dumps({"caption": f"A pattern of {words}."}))


def generated(folder: Path, chat: ChatServer, *options: str) -> dict[str, Any]:
    settings = "filter: {language: null}\ndedupe: {images: none}\n"
    (folder / "s.yaml").write_text(settings)
    done = run_synth(
        "generate", *options, "--base-url", chat.url, "--model", "model", "--config", "s.yaml", "--json", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_frames_of_one_video_share_a_split_and_are_counted_before(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for number in range(12):
        write_video(tmp_path / "clips" / f"{number}.mp4", 4, (64, 48), rate=2, shift=100 * number)
    videos = ("--source", "video:clips", "--every", "1", "--tasks", "caption", "--styles", "plain")
    with running_chat(ChatServer(caption)) as chat:
        predicted = generated(tmp_path, chat, *videos, "--estimate")
        result = generated(tmp_path, chat, *videos)
        again = generated(tmp_path, chat, *videos)
        excluded = generated(tmp_path, chat, *videos, "--exclude", "video:clips/0.mp4", "--out", "e")
    assert predicted["images"] == 48 and excluded["steps"]["read"]["rejected"]["banned_image"] == 4
    assert (again["requests"]["asked"], again["is_new"]) == (0, False)
    export_version(read_version(tmp_path / result["path"]), "parquet", tmp_path / "flat")
    loaded = load_dataset(str(tmp_path / "flat"), cache_dir=str(tmp_path / "cache"))
    splits: dict[str, set[str]] = {}
    for split, rows in loaded.items():
        for name in rows["source_row"]:
            splits.setdefault(name.partition("/")[0], set()).add(split)
    assert sum(len(rows) for rows in loaded.values()) == 48 and len(splits) == 12
    assert all(len(of_video) == 1 for of_video in splits.values()) and len(set.union(*splits.values())) > 1


def test_documents_are_decks_with_all_pages(tmp_path: Path) -> None:
    (tmp_path / "talks").mkdir()
    write_pdf(tmp_path / "talks" / "long.pdf", 23)
    write_pdf(tmp_path / "talks" / "short.pdf", 3, first=30)
    (tmp_path / "talks" / "bad.pdf").write_bytes(b"%PDF-")
    with running_chat(ChatServer(caption)) as chat:
        result = generated(tmp_path, chat, "--source", "pdf:talks")
        sent = [sum(part["type"] == "image_url" for part in body["messages"][-1]["content"]) for body in chat.bodies]
    assert sorted(sent) == [3, 3, 20]
    assert result["steps"]["read"] == {"input": 4, "kept": 3, "rejected": {"unreadable_file": 1}}
    export_version(read_version(tmp_path / result["path"]), "parquet", tmp_path / "flat")
    loaded = load_dataset(str(tmp_path / "flat"), cache_dir=str(tmp_path / "cache"))
    decks = {row["source_row"]: row["pages"] for rows in loaded.values() for row in rows}
    assert {name: len(pages) for name, pages in decks.items()} == {
        "long.pdf/0001-0020": 20, "long.pdf/0021-0023": 3, "short.pdf/0001-0003": 3,
    }  # fmt: skip
    assert len({split for split, rows in loaded.items() for name in rows["source_row"] if name.startswith("long")}) == 1
    page = decks["short.pdf/0001-0003"][0]
    assert (page if isinstance(page, Image.Image) else Image.open(io.BytesIO(page["bytes"]))).size == (1536, 864)
