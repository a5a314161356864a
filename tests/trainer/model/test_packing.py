"""Packing texts of an image into one row: positions, attention mask and learned tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.model.test_caption_model import IMAGES, PROMPTS, ROWS, texts
from trainer.model.text_loss import pack, packed_mask

EOS = 1
LENGTHS = st.tuples(st.integers(2, 9), st.integers(1, 9))  # of text and prompt


def test_positions_start_again_with_each_text() -> None:
    packed = pack(texts(ROWS, PROMPTS, IMAGES), num_images=2)
    assert packed.positions_BS[0].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert packed.segments_BS[0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert packed.ids_BS.tolist() == [[2, 3, 7, 8, 2, 3, 9], [2, 5, 6, 4, 11, 12, 0]]
    assert packed.segments_BS[1].tolist() == [0] * 6 + [-1]
    assert packed.learned_K.tolist() == [1, 2, 3, 5, 6, 7 + 3, 7 + 4, 7 + 5]
    assert packed.labels_K.tolist() == [7, 8, EOS, 9, EOS, 11, 12, EOS]


def test_mask_shows_prefix_and_earlier_tokens_of_the_text() -> None:
    mask = packed_mask(torch.tensor([[0, 0, 1, 1, -1]]), prefix_length=1)[0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 1],
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(LENGTHS, max_size=4), min_size=1, max_size=5))
def test_packing_equals_a_loop_over_tokens(lengths: list[list[tuple[int, int]]]) -> None:
    pairs = [
        (image, length, min(prompt, length)) for image, row in enumerate(lengths) for length, prompt in row
    ]
    if not pairs:
        return
    draw = torch.Generator().manual_seed(len(pairs))
    rows = [torch.randint(2, 99, (length,), generator=draw).tolist() for _, length, _ in pairs]
    packed = pack(texts(rows, [prompt for *_, prompt in pairs], [image for image, *_ in pairs]), len(lengths))
    ids: list[list[int]] = [[] for _ in lengths]
    learned = []
    for row, (image, length, prompt) in zip(rows, pairs, strict=True):
        for t in range(length - 1):
            ids[image].append(row[t])
            if t + 1 >= prompt:
                learned.append((image, len(ids[image]) - 1, row[t + 1]))
    S = packed.ids_BS.shape[1]
    assert max(1, *map(len, ids)) == S
    assert packed.ids_BS.tolist() == [row + [0] * (S - len(row)) for row in ids]
    assert (packed.segments_BS >= 0).sum(1).tolist() == list(map(len, ids))
    assert packed.learned_K.tolist() == [image * S + place for image, place, _ in learned]
    assert packed.labels_K.tolist() == [label for *_, label in learned]
    is_real_BS = packed.segments_BS >= 0
    there_and_back_BS = packed.place_CT.flatten()[packed.origin_BS]
    assert torch.equal(there_and_back_BS[is_real_BS], torch.arange(len(lengths) * S).view(-1, S)[is_real_BS])
