"""Captions of many images, in one file or next to the images."""

import json
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, ImageError
from pipeline.types import Sample
from tests.notes import Steps
from tests.pipeline.images.test_similarity import photo
from tests.pipeline.sources.reading import open_folder
from tests.trainer.test_captioner import save_captioner
from trainer import Captioner
from trainer.caption_files import CaptionTask, caption_images, find_images, open_captions

COUNT = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("models") / "c")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos/sub").mkdir(parents=True)
    for number in range(COUNT):
        photo(number).save(tmp_path / "photos" / ("sub" if number % 2 else "") / f"{number}.png")
    return tmp_path / "photos"


def run(
    model: Path, names: list[str], out: Path | None, stop: int = -1, **more: Any
) -> tuple[list[tuple[Path, ImageError]], list[dict[str, Any]], list[Path]]:
    """Caption images; return unreadable images, the shown rows, and the images that were captioned."""
    seen: list[Path] = []
    rows: list[dict[str, Any]] = []
    captioner = Captioner.from_pretrained(model, device="cpu")
    stream = captioner.stream

    def watched(pairs: Any, *arguments: Any) -> Any:
        for path, text in stream(pairs, *arguments):
            seen.append(path)
            yield path, text

    def interrupt(stage: str, done: int, metrics: Any) -> None:
        if done == stop:
            raise KeyboardInterrupt

    captioner.stream = watched  # type: ignore[assignment, method-assign]
    settings: dict[str, Any] = {"styles": ("brief",), "batch_size": 2} | more
    job = CaptionTask(captioner, find_images(names), **settings)
    try:
        _, unread = caption_images(job, out, model, Steps(interrupt), rows.append)
    except KeyboardInterrupt:
        unread = []
    return unread, rows, seen


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("cut_bytes", [0, 9])  # the last row may be incomplete
def test_resumed_run_writes_the_same_file(model: Path, photos: Path, tmp_path: Path, cut_bytes: int) -> None:
    name = "c.jsonl"
    _, shown, _ = run(model, [str(photos)], None)
    run(model, [str(photos)], tmp_path / "whole" / name)
    assert read(tmp_path / "whole" / name) == shown and len(shown) == COUNT
    run(model, [str(photos)], tmp_path / name, stop=6)
    assert not (tmp_path / name).exists()
    draft = tmp_path / f".{name}.unfinished"
    draft.write_bytes(draft.read_bytes()[: draft.stat().st_size - cut_bytes])
    _, _, seen = run(model, [str(photos)], tmp_path / name)
    assert len(seen) == COUNT - (4 if cut_bytes else 5)  # the last complete image is captioned again
    assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [f".{name}.settings", name]


def test_repeated_run_captions_only_new_images(model: Path, photos: Path, tmp_path: Path) -> None:
    out, last = tmp_path / "c.jsonl", photos / "0.png"
    names = [str(path) for path in find_images([str(photos)]) if path != last]
    run(model, names, out)
    before = out.read_text()
    assert run(model, names, out)[2] == [] and out.read_text() == before
    out.write_text(before.rstrip("\n").replace('"caption": "', '"caption": "Edited '))
    edited = read(out)
    run(model, [str(photos)], out, stop=1)  # the run stops before it is complete
    assert read(out) == edited
    assert run(model, [str(photos)], out)[2] == [last]
    assert read(out)[:-1] == edited and read(out)[-1]["image"] == str(last)
    for captioner, styles in (
        (model, ("detailed",)),
        (save_captioner(tmp_path / "other", seed=5), ("brief",)),
    ):
        with pytest.raises(ConfigError, match="already exists, and is not from this captioner"):
            run(captioner, [str(photos)], out, styles=styles)


