"""Over 200 odd images are read or rejected, without a crash or a warning."""

import io
import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

from PIL import Image

from pipeline.images.decode import has_heif

FORMATS = {
    "PNG": (".png", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    "JPEG": (".jpg", ("L", "RGB", "CMYK")),
    "WEBP": (".webp", ("RGB", "RGBA")),
    "GIF": (".gif", ("L", "P", "RGB")),
    "BMP": (".bmp", ("1", "L", "P", "RGB")),
    "TIFF": (".tif", ("1", "L", "RGB", "RGBA", "CMYK", "F", "I;16")),
    "HEIF": (".heic", ("L", "RGB", "RGBA")),
}
DAMAGE = (
    "none", "empty", "cut in half", "first bytes only", "bits flipped", "zeros in the middle",
    "rubbish behind", "mislabelled",
)  # fmt: skip
REASONS = {"unreadable_image", "unsupported_depth", "too_many_pixels", "too_narrow"}
READ = """
import json, resource, sys
from pathlib import Path
from tests.pipeline.sources.reading import open_folder
from pipeline.types import Sample
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = list(open_folder(Path(sys.argv[1])).rows)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
reasons = [[row.source_row, None if isinstance(row, Sample) else row.reason] for row in rows]
print(json.dumps(reasons + [["grown_kb", grown]]))
"""


def odd(kind: str, mode: str, damage: str, rng: random.Random) -> bytes:
    out = io.BytesIO()
    base = Image.effect_noise((64, 48), 60)
    image = base.convert("I;16") if mode == "I;16" else base.convert(mode)
    options = {"progressive": True} if kind == "JPEG" and rng.random() < 0.5 else {}
    frames = [image.rotate(90), image] if kind in ("GIF", "WEBP") and rng.random() < 0.5 else []
    image.save(out, kind, **options, **({"save_all": True, "append_images": frames} if frames else {}))
    data = bytearray(out.getvalue())
    if damage == "empty":
        return b""
    if damage == "cut in half":
        return bytes(data[: len(data) // 2])
    if damage == "first bytes only":
        return bytes(data[:20])
    if damage == "bits flipped":
        for _ in range(20):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if damage == "zeros in the middle":
        data[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    return bytes(data) + (rng.randbytes(3000) if damage == "rubbish behind" else b"")


def test_each_odd_image_is_read_or_rejected_silently(tmp_path: Path) -> None:
    rng = random.Random(0)
    assert has_heif()  # registers the encoder
    for kind, (suffix, modes) in FORMATS.items():
        for mode, damage in itertools.product(modes, DAMAGE):
            name = f"{kind}-{mode.replace(';', '')}-{damage.replace(' ', '_')}"
            ending = ".png" if damage == "mislabelled" else suffix
            (tmp_path / f"{name}{ending}").write_bytes(odd(kind, mode, damage, rng))
    command = [sys.executable, "-W", "default", "-c", READ, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    *outcomes, (_, grown_kb) = json.loads(process.stdout)
    assert grown_kb < 100_000
    assert len(outcomes) == sum(len(modes) for _, modes in FORMATS.values()) * len(DAMAGE) > 200
    rows: dict[str, str | None] = dict(outcomes)
    assert {reason for reason in rows.values() if reason} <= REASONS
    by_damage: dict[str, Counter[str | None]] = {}
    for name, reason in rows.items():
        by_damage.setdefault(Path(name).stem.rpartition("-")[2], Counter())[reason] += 1
    # The content determines the format, not the name.
    assert set(by_damage["none"]) == set(by_damage["mislabelled"]) == {None, "unsupported_depth"}
    assert set(by_damage["empty"]) == set(by_damage["first_bytes_only"]) == {"unreadable_image"}
    assert by_damage["rubbish_behind"] == by_damage["none"]
    assert by_damage["cut_in_half"][None] <= 3  # files with two frames may stay valid
