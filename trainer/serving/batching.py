"""Answer many requests in batches: those that wait and fit together are written at once."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor

from trainer.model.decoding import DecodingConfig


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One text to write: a prepared image (3, H, W), the tokens of its prompt, and how to write it."""

    pixels_CHW: Tensor
    prompt: Sequence[int]
    decoding: DecodingConfig

    @property
    def group(self) -> tuple[int, DecodingConfig]:
        """Jobs of one group may be written at once."""
        return len(self.prompt), self.decoding


Write = Callable[[list[GenerationRequest]], list[list[int]]]


@dataclass(slots=True)
class Batcher:
    """Writes jobs on one thread, at most `batch_size` at once. Call `run` once, as a task."""

    write: Write
    batch_size: int
    thread: ThreadPoolExecutor  # of one worker, the only one that runs the model
    batches: int = 0  # so far
    _waiting: deque[tuple[GenerationRequest, asyncio.Future[list[int]]]] = field(default_factory=deque)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def waiting(self) -> int:
        """The number of jobs that wait."""
        return len(self._waiting)

    async def submit(self, job: GenerationRequest) -> list[int]:
        """Return the tokens of the text of a job. Raises what `write` raises."""
        done: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, done))
        self._arrived.set()
        return await done

    async def run(self) -> None:
        """Write batch after batch, until cancelled: each with the job that has waited longest, and others of its group."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not self._waiting:
                self._arrived.clear()
            if not batch:
                continue
            self.batches += 1
            try:
                texts = await loop.run_in_executor(self.thread, self.write, [job for job, _ in batch])
            except Exception as error:  # noqa: BLE001  # of each of its requests, and no other
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
            else:
                for (_, done), text in zip(batch, texts, strict=True):
                    if not done.done():
                        done.set_result(text)

    def _next_batch(self) -> list[tuple[GenerationRequest, asyncio.Future[list[int]]]]:
        batch: list[tuple[GenerationRequest, asyncio.Future[list[int]]]] = []
        others: deque[tuple[GenerationRequest, asyncio.Future[list[int]]]] = deque()
        while self._waiting and len(batch) < self.batch_size:
            job, done = self._waiting.popleft()
            if done.done():  # whoever asked has gone
                continue
            if batch and job.group != batch[0][0].group:
                others.append((job, done))
            else:
                batch.append((job, done))
        self._waiting.extendleft(reversed(others))
        return batch
