"""Text decoder trained from scratch: a pre-norm transformer that attends to the hidden states of an image.

Each block has self-attention with rotary embeddings, cross-attention to the image, and an MLP. In training,
all texts about an image are packed into one row (text_loss.py), so the keys and values of the image are
computed once. In generation, they are cached.

Shapes: B images, C rows of tokens, T new tokens, S tokens including cached ones, N hidden states per image,
D width, H heads, K = D / H, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from trainer.model.text_loss import pack, token_loss
from trainer.tokenizer import TextBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Vocabulary size, width, number of blocks and heads, and dropout of a decoder."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must divide into {self.heads} heads of even width")


TensorPair = tuple[Tensor, Tensor]
# The tokens that a token attends to. A mask of shape (T, S) or (C, 1, T, S) is True for visible tokens. The
# pair (`place_CT`, `origin_BS`) limits attention to earlier tokens of the same text. None means all tokens.
Seen = Tensor | TensorPair | None
# Cached keys and values of one block, for the words (C, H, S, K) and for the image (B, H, N, K).
BlockCache = tuple[DynamicLayer, DynamicLayer]


class CrossAttentionDecoder(nn.Module):
    """Maps token ids and image states to logits. The output head is tied to the embedding."""

    max_positions = math.inf

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.width, self.head_width = config.width, config.width // config.heads
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm = nn.RMSNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def make_connector(self, V: int) -> nn.Sequential:
        """Return a new connector from the width of an encoder to the width of the decoder."""
        return nn.Sequential(nn.LayerNorm(V), nn.Linear(V, self.width))

    def forward(
        self, ids_CT: Tensor, memory_BND: Tensor | None, mask_CS: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Return the logits of the token after each of `ids_CT`: (C, T, V).

        With a cache, `ids_CT` holds only new tokens, and `memory_BND` is None if the image is cached.
        `mask_CS` is 0 for padding before the text.
        """
        cache = DynamicCache() if cache is None else cache
        depth = len(self.blocks)
        # Each block has two layers of the cache: one for the words, and one for the image.
        while len(cache.layers) < 2 * depth:
            cache.layers.append(DynamicLayer())
        T, S = ids_CT.shape[1], mask_CS.shape[1]
        causal_TS = torch.ones(T, S, dtype=torch.bool, device=ids_CT.device).tril(S - T)
        # Let padding attend to itself: a fully masked row would be NaN.
        itself_TS = torch.eye(S, dtype=torch.bool, device=ids_CT.device)[S - T :]
        seen_C1TS = (causal_TS & mask_CS[:, None, None].bool()) | itself_TS
        rope = rope_table(torch.arange(S - T, S, device=ids_CT.device), self.head_width)
        caches: list[Any] = list(zip(cache.layers[:depth], cache.layers[depth:], strict=True))
        states_CTD = self.states(ids_CT, memory_BND, rope, seen_C1TS, caches)
        return functional.linear(states_CTD, self.embedding.weight)

    def states(
        self,
        ids_CT: Tensor,
        memory_BND: Tensor | None,
        rope: TensorPair,
        seen: Seen,
        caches: Sequence[BlockCache] = (),
    ) -> Tensor:
        """Return the hidden states from which the head predicts the next tokens: (C, T, D)."""
        x_CTD = self.dropout(self.embedding(ids_CT))
        for index, block in enumerate(self.blocks):
            x_CTD = block(x_CTD, memory_BND, rope, seen, caches[index] if caches else None)
        normed_CTD: Tensor = self.norm(x_CTD)
        return normed_CTD