def test_run_killed_after_the_last_write_is_finished_by_the_next_run(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c.jsonl"
    run(model, [str(photos)], out)
    whole, settings = out.read_text(), (tmp_path / ".c.jsonl.settings").read_text()
    (tmp_path / ".c.jsonl.unfinished").write_text(settings + whole)
    run(model, [str(photos)], out)
    assert out.read_text() == whole and not (tmp_path / ".c.jsonl.unfinished").exists()


def caption(path: Path, images: str, stop: str = "") -> list[str]:
    """Add a caption for each letter, stop before the image `stop`, and return the finished images."""
    with suppress(KeyboardInterrupt), open_captions(path, {}) as (done, add):
        for image in images:
            if image == stop:
                raise KeyboardInterrupt
            if image not in done:
                add([{"image": image, "caption": f"A {image}."}])
    return [row["image"] for row in read(path)]


def test_interrupted_extension_keeps_all_rows(tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    assert caption(out, "abc") == caption(out, "de", stop="d") == [*"abc"]
    assert caption(out, "de", stop="e") == [*"abc"]
    assert caption(out, "e") == [*"abce"]  # the last image of the draft may lack rows
    assert caption(out, "d") == [*"abced"]


def test_draft_of_a_finished_file_removes_no_row(tmp_path: Path) -> None:
    out, draft = tmp_path / "c.jsonl", tmp_path / ".c.jsonl.unfinished"
    caption(out, "ab")
    # The process was killed before it could remove the draft.
    draft.write_text('{"settings": {}}\n' + out.read_text())
    assert caption(out, "n") == [*"abn"] and not draft.exists()


def test_edits_of_a_finished_file_survive_an_interrupted_extension(tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    caption(out, "ab")
    caption(out, "de", stop="e")
    out.write_text(out.read_text().replace("A a.", "Edited."))
    assert caption(out, "de") == [*"abde"]
    assert read(out)[0]["caption"] == "Edited."


def test_resuming_with_other_settings_is_refused(model: Path, photos: Path, tmp_path: Path) -> None:
    run(model, [str(photos)], tmp_path / "c.jsonl", stop=4)
    other = save_captioner(tmp_path / "other", seed=5)
    for captioner, styles in ((model, ("detailed",)), (other, ("brief",))):
        with pytest.raises(ConfigError, match="started with a different captioner or different settings"):
            run(captioner, [str(photos)], tmp_path / "c.jsonl", styles=styles)


def test_existing_or_unsupported_output_is_refused(model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "mine"}\n')
    for name, problem in (("c.jsonl", "already exists"), ("c.xlsx", "is not a caption file")):
        with pytest.raises(ConfigError, match=problem):
            run(model, [str(photos)], tmp_path / name)
    assert (tmp_path / "c.jsonl").read_text() == '{"text": "mine"}\n'
    assert [path.name for path in tmp_path.glob("*c.*")] == ["c.jsonl"]


def test_each_style_and_question_has_its_own_row(model: Path, photos: Path, tmp_path: Path) -> None:
    run(model, [str(photos)], tmp_path / "c.jsonl", styles=("brief", "detailed"))
    rows = read(tmp_path / "c.jsonl")
    assert [row["style"] for row in rows] == ["brief", "detailed"] * COUNT
    _, answers, _ = run(model, [str(photos / "0.png")], None, styles=("",), question="How many?")
    assert [{*row} for row in answers] == [{"image", "question", "answer"}]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([""], None),
        (['{"settings": {}}'], None),
        (['{"settings": 1}', '{"image": "a", "caption": "x"}'], "started with a different captioner"),
        (["{}", '{"image": "a", "caption": "x"}'], "is damaged: 'settings'"),
        (['{"settings": {}}', "{}"], "is damaged: 'image'"),
        (['{"settings": {}}', '{"image": ["a"]}'], "is damaged: a value is not a string"),
        (["[" * 100_000, "{}"], "is damaged"),
    ],
)
def test_damaged_draft_is_reported(lines: list[str], problem: str | None, tmp_path: Path) -> None:
    (tmp_path / ".c.jsonl.unfinished").write_text("".join(f"{line}\n" for line in lines))
    refused = nullcontext() if problem is None else pytest.raises(ConfigError, match=problem)
    with refused, open_captions(tmp_path / "c.jsonl", {}) as (done, _):
        assert done == set()


def test_text_file_has_line_per_style_and_is_not_replaced(model: Path, photos: Path, tmp_path: Path) -> None:
    _, shown, _ = run(model, [str(photos)], None, styles=("brief", "detailed"))
    by_image: dict[str, list[str]] = {}
    for row in shown:
        by_image.setdefault(row["image"], []).append(row["caption"])
    (photos / "0.txt").write_text("My own.\n")
    (tmp_path / "secret").write_text("secret\n")
    (photos / "4.txt").symlink_to(tmp_path / "secret")
    _, _, seen = run(model, [str(photos)], Path("txt"), styles=("brief", "detailed"))
    assert len(seen) == COUNT - 2
    assert (photos / "0.txt").read_text() == "My own.\n" and (tmp_path / "secret").read_text() == "secret\n"
    assert (photos / "2.txt").read_text().splitlines() == by_image[str(photos / "2.png")]
    (photos / "4.txt").unlink()
    samples = [row for row in open_folder(photos).rows if isinstance(row, Sample)]
    assert [sample.references for sample in samples if sample.references] == [("My own.",)]


def test_two_images_with_the_same_text_file_are_refused(model: Path, photos: Path) -> None:
    photo(0).save(photos / "0.webp")
    with pytest.raises(ConfigError, match=r"two images would have the text file .*0\.txt"):
        run(model, [str(photos)], Path("txt"))
    (photos / "1.txt").write_bytes((photos / "0.png").read_bytes())
    with pytest.raises(ConfigError, match="has the same name as its text file"):
        run(model, [str(photos / "1.txt")], Path("txt"))


def test_second_run_with_the_same_captions_file_is_refused(model: Path, photos: Path, tmp_path: Path) -> None:
    with open_captions(tmp_path / "c.jsonl", {}) as (_, add):
        add([{"image": "a", "style": "brief", "caption": "x"}])
        with pytest.raises(ConfigError, match=r"another process is writing c\.jsonl"):
            run(model, [str(photos)], tmp_path / "c.jsonl")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / ".d.jsonl.lock").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match="is a link, but must be a file"):
        run(model, [str(photos)], tmp_path / "d.jsonl")
    assert (tmp_path / "secret").read_text() == "secret"
    assert len(read(tmp_path / "c.jsonl")) == 1
    assert {path.name for path in tmp_path.glob("*c.jsonl*")} == {"c.jsonl", ".c.jsonl.settings"}


