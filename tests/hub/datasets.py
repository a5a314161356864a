"""Tiny repositories with the columns, types, file names and branches of the built-in benchmark datasets."""

import io
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.hub.storage import Storage

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
STRINGS = pa.list_(pa.string())
SCRIPT = b"raise SystemExit('a script of the Hub was run')\n"
KARPATHY = ("train", "train", "train", "val", "test")


def photo(number: int, size: tuple[int, int] = (60, 45)) -> bytes:
    """Return a JPEG that is unique to this number."""
    rng, out = random.Random(number), io.BytesIO()
    small = Image.frombytes("RGB", (6, 5), rng.randbytes(90))
    small.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


def cell(number: int, **change: Any) -> dict[str, Any]:
    return {"bytes": photo(number), "path": f"{number}.jpg", **change}


def parquet(rows: list[dict[str, Any]], schema: pa.Schema, *, rows_a_group: int = 50) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), out, row_group_size=rows_a_group)
    return out.getvalue()


FLICKR = pa.schema(
    {
        "image": IMAGE, "caption": STRINGS, "sentids": STRINGS, "split": pa.string(), "img_id": pa.string(),
        "filename": pa.string(),
    }
)  # fmt: skip


def flickr_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "image": cell(n), "caption": [f"A person does thing {n} in way {k}." for k in range(5)],
            "sentids": [str(n * 5 + k) for k in range(5)], "split": KARPATHY[n % 5], "img_id": str(n),
            "filename": f"{1000 + n}.jpg",
        }
        for n in range(count)
    ]  # fmt: skip


def seed_flickr30k(storage: Storage, count: int = 20, repo: str = "nlphuji/flickr30k") -> None:
    """Seed a loading script, and on another branch its Parquet conversion, with all rows under `test`."""
    storage.seed("dataset", repo, {"flickr30k.py": SCRIPT, "README.md": b"---\nlanguage: en\n---\n"})
    half = count // 2
    rows = flickr_rows(count)
    parts = enumerate((rows[:half], rows[half:]))
    files = {f"TEST/test/000{n}.parquet": parquet(part, FLICKR) for n, part in parts}
    storage.seed("dataset", repo, files, "refs/convert/parquet")


def seed_flickr30k_without_split(storage: Storage, count: int = 10, repo: str = "lmms-lab/flickr30k") -> None:
    """Seed a copy with all rows under `test` and without a split column."""
    schema = FLICKR.remove(FLICKR.get_field_index("split"))
    rows = [{k: v for k, v in row.items() if k != "split"} for row in flickr_rows(count)]
    storage.seed("dataset", repo, {"data/test-00000-of-00001.parquet": parquet(rows, schema)})


ANSWER = pa.struct({"answer": pa.string(), "answer_confidence": pa.string(), "answer_id": pa.int64()})
VQA = pa.schema(
    {
        "question_type": pa.string(), "multiple_choice_answer": pa.string(), "answers": pa.list_(ANSWER),
        "image_id": pa.int64(), "answer_type": pa.string(), "question_id": pa.int64(),
        "question": pa.string(), "image": IMAGE,
    }
)  # fmt: skip


def vqa_rows(images: int, questions: int, *, answered: bool = True) -> list[dict[str, Any]]:
    texts = enumerate(["Two", "2", "the 2."])
    answers = [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in texts]
    return [
        {
            "question_type": "how many", "multiple_choice_answer": "2",
            "answers": answers if answered else None,
            "image_id": image, "answer_type": "number", "question_id": image * 1000 + question,
            "question": f"How many things of kind {question} are there?", "image": cell(1000 + image),
        }
        for image in range(images)
        for question in range(questions)
    ]  # fmt: skip


def seed_vqav2(storage: Storage, images: int = 6, questions: int = 3, repo: str = "lmms-lab/VQAv2") -> None:
    """Seed a validation split, and a test split without answers."""
    files = {
        "data/validation-00000-of-00001.parquet": parquet(vqa_rows(images, questions), VQA),
        "data/test-00000-of-00001.parquet": parquet(vqa_rows(2, questions, answered=False), VQA),
    }
    storage.seed("dataset", repo, {**files, "README.md": b"---\nlicense: cc-by-4.0\n---\n"})


SLIDES = pa.schema(
    {
        "deck_name": pa.string(), "deck_url": pa.string(), **{f"page_{n}": IMAGE for n in range(1, 21)},
        "qa_id": pa.int64(),
        "question": pa.string(), "answer": pa.string(), "arithmetic_expression": pa.string(),
        "evidence_pages": pa.list_(pa.int64()), "reasoning_type": pa.string(), "answer_type": pa.string(),
    }
)  # fmt: skip


def slide_rows(decks: int, pages: int = 20) -> list[dict[str, Any]]:
    return [
        {
            "deck_name": f"deck-{deck}", "deck_url": "https://slides.invalid/deck",
            **{f"page_{n}": cell(10_000 + deck * 100 + n) if n <= pages else None for n in range(1, 21)},
            "qa_id": deck * 10 + question, "question": f"How much more is number {question} than the other?",
            "answer": "12%",
            "arithmetic_expression": "30% - 18%" if question else "None",
            "evidence_pages": [3, 1] if question else [2],
            "reasoning_type": "Numerical", "answer_type": "Non-Span" if question else "Single-Span",
        }
        for deck in range(decks)
        for question in range(2)
    ]  # fmt: skip


def seed_slidevqa(storage: Storage, decks: int = 2, repo: str = "NTT-hil-insight/SlideVQA") -> None:
    """Seed a gated repository: decks of twenty pages and, in `val`, one deck of seven pages."""
    files = {
        "data/train-00000-of-00001.parquet": parquet(slide_rows(decks), SLIDES),
        "data/val-00000-of-00001.parquet": parquet(slide_rows(1, pages=7), SLIDES),
    }
    storage.seed("dataset", repo, files, gated=True)
