"""Generate texts with `generate` of transformers: greedily, by sampling, or by beam search."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class DecodingConfig:
    """Decoding options with the names and meanings of transformers, greedy by default."""

    num_beams: int = 1
    temperature: float = 0.0
    length_penalty: float = 1.0
    min_new_tokens: int = 0
    no_repeat_ngram_size: int = 0


GREEDY = DecodingConfig()


def generate_texts(
    model: Any, decoding: DecodingConfig, max_tokens: int, eos_id: int, **inputs: Any
) -> list[list[int]]:
    """Return the new token ids of each row, without EOS. `inputs` are those of `model.generate`."""
    options = {name: value for name, value in asdict(decoding).items() if value != getattr(GREEDY, name)}
    options["min_new_tokens"] = min(decoding.min_new_tokens, max_tokens)
    if decoding.num_beams > 1:
        options["early_stopping"] = "never"  # a longer text may have a better mean log-probability
    else:
        options.pop("length_penalty", None)  # transformers warns of it
    if decoding.temperature > 0:
        options |= {"do_sample": True, "top_k": 0}
    ends = {"max_new_tokens": max_tokens, "eos_token_id": eos_id, "pad_token_id": eos_id}
    ids_BT = model.generate(**inputs, **ends, **options)
    prompt_tokens = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    rows = ids_BT[:, prompt_tokens:].tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]
