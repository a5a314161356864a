"""Lists of files and URLs: texts of the images, and protection of files and addresses."""

import http.server
import json
import os
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from pipeline.config.files import resolve
from pipeline.errors import ConfigError, SourceError
from pipeline.sources import image_urls, open_source
from pipeline.types import ReferenceQA, Rejected, Sample, Source
from tests.hub.datasets import photo
from tests.pipeline.sources.reading import samples_of


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    (folder / "sub").mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    (folder / "sub/4.jpg").write_bytes(photo(4))
    (tmp_path / "private.jpg").write_bytes(photo(9))
    return folder


def opened(file: Path, text: str, **settings: Any) -> Source:
    file.write_text(text, encoding="utf-8")
    return open_source(resolve(source=f"list:{file}", **settings))


def outcomes(source: Source) -> dict[str, str]:
    return {row.source_row: row.reason if isinstance(row, Rejected) else "read" for row in source.rows}


def test_text_list_keeps_line_order(home: Path) -> None:
    source = opened(home / "list.txt", "# mine\n3.jpg\n\n sub/4.jpg \r\n0.jpg\nmissing.jpg\n")
    assert source.count() == 4
    assert outcomes(source) == {
        "3.jpg": "read",
        "sub/4.jpg": "read",
        "0.jpg": "read",
        "list.txt:6": "unreadable_file",
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "path,caption,title,split\n0.jpg,A bowl.,Bowl,train\n1.jpg,,Cup,val\n"),
        ("list.csv", "path;caption;title;split\n0.jpg;A bowl.;Bowl;train\n1.jpg;;Cup;val\n"),
        ("list.tsv", "caption\timage\ttitle\tsplit\nA bowl.\t0.jpg\tBowl\ttrain\n\t1.jpg\tCup\tval\n"),
        (
            "list.jsonl",
            '{"file_name": "0.jpg", "text": ["A bowl."], "title": "Bowl", "split": "train"}\n'
            '{"file_name": "1.jpg", "title": "Cup", "split": "validation"}\n',
        ),
    ],
)
def test_list_columns_become_captions_splits_and_context(home: Path, name: str, text: str) -> None:
    source = opened(home / name, text, columns={"context": "title"})
    first, second = (row for row in samples_of(source))
    assert (first.references, first.split, dict(first.context)) == (("A bowl.",), "train", {"title": "Bowl"})
    assert (second.references, second.split, dict(second.context)) == ((), "validation", {"title": "Cup"})
    assert outcomes(opened(home / name, text, source_split="validation")) == {"1.jpg": "read"}
    with pytest.raises(SourceError, match="no line with the split test"):
        opened(home / name, text, source_split="test")
    with pytest.raises(SourceError, match="no column is named name") as refused:
        opened(home / name, text, columns={"context": "name"})
    assert "title" in refused.value.hint


def test_list_questions_are_human_questions(home: Path) -> None:
    source = opened(home / "list.csv", "image,question,answer\n0.jpg,Is it red?,yes\n1.jpg,,\n")
    assert [row.reference_qa for row in samples_of(source)] == [
        (ReferenceQA(question="Is it red?", answers=("yes",)),),
        (),
    ]


def test_outside_paths_need_follow_links_and_are_not_published(home: Path) -> None:
    (home / "link.jpg").symlink_to(home.parent / "private.jpg")
    text = f"../private.jpg\n{home.parent / 'private.jpg'}\nlink.jpg\n{home / '0.jpg'}\n"
    assert outcomes(opened(home / "list.txt", text)) == {
        "list.txt:1": "outside_folder",
        "list.txt:2": "outside_folder",
        "link.jpg": "outside_folder",
        "list.txt:4": "read",
    }
    assert {*outcomes(opened(home / "list.txt", text, follow_links=True)).values()} == {"read"}


@pytest.mark.parametrize("place", ["/dev/zero", "/proc/self/environ", "pipe.jpg", "sub", "x\0.jpg", " "])
def test_pipes_and_folders_are_rejected_without_waiting(home: Path, place: str) -> None:
    os.mkfifo(home / "pipe.jpg")
    source = opened(home / "list.jsonl", json.dumps({"image": place}), follow_links=True)
    (reason,) = outcomes(source).values()
    assert reason in ("not_a_file", "unreadable_file", "image_missing", "unreadable_image", "file_too_large")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("list.csv", "id,caption\n1,A bowl.\n", "has no column of images: it has id, caption"),
        ("list.txt", "# nothing\n", "lists no images"),
        ("list.csv", "", "lists no images"),
        ("list.csv", "path,split\n0.jpg,test\n1.jpg,fold2\n", "row 2: 'fold2' is not a split"),
        ("list.jsonl", "[1]\n", "a row is not a JSON object"),
        ("list.jsonl", "{\n", "cannot read"),
    ],
)
def test_invalid_list_file_is_refused(home: Path, name: str, text: str, problem: str) -> None:
    with pytest.raises(SourceError, match=problem):
        opened(home / name, text)


