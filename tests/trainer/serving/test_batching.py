"""Batches: requests of a group go together, in their order; the others wait; one that fails or leaves takes nobody along."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from trainer.model.decoding import GREEDY, DecodingConfig
from trainer.serving.batching import Batcher, GenerationRequest

THREAD = ThreadPoolExecutor(1)


def job(number: int, length: int = 2, decoding: DecodingConfig = GREEDY) -> GenerationRequest:
    return GenerationRequest(torch.full((3, 2, 2), float(number)), [number] * length, decoding)


def run(steps: Coroutine[Any, Any, None]) -> None:
    asyncio.run(steps)


def test_what_waits_and_fits_together_is_written_at_once() -> None:
    batches: list[list[int]] = []

    def write(jobs: list[GenerationRequest]) -> list[list[int]]:
        batches.append([one.prompt[0] for one in jobs])
        return [[one.prompt[0]] for one in jobs]

    async def steps() -> None:
        batcher = Batcher(write, batch_size=3, thread=THREAD)
        beams = DecodingConfig(num_beams=2)
        kinds = [job(0), job(1, 3), job(2), job(3), job(4, decoding=beams), job(5), job(6, 3)]
        waiting = [asyncio.create_task(batcher.submit(one)) for one in kinds]
        await asyncio.sleep(0)
        assert batcher.waiting == 7
        task = asyncio.create_task(batcher.run())
        assert await asyncio.gather(*waiting) == [[number] for number in range(7)]
        task.cancel()

    run(steps())
    assert batches == [[0, 2, 3], [1, 6], [4], [5]]


def test_a_batch_that_fails_fails_alone() -> None:
    def write(jobs: list[GenerationRequest]) -> list[list[int]]:
        if jobs[0].prompt[0] == 1:
            raise RuntimeError("no memory")
        return [[9] for _ in jobs]

    async def steps() -> None:
        batcher = Batcher(write, batch_size=1, thread=THREAD)
        task = asyncio.create_task(batcher.run())
        answers = await asyncio.gather(*(batcher.submit(job(number)) for number in range(3)), return_exceptions=True)
        assert [str(answer) for answer in answers] == ["[9]", "no memory", "[9]"]
        task.cancel()

    run(steps())
