"""The lists of WordNet: how they are made of its files."""

from pathlib import Path

import pytest

from pipeline.text.wordnet import concepts_above, object_words
from pipeline.text.wordnet.build import object_lists

NOUNS = """
  1 a license, which is indented
00000001 03 n 01 entity 0 000 | what there is
00000002 05 n 01 animal 0 001 @ 00000001 n 0000 | an animal
00000003 05 n 02 dog 0 domestic_dog 0 001 @ 00000002 n 0000 | a dog
00000004 18 n 01 man 0 001 @ 00000001 n 0000 | a man
00000005 04 n 01 walk 0 001 @ 00000001 n 0000 | an act
00000006 06 n 01 walk 1 001 @ 00000001 n 0000 | a path
00000007 18 n 01 Einstein 0 001 @i 00000004 n 0000 | a name
00000008 05 n 01 fly 0 001 @ 00000002 n 0000 | an insect
""".lstrip("\n")
INDEX = """
animal n 1 0 1 0 00000002
dog n 1 1 @ 1 1 00000003
domestic_dog n 1 1 @ 1 0 00000003
einstein n 1 1 @i 1 0 00000007
fly n 1 1 @ 1 1 00000008
frankfurter n 1 1 @ 1 0 00000002
man n 1 1 @ 1 1 00000004
table n 1 1 @ 1 1 00000006
television_set n 1 1 @ 1 0 00000006
toy n 1 1 @ 1 0 00000006
cellphone n 1 1 @ 1 0 00000006
wineglass n 1 1 @ 1 0 00000006
wheeled_vehicle n 1 1 @ 1 0 00000006
walk n 2 1 @ 2 1 00000005 00000006
""".lstrip("\n")


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    (tmp_path / "data.noun").write_text(NOUNS)
    (tmp_path / "index.noun").write_text(INDEX)
    (tmp_path / "noun.exc").write_text("men man\ndice die\n")
    (tmp_path / "cntlist.rev").write_text("dog%1:05:00:: 1 9\nfly%1:05:00:: 1 1\nfly%2:38:00:: 1 8\n")
    return tmp_path


def test_a_noun_has_its_first_sense_if_that_can_be_seen(wordnet: Path) -> None:
    lists = object_lists(wordnet)
    words = dict(line.split("\t", 1) for line in lists["objects"])
    assert words["dog"] == words["domestic dog"] and words["man"] == words["person"] == "0"
    assert "walk" not in words and "einstein" not in words  # an act, and a name
    assert words["fly"].endswith("\t-") and not words["dog"].endswith("-")
    assert words["men"] == "0\t=man" and "dice" not in words
    assert lists["concepts"][int(words["dog"])] == words["animal"]


def test_the_lists_that_are_shipped_fit_together() -> None:
    words, above = object_words(), concepts_above()
    assert all(0 <= word.concept < len(above) for word in words.values())
    assert all(parent < len(above) for parents in above for parent in parents)
    assert words["mice"].singular == "mouse" and words["dog"].singular == "dog"
    assert not [word for word in words if "_" in word]
    assert words["train"].is_mostly_other and not words["dog"].is_mostly_other
