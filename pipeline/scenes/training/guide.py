"""What helps the tiny teacher to find a page of a deck. From answers alone it did not learn that (docs/experiments/teacher.md).

To answer "How many objects are there on the gray page?" the model must know the page of each image token, find those of the
gray page from the word, and look there. Each of these steps is given a target of its own: heads that read a page, a ground, a
count or the spot to look at off hidden states, and a reward for attention on spots that decide a word. None of these heads is
part of the model.

Shapes: B decks, S tokens, H heads, V spots of a deck (10 a page), 9 image tokens of a page, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from pipeline.scenes.facts import BACKGROUNDS, MAX_OBJECTS, Scene
from pipeline.scenes.training.pack import VISION_TOKENS, Packed

PAGE_LAYER, WORD_LAYER = 1, 2  # after which layers the heads read
GUIDED_LAYERS, GUIDED_HEADS = (2, 3), slice(2, None)  # whose attention is rewarded, counted from 0; other heads read the text
NOTHING = -100


@dataclass(frozen=True, slots=True)
class Asked:
    """A packed deck with its facts."""

    packed: Packed
    deck: tuple[Scene, ...]


class PageGuide(nn.Module):
    """The heads, and the losses of all steps."""

    def __init__(self, width: int, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        classes = len(BACKGROUNDS)  # of pages and of grounds alike
        self.page, self.word, self.number, self.ground = (nn.Linear(width, classes) for _ in range(4))
        self.count = nn.Linear(width, MAX_OBJECTS + 1)
        self.look_page, self.look_ground = nn.Linear(width, classes), nn.Linear(width, classes)
        self.look_spot = nn.Linear(width, VISION_TOKENS + 1)
        self._end_id = tokenizer.get_vocab()["<|vision_end|>"]
        ids = {text: tokenizer(text)["input_ids"] for text in (*(f" {ground}" for ground in BACKGROUNDS), " page")}
        assert all(len(found) == 1 for found in ids.values()), "each of these words must be one token"
        self._ground_of_id = {ids[f" {ground}"][0]: at for at, ground in enumerate(BACKGROUNDS)}
        self._page_id = ids[" page"][0]
        self._number_of_id = {tokenizer(str(number))["input_ids"][-1]: number for number in range(1, classes + 1)}

    def forward(self, output: Any, image_BS: Tensor, asked: Sequence[Asked]) -> Tensor:
        """Return the sum of all losses; `output` is that of the language model, with hidden states and, or not, attentions.

        All decks must have the same number of pages.
        """
        pages = len(asked[0].deck)
        length = image_BS.shape[1]
        ends_BS = self._ends(asked, length)
        image_KD = output.hidden_states[PAGE_LAYER][image_BS | ends_BS]
        page_K = torch.arange(pages).repeat_interleave(VISION_TOKENS + 1).repeat(len(asked))
        loss = functional.cross_entropy(self.page(image_KD), page_K)
        words_BSD = output.hidden_states[WORD_LAYER]
        page_BS, ground_BS, spot_BS = _looks(asked, length)
        # Which page a word names, and which spot decides the next one, must be known before the layers that look there.
        heads = (self.word, self.number, self.look_spot)
        for head, targets_BS in zip(heads, (*self._targets(asked, length), spot_BS), strict=True):
            loss = loss + _mean(_costs(head, words_BSD, targets_BS))
        # A page is known by its number or by its ground: after "pages [2]" by the one, after "on the gray page" by the other.
        by_number_N, by_ground_N = (
            _costs(*each) for each in ((self.look_page, words_BSD, page_BS), (self.look_ground, words_BSD, ground_BS))
        )
        loss = loss + _mean(torch.minimum(by_number_N, by_ground_N))
        ends_ED = words_BSD[ends_BS]  # what stands behind each page sums it up
        counts = torch.tensor([len(scene.objects) for each in asked for scene in each.deck])
        grounds = torch.tensor([BACKGROUNDS.index(scene.background) for each in asked for scene in each.deck])
        loss = loss + functional.cross_entropy(self.count(ends_ED), counts)
        loss = loss + functional.cross_entropy(self.ground(ends_ED), grounds)
        if output.attentions:
            loss = loss + attention_loss([output.attentions[layer] for layer in GUIDED_LAYERS], image_BS | ends_BS, asked)
        return loss

    def _ends(self, asked: Sequence[Asked], length: int) -> Tensor:
        """Return where the pages end: (B, S)."""
        ends_BS = torch.zeros(len(asked), length, dtype=torch.bool)
        for b, each in enumerate(asked):
            ends_BS[b, [s for s, token in enumerate(each.packed.ids) if token == self._end_id]] = True
        return ends_BS

    def _targets(self, asked: Sequence[Asked], length: int) -> tuple[Tensor, Tensor]:
        """Return, within tasks, the page at each word that names a ground, and the ground at each number of a page: (B, S)."""
        page_BS, ground_BS = (torch.full((len(asked), length), NOTHING) for _ in range(2))
        for b, each in enumerate(asked):
            page_of = {BACKGROUNDS.index(scene.background): at for at, scene in enumerate(each.deck)}
            ids = each.packed.ids
            for s, (token, segment) in enumerate(zip(ids, each.packed.segments, strict=True)):
                ground, number = self._ground_of_id.get(token), self._number_of_id.get(token)
                if segment and ground in page_of:
                    page_BS[b, s] = page_of[ground]
                if segment and number and self._page_id in ids[s - 2 : s] and number <= len(each.deck):
                    ground_BS[b, s] = BACKGROUNDS.index(each.deck[number - 1].background)
        return page_BS, ground_BS


def _costs(head: nn.Module, words_BSD: Tensor, targets_BS: Tensor) -> Tensor:
    """Return the cross-entropy at each of the places that have a target."""
    told_BS = targets_BS != NOTHING
    costs_N: Tensor = functional.cross_entropy(head(words_BSD[told_BS]), targets_BS[told_BS], reduction="none")
    return costs_N


def _mean(costs_N: Tensor) -> Tensor:
    return costs_N.sum() / max(1, len(costs_N))


def _looks(asked: Sequence[Asked], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, where one page decides a word, its number and its ground, and where one spot of it does, which: (B, S)."""
    page_BS, ground_BS, spot_BS = (torch.full((len(asked), length), NOTHING) for _ in range(3))
    for b, each in enumerate(asked):
        for s, decisive in enumerate(each.packed.looks):
            pages, spots = {page for page, _ in decisive}, {spot for _, spot in decisive}
            if len(pages) == 1:
                page_BS[b, s] = min(pages) - 1
                ground_BS[b, s] = BACKGROUNDS.index(each.deck[min(pages) - 1].background)
            if len(spots) == 1:
                spot_BS[b, s] = min(spots)
    return page_BS, ground_BS, spot_BS


