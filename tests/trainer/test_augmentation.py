"""Views show nearly all of an image, upright, and are the same whenever they are drawn."""

import numpy as np
import pytest
from PIL import Image

from tests.pipeline.images.test_similarity import photo
from trainer.augmentation import MIN_AREA, view_in_epoch, view_of


def test_a_view_is_a_crop_in_other_light_and_never_mirrored() -> None:
    ramp = Image.linear_gradient("L").rotate(90).resize((300, 200)).convert("RGB")  # dark at one side
    is_dark_left = np.asarray(ramp)[:, 0].mean() < np.asarray(ramp)[:, -1].mean()
    sizes, means = set(), set()
    for number in range(1, 40):
        view = view_of(ramp, "a", number)
        values = np.asarray(view, np.float32)
        assert MIN_AREA * 0.98 <= view.width * view.height / (300 * 200) <= 1
        assert view.width / view.height == pytest.approx(1.5, rel=0.02)
        assert (values[:, 0].mean() < values[:, -1].mean()) == is_dark_left
        sizes.add(view.size)
        means.add(round(float(values.mean())))
    assert len(sizes) > 20 and len(means) > 10


def test_a_view_depends_on_its_image_and_number_alone() -> None:
    picture = photo(1).convert("RGB")
    first, again = view_of(picture, "a", 1), view_of(picture.copy(), "a", 1)
    assert first.tobytes() == again.tobytes()
    others = [view_of(picture, "a", 2), view_of(picture, "b", 1)]
    assert all(other.size != first.size or other.tobytes() != first.tobytes() for other in others)


@pytest.mark.parametrize("size", [(1, 1), (2, 900)])
def test_the_smallest_image_has_views(size: tuple[int, int]) -> None:
    assert min(view_of(Image.new("RGB", size), "a", 3).size) >= 1


def test_all_views_come_in_turn_and_images_begin_with_different_ones() -> None:
    turns = {name: [view_in_epoch(name, epoch, 3) for epoch in range(8)] for name in map(str, range(20))}
    assert all(sorted(views[:4]) == [0, 1, 2, 3] and views[4:] == views[:4] for views in turns.values())
    assert {views[0] for views in turns.values()} == {0, 1, 2, 3}
    assert view_in_epoch("a", 7, 0) == 0
