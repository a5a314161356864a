"""Conversion to upright RGB over white, here and in published captioners."""

import io
from typing import Any

import pytest
from PIL import Image

from pipeline.images.decode import ORIENTATION, prepare_image
from pipeline.images.upright import over_white
from tests.media import encoded
from trainer.model.transformers_files import standalone_source

PUBLISHED = standalone_source()


def noise(mode: str, **options: Any) -> bytes:
    """Return a PNG of noise. With `transparent`, all pixels of one color are transparent."""
    gray = Image.effect_noise((40, 30), 90)
    bands = [gray.rotate(90 * n) for n in range(len(Image.new(mode, (1, 1)).getbands()))]
    if mode == "I;16":
        image = gray.convert("I").point(lambda level: level * 257).convert("I;16")
    elif mode == "P":
        image = Image.merge("RGB", [gray, gray.rotate(180), gray]).convert("P")
    else:
        image = Image.merge(mode, bands) if len(bands) > 1 else gray.convert(mode)
    if options.pop("transparent", False):
        options["transparency"] = image.getpixel((3, 15))
    return encoded(image, **options)


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 128))
    assert over_white(image).tobytes() == bytes((227, 127, 127, 255, 255, 255))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "I;16", "1"])
def test_published_captioner_code_decodes_images_to_the_same_pixels(mode: str) -> None:
    names: dict[str, Any] = {"__name__": "modeling"}
    exec(compile(PUBLISHED, "modeling.py", "exec"), names)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        data = noise(mode, exif=exif.tobytes(), transparent=mode in ("RGB", "P"))
        with Image.open(io.BytesIO(data)) as image:
            assert names["upright_rgb"](image).tobytes() == prepare_image(data).tobytes()


def test_published_file_does_not_import_this_project() -> None:
    imports = ("from trainer", "from pipeline", "import trainer")
    assert not any(line.startswith(imports) for line in PUBLISHED.splitlines())
