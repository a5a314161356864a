"""Rendering: pages and frames come in order from an isolated process, and damaged files are rejected."""

import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import ImageError
from pipeline.images import isolation, rendering
from pipeline.images.rendering import Kind, Rendered, render
from tests.media import text_pdf, write_pdf, write_video
from tests.whole.conftest import is_alive, wait_until


def rendered(path: Path, kind: Kind = "pdf", every_s: float = 1.0) -> list[Rendered]:
    with path.open("rb") as file:
        return list(render(kind, file, path.suffix, every_s))


def image_of(one: Rendered) -> Image.Image:
    return Image.open(io.BytesIO(one.data))


def reason_of(path: Path, kind: Kind = "pdf") -> str:
    with pytest.raises(ImageError) as caught:
        rendered(path, kind)
    return caught.value.reason


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_pages_are_rendered_in_order_at_one_size(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", 3)
    pages = rendered(tmp_path / "a.pdf")
    assert [page.place for page in pages] == [1, 2, 3]
    assert {image_of(page).size for page in pages} == {(1536, 864)}
    rows = [image_of(page).convert("RGB").crop((0, 200, 1536, 201)).tobytes() for page in pages]
    bars = [row.count(b"\xff\xff\xff") for row in rows]
    assert bars == sorted(bars, reverse=True) and bars[0] > bars[2]  # each page has a longer bar


def test_frames_are_read_at_the_requested_interval(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 7)
    for every_s, places in ((2.0, [0, 2000, 4000, 6000]), (1e9, [0])):
        assert [frame.place for frame in rendered(tmp_path / "a.mp4", "video", every_s)] == places
    assert len(rendered(tmp_path / "a.mp4", "video", 0.1)) == 70
    frames = rendered(tmp_path / "a.mp4", "video", 0.5)
    assert [frame.place for frame in frames] == list(range(0, 7000, 500))
    assert {image_of(frame).size for frame in frames} == {(320, 240)}
    assert len({image_of(frame).getpixel((10, 10)) for frame in frames}) >= 5  # another image in each second


@pytest.mark.parametrize("suffix", [".mkv", ".mpg", ".ts", ".avi"])
def test_video_containers_are_read(suffix: str, tmp_path: Path) -> None:
    write_video(tmp_path / f"a{suffix}", 2, rate=25)
    assert [frame.place // 1000 for frame in rendered(tmp_path / f"a{suffix}", "video")] == [0, 1]


def test_damage_in_a_video_is_reported_and_skipped(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 20)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = len(data) // 5
    data[at : at + 3000] = bytes(3000)
    frames = rendered(saved(tmp_path / "b.mp4", bytes(data)), "video")
    assert len([frame for frame in frames if frame.fault]) <= 1
    assert len([frame for frame in frames if frame.data]) >= 15


def test_large_frames_are_scaled_down(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 1, (2560, 1440), rate=2)
    assert [image_of(frame).size for frame in rendered(tmp_path / "a.mp4", "video")] == [(2048, 1152)]


PLAYLIST = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile /etc/hostname\n"
DAMAGED: dict[str, Callable[[Path], bytes]] = {
    "empty.pdf": lambda good: b"",
    "cut.pdf": lambda good: (good / "good.pdf").read_bytes()[:1500],
    "cut.mp4": lambda good: (good / "good.mp4").read_bytes()[:3000],
    "playlist.mp4": lambda good: PLAYLIST,
    "concat.mkv": lambda good: CONCAT,
    "pdf.mp4": lambda good: (good / "good.pdf").read_bytes(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    write_pdf(tmp_path / "good.pdf", 1)
    write_video(tmp_path / "good.mp4", 1)
    path = saved(tmp_path / name, DAMAGED[name](tmp_path))
    assert reason_of(path, "pdf" if path.suffix == ".pdf" else "video") in ("unreadable_file", "empty_file")


def test_thin_pages_and_encrypted_documents_are_refused(tmp_path: Path) -> None:
    (line,) = rendered(saved(tmp_path / "line.pdf", text_pdf(media_box="0 0 100000 2")))
    assert line.data == b"" and "page 1: its size is 100000 by 2 points" in line.fault
    (huge,) = rendered(saved(tmp_path / "huge.pdf", text_pdf(media_box="0 0 100000 50000")))
    assert image_of(huge).size == (1536, 768)
    encryption = b"/Filter /Standard /V 1 /R 2 /P -4 /O (%s) /U (%s)" % (b"x" * 32, b"y" * 32)
    trailer = b"/Root 1 0 R /Encrypt << %s >> /ID [(a) (b)]" % encryption
    locked = text_pdf().replace(b"/Root 1 0 R", trailer)
    assert reason_of(saved(tmp_path / "locked.pdf", locked)) == "encrypted"


def test_script_in_a_document_is_not_run(tmp_path: Path) -> None:
    script = f"/OpenAction << /S /JavaScript /JS (app.launchURL\\('file:///{tmp_path}/x'\\)) >>"
    launch = f"/AA << /O << /S /Launch /F (/usr/bin/touch {tmp_path}/launched) >> >>"
    assert len(rendered(saved(tmp_path / "js.pdf", text_pdf(more=f"{script} {launch}")))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["js.pdf"]


@pytest.mark.parametrize(
    ("attack", "settings", "reason"),
    [
        ("while True: pass", "isolation.CPU_SECONDS = 1", "too_slow"),
        ("x = bytearray(10**9)", "isolation.MEMORY_BYTES = 300_000_000", "too_much_memory"),
        ("os.kill(os.getpid(), 11)", "", "decoder_died"),
        ("os.write(1, struct.pack('!iQ', -1, 1 << 50))", "", "decoder_died"),
        ("open('/etc/hostname')", "", "unreadable_file"),
        ("__import__('socket').create_connection(('127.0.0.1', 9))", "", "unreadable_file"),
        ("os.close(0); os.close(2); open('/etc/hostname')", "", "unreadable_file"),
        ("os.close(2); __import__('socket').socket()", "", "unreadable_file"),
    ],
)
def test_compromised_document_decoder_is_stopped_and_cannot_open_files_or_sockets(
    attack: str, settings: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"""
import os, socket, struct
from pipeline.images import isolation, rendering
{settings}
pages = rendering._pages
def patched(pdfium, data):
    answers = pages(pdfium, data)
    yield next(answers)
    {attack}
rendering._pages = patched
rendering.serve()
"""
    monkeypatch.setattr(rendering, "_SERVE", code)
    write_pdf(tmp_path / "a.pdf", 2)
    with (tmp_path / "a.pdf").open("rb") as file:
        pages = render("pdf", file, ".pdf")
        assert next(pages).place == 1  # earlier pages are valid
        with pytest.raises(ImageError) as caught:
            next(pages)
    assert caught.value.reason == reason
    if reason == "unreadable_file":
        assert "Too many open files" in str(caught.value)


def test_slow_file_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "WALL_SECONDS", 1.0)
    monkeypatch.setattr(rendering, "_SERVE", "import time; time.sleep(600)")
    write_pdf(tmp_path / "a.pdf", 1)
    assert reason_of(tmp_path / "a.pdf") == "too_slow"


def test_renderer_is_killed_with_its_parent(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", 2)
    waits = f"""
import os, time
from pathlib import Path
from pipeline.images import rendering
def never_answer(file):
    Path({str(tmp_path)!r}, "part").write_text(str(os.getpid()))
    Path({str(tmp_path)!r}, "part").rename({str(tmp_path / "pid")!r})
    time.sleep(3600)
rendering._open_pdf = never_answer
rendering.serve()
"""
    reads = f"""
from pipeline.images import rendering
rendering._SERVE = {waits!r}
list(rendering.render("pdf", open({str(tmp_path / "a.pdf")!r}, "rb"), ".pdf"))
"""
    parent = subprocess.Popen([sys.executable, "-c", reads])
    while not (tmp_path / "pid").exists():
        assert parent.poll() is None
        time.sleep(0.05)
    renderer = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_alive(renderer), "the renderer is gone")
