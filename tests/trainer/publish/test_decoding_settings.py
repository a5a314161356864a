"""Decoding settings of a captioner are used by this package and by `generate` of transformers alike."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from tests.pipeline.images.test_similarity import photo
from tests.trainer.publish.test_modeling import load_with_transformers, save_captioner
from trainer.captioner import Captioner
from trainer.model.decoding import DecodingConfig
from trainer.publish.transformers_files import transformers_files


@pytest.mark.parametrize("num_beams", [1, 3])
def test_saved_captioner_writes_the_same_tokens_with_its_decoding_settings(
    num_beams: int, tmp_path: Path
) -> None:
    folder = save_captioner("scratch", tmp_path)
    settings = {"num_beams": num_beams, "min_new_tokens": 5, "no_repeat_ngram_size": 2, "length_penalty": 0.3}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"data": {"decoding": settings}}))
    for file, data in transformers_files(folder).items():
        (folder / file).write_bytes(data)
    captioner = Captioner.from_pretrained(folder, "cpu")
    decoding = captioner.decoding(captioner.usual_beams)
    assert decoding == DecodingConfig(**settings)  # type: ignore[arg-type]
    images = [photo(number) for number in range(12)]
    pixels_BCHW = torch.stack([captioner.prepare(image) for image in images])  # type: ignore[misc]
    rows = captioner.write(pixels_BCHW, [captioner.prompt()] * len(images), decoding)
    model, processor = load_with_transformers(folder)
    inputs = processor(images=images, text="", return_tensors="pt")
    tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist()
    eos_id = captioner.checkpoint.captioner.config.eos_id
    tokens = [row[: row.index(eos_id)] if eos_id in row else row for row in tokens]
    # transformers counts n-grams of the prompt, too. Only random weights write tokens of the prompt.
    pairs = [pair for pair in zip(tokens, rows, strict=True) if not {*captioner.prompt()} & {*pair[1]}]
    assert len(pairs) >= 6 and all(written == expected for written, expected in pairs)
    assert min(map(len, rows)) >= 5
    assert all(len({*itertools.pairwise(row)}) == len(row) - 1 for row in rows)
    greedy = captioner.write(pixels_BCHW, [captioner.prompt()] * len(images))
    assert rows != greedy
