"""Text decoder trained from scratch: a pre-norm transformer that attends to the hidden states of an image.

Each block has self-attention with rotary embeddings, cross-attention to the image, and an MLP. In training,
all texts about an image are packed into one row (text_loss.py), so its keys and values are computed once. In
generation, they are cached and shared by all beams.

Shapes: B images, C rows of tokens (C / B adjacent rows per image), T new tokens, S tokens including cached
ones, N hidden states per image, D width, H heads, K = D / H, V vocabulary.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.model.decoding import DecodingConfig, beam_search, decode
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


@dataclass(slots=True)
class BlockCache:
    """Cached keys and values of one block: `image` (B, H, N, K) is constant, `words` (C, H, S, K) grows."""

    image: TensorPair | None = None
    words: TensorPair | None = None


@dataclass(slots=True)
class Cache:
    """Key-value cache for one generation. It is empty before the first call and passed to all calls."""

    blocks: list[BlockCache] = field(default_factory=list)
    length: int = 0

    def reorder(self, rows_C: Tensor) -> None:
        """Let each row i continue the cached tokens of row rows_C[i], which must have the same image."""
        for block in self.blocks:
            assert block.words is not None
            block.words = block.words[0][rows_C], block.words[1][rows_C]

    def keep_images(self, images_B: Tensor) -> None:
        """Keep only the keys and values of these images."""
        for block in self.blocks:
            assert block.image is not None
            block.image = block.image[0][images_B], block.image[1][images_B]

    def keep(self, rows_C: Tensor) -> None:
        """Keep only these rows and their images. Requires one row per image."""
        self.reorder(rows_C)
        self.keep_images(rows_C)


class ScratchDecoder(nn.Module):
    """Maps token ids and image states to hidden states. The output head is tied to the embedding."""

    max_positions = math.inf

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.width, self.head_width = config.width, config.width // config.heads
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        blocks = [Block(config) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(_init_weights)
        # Each block has three residual branches. Their last layers start with small weights, as in GPT-2.
        for block in blocks:
            for layer in (block.attend_words.out, block.attend_image.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (3 * config.depth) ** 0.5)

    def forward(self, ids_CT: Tensor, memory_BND: Tensor | None, cache: Cache | None = None) -> Tensor:
        """Return the states (C, T, D) that predict the token after each of `ids_CT`.

        With a cache, `ids_CT` holds only new tokens. `memory_BND` is None if there is no image, or if
        its keys and values are cached.
        """
        start, T = cache.length if cache else 0, ids_CT.shape[1]
        if cache is not None:
            cache.blocks = cache.blocks or [BlockCache() for _ in self.blocks]
            cache.length += T
        # New token t has position start + t, and attends to itself and all earlier tokens.
        rope = rope_table(torch.arange(start, start + T, device=ids_CT.device), self.head_width)
        seen_TS = torch.ones(T, start + T, dtype=torch.bool, device=ids_CT.device).tril(start)
        return self._states(ids_CT, memory_BND, rope, seen_TS if T > 1 else None, cache)

    def _states(
        self, ids_CT: Tensor, memory_BND: Tensor | None, rope: TensorPair, seen: Seen, cache: Cache | None
    ) -> Tensor:
        x_CTD = self.dropout(self.embedding(ids_CT))
        for index, block in enumerate(self.blocks):
            x_CTD = block(x_CTD, memory_BND, rope, seen, cache.blocks[index] if cache else None)
        normed_CTD: Tensor = self.norm(x_CTD)
        return normed_CTD

    def head(self, states_ND: Tensor) -> Tensor:
        """Return logits over the vocabulary: (N, D) -> (N, V)."""
        return functional.linear(states_ND, self.embedding.weight)

    def loss(self, memory_BND: Tensor, texts: TextBatch, label_smoothing: float = 0) -> Tensor:
        """Return the summed loss (see CaptionerModel.loss)."""
        packed = pack(texts, len(memory_BND)).to(memory_BND.device)
        rope = rope_table(packed.positions_BS[:, None], self.head_width)
        states_BSD = self._states(packed.ids_BS, memory_BND, rope, (packed.place_CT, packed.origin_BS), None)
        states_KD = packed.learned(states_BSD)
        return token_loss(states_KD, self.embedding, packed.labels_K, packed.weight_K, label_smoothing)

    def generate(
        self, memory_BND: Tensor, prompt_BT: Tensor, decoding: DecodingConfig, max_tokens: int, eos_id: int
    ) -> list[list[int]]:
        """Generate one text per image (see CaptionerModel.generate)."""
        cache = Cache()

        def step(new_CT: Tensor) -> Tensor:
            return self.head(self(new_CT, None if cache.blocks else memory_BND, cache)[:, -1])

        if decoding.num_beams > 1:
            reorder, keep = cache.reorder, cache.keep_images
            return beam_search(step, reorder, keep, prompt_BT, decoding, max_tokens, eos_id)
        return decode(step, cache.keep, prompt_BT, decoding, max_tokens, eos_id)

    def repeated_parts(self) -> list[nn.Module]:
        """Return the modules to compile, one for each block."""
        return list(self.blocks)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


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
        if memory_BND is not None or (cache is not None and cache.image is not None):
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
            if cache.words is not None:
                k_CHSK = torch.cat([cache.words[0], k_CHSK], 2)
                v_CHSK = torch.cat([cache.words[1], v_CHSK], 2)
            cache.words = k_CHSK, v_CHSK
        return attention.attend(q_CHTK, k_CHSK, v_CHSK, seen)

    def _cross_attention(self, x_CTD: Tensor, memory_BND: Tensor | None, cache: BlockCache | None) -> Tensor:
        attention = self.attend_image
        if cache is not None and cache.image is not None:
            k_BHNK, v_BHNK = cache.image
        else:
            assert memory_BND is not None
            k_BHNK, v_BHNK = attention.keys_values(memory_BND)
        if cache is not None:
            cache.image = k_BHNK, v_BHNK
        # Rows about one image are adjacent. Joined to one long row, they share its keys and values.
        joined_BXD = x_CTD.reshape(len(k_BHNK), -1, x_CTD.shape[-1])
        out_BXD = attention.attend(attention.heads(attention.query(joined_BXD)), k_BHNK, v_BHNK, None)
        return out_BXD.view_as(x_CTD)


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
            mixed_CHTK = functional.scaled_dot_product_attention(q_CHTK, k_CHSK, v_CHSK, attn_mask=seen)
        out_CTD: Tensor = self.out(mixed_CHTK.transpose(1, 2).flatten(2))
        return out_CTD


def attend_apart(
    q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, place_CT: Tensor, origin_BS: Tensor
) -> Tensor:
    """Attend within each packed text only. Returns (B, H, S, K).

    Each text is moved to its own row and back. Causal attention then needs no explicit mask, so fast kernels
    can be used.
    """

    def moved(x_BHSK: Tensor, place_CT: Tensor) -> Tensor:
        flat_XHK = x_BHSK.transpose(1, 2).flatten(0, 1)
        moved_CTHK: Tensor = flat_XHK.index_select(0, place_CT.flatten()).unflatten(0, place_CT.shape)
        return moved_CTHK.transpose(1, 2)

    q_CHTK, k_CHTK, v_CHTK = (moved(x_BHSK, place_CT) for x_BHSK in (q_BHSK, k_BHSK, v_BHSK))
    return moved(functional.scaled_dot_product_attention(q_CHTK, k_CHTK, v_CHTK, is_causal=True), origin_BS)


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
