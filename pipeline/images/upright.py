"""Convert an image to upright RGB on a white background, the form in which every model sees it.

Published captioners contain this code (trainer/model/transformers_files.py), so it needs only Pillow.
"""

from PIL import Image, ImageOps


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB on a white background, rotated as its EXIF orientation states."""
    return over_white(ImageOps.exif_transpose(image))


def over_white(image: Image.Image) -> Image.Image:
    """Return an image in RGB, composited on a white background. 16-bit gray is reduced to 8 bits.

    Raises ValueError if the image has 32-bit pixels, whose range is unknown.
    """
    if image.mode in ("I", "F"):
        raise ValueError(
            f"the value range of 32-bit pixels ({image.mode}) is unknown: convert the image to 16 bits"
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda level: level / 257).convert("L").convert("RGB")
    return image.convert("RGB")
