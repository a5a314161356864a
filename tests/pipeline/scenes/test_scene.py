"""Drawn scenes. The accuracy of the tiny model shows that the drawings agree with the facts."""

import pytest

from pipeline.scenes.scene import Scene, Thing


def test_two_objects_in_one_place_are_refused() -> None:
    with pytest.raises(ValueError, match="sorted by place"):
        Scene("white", (Thing("small", "red", "ring", "center"), Thing("large", "red", "ring", "center")))
