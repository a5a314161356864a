"""Pretrained decoder: any causal language model of transformers, with the image states as a prefix.

All texts about an image are packed into one sequence after the shared prefix. The positions of each text
continue from the prefix, and a mask limits attention to the prefix and the token's own text. Convolutions and
recurrent layers ignore such a mask. The first use therefore compares packed and separate texts. If their
states differ, texts are not packed.

Shapes: B images, C texts, T tokens per text, P prefix states, S tokens per packed row, L = P + S, D width,
V vocabulary.
"""

from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from pipeline.errors import TrainError, one_line
from pipeline.images.clip import silence_transformers
from trainer.config import DECODERS
from trainer.model import adapters, pretrained, text_loss
from trainer.model.adapters import is_adapter
from trainer.model.transformers_model import PrefixDecoder
from trainer.tokenizer import CaptionTokenizer, TextBatch, require_known_tokens

PROBE_TOKENS = 6
# The unit is the standard deviation of the states. Rounding causes differences of 1e-6.
MAX_STATE_DIFFERENCE = 1e-4
MAX_LOGIT_DIFFERENCE = 0.01  # rounding on a GPU may change logits by 0.001
MAX_SHARE_OF_CAP = 0.99  # logits closer to the cap cannot be inverted
MODEL_ERRORS = (ValueError, RuntimeError, TypeError, AttributeError, IndexError, NotImplementedError)


class Probe(NamedTuple):
    """Properties of a language model, measured when it is first used."""

    can_pack: bool
    transform: text_loss.LogitTransform


