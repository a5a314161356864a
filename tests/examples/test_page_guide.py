"""Page guide: heads are trained on the true pages, and attention outside the evidence raises the loss."""

import random
from types import SimpleNamespace

import pytest
import torch

from examples.scenes.packed_tasks import VISION_TOKENS, Packer, TrainingTask, collate
from examples.scenes.page_guide import GUIDED_HEADS, DeckExample, PageGuide, attention_loss
from examples.scenes.questions import END, Spot
from examples.scenes.tiny_vlm import TEXT_WIDTH, train_tokenizer
from examples.scenes.train_teacher import tokenizer_corpus
from pipeline.scenes.scene import sample_deck

PAGES = 3
IMAGE_ID = 6


@pytest.fixture(scope="module")
def guide() -> tuple[PageGuide, Packer]:
    tokenizer = train_tokenizer(tokenizer_corpus(400))
    return PageGuide(TEXT_WIDTH, tokenizer), Packer(tokenizer, tokenizer.get_vocab()["<|image_pad|>"])


def pack_example(packer: Packer, line: str, spots: tuple[Spot, ...]) -> DeckExample:
    deck = sample_deck(random.Random(4))[:PAGES]
    task = TrainingTask(line, '{"answer":"2"}', seldom_worded=True, decided_spans=((11, 12, spots),))
    return DeckExample(packer.pack(PAGES, random.Random(1), [task], 4.0), deck)


def test_attention_to_the_right_spots_costs_nothing_and_elsewhere_much(guide: tuple[PageGuide, Packer]) -> None:
    heads, packer = guide
    example = pack_example(packer, "Question: How many?", ((2, 4), (2, END)))
    ids, *_ = collate([example.packed])
    visual_BS = (ids == packer.image_token_id) | (ids == heads._end_id)
    spots = visual_BS[0].nonzero()[:, 0].view(PAGES, VISION_TOKENS + 1)
    losses = {}
    for page, spot in ((2, 4), (2, END), (2, 5), (1, 4), (3, END)):
        attention = torch.zeros(1, 5, ids.shape[1], ids.shape[1])  # unguided heads may attend anywhere
        attention[:, GUIDED_HEADS, :, spots[page - 1, spot]] = 1.0
        losses[page, spot] = attention_loss([attention], visual_BS, [example]).item()
    assert losses[2, 4] == pytest.approx(0.0, abs=1e-3)
    assert losses[2, END] == pytest.approx(0.0, abs=1e-3)
    assert min(losses[2, 5], losses[1, 4], losses[3, END]) > 5


def test_all_heads_learn_from_a_deck(guide: tuple[PageGuide, Packer]) -> None:
    heads, packer = guide
    ground = sample_deck(random.Random(4))[0].background
    example = pack_example(packer, f"Question: Which page is {ground}? What color is page 1?", ((1, END),))
    ids, *_ = collate([example.packed])
    for _ in range(20):  # a page is known by its number or its ground: each step trains only one of the two heads
        output = SimpleNamespace(hidden_states=[torch.randn(1, ids.shape[1], TEXT_WIDTH) for _ in range(5)], attentions=None)
        heads(output, ids == packer.image_token_id, [example]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads.parameters())
