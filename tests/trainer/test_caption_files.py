"""Captions of folders: to a file or beside the images; a run that was stopped goes on, and nothing is written over unasked."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, ImageError
from pipeline.progress import NullProgress
from pipeline.sources.folder import open_folder
from pipeline.storage.sidecars import Existing
from pipeline.types import Sample
from tests.pipeline.images.test_similarity import photo
from tests.trainer.test_captioner import save_captioner
from trainer import Captioner
from trainer.caption_files import CaptionFile, CaptionTask, caption_images, find_images

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


class Stop(NullProgress):
    """Ends a run, as Ctrl-C does, after so many images."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, stage: str, done: int, total: int | None, metrics: Any = None) -> None:
        if done == self.after:
            raise KeyboardInterrupt


def run(
    model: Path, names: list[str], out: Path | None, existing: Existing = "refuse", stop: int = -1, **options: Any
) -> tuple[list[tuple[Path, ImageError]], list[dict[str, Any]], list[Path]]:
    """Caption images; return those that could not be read, the rows that were shown, and the images that were looked at."""
    seen: list[Path] = []
    rows: list[dict[str, Any]] = []
    captioner = Captioner.from_pretrained(model, device="cpu")
    stream = captioner.stream

    def watched(pairs: Any, *more: Any) -> Any:
        for path, text in stream(pairs, *more):
            seen.append(path)
            yield path, text

    captioner.stream = watched  # type: ignore[assignment, method-assign]
    settings: dict[str, Any] = {"styles": ("brief",), "batch_size": 2} | options
    job = CaptionTask(captioner, find_images(names), **settings)
    try:
        unread = caption_images(job, out, existing, model, Stop(stop), rows.append).unread
    except KeyboardInterrupt:
        unread = []
    return unread, rows, seen


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_that_was_stopped_goes_on_and_gives_the_same_file(model: Path, photos: Path, tmp_path: Path) -> None:
    name = "c.jsonl"
    _, shown, _ = run(model, [str(photos)], None)
    run(model, [str(photos)], tmp_path / "whole" / name)
    assert read(tmp_path / "whole" / name) == shown and len(shown) == COUNT
    run(model, [str(photos)], tmp_path / name, stop=5)
    assert not (tmp_path / name).exists()
    _, _, seen = run(model, [str(photos)], tmp_path / name)
    assert len(seen) == COUNT - 5
    assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [name]  # no draft is left


def test_a_line_that_was_cut_off_is_written_again(model: Path, photos: Path, tmp_path: Path) -> None:
    run(model, [str(photos)], tmp_path / "c.jsonl", stop=4)
    draft = tmp_path / ".c.jsonl.unfinished"
    draft.write_bytes(draft.read_bytes()[:-9])
    _, _, seen = run(model, [str(photos)], tmp_path / "c.jsonl")
    assert len(seen) == COUNT - 3
    assert len(read(tmp_path / "c.jsonl")) == COUNT


def test_other_settings_do_not_go_on_with_a_file(model: Path, photos: Path, tmp_path: Path) -> None:
    run(model, [str(photos)], tmp_path / "c.jsonl", stop=4)
    with pytest.raises(ConfigError, match="begun with another captioner or other settings"):
        run(model, [str(photos)], tmp_path / "c.jsonl", styles=("detailed",))
    with pytest.raises(ConfigError, match="begun with another captioner or other settings"):
        run(save_captioner(tmp_path / "other", seed=5), [str(photos)], tmp_path / "c.jsonl")


