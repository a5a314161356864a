"""Decoder from scratch: a pre-norm transformer with cross-attention to the hidden states of an image.

Each block has self-attention (rotary positions), cross-attention to the image, and an MLP. During generation, keys and values
of the image are computed once per block, and those of the tokens are cached.

Shapes: B images, C texts (one per image unless noted), T new tokens, S tokens so far, N hidden states of an image, D width,
H heads, K = D / H, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.model.decoding import DecodingConfig, beam_search, write
from trainer.tokenizer import TextBatch

LENGTH_GROUPS = 3  # groups of similar length in a batch


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
    """Keys and values of one block: fixed for the image, growing for the tokens (each B, H, *, K)."""

    image: tuple[Tensor, Tensor] | None = None
    words: tuple[Tensor, Tensor] | None = None


@dataclass(slots=True)
class Cache:
    """Key-value cache of a generation. Pass an empty cache to the first call, then the same cache again."""

    blocks: list[BlockCache] = field(default_factory=list)
    length: int = 0

    def reorder(self, rows_B: Tensor) -> None:
        """Continue row i from the tokens of row rows_B[i], which must be about the same image."""
        for block in self.blocks:
            assert block.words is not None
            block.words = block.words[0][rows_B], block.words[1][rows_B]


class ScratchDecoder(nn.Module):
    """Maps token ids and image states to next-token states; `head` maps states to logits, with the embedding's weights."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.width = config.width
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        blocks = [Block(config) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.apply(_initialise)
        # Each block adds three branches to the residual stream: initialise them small, as GPT-2 does.
        for block in blocks:
            for layer in (block.attend_words.out, block.attend_image.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (3 * config.depth) ** 0.5)

    def loss(self, memory_BND: Tensor, texts: TextBatch) -> Tensor:
        """Return the sum of negative log-likelihoods of the target tokens of `texts`."""
        total = memory_BND.new_zeros(())
        for group in texts.by_length(LENGTH_GROUPS):  # an answer is not padded to the length of a description
            states_CTD = self(group.ids_CT[:, :-1], memory_BND, group.image_of_C)
            learned_CT = group.learned_CT  # no logits for other positions
            scores_KV = self.head(states_CTD[learned_CT])
            total = total + functional.cross_entropy(scores_KV.float(), group.ids_CT[:, 1:][learned_CT], reduction="sum")
        return total

    def read(self, texts: TextBatch) -> Tensor:
        """Return the state of the last token of each text, without any image: (C, D)."""
        return texts.last_token(self(texts.ids_CT, None, texts.image_of_C))

    def generate(
        self, memory_BND: Tensor, prompt_BT: Tensor, search: DecodingConfig, max_tokens: int, eos_id: int
    ) -> list[list[int]]:
        """Generate one text per image; see CaptionerModel.generate."""
        cache = Cache()
        image_of_R = torch.arange(len(memory_BND), device=memory_BND.device).repeat_interleave(search.beams)

        def step(new_RT: Tensor) -> Tensor:
            return self.head(self(new_RT, memory_BND, image_of_R, cache)[:, -1])

        if search.beams > 1:
            return beam_search(step, cache.reorder, prompt_BT, search, max_tokens, eos_id)
        return write(step, prompt_BT, search, max_tokens, eos_id)

    def forward(self, ids_CT: Tensor, memory_BND: Tensor | None, image_of_C: Tensor, cache: Cache | None = None) -> Tensor:
        """Return states (C, T, D) that predict the token after each of `ids_CT`; with a cache, only of new tokens.

        `memory_BND` are states of the images (None: no image); not read again once the cache holds their keys and values.
        """
        start = cache.length if cache else 0
        if cache is not None:
            cache.blocks = cache.blocks or [BlockCache() for _ in self.blocks]
            cache.length += ids_CT.shape[1]
        T = ids_CT.shape[1]
        # New token t has position start + t, and attends to itself and all tokens before it.
        seen_TS = torch.ones(T, start + T, dtype=torch.bool, device=ids_CT.device).tril(start)
        x_CTD = self.dropout(self.embedding(ids_CT))
        for index, block in enumerate(self.blocks):
            x_CTD = block(x_CTD, memory_BND, image_of_C, start, seen_TS, cache.blocks[index] if cache else None)
        normed_CTD: Tensor = self.norm(x_CTD)
        return normed_CTD

    def head(self, states_ND: Tensor) -> Tensor:
        """Return the logits of the vocabulary: (N, D) -> (N, V)."""
        return functional.linear(states_ND, self.embedding.weight)


class Block(nn.Module):
    """Self-attention, cross-attention, MLP; pre-norm, residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attend_words, self.attend_image = Attention(config), Attention(config)
        self.norm_words, self.norm_image, self.norm_mlp = (nn.RMSNorm(config.width) for _ in range(3))
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x_CTD: Tensor,
        memory_BND: Tensor | None,
        image_of_C: Tensor,
        start: int,
        seen_TS: Tensor,
        cache: BlockCache | None,
    ) -> Tensor:
        """Return the updated stream (C, T, D).

        `start` is the position of the first of the T tokens. `seen_TS` is True where a token attends to one of the S tokens so
        far: of all texts, or (C, 1, T, S) of each.
        """
        x_CTD = x_CTD + self.dropout(self._words(self.norm_words(x_CTD), start, seen_TS, cache))
        if memory_BND is not None:
            x_CTD = x_CTD + self.dropout(self._image(self.norm_image(x_CTD), memory_BND, image_of_C, cache))
        out_CTD: Tensor = x_CTD + self.dropout(self.down(functional.gelu(self.up(self.norm_mlp(x_CTD)))))
        return out_CTD

    def _words(self, x_CTD: Tensor, start: int, seen_TS: Tensor, cache: BlockCache | None) -> Tensor:
        attend = self.attend_words
        q_CHTK = apply_rope(attend.heads(attend.query(x_CTD)), start)
        k_CHSK, v_CHSK = attend.keys_values(x_CTD)
        k_CHSK = apply_rope(k_CHSK, start)
        if cache is not None:
            if cache.words is not None:
                k_CHSK, v_CHSK = (torch.cat(pair, 2) for pair in zip(cache.words, (k_CHSK, v_CHSK), strict=True))
            cache.words = k_CHSK, v_CHSK
        return attend.attend(q_CHTK, k_CHSK, v_CHSK, seen_TS)

    def _image(self, x_CTD: Tensor, memory_BND: Tensor, image_of_C: Tensor, cache: BlockCache | None) -> Tensor:
        attend = self.attend_image
        if cache is not None and cache.image is not None:
            k_CHNK, v_CHNK = cache.image
        else:  # computed once per image, not per text
            k_CHNK, v_CHNK = (projected_BHNK[image_of_C] for projected_BHNK in attend.keys_values(memory_BND))
        if cache is not None:
            cache.image = k_CHNK, v_CHNK
        return attend.attend(attend.heads(attend.query(x_CTD)), k_CHNK, v_CHNK, None)


class Attention(nn.Module):
    """Projections of multi-head attention (Vaswani et al., 2017), without biases."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_count = config.heads
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key_value = nn.Linear(config.width, 2 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def heads(self, x_CTD: Tensor) -> Tensor:
        """Split features into heads: (C, T, D) -> (C, H, T, K)."""
        C, T, D = x_CTD.shape
        return x_CTD.view(C, T, self.head_count, D // self.head_count).transpose(1, 2)

    def keys_values(self, x_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Project to keys and values: (B, N, D) -> two of (B, H, N, K)."""
        k_BND, v_BND = self.key_value(x_BND).chunk(2, -1)
        return self.heads(k_BND), self.heads(v_BND)

    def attend(self, q_CHTK: Tensor, k_CHSK: Tensor, v_CHSK: Tensor, seen_TS: Tensor | None) -> Tensor:
        """Attend and merge the heads: -> (C, T, D)."""
        mixed_CHTK = functional.scaled_dot_product_attention(q_CHTK, k_CHSK, v_CHSK, attn_mask=seen_TS)
        out_CTD: Tensor = self.out(mixed_CHTK.transpose(1, 2).flatten(2))
        return out_CTD


def apply_rope(x_CHTK: Tensor, start: int, base: float = 10_000.0) -> Tensor:
    """Apply rotary position embeddings (RoPE, Su et al., 2021) for positions from `start` on.

    Pair i at position p is rotated by p * base^(-2i / K); attention scores depend only on differences of positions.
    """
    T, K = x_CHTK.shape[-2:]
    positions_T = torch.arange(start, start + T, device=x_CHTK.device, dtype=torch.float32)
    frequencies_P = base ** (-torch.arange(0, K, 2, device=x_CHTK.device, dtype=torch.float32) / K)
    angles_TP = positions_T[:, None] * frequencies_P
    cos_TP, sin_TP = angles_TP.cos(), angles_TP.sin()
    first, second = x_CHTK.chunk(2, -1)
    turned_CHTK = torch.cat([first * cos_TP - second * sin_TP, second * cos_TP + first * sin_TP], -1)
    return turned_CHTK.to(x_CHTK.dtype)  # angles are float32 also where the model is not


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
