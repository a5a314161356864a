"""Pack all tasks about an image into one sequence, in which they share the system text and the image.

Tasks do not attend to each other. Each task has the same tokens and positions as if it were alone in the chat
template.

The text before each task line is dropped, truncated, shuffled, mixed with other sentences, or replaced by
random letters. Thus the model learns to read only the task line, and a new prompt requires no retraining.
"""

import itertools
import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from examples.scenes.questions import Spot
from pipeline.config import SCENE_PROMPTS
from pipeline.scenes.scene import PLACES
from pipeline.tasks import TASKS
from pipeline.tasks.prompts import SYSTEM, page_label, template

VISION_TOKENS = len(PLACES)
RARE_WORDS_PROBABILITY = 0.3
# Matches the values in a reply that depend on the image.
DECIDED = re.compile(r'"(?:answer|expression)":"([^"]*)"')
# Characters from start to end depend on these parts of the image.
DecidedSpan = tuple[int, int, tuple[Spot, ...]]
MAX_WORDS = 200

_TEXT = """
Please look closely before you reply. You are a careful assistant that writes short texts about pictures. Use
plain English and the present tense. Do not guess; leave out what cannot be made out. Return valid JSON
without any explanation. The output is parsed by a program, so keep to the format. Mention colors, sizes and
positions where they matter. Several people will read this text later and compare it with the photo. Keep it
factual, neutral and concise. Count with care: every item matters. Never repeat yourself and never add a
greeting. Here is one more page from the collection. Describe the scene for someone who cannot see it. Think
about what stands in the foreground and what lies behind it. Avoid words such as maybe, probably or appears to
be. A good question has exactly one correct answer. Each reply is checked against a schema by machine. If
there is text in the figure, ignore it unless told otherwise. Your description should be between five and
sixty words long. Follow the task on the last line. The user will upload many such files, one after another.
Numbers are written as digits and answers stay short. Let the tone be calm, like a catalogue of a museum. What
would a child point at first?
"""
SENTENCES = tuple(re.split(r"(?<=[.?]) ", " ".join(_TEXT.split())))


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """A task line (the last line of a prompt, which names the task) and the reply to learn."""

    line: str
    reply: str
    rarely_worded: bool = False
    # None stands for random words.
    words: str | None = None
    decided_spans: tuple[DecidedSpan, ...] = ()  # for decks


@dataclass(slots=True)
class Packed:
    """The tokens of a document, with a shared prefix (segment 0) and one segment per task.

    A position is (time, height, width). `labels` holds the next token, or -100 if it is not learned.
    `weights` holds its weight in the loss.
    """

    ids: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    # The next token depends on these parts of the image.
    decided_spans: list[tuple[Spot, ...]] = field(default_factory=list)


