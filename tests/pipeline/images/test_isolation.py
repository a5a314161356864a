"""Isolation: an image that kills, fills or stalls its decoder is rejected alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import ImageError
from pipeline.images import isolation
from pipeline.images.decode import check_image
from pipeline.images.isolation import CheckedImage, Result, check_all
from pipeline.images.metadata import strip_metadata
from tests.media import encoded
from tests.pipeline.images.test_metadata import jpeg

PATCHED = """
import os, signal, struct, sys
from pipeline.images import isolation
check = isolation.check_image
def patched(data, **options):
    if data.startswith(b"EVIL"):
        {attack}
    return check(data, **options)
isolation.check_image = patched
strip = isolation.strip_metadata
isolation.strip_metadata = lambda data: data if data.startswith(b"EVIL") else strip(data)
{settings}
isolation.serve()
"""


ANSWER = "os.write(1, struct.pack('!i', len(d))); sys.stdout.buffer.write(d); sys.stdout.flush()"


def png(side_px: int = 16, color: str = "red") -> bytes:
    return encoded(Image.new("RGB", (side_px, side_px), color))


@pytest.fixture(autouse=True)
def own_pool() -> Iterator[None]:
    """Give each test its own workers."""
    isolation._pool.cache_clear()
    yield
    isolation._pool().close()
    isolation._pool.cache_clear()


def patch(monkeypatch: pytest.MonkeyPatch, attack: str, settings: str = "") -> None:
    monkeypatch.setattr(isolation, "_SERVE", PATCHED.format(attack=attack, settings=settings))


def check(*images: bytes) -> list[Result]:
    return [result for _, result in check_all(iter([(n, (image,)) for n, image in enumerate(images)]))]


def reason(result: Result) -> str:
    return result.reason if isinstance(result, ImageError) else "fine"


def test_worker_process_returns_the_same_image_facts_as_the_calling_process() -> None:
    for original in (png(), jpeg(), png(200)):
        (result,) = check(original)
        assert isinstance(result, list)
        data = strip_metadata(original)
        assert result == [CheckedImage(data, check_image(data))]


def test_unreadable_page_rejects_the_whole_deck() -> None:
    jobs = iter([("deck", (png(), png(20))), ("spoilt", (png(), b"x")), ("empty", ())])
    results = dict(check_all(jobs))
    assert len(results["deck"]) == 2  # type: ignore[arg-type]
    assert reason(results["spoilt"]) == "unreadable_image"
    assert results["empty"] == []


def test_results_keep_the_order_of_images() -> None:
    sides = [8 + n for n in range(60)]
    jobs = iter([(side, (png(side),)) for side in sides])
    assert [(side, side) for side in sides] == [(key, r[0].info.width_px) for key, r in check_all(jobs)]  # type: ignore[index]


def test_source_error_is_raised_after_the_images_before_it() -> None:
    def jobs() -> Iterator[tuple[int, tuple[bytes, ...]]]:
        yield 0, (png(),)
        raise RuntimeError("the source is gone")

    results = check_all(jobs())
    assert next(results)[0] == 0
    with pytest.raises(RuntimeError, match="the source is gone"):
        next(results)


@pytest.mark.parametrize(
    ("attack", "settings", "expected"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "", "decoder_died"),
        ("while True: pass", "isolation.CPU_SECONDS = 1", "too_slow"),
        ("x = bytearray(10**9)", "isolation.MEMORY_BYTES = 200_000_000", "too_much_memory"),
        ("sys.stdout.buffer.write(b'x' * 999); sys.stdout.flush(); os._exit(0)", "", "decoder_died"),
        ("os.write(1, struct.pack('!iQ', -1, 1 << 50))", "", "decoder_died"),
        ("raise ValueError('odd')", "", "decoder_died"),
        (f"d = b'[' * 900_000; {ANSWER}", "", "decoder_died"),
        (f'd = b\'{{"images": [[Infinity, 1, ""]]}}\'; {ANSWER}', "", "decoder_died"),
    ],
)
def test_only_the_image_that_kills_its_worker_is_rejected(
    attack: str, settings: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(monkeypatch, attack, settings)
    results = check(png(), b"EVIL 1", png(20), b"EVIL 2", png(30), png(40))
    assert [reason(result) for result in results] == ["fine", expected, "fine", expected, "fine", "fine"]


def test_sleeping_worker_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "WALL_SECONDS", 3.0)
    patch(monkeypatch, "import time; time.sleep(600)")
    results = check(png(), png(20), b"EVIL", png())
    assert [reason(result) for result in results] == ["fine", "fine", "too_slow", "fine"]


def test_worker_has_no_keys_and_cannot_write_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    monkeypatch.setenv("SYNTH_API_KEY", "SECRET")
    answer = "raise isolation.ImageError('answered', 'SECRET' in str(os.environ) and 'leaked' or 'nothing')"
    patch(monkeypatch, answer)
    (result,) = check(b"EVIL")
    assert (reason(result), str(result)) == ("answered", "nothing")
    isolation._pool().close()
    isolation._pool.cache_clear()
    patch(monkeypatch, f"open({str(tmp_path / 'file')!r}, 'w').write('x')")
    assert reason(check(b"EVIL")[0]) != "fine"
    assert not (tmp_path / "file").exists() or not (tmp_path / "file").stat().st_size


def test_image_of_50_megapixels_fits_into_worker_memory() -> None:
    (result,) = check(encoded(Image.new("RGBA", (10_000, 5_000), (1, 2, 3, 4)), compress_level=1))
    assert reason(result) == "fine"
