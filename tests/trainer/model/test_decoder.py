"""Decoder: attention to earlier tokens and to the image, with and without a cache."""

import pytest
import torch

from trainer.model.decoder import Cache, DecoderConfig, ScratchDecoder

WORDS, WIDTH = 23, 32


@pytest.fixture
def decoder() -> ScratchDecoder:
    torch.manual_seed(0)
    return ScratchDecoder(DecoderConfig(vocab_size=WORDS, width=WIDTH, depth=2, heads=4)).eval()


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 4], [9]])
def test_cache_does_not_change_states(decoder: ScratchDecoder, pieces: list[int]) -> None:
    ids, memory = torch.randint(WORDS, (4, 9)), torch.randn(2, 5, WIDTH)
    cache, start, states = Cache(), 0, []
    for length in pieces:
        states.append(decoder(ids[:, start : start + length], memory, cache))
        start += length
    torch.testing.assert_close(torch.cat(states, 1), decoder(ids, memory), rtol=1e-5, atol=1e-5)


def test_rows_that_share_an_image_have_the_same_states_as_separate_rows(decoder: ScratchDecoder) -> None:
    ids, memory = torch.randint(WORDS, (4, 6)), torch.randn(2, 5, WIDTH)
    apart = torch.cat([decoder(ids[[row]], memory[[row // 2]]) for row in range(4)])
    torch.testing.assert_close(decoder(ids, memory), apart, rtol=1e-5, atol=1e-5)


def test_rows_kept_in_the_cache_continue_like_separate_rows(decoder: ScratchDecoder) -> None:
    ids, memory, cache = torch.randint(WORDS, (3, 6)), torch.randn(3, 5, WIDTH), Cache()
    decoder(ids[:, :5], memory, cache)
    cache.keep(torch.tensor([2, 0]))
    alone = decoder(ids[[2, 0]], memory[[2, 0]])[:, 5:]
    torch.testing.assert_close(decoder(ids[[2, 0], 5:], None, cache), alone, rtol=1e-5, atol=1e-5)
