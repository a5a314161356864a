"""Auxiliary losses that teach the tiny teacher to find a page in a deck.

Answers alone do not suffice as targets (docs/measurements.md). To answer "How many objects are there on the
gray page?" the model must identify the page of each image token, find the gray page, and attend to its
tokens. Each of these steps has its own loss. A spot is an image token or the token after a page. Heads
predict a page, a background, a count or a spot from hidden states. Another loss rewards attention to decisive
spots, which determine the answer. The heads are not part of the model.

Shapes: B decks, S tokens, H heads, V spots in a deck (10 per page), 9 image tokens per page, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from examples.scenes.packed_tasks import VISION_TOKENS, Packed
from pipeline.scenes.scene import BACKGROUNDS, MAX_OBJECTS, Scene

PAGE_LAYER, WORD_LAYER = 1, 2  # the heads read the hidden states after these layers
# Only these layers and heads have an attention loss. The other heads attend to the text.
GUIDED_LAYERS, GUIDED_HEADS = (2, 3), slice(2, None)
IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class DeckExample:
    """A packed deck and its facts."""

    packed: Packed
    deck: tuple[Scene, ...]


class PageGuide(nn.Module):
    """Auxiliary heads that predict facts from hidden states, for use in training only."""

    def __init__(self, width: int, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        classes = len(BACKGROUNDS)  # a full deck has one page per background
        self.page, self.word, self.number, self.ground = (nn.Linear(width, classes) for _ in range(4))
        self.count = nn.Linear(width, MAX_OBJECTS + 1)
        self.look_page, self.look_ground = nn.Linear(width, classes), nn.Linear(width, classes)
        self.look_spot = nn.Linear(width, VISION_TOKENS + 1)
        self._end_id = tokenizer.get_vocab()["<|vision_end|>"]
        ids = {
            text: tokenizer(text)["input_ids"]
            for text in (*(f" {ground}" for ground in BACKGROUNDS), " page")
        }
        assert all(len(token_ids) == 1 for token_ids in ids.values()), "each of these words must be one token"
        self._ground_of_id = {ids[f" {ground}"][0]: index for index, ground in enumerate(BACKGROUNDS)}
        self._page_id = ids[" page"][0]
        self._number_of_id = {
            tokenizer(str(number))["input_ids"][-1]: number for number in range(1, classes + 1)
        }

    def forward(self, output: Any, image_BS: Tensor, examples: Sequence[DeckExample]) -> Tensor:
        """Return the sum of all losses for decks with the same number of pages.

        `output` must have hidden states. If it has attentions, their loss is added.
        """
        pages, length = len(examples[0].deck), image_BS.shape[1]
        ends_BS = (
            pad_sequence([torch.tensor(item.packed.ids) for item in examples], batch_first=True)
            == self._end_id
        )
        image_KD = output.hidden_states[PAGE_LAYER][image_BS | ends_BS]
        page_K = torch.arange(pages).repeat_interleave(VISION_TOKENS + 1).repeat(len(examples))
        loss = functional.cross_entropy(self.page(image_KD), page_K)
        words_BSD = output.hidden_states[WORD_LAYER]
        page_BS, ground_BS, spot_BS = _looks(examples, length)
        # The hidden states before the guided layers must contain the page and the spot.
        heads = (self.word, self.number, self.look_spot)
        for head, targets_BS in zip(heads, (*self._targets(examples, length), spot_BS), strict=True):
            loss = loss + _mean(_costs(head, words_BSD, targets_BS))
        # A page is identified by its number or by its background, so only the smaller loss counts.
        by_number_N, by_ground_N = (
            _costs(self.look_page, words_BSD, page_BS),
            _costs(self.look_ground, words_BSD, ground_BS),
        )
        loss = loss + _mean(torch.minimum(by_number_N, by_ground_N))
        ends_ED = words_BSD[ends_BS]  # the token after a page summarizes it
        counts = torch.tensor([len(scene.objects) for item in examples for scene in item.deck])
        grounds = torch.tensor(
            [BACKGROUNDS.index(scene.background) for item in examples for scene in item.deck]
        )
        loss = loss + functional.cross_entropy(self.count(ends_ED), counts)
        loss = loss + functional.cross_entropy(self.ground(ends_ED), grounds)
        if output.attentions:
            loss = loss + attention_loss(
                [output.attentions[layer] for layer in GUIDED_LAYERS], image_BS | ends_BS, examples
            )
        return loss

    def _targets(self, examples: Sequence[DeckExample], length: int) -> tuple[Tensor, Tensor]:
        """Return targets [B, S]: the page of each named background, the background of each page number."""
        page_BS, ground_BS = (torch.full((len(examples), length), IGNORE_INDEX) for _ in range(2))
        for b, example in enumerate(examples):
            page_of = {BACKGROUNDS.index(scene.background): index for index, scene in enumerate(example.deck)}
            ids = example.packed.ids
            for s, (token, segment) in enumerate(zip(ids, example.packed.segments, strict=True)):
                ground, number = self._ground_of_id.get(token), self._number_of_id.get(token)
                if segment and ground in page_of:
                    page_BS[b, s] = page_of[ground]
                if segment and number and self._page_id in ids[s - 2 : s] and number <= len(example.deck):
                    ground_BS[b, s] = BACKGROUNDS.index(example.deck[number - 1].background)
        return page_BS, ground_BS


def _costs(head: nn.Module, words_BSD: Tensor, targets_BS: Tensor) -> Tensor:
    """Return the cross-entropy at each position with a target."""
    has_target_BS = targets_BS != IGNORE_INDEX
    costs_N: Tensor = functional.cross_entropy(
        head(words_BSD[has_target_BS]), targets_BS[has_target_BS], reduction="none"
    )
    return costs_N


def _mean(costs_N: Tensor) -> Tensor:
    return costs_N.sum() / max(1, len(costs_N))


def _looks(examples: Sequence[DeckExample], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return targets [B, S]: the page, background and spot on which the next token depends."""
    page_BS, ground_BS, spot_BS = (torch.full((len(examples), length), IGNORE_INDEX) for _ in range(3))
    for b, example in enumerate(examples):
        for s, decisive in enumerate(example.packed.decided_spans):
            pages, spots = {page for page, _ in decisive}, {spot for _, spot in decisive}
            if len(pages) == 1:
                page_BS[b, s] = min(pages) - 1
                ground_BS[b, s] = BACKGROUNDS.index(example.deck[min(pages) - 1].background)
            if len(spots) == 1:
                spot_BS[b, s] = min(spots)
    return page_BS, ground_BS, spot_BS