def attention_loss(attentions_BHSS: Sequence[Tensor], visual_BS: Tensor, asked: Sequence[Asked]) -> Tensor:
    """Return how far attention strays from the spots that decide a word, where it is told: mean -log of what is on them.

    `visual_BS` is where the pages are: of each its image tokens and the one behind them.
    """
    spots = VISION_TOKENS + 1
    at_BSV = torch.zeros(*visual_BS.shape, len(asked[0].deck) * spots)
    at_BSV[visual_BS] = torch.eye(at_BSV.shape[-1]).repeat(len(asked), 1)
    right_BSV = torch.zeros_like(at_BSV)
    for b, each in enumerate(asked):
        for s, decisive in enumerate(each.packed.looks):
            right_BSV[b, s, [(page - 1) * spots + spot for page, spot in decisive]] = 1.0
    told_BS = right_BSV.any(-1)
    strayed: list[Tensor] = []
    for attention_BHSS in attentions_BHSS:
        looked_BHSV = attention_BHSS[:, GUIDED_HEADS] @ at_BSV[:, None]
        stays_BHS = (looked_BHSV * right_BSV[:, None]).sum(-1) + 1e-4
        strayed.append(-stays_BHS.transpose(1, 2)[told_BS].log().flatten())
    return torch.cat(strayed).mean()
