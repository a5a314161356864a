"""Lay an image that Pillow has opened upright and over white, in RGB: what every model sees of a file.

A published captioner prepares its images by these lines as well (trainer/publish): they need nothing but Pillow.
"""

from PIL import Image, ImageOps

BAND_PX = 512  # rows that are laid over white at once


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image upright, as its EXIF says, in RGB over white."""
    return over_white(ImageOps.exif_transpose(image))


def over_white(image: Image.Image) -> Image.Image:
    """Return an image in RGB: what is transparent is white, and 16 bits of gray become 8.

    Raise ValueError for pixels of 32 bits or fractions, of which nobody knows what is white.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of the mode {image.mode} have no known white: make them of 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgb = Image.new("RGB", image.size)
        for top in range(0, image.height, BAND_PX):  # an image of 50 megapixels takes 0.44 GB this way, not 0.8
            band = image.crop((0, top, image.width, min(top + BAND_PX, image.height))).convert("RGBA")
            rgb.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), (0, top))
        return rgb
    if image.mode.startswith("I;16"):
        return image.convert("I").point(lambda level: level / 257).convert("L").convert("RGB")
    return image.convert("RGB")