class PretrainedDecoder(PrefixDecoder):
    """A PrefixDecoder with adapters and a loss. Without `model`, builds one with random weights."""

    def __init__(self, settings: dict[str, Any], model: PreTrainedModel | None = None) -> None:
        super().__init__(model or AutoModelForCausalLM.from_config(pretrained.config_of(settings)))
        self.settings = settings
        self.model.tie_weights()
        self._attention_window = pretrained.attention_window(self.model.config)

    def add_adapters(self, rank: int, dropout: float) -> None:
        """Add LoRA adapters with scale 2 to all linear layers except head and experts. Freezes the rest.

        Raises TrainError if the model has no such layers.
        """
        if not adapters.add_adapters(self.model, self.model.get_output_embeddings(), rank, dropout):
            raise TrainError("this model has no linear layers", hint="train the whole model: --lora-rank 0")

    def recompute_blocks(self) -> bool:
        """Enable gradient checkpointing. Returns False if it is enabled already or not supported."""
        if self.model.is_gradient_checkpointing or not self.model.supports_gradient_checkpointing:
            return False
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return True

    def add_dropout(self, rate: float) -> None:
        """Add dropout to the embedding and to the outputs of attention and MLP. For Qwen3 models."""

        def drop(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
            return nn.functional.dropout(output, rate, layer.training)

        for name, layer in self.model.named_modules():
            if layer is self.embedding or name.endswith(("o_proj", "down_proj")):
                layer.register_forward_hook(drop)

    def frozen_names(self) -> set[str]:
        """Return the names of all weights except adapters, or an empty set without adapters."""
        names = set(self.state_dict())
        return {name for name in names if not is_adapter(name)} if any(map(is_adapter, names)) else set()

    def loss(self, prefix_BPD: Tensor, texts: TextBatch, label_smoothing: float = 0) -> Tensor:
        """Return the summed loss (see CaptionerModel.loss)."""
        P = prefix_BPD.shape[1]
        self.require_positions(P, texts.ids_CT.shape[1])
        packed = text_loss.pack(texts, len(prefix_BPD)) if self.probed.can_pack else None
        if packed is not None and P + packed.ids_BS.shape[1] <= self._attention_window:
            packed = packed.to(prefix_BPD.device)
            states_KD, labels_K = packed.learned(self._states_packed(prefix_BPD, packed)), packed.labels_K
            weight_K = packed.weight_K
        else:
            texts = texts.to(prefix_BPD.device)
            learned_CT = texts.learned_CT
            states_KD = self._states_apart(prefix_BPD, texts)[:, :-1][learned_CT]
            labels_K, weight_K = texts.ids_CT[:, 1:][learned_CT], text_loss.weight_of_learned(texts)
        head, transform = self.model.get_output_embeddings(), self.probed.transform
        return text_loss.token_loss(states_KD, head, labels_K, weight_K, label_smoothing, transform)

    def require_positions(self, num_states: int, num_tokens: int) -> None:
        """Raise TrainError if image and text need more positions than the model has."""
        if num_states + num_tokens > self.max_positions:
            problem = f"an image of {num_states} states and a text of {num_tokens} tokens"
            problem += f" need {num_states + num_tokens} positions, and the language model has"
            hint = "use fewer states (--encoder-states 2x2) or a smaller max_caption_tokens"
            raise TrainError(f"{problem} {self.max_positions:,}", hint=hint)

    def _states_packed(self, prefix_BPD: Tensor, packed: text_loss.PackedTexts) -> Tensor:
        """Return the hidden states of packed texts: (B, S, D)."""
        P = prefix_BPD.shape[1]
        words_BSD = self.embedding(packed.ids_BS)
        before_BP = torch.arange(P, device=words_BSD.device).expand(len(prefix_BPD), -1)
        hidden_BLD: Tensor = self.model.get_decoder()(
            inputs_embeds=torch.cat([prefix_BPD.to(words_BSD.dtype), words_BSD], 1),
            position_ids=torch.cat([before_BP, P + packed.positions_BS], 1),
            attention_mask=text_loss.packed_mask(packed.segments_BS, P)[:, None],
            use_cache=False,
        ).last_hidden_state
        return hidden_BLD[:, P:]

    def _states_apart(self, prefix_BPD: Tensor, texts: TextBatch) -> Tensor:
        """Return the hidden states of texts in separate sequences: (C, T, D)."""
        P, embeds_CLD = prefix_BPD.shape[1], self._embed(prefix_BPD[texts.image_of_C], texts.ids_CT)
        tokens_L = torch.arange(embeds_CLD.shape[1], device=embeds_CLD.device)
        hidden_CLD: Tensor = self.model.get_decoder()(
            inputs_embeds=embeds_CLD,
            attention_mask=(tokens_L < P + texts.length_C[:, None]).long(),
            use_cache=False,
        ).last_hidden_state
        return hidden_CLD[:, P:]

    def _embed(self, prefix_CPD: Tensor, ids_CT: Tensor) -> Tensor:
        """Concatenate prefixes and token embeddings: (C, P + T, D)."""
        words_CTD = self.embedding(ids_CT)
        return torch.cat([prefix_CPD.to(words_CTD.dtype), words_CTD], 1)

    @cached_property
    @torch.no_grad()
    def probed(self) -> Probe:
        """Properties of the model, measured at first access. Raises TrainError for an unsupported model."""
        device, was_training = next(self.model.parameters()).device, self.model.training
        # Use a separate generator, because dropout depends on the global one.
        random = torch.Generator().manual_seed(0)
        vocabulary = self.embedding.num_embeddings
        ids_CT = torch.randint(vocabulary, (2, PROBE_TOKENS), generator=random)
        zeros_C = torch.zeros(2, dtype=torch.long)
        texts = TextBatch(zeros_C, ids_CT, zeros_C + 1, zeros_C + PROBE_TOKENS, zeros_C.float()).to(device)
        prefix_BPD = self.embedding(torch.randint(vocabulary, (1, 3), generator=random).to(device))
        can_pack = False
        self.model.eval()
        try:
            with torch.autocast(device.type, enabled=False):
                states_CTD = self._states_apart(prefix_BPD, texts)
                transform = self._logit_transform(prefix_BPD, texts, states_CTD)
                apart_CTD = states_CTD[:, :-1]
                with suppress(*MODEL_ERRORS):  # some models reject the mask for packed texts
                    packed_BSD = self._states_packed(prefix_BPD, text_loss.pack(texts, 1))
                    difference = (packed_BSD.reshape(apart_CTD.shape) - apart_CTD).abs().max()
                    can_pack = bool(difference <= MAX_STATE_DIFFERENCE * apart_CTD.std())
        except MODEL_ERRORS as error:
            hint = "choose a causal language model that accepts embeddings, such as --decoder qwen3"
            raise TrainError(f"the decoder cannot read an image: {one_line(error)}", hint=hint) from None
        finally:
            self.model.train(was_training)
        return Probe(can_pack, transform)

    def _logit_transform(
        self, prefix_BPD: Tensor, texts: TextBatch, states_CTD: Tensor
    ) -> text_loss.LogitTransform:
        """Return how the model transforms the logits of its head. Raises TrainError if this is unknown."""
        embeds_CLD = self._embed(prefix_BPD[texts.image_of_C], texts.ids_CT)
        own_CLV = self.model(inputs_embeds=embeds_CLD, use_cache=False).logits
        own_CTV = own_CLV[:, prefix_BPD.shape[1] :].float()
        head = self.model.get_output_embeddings()
        head_CTV = head(states_CTD).float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        uncapped_CTV, is_usable = own_CTV, torch.ones_like(own_CTV, dtype=torch.bool)
        if cap is not None:
            uncapped_CTV, is_usable = cap * torch.atanh(own_CTV / cap), own_CTV.abs() < MAX_SHARE_OF_CAP * cap
        uncapped_K, head_K = uncapped_CTV[is_usable], head_CTV[is_usable]
        scale = float((uncapped_K * head_K).sum() / head_K.square().sum())
        transform = text_loss.LogitTransform(1.0 if abs(scale - 1) < MAX_LOGIT_DIFFERENCE else scale, cap)
        difference = (transform.apply(head_CTV) - own_CTV).abs().max()
        fits = bool(difference <= MAX_LOGIT_DIFFERENCE * own_CTV.std())  # False for NaN
        if not isinstance(head, nn.Linear) or not fits:
            problem = "the decoder changes its logits in an unknown way, so the training loss would be wrong"
            raise TrainError(problem, hint="choose another decoder, such as --decoder qwen3")
        return transform


def new_decoder(
    tokenizer: CaptionTokenizer, *, width: int, depth: int, heads: int
) -> tuple[PretrainedDecoder, CaptionTokenizer]:
    """Build a small Qwen3 model with random weights for a new tokenizer."""
    sizes: dict[str, Any] = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width // heads,
        "tie_word_embeddings": True, "vocab_size": tokenizer.backend.get_vocab_size(),
        "eos_token_id": tokenizer.eos_id,
    }  # fmt: skip
    config = Qwen3Config(**sizes)
    tokenizer = CaptionTokenizer(tokenizer.backend, "pretrained", tokenizer.eos_id)
    return PretrainedDecoder(pretrained.settings_of(config), Qwen3ForCausalLM(config)), tokenizer


