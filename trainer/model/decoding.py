"""Options for `generate` of transformers: greedy decoding, sampling, or beam search."""

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

    def options(self, max_tokens: int) -> dict[str, Any]:
        """Return the options of `generate` for texts of at most `max_tokens` tokens."""
        changed = {name: value for name, value in asdict(self).items() if value != getattr(GREEDY, name)}
        lengths = {"max_new_tokens": max_tokens, "min_new_tokens": min(self.min_new_tokens, max_tokens)}
        options: dict[str, Any] = changed | lengths
        if self.num_beams == 1:
            options.pop("length_penalty", None)  # transformers warns if it is set without beam search
        if self.temperature > 0:
            options |= {"do_sample": True, "top_k": 0}
        return options


GREEDY = DecodingConfig()