def test_a_file_that_is_there_is_kept_added_to_or_written_anew(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    run(model, [str(photos / "sub")], out)
    before = read(out)
    with pytest.raises(ConfigError, match="is there already"):
        run(model, [str(photos)], out)
    assert sorted(path.name for path in tmp_path.glob("*c.jsonl*")) == ["c.jsonl"]  # no lock is left
    _, _, seen = run(model, [str(photos)], out, "append")
    assert len(seen) == COUNT - len(before) and read(out)[: len(before)] == before and len(read(out)) == COUNT
    _, _, seen = run(model, [str(photos / "sub")], out, "overwrite")
    assert len(seen) == len(before) and read(out) == before
    (tmp_path / "other.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(ConfigError, match="is not a file of captions"):
        run(model, [str(photos)], tmp_path / "other.jsonl", "append")
    assert (tmp_path / "other.jsonl").read_text() == '{"text": "mine"}\n'
    with pytest.raises(ConfigError, match="is not a kind of file for captions"):
        run(model, [str(photos)], tmp_path / "c.xlsx")


def test_all_styles_and_questions_have_rows_of_their_own(model: Path, photos: Path, tmp_path: Path) -> None:
    run(model, [str(photos)], tmp_path / "c.jsonl", styles=("brief", "detailed"))
    rows = read(tmp_path / "c.jsonl")
    assert [row["style"] for row in rows] == ["brief", "detailed"] * COUNT
    _, answers, _ = run(model, [str(photos / "0.png")], None, styles=("",), question="How many?")
    assert [{*row} for row in answers] == [{"image", "question", "answer"}]


def test_texts_beside_images_are_written_added_to_or_left(model: Path, photos: Path) -> None:
    _, shown, _ = run(model, [str(photos)], None, styles=("brief", "detailed"))
    by_image = {row["image"]: [one["caption"] for one in shown if one["image"] == row["image"]] for row in shown}
    (photos / "0.txt").write_text("My own.\n")
    with pytest.raises(ConfigError, match="1 of 10 text files exist already"):
        run(model, [str(photos)], Path("txt"))
    assert sorted(photos.rglob("*.txt")) == [photos / "0.txt"]
    _, _, seen = run(model, [str(photos)], Path("txt"), "skip", styles=("brief", "detailed"))
    assert len(seen) == COUNT - 1 and (photos / "0.txt").read_text() == "My own.\n"
    assert (photos / "2.txt").read_text().splitlines() == by_image[str(photos / "2.png")]
    for _ in range(2):  # a second time adds nothing
        run(model, [str(photos)], Path("txt"), "append", styles=("brief", "detailed"))
        assert (photos / "0.txt").read_text().splitlines() == ["My own.", *by_image[str(photos / "0.png")]]
    of_people = [row.references for row in open_folder(photos).rows if isinstance(row, Sample) and row.references]
    assert of_people == [("My own.",)]
    run(model, [str(photos)], Path("txt"), "overwrite")
    assert (photos / "0.txt").read_text() == by_image[str(photos / "0.png")][0] + "\n"


def test_images_that_would_share_a_text_file_are_one_error(model: Path, photos: Path) -> None:
    photo(0).save(photos / "0.webp")
    with pytest.raises(ConfigError, match=r"two images would have the text file .*0\.txt"):
        run(model, [str(photos)], Path("txt"))
    (photos / "1.txt").write_bytes((photos / "0.png").read_bytes())
    with pytest.raises(ConfigError, match="has the name of its text file"):
        run(model, [str(photos / "1.txt")], Path("txt"), "overwrite")


def test_a_link_in_place_of_a_text_file_is_not_written_through(model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret\n")
    (photos / "0.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"0\.txt is a link"):
        run(model, [str(photos)], Path("txt"), "append")
    run(model, [str(photos)], Path("txt"), "overwrite")
    assert (tmp_path / "secret").read_text() == "secret\n" and not (photos / "0.txt").is_symlink()


def test_two_runs_do_not_write_one_file(model: Path, photos: Path, tmp_path: Path) -> None:
    with CaptionFile(tmp_path / "c.jsonl", {}) as file:
        file.add({"image": "a", "style": "brief", "caption": "x"})
        with pytest.raises(ConfigError, match=r"another process is writing c\.jsonl"):
            run(model, [str(photos)], tmp_path / "c.jsonl")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / ".d.jsonl.lock").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match="is a link, but must be a file"):
        run(model, [str(photos)], tmp_path / "d.jsonl")
    assert (tmp_path / "secret").read_text() == "secret"
    assert len(read(tmp_path / "c.jsonl")) == 1 and sorted(path.name for path in tmp_path.glob("*c.jsonl*")) == ["c.jsonl"]


def test_files_that_are_no_images_are_listed_and_stop_nothing(model: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "bad.png").write_bytes(b"no image")
    unread, _, _ = run(model, [str(photos)], tmp_path / "c.jsonl", styles=("brief", "detailed"))
    assert [path.name for path, _ in unread] == ["bad.png"]
    assert len(read(tmp_path / "c.jsonl")) == 2 * COUNT
    unread, _, _ = run(model, [str(photos)], Path("txt"), styles=("brief", "detailed"))
    assert [path.name for path, _ in unread] == ["bad.png"] and not (photos / "bad.txt").exists()


def test_names_mean_files_folders_and_patterns(photos: Path, tmp_path: Path) -> None:
    (photos / "notes.md").write_text("x")
    everything = sorted(photos.rglob("*.png"))
    for hidden in (photos / ".thumbnails" / "0.png", photos / "._0.png"):
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_bytes(b"of a program")
    assert find_images([str(photos)]) == everything
    assert find_images([f"{photos}/**/*.png", str(photos / "0.png")]) == everything
    assert find_images([str(photos / "notes.md")]) == [photos / "notes.md"]  # who names a file means it
    for bad, problem in ((str(tmp_path / "gone.png"), "does not exist"), (f"{photos}/*.jpg", "does not exist")):
        with pytest.raises(ConfigError, match=problem):
            find_images([bad])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no image in"):
        find_images([str(tmp_path / "empty")])
