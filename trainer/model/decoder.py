"""Decoder, from scratch: a pre-norm transformer that writes text while it looks at the hidden states of an image.

Each block attends to the words so far (rotary positions), then to the image, then thinks. What does not change while a
caption is written is computed once: keys and values of the image per block, keys and values of the words in a cache.

Shapes: B captions, T new tokens, S tokens so far, N hidden states of the image, D width, H heads, K = D / H, V words.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes are numbers of features, tokens, or layers."""

    vocab_size: int
    width: int
    depth: int
    heads: int
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must divide into {self.heads} heads of an even width")


@dataclass(slots=True)
class BlockCache:
    """What one block keeps: the image's keys and values, fixed, and those of the words, growing (each B, H, *, K)."""

    image: tuple[Tensor, Tensor] | None = None
    words: tuple[Tensor, Tensor] | None = None


@dataclass(slots=True)
class Cache:
    """The state of captions that are being written. Give a fresh one to the first call, then the same one again."""

    blocks: list[BlockCache] = field(default_factory=list)
    length: int = 0


class Decoder(nn.Module):
    """Token ids and image states in; next-token states out. `head` turns states into scores, with the embedding's weights."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        blocks = [Block(config) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(_initialise)
        # Two residual branches grow the stream in each block, a third does in its middle: start them small (GPT-2).
        for block in blocks:
            for layer in (block.attend_words.out, block.attend_image.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (3 * config.depth) ** 0.5)

    def forward(self, ids_BT: Tensor, memory_BND: Tensor, cache: Cache | None = None) -> Tensor:
        """Return states (B, T, D) from which the token after each of `ids_BT` is told.

        Args:
            ids_BT: tokens; with a cache, only those that it has not seen.
            memory_BND: states of the images; not read again once the cache holds their keys and values.
            cache: kept between calls while generating; None while training.
        """
        start = cache.length if cache else 0
        if cache is not None:
            cache.blocks = cache.blocks or [BlockCache() for _ in self.blocks]
            cache.length += ids_BT.shape[1]
        x_BTD = self.dropout(self.embedding(ids_BT))
        for index, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, memory_BND, start, cache.blocks[index] if cache else None)
        normed_BTD: Tensor = self.norm(x_BTD)
        return normed_BTD

    def head(self, states_ND: Tensor) -> Tensor:
        """Score every word: (N, D) -> (N, V)."""
        return functional.linear(states_ND, self.embedding.weight)


class Block(nn.Module):
    """Look at the words, look at the image, think; each on a normalised copy of the stream, added back to it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attend_words = Attention(config)
        self.attend_image = Attention(config)
        self.norm_words, self.norm_image, self.norm_mlp = (nn.RMSNorm(config.width) for _ in range(3))
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, memory_BND: Tensor, start: int, cache: BlockCache | None) -> Tensor:
        """Advance the stream; `start` is the position of the first of the T tokens."""
        x_BTD = x_BTD + self.dropout(self._words(self.norm_words(x_BTD), start, cache))
        x_BTD = x_BTD + self.dropout(self._image(self.norm_image(x_BTD), memory_BND, cache))
        mlp_BTD = self.down(functional.gelu(self.up(self.norm_mlp(x_BTD))))
        out_BTD: Tensor = x_BTD + self.dropout(mlp_BTD)
        return out_BTD

    def _words(self, x_BTD: Tensor, start: int, cache: BlockCache | None) -> Tensor:
        attend = self.attend_words
        q_BHTK = rotate(attend.heads(attend.query(x_BTD)), start)
        k_BHSK, v_BHSK = attend.keys_values(x_BTD)
        k_BHSK = rotate(k_BHSK, start)
        if cache is not None:
            if cache.words is not None:
                k_BHSK = torch.cat([cache.words[0], k_BHSK], 2)
                v_BHSK = torch.cat([cache.words[1], v_BHSK], 2)
            cache.words = k_BHSK, v_BHSK
        T, S = q_BHTK.shape[2], k_BHSK.shape[2]
        # Token t of the new ones stands at S - T + t, and sees itself and all before it.
        seen_TS = torch.ones(T, S, dtype=torch.bool, device=x_BTD.device).tril(S - T)
        return attend.mix(q_BHTK, k_BHSK, v_BHSK, seen_TS)

    def _image(self, x_BTD: Tensor, memory_BND: Tensor, cache: BlockCache | None) -> Tensor:
        attend = self.attend_image
        if cache is not None and cache.image is not None:
            k_BHNK, v_BHNK = cache.image
        else:
            k_BHNK, v_BHNK = attend.keys_values(memory_BND)
        if cache is not None:
            cache.image = k_BHNK, v_BHNK
        return attend.mix(attend.heads(attend.query(x_BTD)), k_BHNK, v_BHNK, None)


class Attention(nn.Module):
    """Projections of multi-head attention (Vaswani et al., 2017), without biases."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_count = config.heads
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key_value = nn.Linear(config.width, 2 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def heads(self, x_BTD: Tensor) -> Tensor:
        """Cut features into heads: (B, T, D) -> (B, H, T, K)."""
        B, T, D = x_BTD.shape
        return x_BTD.view(B, T, self.head_count, D // self.head_count).transpose(1, 2)

    def keys_values(self, x_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Project to keys and values: (B, N, D) -> two of (B, H, N, K)."""
        k_BND, v_BND = self.key_value(x_BND).chunk(2, -1)
        return self.heads(k_BND), self.heads(v_BND)

    def mix(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, seen_TS: Tensor | None) -> Tensor:
        """Attend and put the heads together again: -> (B, T, D)."""
        mixed_BHTK = functional.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=seen_TS)
        out_BTD: Tensor = self.out(mixed_BHTK.transpose(1, 2).flatten(2))
        return out_BTD


def rotate(x_BHTK: Tensor, start: int, base: float = 10_000.0) -> Tensor:
    """Turn pairs of features by angles that grow with the position (RoPE, Su et al., 2021); position `start` comes first.

    The angle of pair i at position p is p * base^(-2i / K); only differences of positions reach the scores.
    """
    T, K = x_BHTK.shape[-2:]
    positions_T = torch.arange(start, start + T, device=x_BHTK.device, dtype=torch.float32)
    frequencies_P = base ** (-torch.arange(0, K, 2, device=x_BHTK.device, dtype=torch.float32) / K)
    angles_TP = positions_T[:, None] * frequencies_P
    cos_TP, sin_TP = angles_TP.cos(), angles_TP.sin()
    first, second = x_BHTK.chunk(2, -1)
    return torch.cat([first * cos_TP - second * sin_TP, second * cos_TP + first * sin_TP], -1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
