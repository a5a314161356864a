"""Load the images of each step, or their states, and its texts, while the step before is computed."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from trainer.config import TrainConfig
from trainer.data import Example
from trainer.features import LoadedFeatures
from trainer.tokenizer import CaptionTokenizer, EncodedText, TextBatch, collate


class MicroBatch(NamedTuple):
    """Images that are computed at once, with their texts."""

    loaded: Tensor  # what the features load of the images (trainer/features.py)
    texts: TextBatch
    examples: list[Example]


@dataclass(frozen=True, slots=True)
class Batch:
    """The images of a step: the micro-batches of this process, and counts of all processes."""

    micro_batches: list[MicroBatch]
    num_tokens: int  # of targets
    num_micro_batches: int
    num_images: int


@dataclass(slots=True)
class BatchLoader:
    """Loads what the steps of one of several processes are computed from."""

    config: TrainConfig
    tokenizer: CaptionTokenizer
    examples: list[Example]
    features: LoadedFeatures
    rank: int = 0
    processes: int = 1
    micro_batches: int = 1  # of each process in a step
    encoded: dict[str, list[EncodedText]] = field(default_factory=dict)  # texts by sample id, once an image was seen

    def load(self, examples: list[Example]) -> Batch:
        """Read the images of a step, or their states, and collate their texts. Images of other processes are not read."""
        count = self.micro_batches * self.processes
        # Parts of all processes: the mean needs their token counts.
        parts = [part for first in range(count) if (part := examples[first::count])]  # fewer, of few images
        texts = [self.collate(part) for part in parts]
        own = range(self.rank * self.micro_batches, min(len(parts), (self.rank + 1) * self.micro_batches))
        loaded = [MicroBatch(self.features.load(parts[index]), texts[index], parts[index]) for index in own]
        return Batch(loaded, sum(int(batch.learned_CT.sum()) for batch in texts), len(parts), len(examples))

    def load_ahead(self, order: Iterable[list[int]]) -> Iterator[Batch]:
        """Yield the batches of an order (`data.batches`), each loaded by a thread while the step before it is computed."""
        with ThreadPoolExecutor(1) as pool:
            coming: Future[Batch] | None = None
            for indices in order:
                following = pool.submit(self.load, [self.examples[index] for index in indices])
                if coming:
                    yield coming.result()
                coming = following
            if coming:
                yield coming.result()

    def collate(self, examples: list[Example]) -> TextBatch:
        """Return one batch of all texts of the examples."""
        most = self.config.max_caption_tokens
        for example in examples:
            if example.sample_id not in self.encoded:
                self.encoded[example.sample_id] = [self.tokenizer.encode(text, most) for text in example.texts]
        return collate([self.encoded[example.sample_id] for example in examples])