class Packer:
    """Turns tasks into packed sequences."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_token_id: int) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = image_token_id

    def pack(
        self,
        images: int,
        rng: random.Random,
        tasks: Iterable[TrainingTask],
        answer_weight: float,
        system: str | None = None,
    ) -> Packed:
        """Return the sequence for a document with `images` images. `system` is random by default."""
        packed = Packed()
        random_system, _ = sample_wording(rng)
        system = random_system if system is None else system
        prefix = (f"<|im_start|>system\n{system}<|im_end|>\n" if system else "") + "<|im_start|>user\n"
        start = 0
        for number in range(1, images + 1):
            label = page_label(number) if images > 1 else ""
            start = self._text(packed, self._ids(f"{prefix}{label}<|vision_start|>"), segment=0, start=start)
            start = self._image(packed, start)
            prefix = "<|vision_end|>"
        start = self._text(packed, self._ids("<|vision_end|>"), segment=0, start=start)
        for segment, task in enumerate(tasks, 1):
            has_words = not task.rarely_worded or rng.random() < RARE_WORDS_PROBABILITY
            words = sample_wording(rng)[1] if has_words else ""
            words = words if task.words is None else task.words
            prompt_ids = self._ids(f"{words}\n{task.line}" if words else task.line)
            prompt_ids += self._ids("<|im_end|>\n<|im_start|>assistant\n")
            reply_ids = self._ids(f"{task.reply}<|im_end|>")
            self._text(
                packed, prompt_ids + reply_ids, segment=segment, start=start, learn_from=len(prompt_ids)
            )
            offsets = self.tokenizer(f"{task.reply}<|im_end|>", return_offsets_mapping=True)["offset_mapping"]
            answers = [match.span(1) for match in DECIDED.finditer(task.reply)]
            # Labels are stored at the previous token.
            for index, (first, stop) in enumerate(offsets, -len(reply_ids) - 1):
                spots = next((spots for a, b, spots in task.decided_spans if a < stop and first < b), ())
                packed.decided_spans[index] = spots
                is_decided = spots or any(a < stop and first < b for a, b in answers)
                packed.weights[index] = answer_weight if is_decided else 1.0
        return packed

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def _image(self, packed: Packed, start: int) -> int:
        """Add the tokens of one image, and return the next free position."""
        side = math.isqrt(VISION_TOKENS)
        positions = [
            (start, start + row, start + column) for row, column in itertools.product(range(side), repeat=2)
        ]
        _extend(packed, [self.image_token_id] * VISION_TOKENS, positions, segment=0)
        return start + side

    def _text(
        self, packed: Packed, ids: list[int], *, segment: int, start: int, learn_from: int | None = None
    ) -> int:
        _extend(packed, ids, [(n, n, n) for n in range(start, start + len(ids))], segment=segment)
        if learn_from is not None:
            packed.labels[learn_from - 1 - len(ids) : -1] = ids[learn_from:]
        return start + len(ids)


def _extend(packed: Packed, ids: list[int], positions: list[tuple[int, int, int]], *, segment: int) -> None:
    packed.ids += ids
    packed.segments += [segment] * len(ids)
    packed.positions += positions
    packed.labels += [-100] * len(ids)
    packed.weights += [1.0] * len(ids)
    packed.decided_spans += [()] * len(ids)


def collate(rows: list[Packed]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ids [B, S], positions [3, B, S], attention mask [B, 1, S, S], labels [B, S], weights [B, S]."""

    def pad(name: str, value: float) -> Tensor:
        return pad_sequence(
            [torch.tensor(getattr(row, name)) for row in rows], batch_first=True, padding_value=value
        )

    ids_BS, labels_BS, weights_BS, segments_BS = (
        pad("ids", 0),
        pad("labels", -100),
        pad("weights", 0),
        pad("segments", -1),
    )
    visible_BSS = (segments_BS[:, None, :] == segments_BS[:, :, None]) | (segments_BS[:, None, :] == 0)
    mask_BSS = visible_BSS & torch.ones(visible_BSS.shape[1:], dtype=torch.bool).tril()
    return ids_BS, pad("positions", 0).permute(2, 0, 1).contiguous(), mask_BSS[:, None], labels_BS, weights_BS


def sample_wording(rng: random.Random) -> tuple[str, str]:
    """Return a random system text, and random words before a task line. Either may be empty."""
    return _wording(rng), _wording(rng)


def _wording(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.3:
        return ""
    if draw < 0.4:
        return " ".join(_nonsense(rng) for _ in range(rng.randint(1, 12)))
    prompt = rng.choice((SYSTEM, *(task.prompt for task in TASKS.values())))
    prompt_lines = template(prompt, (SCENE_PROMPTS,)).split("\n")
    prompt_lines = [
        line for line in prompt_lines if line and not line.startswith(("{%", "}", "Task:", "Question:"))
    ]
    words = " ".join(rng.sample((*SENTENCES, *prompt_lines), rng.randint(1, 4))).split()
    if draw < 0.8:  # keep only a few of the words
        first = rng.randrange(len(words))
        words = words[first : first + rng.randint(1, 16)]
    words = [word for word in words if rng.random() > 0.1]
    if rng.random() < 0.2:
        rng.shuffle(words)
    return " ".join(words[:MAX_WORDS])


def _nonsense(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 8)))