def test_missing_or_binary_list_file_is_refused(home: Path) -> None:
    with pytest.raises(SourceError, match="no list at"):
        open_source(resolve(source=f"list:{home / 'nothing.txt'}"))
    with pytest.raises(SourceError, match="cannot read"):
        open_source(resolve(source=f"list:{home / '0.jpg'}"))
    with pytest.raises(ConfigError, match="--columns has the role image"):
        opened(home / "list.csv", "photo\n0.jpg\n", columns={"image": "photo"})


def test_urls_of_any_scheme_are_neither_opened_nor_published(home: Path) -> None:
    places = [
        "HTTPS://127.0.0.1/x.jpg?key=secret",
        "s3://bucket/x.jpg?sig=secret",
        "file:///etc/passwd",
        "ftp://h/x",
    ]
    source = opened(home / "list.txt", "\n".join(places))
    assert outcomes(source) == {f"list.txt:{n}": "image_not_embedded" for n in range(1, 5)}
    fetched = list(opened(home / "list.txt", "\n".join(places), allow_urls=True).rows)
    assert [getattr(row, "reason", "") for row in fetched] == ["url_refused"] * 4
    assert "secret" not in str(fetched)


@pytest.mark.parametrize(
    "place",
    [
        "C:\\Users\\zoe\\x.jpg", "\\\\server\\zoe\\x.jpg", "~/zoe/x.jpg", '"https://h/x?zoe"',
        "/home/zoe/x.jpg", "zoe/../../x.jpg", "zoe.jpg",
    ],
)  # fmt: skip
def test_image_outside_the_folder_is_named_by_its_line(home: Path, place: str) -> None:
    (row,) = opened(home / "list.jsonl", json.dumps({"path": place})).rows
    assert isinstance(row, Rejected) and "zoe" not in str(row) and row.source_row == "list.jsonl:1"


def test_windows_paths_and_old_line_ends_are_read(home: Path) -> None:
    assert outcomes(opened(home / "list.txt", ".\\0.jpg\rsub\\4.jpg\r")) == {
        "./0.jpg": "read",
        "sub/4.jpg": "read",
    }


def test_odd_json_values_are_read(home: Path) -> None:
    rows = [
        '{"path": "0.jpg", "score": NaN, "caption": {"raw": "A bowl."}}',
        '{"path": "1.jpg", "caption": "half \\ud83d"}',
        '{"url": "", "image": "2.jpg", "caption": " "}',
    ]
    for text in ("\n".join(rows), f"[{','.join(rows)}]"):
        read = list(opened(home / "list.json", text, columns={"context": "score"}).rows)
        assert [row.references for row in read if isinstance(row, Sample)] == [("A bowl.",), ("half ?",), ()]


class Together(http.server.BaseHTTPRequestHandler):
    """Answers the first three images once all are requested; `gone` is missing."""

    first = threading.Barrier(3)

    def do_GET(self) -> None:
        number = self.path.rpartition("/")[2]
        if number in ("0", "1", "2"):
            self.first.wait(20)
        self.send_response(404 if number == "gone" else 200)
        self.end_headers()
        if number != "gone":
            self.wfile.write(photo(int(number)))

    def log_message(self, *args: object) -> None:
        pass


def serve(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Yield the address of a running server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.fixture
def web() -> Iterator[str]:
    yield from serve(Together)


def test_list_urls_are_fetched_in_order_with_allow_urls(
    home: Path, web: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [*map(str, range(8)), "gone"]
    text = "url,caption\n" + "".join(f"{web}/{name}?key=secret,Image {name}.\n" for name in names)
    refused = opened(home / "list.csv", text)
    assert set(outcomes(refused).values()) == {"image_not_embedded"}
    fetch_image = image_urls.fetch_image
    monkeypatch.setattr(
        image_urls, "fetch_image", lambda url: fetch_image(url.partition("?")[0], lambda address: True)
    )
    read = list(opened(home / "list.csv", text, allow_urls=True).rows)
    assert not Together.first.broken
    assert [row.references for row in read if isinstance(row, Sample)] == [(f"Image {n}.",) for n in range(8)]
    assert [row.source_row for row in read] == [f"list.csv:{n}" for n in range(1, 10)]
    assert isinstance(read[-1], Rejected) and read[-1].reason == "url_not_found"
    assert "secret" not in str(read[-1])


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_listed_name_matches_file_name_in_both_unicode_forms(
    listed: Literal["NFC", "NFD"], stored: Literal["NFC", "NFD"], tmp_path: Path
) -> None:
    (tmp_path / unicodedata.normalize(stored, "Köln.jpg")).write_bytes(photo(1))
    (tmp_path / "a.txt").write_text(unicodedata.normalize(listed, "Köln.jpg") + "\n")
    rows = list(open_source(resolve(source=f"list:{tmp_path}/a.txt")).rows)
    assert [type(row) for row in rows] == [Sample]


def test_context_value_error_names_the_row(home: Path) -> None:
    with pytest.raises(SourceError, match=r"list\.jsonl, row 2: the column title contains objects"):
        text = '{"file_name": "0.jpg"}\n{"file_name": "0.jpg", "title": [["A dog"]]}\n'
        opened(home / "list.jsonl", text, columns={"context": "title"})
