"""Answer requests with the shipped tiny model in this process, on the CPU.

Each request has its own random numbers, so a reply does not depend on the other requests of its batch.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import llguidance.hf
import llguidance.numpy  # llguidance.torch would import torch's compiler
import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessor, LogitsProcessorList
from transformers.utils.logging import disable_progress_bar

from pipeline.images.decode import prepare_image, sent_size, upright_size
from pipeline.tasks.prompts import Prompt
from pipeline.types import Reply, Request, RequestSource

PLAIN_TEXT = r"[\s\S]+"  # a grammar never allows special tokens, such as those that begin an image
BATCH_IMAGES = 64
BATCH_PIXELS = 8_000_000


class EmbeddedEngine:
    """Answers requests with the tiny model in `folder`, which is loaded at the first request."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokens = 0
        self._prototypes: dict[str, LLMatcher] = {}  # by schema

    def __enter__(self) -> "EmbeddedEngine":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def ask(self, work: RequestSource) -> Iterator[list[Reply]]:
        """Answer requests in batches (see types.Engine). Batches depend only on the requests."""
        while requests := work.take():
            for batch in batch_requests(requests):
                work.sending(batch)
                yield self._answer(batch)

    def metrics(self) -> dict[str, str]:
        """See types.Engine."""
        return {"reply tokens": f"{self._tokens:,}"}

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        """The processor, the model in float32, and the tokenizer of grammars."""
        disable_progress_bar()
        processor = AutoProcessor.from_pretrained(self._folder, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(
            self._folder, dtype=torch.float32, local_files_only=True
        )
        vocab_size = model.config.get_text_config().vocab_size
        tokenizer = llguidance.hf.from_tokenizer(processor.tokenizer, n_vocab=vocab_size)
        return processor, model.eval(), tokenizer

    def _answer(self, requests: list[Request]) -> list[Reply]:
        processor, model, _ = self._loaded
        images = [
            [prepare_image(image, request.max_pixels, for_model=True) for image in request.images]
            for request in requests
        ]
        chats = []
        for request in requests:
            prompt = Prompt(id=request.prompt_id, system=request.system, text=request.text)
            messages = prompt.messages(len(request.images), request.pages)
            for role, text in zip(("assistant", "user"), request.failed or (), strict=False):
                messages.append({"role": role, "content": text})
            chats.append(processor.apply_chat_template(messages, add_generation_prompt=True))
        shown = images if any(images) else None
        inputs = processor(text=chats, images=shown, padding=True, return_tensors="pt")
        chooser = GrammarChooser(requests, [self._matcher(request.schema) for request in requests])
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=requests[0].sampling.max_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([chooser]),
            )
        prompt_tokens = inputs["attention_mask"].sum(1).tolist()
        replies = []
        rows = zip(requests, output.tolist(), prompt_tokens, chooser.logprobs, strict=True)
        for request, row, num_read, logprobs in rows:
            ids, end = row[inputs["input_ids"].shape[1] :], processor.tokenizer.eos_token_id
            is_whole = end in ids
            ids = ids[: ids.index(end)] if is_whole else ids
            self._tokens += len(ids)
            text = processor.tokenizer.decode(ids, skip_special_tokens=True)
            reason = "stop" if is_whole else "length"
            replies.append(request.reply(text, reason, num_read, len(ids), logprobs))
        return replies

    def _matcher(self, schema: str) -> LLMatcher:
        """Return a matcher of JSON without white space for a schema, or of any text for an empty schema."""
        if schema not in self._prototypes:
            if schema:
                grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
            else:
                grammar = LLMatcher.grammar_from_regex(PLAIN_TEXT)
            _, _, tokenizer = self._loaded
            self._prototypes[schema] = LLMatcher(tokenizer, grammar)
        return self._prototypes[schema].deep_copy()


def batch_requests(requests: list[Request]) -> Iterator[list[Request]]:
    """Yield batches of requests with the same task, style and attempt, whose prompts need little padding.

    A batch of several requests shows at most BATCH_IMAGES images with at most BATCH_PIXELS in total.
    """
    kind = attrgetter("task", "style", "attempt")
    for _, same in groupby(sorted(requests, key=kind), key=kind):
        group, images, pixels = list(same), 1, 1
        for request in group:
            sizes = [sent_size(*upright_size(image), request.max_pixels) for image in request.images]
            images = max(images, len(sizes))
            pixels = max(pixels, sum(width * height for width, height in sizes))
        number = max(1, min(BATCH_IMAGES // images, BATCH_PIXELS // pixels))
        yield from (group[start : start + number] for start in range(0, len(group), number))


class GrammarChooser(LogitsProcessor):
    """Chooses the next token of each row among the tokens that the row's grammar allows.

    A row is decoded greedily if its temperature is 0, and sampled otherwise, with its own random numbers.
    `generate` itself is greedy, and gets scores that allow only the chosen token. Shape suffixes: B rows,
    V vocabulary size, T tokens, R sampled rows.
    """

    def __init__(self, requests: list[Request], matchers: list[LLMatcher]) -> None:
        self._matchers = matchers
        self._rngs = [np.random.default_rng([int(one.id[:16], 16), one.attempt]) for one in requests]
        self._temperatures = torch.tensor([request.sampling.temperature for request in requests])
        self._done = [False] * len(requests)
        # The log-probabilities of the chosen tokens among the allowed ones, for each row.
        self.logprobs: list[list[float]] = [[] for _ in requests]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002  # required by transformers
        """Return scores [B, V] that allow one token per row, from ids [B, T] and scores [B, V]."""
        mask = llguidance.numpy.allocate_token_bitmask(*scores.shape)  # one bit per token
        for row, matcher in enumerate(self._matchers):
            llguidance.numpy.fill_next_token_bitmask(matcher, mask, row)
        bits_BV = np.unpackbits(mask.view(np.uint8), axis=1, count=scores.shape[1], bitorder="little")
        allowed_BV = scores.masked_fill(torch.from_numpy(bits_BV == 0), -torch.inf)
        chosen_B = self._choose(allowed_BV)
        logprobs_B = allowed_BV.log_softmax(-1).gather(1, chosen_B[:, None])[:, 0]
        for row, (token, logprob) in enumerate(zip(chosen_B.tolist(), logprobs_B.tolist(), strict=True)):
            if not self._done[row]:
                self.logprobs[row].append(logprob)
                matcher = self._matchers[row]
                self._done[row] = not matcher.consume_token(token) or matcher.is_stopped()
        return torch.full_like(allowed_BV, -torch.inf).scatter_(1, chosen_B[:, None], 0.0)

    def _choose(self, allowed_BV: Tensor) -> Tensor:
        chosen_B = allowed_BV.argmax(-1)
        rows_R = (self._temperatures > 0).nonzero().flatten()
        if len(rows_R):
            # Inverse transform sampling: the first token with cumulative probability above a uniform number.
            scores_RV = allowed_BV[rows_R] / self._temperatures[rows_R, None]
            cumulative_RV = scores_RV.double().softmax(-1).cumsum(-1)
            uniform_R = torch.tensor(
                [self._rngs[row].random() for row in rows_R.tolist()], dtype=torch.double
            )
            thresholds_R1 = (uniform_R * cumulative_RV[:, -1])[:, None]
            tokens_R = torch.searchsorted(cumulative_RV, thresholds_R1, right=True).flatten()
            chosen_B[rows_R] = tokens_R.clamp(max=allowed_BV.shape[1] - 1)
        return chosen_B
