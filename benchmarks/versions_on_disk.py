"""Measure the disk that three versions of one folder of photos take: `python benchmarks/versions_on_disk.py FOLDER`.

FOLDER lies on the file system to measure, where nothing else writes meanwhile. 58 photos (drawn noise of 1600 x 1200 px, as
JPEG) are captioned three times in other styles by a mock endpoint (benchmarks/mock_chat.py): the versions have no text in
common. It prints how much of the file system the dataset folder takes (versions, stages, journal), in sizes of the photos, and
how many images `datasets` decodes of each version, also after the first one is removed.

A small XFS to try it on: truncate -s 2G x.img; mkfs.xfs x.img; mkdir x; mount -o loop x.img x
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from datasets import load_dataset
from mock_chat import running_mock
from PIL import Image

HERE = Path(__file__).parent
STYLES = ("plain", "detailed", "brief")


def make_photos(folder: Path, count: int) -> int:
    """Draw distinct images with detail at all scales, as photos have; return their bytes."""
    for number in range(count):
        draw = np.random.default_rng(number)
        image = np.zeros((1200, 1600, 3))
        for scale in (2, 4, 16, 64, 256):
            grain = Image.fromarray(draw.integers(0, 256, (1200 // scale + 1, 1600 // scale + 1, 3), dtype=np.uint8))
            image += np.asarray(grain.resize((1600, 1200), Image.Resampling.BICUBIC), dtype=float) * scale**0.5
        stored = io.BytesIO()
        Image.fromarray(np.uint8(image / image.max() * 255)).save(stored, "JPEG", quality=96)
        (folder / f"{number:03d}.jpg").write_bytes(stored.getvalue())
    return sum(path.stat().st_size for path in folder.iterdir())


def used_bytes(folder: Path) -> int:
    """Return how many bytes of the file system of a folder are taken, after all writes."""
    os.sync()
    return shutil.disk_usage(folder).used


def generate(photos: Path, out: Path, style: str, url: str) -> None:
    """Make a version of a folder of photos, with captions of one style."""
    options = ["--source", f"folder:{photos}", "--tasks", "caption", "--styles", style, "--base-url", url, "--out", str(out)]
    subprocess.run([sys.executable, "-m", "pipeline", "generate", *options], cwd=HERE.parent, check=True, capture_output=True)


def count_images(version: Path) -> int:
    """Return how many images of a version `datasets` decodes."""
    with tempfile.TemporaryDirectory() as cache:
        splits = load_dataset(str(version), cache_dir=cache)
        return sum(row["image"].size > (0, 0) for split in splits.values() for row in split)


def main() -> None:
    """Print the disk that one, two and three versions take, in sizes of the photos."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=Path, help="a folder of your own photos")
    options = parser.parse_args()
    with (
        running_mock() as url,
        tempfile.TemporaryDirectory() as temporary,
        tempfile.TemporaryDirectory(dir=options.folder) as measured,
    ):
        photos, out = options.photos or Path(temporary), Path(measured, "dataset")
        num_bytes = sum(path.stat().st_size for path in photos.iterdir()) if options.photos else make_photos(photos, 58)
        print(f"{len(list(photos.iterdir()))} photos of {num_bytes / 1e6:.1f} MB")
        before = used_bytes(options.folder)
        for count, style in enumerate(STYLES, start=1):
            generate(photos.resolve(), out, style, url)
            print(f"{count} versions: {(used_bytes(options.folder) - before) / num_bytes:.3f} times the photos")
        versions = sorted(out.glob("versions/v*"))
        shutil.rmtree(out / "stages")  # versions must not need them
        print(f"images of each that `datasets` decodes: {[count_images(version) for version in versions]}")
        remove = ["versions", "rm", versions[0].name, "--data", str(out)]
        subprocess.run([sys.executable, "-m", "pipeline", *remove], cwd=HERE.parent, check=True, capture_output=True)
        print(f"without {versions[0].name}: {(used_bytes(options.folder) - before) / num_bytes:.3f} times the photos")
        print(f"images of each that `datasets` decodes: {[count_images(version) for version in versions[1:]]}")


if __name__ == "__main__":
    main()
