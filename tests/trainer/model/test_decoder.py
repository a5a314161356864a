"""Decoder: attention to earlier tokens and to the image, with and without a cache."""

import pytest
import torch
from transformers import DynamicCache

from trainer.model.decoder import CrossAttentionDecoder, DecoderConfig

WORDS, WIDTH = 23, 32


@pytest.fixture
def decoder() -> CrossAttentionDecoder:
    torch.manual_seed(0)
    return CrossAttentionDecoder(DecoderConfig(vocab_size=WORDS, width=WIDTH, depth=2, heads=4)).eval()


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 4], [9]])
def test_cache_does_not_change_logits(decoder: CrossAttentionDecoder, pieces: list[int]) -> None:
    ids, memory, mask = torch.randint(WORDS, (2, 9)), torch.randn(2, 5, WIDTH), torch.ones(2, 9)
    cache, end, logits = DynamicCache(), 0, []
    for length in pieces:
        new = ids[:, end : end + length]
        logits.append(decoder(new, None if end else memory, mask[:, : end + length], cache))
        end += length
    torch.testing.assert_close(torch.cat(logits, 1), decoder(ids, memory, mask), rtol=1e-5, atol=1e-5)