def test_unreadable_images_are_listed_and_skipped(model: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "bad.png").write_bytes(b"no image")
    unread, _, _ = run(model, [str(photos)], tmp_path / "c.jsonl", styles=("brief", "detailed"))
    assert [path.name for path, _ in unread] == ["bad.png"]
    assert len(read(tmp_path / "c.jsonl")) == 2 * COUNT
    unread, _, _ = run(model, [str(photos)], Path("txt"), styles=("brief", "detailed"))
    assert [path.name for path, _ in unread] == ["bad.png"] and not (photos / "bad.txt").exists()


def test_images_are_found_by_file_folder_or_pattern(photos: Path, tmp_path: Path) -> None:
    (photos / "notes.md").write_text("x")
    everything = sorted(photos.rglob("*.png"))
    for hidden in (photos / ".thumbnails" / "0.png", photos / "._0.png"):
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_bytes(b"of a program")
    assert find_images([str(photos)]) == everything
    assert find_images([f"{photos}/**/*.png", str(photos / "0.png")]) == everything
    # A path to a single file may have any suffix.
    assert find_images([str(photos / "notes.md")]) == [photos / "notes.md"]
    for bad in (str(tmp_path / "gone.png"), f"{photos}/*.jpg"):
        with pytest.raises(ConfigError, match="does not exist"):
            find_images([bad])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no images in"):
        find_images([str(tmp_path / "empty")])
