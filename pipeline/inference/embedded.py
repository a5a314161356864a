"""Run a vision-language model in this process, with transformers and decoding constrained by llguidance.

Grammars are the same as in vLLM's guidance backend. Each request has its own random number generator, seeded
by the request id, so a reply does not depend on the rest of its batch, except for rounding.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import llguidance.hf
import llguidance.numpy  # llguidance.torch would import torch's compiler
import numpy as np
import torch
from jinja2 import TemplateError
from llguidance import LLMatcher
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, LogitsProcessor, LogitsProcessorList
from transformers.utils.logging import disable_progress_bar

from pipeline.errors import EngineError, one_line
from pipeline.images.decode import prepare_image, sent_size, upright_size
from pipeline.tasks.prompts import Prompt
from pipeline.types import REFUSED_BY_SERVER, Reply, Request, RequestSource

PLAIN_TEXT = r"[\s\S]+"  # a grammar never allows special tokens, such as those that begin an image
MAX_FLOAT32_BYTES = 1_000_000_000
MAX_SAME_FAILURES = 3  # if more requests in a row fail with one error, the images are not its cause
BATCH_PIXELS = 8_000_000  # of all images in a batch, which bounds the memory of activations


class EmbeddedEngine:
    """Answers requests in this process. `find_folder` returns the folder of the model."""

    def __init__(self, model: str, find_folder: Callable[[], Path], revision: str, batch_size: int) -> None:
        self.model = model
        self.revision = revision
        self._find_folder = find_folder
        self._batch_size = batch_size
        self._tokens = 0
        self._failures: list[str] = []  # equal errors of the last requests; cleared when a batch is answered

    def __enter__(self) -> "EmbeddedEngine":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def ask(self, work: RequestSource) -> Iterator[list[Reply]]:
        """Answer requests in batches (see types.Engine). Batches depend only on the requests."""
        while requests := work.take():
            for batch in batch_requests(requests, self._batch_size):
                work.sending(batch)
                yield self._answer(batch)

    def metrics(self) -> dict[str, str]:
        """See types.Engine."""
        return {"reply tokens": f"{self._tokens:,}"}

    def _answer(self, requests: list[Request]) -> list[Reply]:
        """Answer a batch. If it fails, answer its halves, until only the request that fails is refused.

        Raises EngineError if more than MAX_SAME_FAILURES requests in a row fail with the same error.
        """
        processor, model = self._loaded
        grammars = self._grammars
        try:
            replies = self._generate(requests, processor, model, grammars)
            self._failures.clear()
            return replies
        except (EngineError, OSError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001  # processors and models raise anything for unusual inputs
            if len(requests) == 1:
                return [self._refuse(requests[0], one_line(error))]
        half = len(requests) // 2
        return self._answer(requests[:half]) + self._answer(requests[half:])

    def _refuse(self, request: Request, error: str) -> Reply:
        self._failures = [*(failure for failure in self._failures if failure == error), error]
        if len(self._failures) > MAX_SAME_FAILURES:
            hint = (
                "check the GPU and its free memory; if the model supports no such images, use another --model"
            )
            raise EngineError(f"{self.model} fails for each image: {error}", hint=hint)
        return request.reply(f"the model cannot read it: {error}", REFUSED_BY_SERVER)

    def _generate(
        self, requests: list[Request], processor: Any, model: Any, grammars: "Grammars"
    ) -> list[Reply]:
        images = [
            [prepare_image(image, request.max_pixels, for_model=True) for image in request.images]
            for request in requests
        ]
        chats = [self._chat(request) for request in requests]
        # If the template writes the BOS token, the tokenizer must not add it again.
        bos = processor.tokenizer.bos_token
        options: dict[str, Any] = {"add_special_tokens": False} if bos and chats[0].startswith(bos) else {}
        options |= {"images": images if any(images) else None, "padding": True, "return_tensors": "pt"}
        inputs = processor(text=chats, **options).to(model.device, dtype=model.dtype)
        chooser = LogitsProcessorList([GrammarChooser(requests, grammars, _vocab_size(model))])
        settings: dict[str, Any] = {"max_new_tokens": requests[0].sampling.max_tokens, "do_sample": False}
        settings |= {"eos_token_id": [*self._eos_ids], "pad_token_id": self._pad_id}
        with torch.inference_mode():
            output = model.generate(**inputs, **settings, logits_processor=chooser)
        prompt_tokens = inputs["attention_mask"].sum(1).tolist()
        replies_BT = output[:, inputs["input_ids"].shape[1] :]
        replies = zip(requests, replies_BT.tolist(), prompt_tokens, strict=True)
        return [self._reply(request, ids, prompt) for request, ids, prompt in replies]

    def _chat(self, request: Request) -> str:
        """Render the chat. Raises EngineError if the model's template leaves out a part of the prompt."""
        prompt = Prompt(id=request.prompt_id, system=request.system, text=request.text)
        messages = prompt.messages(len(request.images), request.pages)
        if request.failed:
            reply_text, feedback = request.failed
            messages += [{"role": "assistant", "content": reply_text}, {"role": "user", "content": feedback}]
        for message in messages:  # templates of vision-language models expect lists of parts
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        try:
            chat = str(self._loaded[0].apply_chat_template(messages, add_generation_prompt=True))
        except (TemplateError, TypeError):
            chat = ""
        is_whole = prompt.system.strip() in chat and prompt.text.strip() in chat
        if is_whole and "{'type':" not in chat:  # some templates print lists of parts as Python does
            return chat
        raise EngineError(
            f"the chat template of {self.model} leaves out the system prompt or the task",
            hint="use an instruction-tuned variant of the model, or a server: --base-url",
        )

    def _reply(self, request: Request, ids: list[int], prompt_tokens: int) -> Reply:
        end = next((position for position, token in enumerate(ids) if token in self._eos_ids), None)
        reply_ids = ids[:end]
        self._tokens += len(reply_ids)
        text = self._loaded[0].tokenizer.decode(reply_ids, skip_special_tokens=True)
        return request.reply(text, "length" if end is None else "stop", prompt_tokens, len(reply_ids))

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        disable_progress_bar()
        folder = self._find_folder()
        weights_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        # On a CPU, float32 is more exact than the model's own type, but takes twice the memory of bfloat16.
        dtype = torch.float32 if weights_bytes < MAX_FLOAT32_BYTES else "auto"
        if _device() != "cpu":
            dtype = torch.bfloat16
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            processor = AutoProcessor.from_pretrained(folder, **options)
            model: nn.Module = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **options)
            processor.tokenizer.padding_side = "left"
        # Some processors need additional packages.
        except (OSError, ValueError, AttributeError, ImportError) as error:
            hint = "--model needs a vision-language model of transformers: a folder, a Hub id, or tiny"
            raise EngineError(f"cannot load {self.model}: {one_line(error, 300)}", hint=hint) from None
        if not processor.chat_template:
            hint = "use an instruction-tuned variant of the model"
            raise EngineError(f"{self.model} has no chat template", hint=hint)
        return processor, model.to(_device()).eval()

    @cached_property
    def _eos_ids(self) -> frozenset[int]:
        """The ids of the tokens that end a reply, from the tokenizer (as in grammars) and the model."""
        processor, model = self._loaded
        ids = model.generation_config.eos_token_id
        return frozenset([processor.tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])]) - {
            None
        }

    @property
    def _pad_id(self) -> int:
        tokenizer = self._loaded[0].tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    @cached_property
    def _grammars(self) -> "Grammars":
        return Grammars(self._loaded[0].tokenizer, _vocab_size(self._loaded[1]))


