"""Documents: decks contain all pages."""

import io
from pathlib import Path
from typing import Any

from datasets import load_dataset
from PIL import Image

from pipeline.dataset.version import read_version
from pipeline.formats.export import export_version
from tests.chat.server import ChatServer, running_chat
from tests.commands import read_result, run_synth
from tests.media import write_pdf


def generate(folder: Path, chat: ChatServer, *options: str) -> dict[str, Any]:
    settings = "filter: {language: null}\ndedupe: {images: none}\nsplit: {test_frac: 0.4}\n"
    (folder / "s.yaml").write_text(settings)
    server = ("--base-url", chat.url, "--model", "model", "--config", "s.yaml", "--json")
    return read_result(run_synth("generate", *options, *server, cwd=folder))


def test_documents_are_decks_with_all_pages(tmp_path: Path) -> None:
    (tmp_path / "talks").mkdir()
    write_pdf(tmp_path / "talks" / "long.pdf", 23)
    write_pdf(tmp_path / "talks" / "short.pdf", 3, first=30)
    (tmp_path / "talks" / "bad.pdf").write_bytes(b"%PDF-")
    with running_chat(ChatServer()) as chat:
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


def test_estimate_warns_if_the_number_of_images_is_unknown(tmp_path: Path) -> None:
    write_pdf(tmp_path / "long.pdf", 33)
    with running_chat(ChatServer()) as chat:
        for options, warns in (((), True), (("--limit", "33"), False)):
            server = ("--base-url", chat.url, "--model", "model", "--out", f"d{len(options)}")
            source = ("--source", "pdf-pages:long.pdf", "--tasks", "caption")
            done = run_synth("estimate", *source, *server, *options, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            assert ("the number of images is unknown" in done.stderr) == warns
