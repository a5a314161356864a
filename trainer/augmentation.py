"""Views of an image: crops of it in other light, which a training sees in turn with the image itself.

A view shows nearly all of its image, upright and never mirrored: captions name sides, and what stands at the edge. Which view
is which depends on the image and a number alone, so that hidden states of views are kept like those of images.
"""

import random

from PIL import Image, ImageEnhance

MIN_AREA = 0.75  # of the image that a crop shows
MAX_LIGHT = 0.2  # by which brightness and contrast change at most


def view_of(picture: Image.Image, sample_id: str, number: int) -> Image.Image:
    """Return a view of an RGB image: the same one for the same number, from 1 on."""
    draw = random.Random(f"{sample_id}:{number}")
    side = draw.uniform(MIN_AREA, 1.0) ** 0.5
    width, height = (max(1, round(side * length)) for length in picture.size)
    left, top = draw.randint(0, picture.width - width), draw.randint(0, picture.height - height)
    view = picture.crop((left, top, left + width, top + height))
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast):
        view = change(view).enhance(1 + draw.uniform(-MAX_LIGHT, MAX_LIGHT))
    return view


def view_in_epoch(sample_id: str, epoch: int, views: int) -> int:
    """Return which view an epoch shows, 0 for the image itself: all come in turn, and images begin with different ones."""
    first = random.Random(sample_id).randint(0, views)
    return (first + epoch) % (views + 1)