def _vocab_size(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def batch_requests(requests: list[Request], size: int) -> Iterator[list[Request]]:
    """Yield batches of requests with the same task, style and attempt, whose prompts need little padding.

    A batch of several requests shows at most `size` images with at most BATCH_PIXELS in total.
    """
    kind = attrgetter("task", "style", "attempt")
    for _, same in groupby(sorted(requests, key=kind), key=kind):
        group = list(same)
        images = max(1, max(len(request.images) for request in group))
        pixels = max(1, max(map(count_pixels, group)))
        number = max(1, min(size // images, BATCH_PIXELS // pixels))
        yield from (group[start : start + number] for start in range(0, len(group), number))


def count_pixels(request: Request) -> int:
    """Return the total number of pixels that the model sees in the images of a request."""
    sizes = (sent_size(*upright_size(image), request.max_pixels) for image in request.images)
    return sum(width * height for width, height in sizes)


class Grammars:
    """Creates grammar matchers from JSON schemas. The grammars allow no white space, as in training."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size)
        self._prototypes: dict[str, LLMatcher] = {}

    def matcher(self, schema: str) -> LLMatcher:
        """Return a new matcher for a JSON schema, or for plain text if it is empty."""
        if schema not in self._prototypes:
            if schema:
                grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
            else:
                grammar = LLMatcher.grammar_from_regex(PLAIN_TEXT)
            self._prototypes[schema] = LLMatcher(self._tokenizer, grammar)
        return self._prototypes[schema].deep_copy()


class GrammarChooser(LogitsProcessor):
    """Chooses the next token of each row among the tokens that the row's grammar allows.

    A row is decoded greedily if its temperature is 0, and sampled otherwise, with its own random numbers.
    `generate` itself is greedy, and gets scores that allow only the chosen token. Shape suffixes: B rows,
    V vocabulary size, T tokens, R sampled rows.
    """

    def __init__(self, requests: list[Request], grammars: Grammars, vocab_size: int) -> None:
        self._matchers = [grammars.matcher(request.schema) for request in requests]
        self._rngs = [
            np.random.default_rng([int(request.id[:16], 16), request.attempt]) for request in requests
        ]
        self._temperatures = torch.tensor([request.sampling.temperature for request in requests])
        self._mask = llguidance.numpy.allocate_token_bitmask(len(requests), vocab_size)  # one bit per token
        self._done = [False] * len(requests)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002  # required by transformers
        """Return scores [B, V] that allow one token per row, from ids [B, T] and scores [B, V]."""
        for row, matcher in enumerate(self._matchers):
            llguidance.numpy.fill_next_token_bitmask(matcher, self._mask, row)
        bits_BV = np.unpackbits(self._mask.view(np.uint8), axis=1, count=scores.shape[1], bitorder="little")
        allowed_BV = scores.float().cpu().masked_fill(torch.from_numpy(bits_BV == 0), -torch.inf)
        chosen_B = self._choose(allowed_BV)
        for row, token in enumerate(chosen_B.tolist()):
            if not self._done[row]:
                matcher = self._matchers[row]
                self._done[row] = not matcher.consume_token(token) or matcher.is_stopped()
        only_BV = torch.full_like(allowed_BV, -torch.inf).scatter_(1, chosen_B[:, None], 0.0)
        return only_BV.to(scores.device, scores.dtype)

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


def _device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
