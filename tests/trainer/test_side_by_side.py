"""Captioners side by side: what each says of the same images, where they differ most first, with scores where there are any."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import TrainError
from pipeline.progress import NullProgress
from tests.browser import PHONE, Open, violations
from tests.pipeline.images.test_similarity import photo
from tests.trainer.test_captioning import save_captioner
from trainer import Captioner
from trainer.side_by_side import Shown, compare_captioners, write_page


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_captioner(root / name, seed=seed) for name, seed in (("first", 4), ("second", 5))}


def png(number: int) -> bytes:
    data = io.BytesIO()
    photo(number).save(data, "PNG")
    return data.getvalue()


def compare(folders: dict[str, Path], images: list[Shown], style: str | None = None) -> dict[str, Any]:
    return compare_captioners(folders, images, style, 1, NullProgress())


def test_each_captioner_says_what_it_says_alone(folders: dict[str, Path]) -> None:
    images = [Shown(f"{number}.png", png(number)) for number in range(6)]
    result = compare(folders, images, "detailed")
    texts = {row["image"]: row["texts"] for row in result["images"]}
    for position, folder in enumerate(folders.values()):
        alone = Captioner.from_pretrained(folder).caption([one.open() for one in images], style="detailed")
        assert [texts[one.name][position] for one in images] == alone
    assert [one["name"] for one in result["captioners"]] == ["first", "second"]
    assert "scores" not in result["captioners"][0] and result["differences"] == []
    differing = [len(set(row["texts"])) for row in result["images"]]
    assert differing == sorted(differing, reverse=True)


def test_scores_are_over_the_images_that_people_captioned(folders: dict[str, Path]) -> None:
    """One captioner says exactly what people say: it is better, and the image on which they differ most comes first."""
    images = [png(number) for number in range(12)]
    right = Captioner.from_pretrained(folders["second"]).caption(images)
    shown = [Shown(f"{number}.png", image, (right[number],) if number < 10 else ()) for number, image in enumerate(images)]
    result = compare(folders, shown)
    first, second = result["captioners"]
    assert result["scored_images"] == 10
    assert second["scores"]["bleu_1"] == pytest.approx(1.0)
    assert second["scores"]["cider_d"] > first["scores"]["cider_d"]
    (difference,) = result["differences"]
    assert (difference["captioner"], difference["than"]) == ("second", "first")
    assert difference["difference"] == pytest.approx(second["scores"]["cider_d"] - first["scores"]["cider_d"])
    assert difference["interval"][0] <= difference["difference"] <= difference["interval"][1]
    assert difference["verdict"] == ("better" if difference["interval"][0] > 0 else "cannot tell at this size")
    spreads = [max(row["cider_d"]) - min(row["cider_d"]) if row["cider_d"] else 0.0 for row in result["images"]]
    assert spreads == sorted(spreads, reverse=True)


def test_images_that_cannot_be_read_are_named_and_left_out(folders: dict[str, Path]) -> None:
    result = compare(folders, [Shown("bad.png", b"no image"), Shown("good.png", png(1))])
    assert list(result["unread"]) == ["bad.png"]
    assert [row["image"] for row in result["images"]] == ["good.png"]
    with pytest.raises(TrainError, match="no image could be read"):
        compare(folders, [Shown("bad.png", b"no image")])


@pytest.mark.parametrize("width", ["wide", "phone"])
def test_the_page_shows_all_texts_escaped_and_is_for_everyone(
    folders: dict[str, Path], tmp_path: Path, opened: Open, width: str
) -> None:
    reference = ("A <script>dog</script> runs.",)
    images = [Shown(f"<b>{number}</b>.png", png(number), reference if number else ()) for number in range(3)]
    result = compare(folders, [*images, Shown("bad.png", b"")])
    write_page(result, images, tmp_path / "page.html")
    page = opened(tmp_path / "page.html", **({"viewport": PHONE} if width == "phone" else {}))
    assert violations(page) == []
    assert page.locator("article").count() == 3
    assert page.locator("article b, article script").count() == 0
    text = page.locator("main").inner_text()
    for row in result["images"]:
        assert all(" ".join(one.split()) in " ".join(text.split()) for one in row["texts"])
    assert "A <script>dog</script> runs." in text
    assert "These are few" in text
    assert "bad.png cannot be read" in text
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert json.dumps(result)
