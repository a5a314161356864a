"""Compare captioners on the same images: their captions side by side, with scores where people have captioned the images."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ImageError, TrainError
from pipeline.images.decode import MAX_IMAGE_BYTES
from pipeline.progress import Progress
from pipeline.report.html import data_uri, render_page, thumbnail
from pipeline.storage.files import write_text
from pipeline.storage.untrusted import read_regular
from trainer.captioning import Captioner
from trainer.experiment.compare import verdict
from trainer.image_index import StoredImage
from trainer.metrics import bootstrap, score, score_each, tokenize

SHOWN_IMAGES = 200  # on the page
THUMBNAIL_BYTES = 16_384
FEW_IMAGES = 20  # below which CIDEr-D, which weighs words by the images that have them, says little


@dataclass(frozen=True, slots=True)
class Shown:
    """One image: what it is called, its file, its encoded bytes or where they are stored, and what people say of it."""

    name: str
    image: bytes | Path | StoredImage
    references: tuple[str, ...] = ()

    def open(self) -> bytes | Path:
        """Return its file, or its encoded bytes."""
        return bytes(self.image.read()) if isinstance(self.image, StoredImage) else self.image

    def read(self) -> bytes:
        """Return the encoded bytes. Raises UnsafeFileError or OSError if the file cannot be read."""
        opened = self.open()
        return read_regular(opened, max_bytes=MAX_IMAGE_BYTES) if isinstance(opened, Path) else opened


def compare_captioners(
    folders: dict[str, Path], images: Sequence[Shown], style: str | None, num_beams: int | None, progress: Progress
) -> dict[str, Any]:
    """Return what each captioner says of each image, with scores and differences over the images that have references.

    Without `num_beams`, each has as many as when it was scored after its training. Captioners are loaded one after another.
    Images without references are no part of the scores. Raises TrainError if no image can be read, or a captioner has not
    learned the style.
    """
    texts: dict[str, list[str]] = {}
    unread: dict[str, str] = {}
    for name, folder in folders.items():
        texts[name] = []
        progress(name, 0, len(images))
        pairs = ((number, one.open()) for number, one in enumerate(images))
        captioner = Captioner.from_pretrained(folder)
        for number, answer in captioner.stream(pairs, (style,), num_beams=num_beams):
            if isinstance(answer, ImageError):
                unread[images[number].name] = str(answer)
            texts[name].append("" if isinstance(answer, ImageError) else answer[0])
            progress(name, number + 1, len(images))
    read = [number for number, one in enumerate(images) if one.name not in unread]
    if not read:
        raise TrainError("no image could be read", hint="pass image files")
    rows = [
        {
            "image": images[number].name,
            "references": list(images[number].references),
            "texts": [texts[name][number] for name in folders],
            "cider_d": [],
        }
        for number in read
    ]
    result: dict[str, Any] = {
        "captioners": [{"name": name} for name in folders],
        "differences": [],
        "images": rows,
        "scored_images": 0,
        "unread": unread,
    }
    _add_words(result)
    if scored := [row for row in rows if row["references"]]:
        _add_scores(result, scored)
    rows.sort(key=_disagreement, reverse=True)
    return result


def write_page(result: dict[str, Any], images: Sequence[Shown], out: Path) -> None:
    """Write a comparison as one HTML file, with the images about which the captioners differ most."""
    by_name = {one.name: one for one in images}
    shown = result["images"][:SHOWN_IMAGES]
    uris = [data_uri(thumbnail(by_name[row["image"]].read(), THUMBNAIL_BYTES)) for row in shown]
    page = render_page(
        "trainer", "side_by_side.html.j2", result=result, shown=list(zip(shown, uris, strict=True)), few=FEW_IMAGES
    )
    write_text(out, page)


def _add_words(result: dict[str, Any]) -> None:
    for number, captioner in enumerate(result["captioners"]):
        written = [row["texts"][number] for row in result["images"]]
        captioner["words"] = round(statistics.fmean(len(text.split()) for text in written), 2)
        captioner["different"] = len(set(written))


def _add_scores(result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add the scores of each captioner, those of each row, and by how much each captioner differs from the first."""
    references = [[tokenize(text) for text in row["references"]] for row in rows]
    each: list[list[float]] = []
    for number, captioner in enumerate(result["captioners"]):
        tokens = [tokenize(row["texts"][number]) for row in rows]
        scores = score_each(tokens, references)
        captioner["scores"] = score(tokens, references, scores)
        captioner["interval"] = list(bootstrap({"cider_d": scores["cider_d"]})["cider_d"])
        each.append(scores["cider_d"])
        for row, value in zip(rows, scores["cider_d"], strict=True):
            row["cider_d"].append(round(value, 4))
    result["scored_images"] = len(rows)
    for number, captioner in enumerate(result["captioners"][1:], start=1):
        gains = [one - other for one, other in zip(each[number], each[0], strict=True)]
        low, high = bootstrap({"gain": gains})["gain"]
        result["differences"].append(
            {
                "captioner": captioner["name"],
                "than": result["captioners"][0]["name"],
                "difference": statistics.fmean(gains),
                "interval": [low, high],
                "verdict": verdict(low, high),
            }
        )


def _disagreement(row: dict[str, Any]) -> tuple[float, int]:
    """Return what an image is sorted by: how far the scores lie apart, then how many different texts there are."""
    scores = row["cider_d"] or [0.0]
    return max(scores) - min(scores), len(set(row["texts"]))
