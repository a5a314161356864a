"""Data: the order of training is a pure function, and nothing outside the training split shapes the vocabulary."""

from itertools import islice

import pytest

from trainer.data import Example, batches, caption_ids, collate, train_tokenizer
from trainer.model.captioner import EOS_ID, PAD_ID


def example(*texts: str) -> Example:
    return Example(sample_id="x", image=b"", captions=tuple(("brief", text) for text in texts), references=())


def test_every_example_comes_once_an_epoch_in_another_order_each_time() -> None:
    steps = list(islice(batches(count=10, size=5, seed=0, first_step=0), 4))
    first, second = steps[0] + steps[1], steps[2] + steps[3]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


@pytest.mark.parametrize("size", [3, 5, 7])
def test_starting_late_gives_the_rest_of_the_same_order(size: int) -> None:
    whole = list(islice(batches(count=10, size=size, seed=1, first_step=0), 8))
    assert list(islice(batches(count=10, size=size, seed=1, first_step=5), 3)) == whole[5:]


def test_another_seed_gives_another_order() -> None:
    assert next(batches(50, 50, 0, 0)) != next(batches(50, 50, 1, 0))


def test_a_caption_survives_its_tokens_and_ends_with_eos() -> None:
    tokenizer = train_tokenizer([example("A red circle.", "A blue ring.")], 400)
    ids = caption_ids(tokenizer, "brief", 'A "red" <eos> Kreis é.', 64)
    assert ids[0] == tokenizer.token_to_id("<brief>")
    assert ids[-1] == EOS_ID
    assert tokenizer.decode(ids[1:-1]).strip() == 'A "red" <eos> Kreis é.'


def test_a_caption_that_is_too_long_is_cut_and_does_not_claim_to_end() -> None:
    tokenizer = train_tokenizer([example("a b c d e f g h")], 400)
    ids = caption_ids(tokenizer, "brief", "a b c d e f g h", 4)
    assert len(ids) == 5
    assert EOS_ID not in ids


def test_shorter_captions_are_padded_on_the_right() -> None:
    assert collate([[2, 3, 4], [2]]).tolist() == [[2, 3, 4], [2, PAD_ID, PAD_ID]]