class ScratchDecoder(CrossAttentionDecoder):
    """A CrossAttentionDecoder with initial weights and a loss."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        # The last layers of the three residual branches start with small weights, as in GPT-2.
        for block in self.blocks:
            assert isinstance(block, Block)
            for layer in (block.attend_words.out, block.attend_image.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (3 * config.depth) ** 0.5)

    def loss(self, memory_BND: Tensor, texts: TextBatch, label_smoothing: float = 0) -> Tensor:
        """Return the summed loss (see CaptionerModel.loss)."""
        packed = pack(texts, len(memory_BND)).to(memory_BND.device)
        rope = rope_table(packed.positions_BS[:, None], self.head_width)
        states_BSD = self.states(packed.ids_BS, memory_BND, rope, (packed.place_CT, packed.origin_BS))
        states_KD = packed.learned(states_BSD)
        return token_loss(states_KD, self.embedding, packed.labels_K, packed.weight_K, label_smoothing)


class Block(nn.Module):
    """Transformer block with pre-norm self-attention, cross-attention and MLP."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attend_words, self.attend_image = Attention(config), Attention(config)
        self.norm_words, self.norm_image, self.norm_mlp = (nn.RMSNorm(config.width) for _ in range(3))
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_CTD: Tensor, memory_BND: Tensor | None, rope: TensorPair, seen: Seen, cache: BlockCache | None
    ) -> Tensor:
        """Return the updated residual stream: (C, T, D). `rope` is the result of `rope_table`."""
        x_CTD = x_CTD + self.dropout(self._self_attention(self.norm_words(x_CTD), rope, seen, cache))
        x_CTD = x_CTD + self.dropout(self._cross_attention(self.norm_image(x_CTD), memory_BND, cache))
        out_CTD: Tensor = x_CTD + self.dropout(self.down(functional.gelu(self.up(self.norm_mlp(x_CTD)))))
        return out_CTD

    def _self_attention(
        self, x_CTD: Tensor, rope: TensorPair, seen: Seen, cache: BlockCache | None
    ) -> Tensor:
        attention = self.attend_words
        q_CHTK = apply_rope(attention.heads(attention.query(x_CTD)), rope)
        k_CHSK, v_CHSK = attention.keys_values(x_CTD)
        k_CHSK = apply_rope(k_CHSK, rope)
        if cache is not None:
            k_CHSK, v_CHSK = cache[0].update(k_CHSK, v_CHSK)
        return attention.attend(q_CHTK, k_CHSK, v_CHSK, seen)

    def _cross_attention(self, x_CTD: Tensor, memory_BND: Tensor | None, cache: BlockCache | None) -> Tensor:
        attention = self.attend_image
        if memory_BND is not None:
            k_BHNK, v_BHNK = attention.keys_values(memory_BND)
            if cache is not None:
                cache[1].update(k_BHNK, v_BHNK)
        else:
            assert cache is not None and cache[1].keys is not None and cache[1].values is not None
            k_BHNK, v_BHNK = cache[1].keys, cache[1].values
        return attention.attend(attention.heads(attention.query(x_CTD)), k_BHNK, v_BHNK, None)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017) without biases."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads = config.heads
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key_value = nn.Linear(config.width, 2 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def heads(self, x_CTD: Tensor) -> Tensor:
        """Split features into heads: (C, T, D) -> (C, H, T, K)."""
        C, T, D = x_CTD.shape
        return x_CTD.view(C, T, self.num_heads, D // self.num_heads).transpose(1, 2)

    def keys_values(self, x_BND: Tensor) -> TensorPair:
        """Project to keys and values, each (B, H, N, K)."""
        k_BND, v_BND = self.key_value(x_BND).chunk(2, -1)
        return self.heads(k_BND), self.heads(v_BND)

    def attend(self, q_CHTK: Tensor, k_CHSK: Tensor, v_CHSK: Tensor, seen: Seen) -> Tensor:
        """Return the attention output with merged heads: (C, T, D)."""
        if isinstance(seen, tuple):
            mixed_CHTK = attend_apart(q_CHTK, k_CHSK, v_CHSK, *seen)
        else:
            mixed_CHTK = attend(q_CHTK, k_CHSK, v_CHSK, attn_mask=seen)
        out_CTD: Tensor = self.out(mixed_CHTK.transpose(1, 2).flatten(2))
        return out_CTD


def attend_apart(
    q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, place_CT: Tensor, origin_BS: Tensor
) -> Tensor:
    """Attend within each packed text only. Returns (B, H, S, K).

    Each text is moved to its own row and back, so that a fast kernel without a mask can be used.
    """

    def moved(x_BHSK: Tensor, place_CT: Tensor) -> Tensor:
        flat_XHK = x_BHSK.transpose(1, 2).flatten(0, 1)
        moved_CTHK: Tensor = flat_XHK.index_select(0, place_CT.flatten()).unflatten(0, place_CT.shape)
        return moved_CTHK.transpose(1, 2)

    q_CHTK, k_CHTK, v_CHTK = (moved(x_BHSK, place_CT) for x_BHSK in (q_BHSK, k_BHSK, v_BHSK))
    return moved(attend(q_CHTK, k_CHTK, v_CHTK, is_causal=True), origin_BS)


def attend(q_CHTK: Tensor, k_CHSK: Tensor, v_CHSK: Tensor, **mask: Any) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v: (C, H, T, K)."""
    if q_CHTK.device.type != "cpu":
        return functional.scaled_dot_product_attention(q_CHTK, k_CHSK, v_CHSK, **mask)
    # On a CPU, the kernel is faster in float32 than in bfloat16.
    with torch.autocast("cpu", enabled=False):
        inputs = (q_CHTK.float(), k_CHSK.float(), v_CHSK.float())
        return functional.scaled_dot_product_attention(*inputs, **mask).to(v_CHSK.dtype)


def rope_table(positions: Tensor, head_width: int, base: float = 10_000.0) -> TensorPair:
    """Return cosines and sines for rotary embeddings (Su et al., 2021), each (..., T, K / 2).

    The pair of features i and i + K / 2 at position p is rotated by the angle p * base^(-2i / K). Attention
    scores then depend only on relative positions.
    """
    even_P = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32)
    frequencies_P = base ** (-even_P / head_width)
    angles = positions[..., None].float() * frequencies_P
    return angles.cos(), angles.sin()


def apply_rope(x_CHTK: Tensor, rope: TensorPair) -> Tensor:
    """Apply rotary embeddings to queries or keys. The result has the dtype of the input."""
    cos, sin = rope
    first, second = x_CHTK.chunk(2, -1)
    turned_CHTK = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned_CHTK.to(x_CHTK.dtype)
