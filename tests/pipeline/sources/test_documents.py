"""Documents and videos: pages and frames become samples, and damaged files are rejected."""

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.files import resolve
from pipeline.errors import ConfigError, SourceError
from pipeline.sources import documents, open_source, with_source_defaults
from pipeline.steps.split import name_key
from pipeline.tasks.base import MAX_PAGES
from pipeline.types import Rejected, Sample, Source
from tests.media import text_pdf, write_pdf, write_video
from tests.pipeline.sources.reading import rejected_of, samples_of


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "talks").mkdir()
    write_pdf(folder / "talks" / "long.PDF", 2 * MAX_PAGES + 5, (160, 90))
    write_pdf(folder / "short.pdf", 3)
    (folder / "bad.pdf").write_bytes(b"%PDF-1.4 and no more")
    write_video(folder / "talks" / "clip.mp4", 11)
    write_video(folder / "one.mkv", 1, shift=50)
    (folder / "._short.pdf").write_bytes(b"of a Mac")
    (folder / "notes.txt").write_text("nothing to see")
    (folder / "list.m3u8").write_text("#EXTM3U\nclip.mp4\n")
    return folder


def rows(source: Source) -> dict[str, Sample | Rejected]:
    return {row.source_row: row for row in source.rows}


def opened(source: str, **settings: Any) -> Source:
    return open_source(resolve(source=source, **settings))


def test_long_document_becomes_several_decks(files: Path) -> None:
    source = opened(f"pdf:{files}")
    pages = {row.source_row: len(row.images) for row in samples_of(source)}
    assert pages | {row.source_row: row.reason for row in rejected_of(source)} == {
        "bad.pdf": "unreadable_file",
        "short.pdf/0001-0003": 3,
        "talks/long.PDF/0001-0020": 20,
        "talks/long.PDF/0021-0040": 20,
        "talks/long.PDF/0041-0045": 5,
    }
    assert source.decks and source.name == "pdf"
    hidden, others = source.messages
    assert hidden == "hidden files and folders, which are not read: 1 (._short.pdf)"
    assert others.startswith("files that are not pdf files: 4 (") and "list.m3u8" in others


def test_pdf_pages_are_single_images(files: Path) -> None:
    source = opened(f"pdf-pages:{files / 'short.pdf'}")
    assert list(rows(source)) == ["short.pdf/0001", "short.pdf/0002", "short.pdf/0003"]
    assert not source.decks and not source.messages


def test_frames_are_named_after_video_and_time(files: Path) -> None:
    outcome_of = rows(opened(f"video:{files}"))
    assert [*outcome_of] == ["one.mkv/00000.000s", *(f"talks/clip.mp4/{n:05d}.000s" for n in (0, 5, 10))]
    assert len(rows(opened(f"video:{files}/talks/clip.mp4", frame_seconds=2))) == 6
    assert len({row.id for row in outcome_of.values() if isinstance(row, Sample)}) == 4


def test_images_of_one_document_or_video_form_one_split_group(files: Path) -> None:
    for source in ("pdf", "pdf-pages", "video"):
        config = with_source_defaults(resolve(source=f"{source}:{files}"))
        assert config.split.group_by == "folder"
        given = resolve(source=f"{source}:{files}", split={"group_by": None})
        assert with_source_defaults(given).split.group_by is None
    # The group is the file, not its folder.
    key_of = {"talks/long.PDF/0001-0020": "talks/long.PDF", "one.mkv/00000.000s": "one.mkv"}
    assert {name: name_key(name, "folder") for name in key_of} == key_of


def test_revision_depends_on_files_and_frame_interval(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 2)
    write_pdf(tmp_path / "a.pdf", 1)
    first = opened(f"video:{tmp_path}").revision
    assert opened(f"video:{tmp_path}").revision == first
    assert opened(f"video:{tmp_path}", frame_seconds=1).revision != first
    pdf = opened(f"pdf:{tmp_path}").revision
    write_pdf(tmp_path / "a.pdf", 2)
    assert opened(f"pdf:{tmp_path}").revision != pdf
    assert opened(f"video:{tmp_path}").revision == first


def test_damaged_page_rejects_only_its_row(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", 45, (160, 90))
    data = (tmp_path / "a.pdf").read_bytes()
    kids = data[data.index(b"/Kids [") + 7 :].split(b"]")[0].split(b" R")
    broken = kids[24].strip()  # the object of page 25
    other = b"9999 0 R"[: len(broken) + 2].ljust(len(broken) + 2)
    (tmp_path / "a.pdf").write_bytes(data.replace(broken + b" R", other, 1))
    decks = rows(opened(f"pdf:{tmp_path}"))
    assert [*decks] == ["a.pdf/0001-0020", "a.pdf/0021-0040", "a.pdf/0041-0045"]
    (bad,) = (row for row in decks.values() if isinstance(row, Rejected))
    assert bad.source_row == "a.pdf/0021-0040" and "page 25" in bad.detail
    pages = rows(opened(f"pdf-pages:{tmp_path}"))
    lost = [name for name, row in pages.items() if isinstance(row, Rejected)]
    # After a damaged page, pdfium may also fail to find the next page.
    assert lost in (["a.pdf/0025"], ["a.pdf/0025", "a.pdf/0026"]) and len(pages) == 45


def test_linked_document_is_rejected_without_follow_links(tmp_path: Path) -> None:
    (tmp_path / "private.pdf").write_bytes(text_pdf("secret"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.pdf").symlink_to(tmp_path / "private.pdf")
    os.mkfifo(tmp_path / "folder" / "b.pdf")
    outcome_of = rows(opened(f"pdf:{tmp_path / 'folder'}"))
    refused = {name: row.reason for name, row in outcome_of.items() if isinstance(row, Rejected)}
    assert refused == {"a.pdf": "outside_folder", "b.pdf": "not_a_file"}
    allowed = rows(opened(f"pdf:{tmp_path / 'folder'}", follow_links=True))
    assert isinstance(allowed["a.pdf/0001-0001"], Sample)
    named = rows(opened(f"pdf:{tmp_path / 'folder/a.pdf'}"))  # the user names the link itself
    assert isinstance(named["a.pdf/0001-0001"], Sample)


def test_missing_document_is_an_error(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("none.pdf", ""):
        with pytest.raises(SourceError, match="no pdf file at"):
            opened(f"pdf:{tmp_path / name}")
    monkeypatch.setattr(documents, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="need the package pypdfium2") as caught:
        opened(f"pdf:{files}")
    assert "pdf" in caught.value.hint