def load_decoder(name: str) -> tuple[PretrainedDecoder, CaptionTokenizer]:
    """Load a decoder by a name in DECODERS, a folder or a Hub id. Raises TrainError if this fails."""
    model_id = DECODERS.get(name, name)
    try:
        config = pretrained.load_config(model_id)
        model, missing = pretrained.load_weights(AutoModelForCausalLM, model_id, config=config)
        if missing:
            raise ValueError(f"its files lack weights that the language model needs, such as {missing[0]}")
        with silence_transformers():
            tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=False)
        if tokenizer.eos_token_id is None:
            raise ValueError("its tokenizer has no end-of-text token (eos_token in tokenizer_config.json)")
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.encode_special_tokens = True  # "<|endoftext|>" in a caption must not become EOS
        decoder = PretrainedDecoder(pretrained.settings_of(config), model)
        require_known_tokens(backend, config.vocab_size)
        if tokenizer.eos_token_id >= config.vocab_size:
            raise ValueError(f"its end-of-text token {tokenizer.eos_token!r} has no embedding")
    except pretrained.LOAD_ERRORS as error:
        hint = "pass scratch, qwen3, smollm2, a folder, or a Hub id"
        raise TrainError(f"cannot load decoder {name}: {pretrained.reason_of(error)}", hint=hint) from None
    return decoder, CaptionTokenizer(backend, "pretrained", int(tokenizer.eos_token_id))