def attention_loss(
    attentions_BHSS: Sequence[Tensor], visual_BS: Tensor, examples: Sequence[DeckExample]
) -> Tensor:
    """Return the mean -log of the attention to the spots on which a token depends.

    `visual_BS` masks the image tokens and the token after each page.
    """
    spots = VISION_TOKENS + 1
    is_spot_BSV = torch.zeros(*visual_BS.shape, len(examples[0].deck) * spots)
    is_spot_BSV[visual_BS] = torch.eye(is_spot_BSV.shape[-1]).repeat(len(examples), 1)
    is_decisive_BSV = torch.zeros_like(is_spot_BSV)
    for b, example in enumerate(examples):
        for s, decisive in enumerate(example.packed.decided_spans):
            is_decisive_BSV[b, s, [(page - 1) * spots + spot for page, spot in decisive]] = 1.0
    has_target_BS = is_decisive_BSV.any(-1)
    losses: list[Tensor] = []
    for attention_BHSS in attentions_BHSS:
        spot_attention_BHSV = attention_BHSS[:, GUIDED_HEADS] @ is_spot_BSV[:, None]
        decisive_attention_BHS = (spot_attention_BHSV * is_decisive_BSV[:, None]).sum(-1) + 1e-4
        losses.append(-decisive_attention_BHS.transpose(1, 2)[has_target_BS].log().flatten())
    return torch.cat(losses).mean()
