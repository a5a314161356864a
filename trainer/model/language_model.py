"""Pretrained decoder: any causal language model of transformers, with the image as a prefix of the text.

All texts about an image are packed into one sequence behind a shared prefix: position ids of each text continue from the
prefix, and the mask lets a token attend to the prefix and its own text only. That is right for attention that obeys such a
mask, and for nothing else: layers with convolutions or a recurrent state carry words from one text to the next. So before the
first step two texts are computed packed and apart, and where they differ, each text gets a sequence of its own.

Adapters (LoRA, Hu et al., 2021) are those of peft: few weights learn, and are merged into the matrices to be saved.

Shapes: B images, C texts, T tokens of a text, P prefix states, S tokens of all texts of an image, L = P + S, D width.
"""

import math
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.pytorch_utils import Conv1D

from pipeline.errors import TrainError, one_line
from pipeline.install import install_command
from trainer.config import DECODERS
from trainer.model.decoding import DecodingConfig
from trainer.model.pretrained import (
    LOAD_ERRORS,
    attention_window,
    config_of,
    load_config,
    load_weights,
    reason_of,
    settings_of,
    silence_transformers,
)
from trainer.model.text_loss import PackedTexts, ScoreForm, pack, token_loss, visible
from trainer.tokenizer import CaptionTokenizer, TextBatch, require_known_tokens

ADAPTER = "default"  # the name that peft gives adapters
PROBE_TOKENS = 6  # of each of two texts that are compared
MAX_SCORE_DIFFERENCE = 0.01  # of the standard deviation of the scores; rounding on a GPU may make 0.001
MOST_OF_CAP = 0.99  # above it a score says little of what it was
UNTIL_THE_END = {"early_stopping": "never"}  # of a search with beams: a longer text may have the better mean
MAX_DIFFERENCE = 1e-4  # of the standard deviation of the states; rounding makes 1e-6, a convolution at least 4e-4


class ProbeResult(NamedTuple):
    """What is found out of a language model before its first step."""

    packs: bool  # whether texts about an image may be packed into one sequence
    form: ScoreForm


class PretrainedDecoder(nn.Module):
    """A language model; `settings` are those of its config. `model` is one that is loaded; None: it gets new weights."""

    def __init__(self, settings: dict[str, Any], model: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.model: Any = model or AutoModelForCausalLM.from_config(config_of(settings))
        self.model.tie_weights()  # which goes with drawing weights, and is left out where they are loaded
        self.model.generation_config = GenerationConfig()  # a checkpoint keeps none: penalties would end with the training
        embedding: Any = self.model.get_input_embeddings()
        self.width: int = embedding.embedding_dim  # which in some models is not that of the layers
        self._window = attention_window(self.model.config)  # packed texts would take the place of their image in it
        self.max_positions: float = getattr(self.model.config, "max_position_embeddings", None) or math.inf
        self._probe_result: ProbeResult | None = None

    def adapt(self, rank: int, dropout: float) -> None:
        """Give the model adapters, which alone learn from here on."""
        add_adapters(self.model, rank, dropout)

    def frozen_names(self) -> set[str]:
        """Return the names of the weights beside the adapters; none where there are no adapters."""
        names = set(self.state_dict())
        return {name for name in names if not is_adapter(name)} if any(map(is_adapter, names)) else set()

    def learning(self) -> list[nn.Parameter]:
        """Return the weights that may learn: the adapters, or all where there are none."""
        frozen = self.frozen_names()
        return [weights for name, weights in self.named_parameters() if name not in frozen]

    def keep_no_states(self) -> None:
        """Compute the states within a block again for the gradient, instead of keeping them: less memory, a third more time."""
        if not self.model.supports_gradient_checkpointing:
            kind = self.model.config.model_type
            raise TrainError(f"a decoder of the kind {kind} keeps its states", hint="set checkpoint_blocks: false")
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def repeated_parts(self) -> list[nn.Module]:
        """Return the parts that are worth compiling."""
        return [self.model.get_decoder()]

    @property
    def probed(self) -> ProbeResult:
        """What a probe of the model says, made at the first use. Raises TrainError if the model cannot learn here."""
        if self._probe_result is None:
            self._probe_result = self._probe()
        return self._probe_result

    def loss(
        self, prefix_BPD: Tensor, texts: TextBatch, label_smoothing: float = 0.0, weight_C: Tensor | None = None
    ) -> Tensor:
        """Return the sum of negative log-likelihoods of the target tokens of `texts`; see CaptionerModel.loss."""
        self.require_positions(prefix_BPD.shape[1], texts.ids_CT.shape[1])
        packed = pack(texts, len(prefix_BPD)) if self.probed.packs else None
        if packed is None or self._window < prefix_BPD.shape[1] + packed.ids_BS.shape[1]:
            texts = texts.to(prefix_BPD.device)
            learned_CT = texts.learned_CT
            states_KD, labels_K = self._states_apart(prefix_BPD, texts)[:, :-1][learned_CT], texts.ids_CT[:, 1:][learned_CT]
            text_K = torch.arange(len(learned_CT), device=learned_CT.device)[:, None].expand_as(learned_CT)[learned_CT]
        else:
            packed = packed.to(prefix_BPD.device)
            states_KD, labels_K = packed.learned(self._states_packed(prefix_BPD, packed)), packed.labels_K
            text_K = packed.text_K
        weight_K = None if weight_C is None else weight_C.to(labels_K.device)[text_K]
        head = self.model.get_output_embeddings()
        return token_loss(states_KD, head, labels_K, label_smoothing, weight_K, form=self.probed.form)

    def require_positions(self, num_states: int, num_tokens: int, hint: str = "") -> None:
        """Raise TrainError if the model has fewer positions than an image and a text take: GPT-2 has 1,024, for one."""
        if num_states + num_tokens > self.max_positions:
            problem = (
                f"an image of {num_states} states and a text of {num_tokens} tokens need {num_states + num_tokens} positions"
            )
            hint = hint or "take fewer states: --encoder-states 2x2; or set max_caption_tokens lower"
            raise TrainError(f"{problem}, and the language model has {self.max_positions:,}", hint=hint)

    def _states_packed(self, prefix_BPD: Tensor, packed: PackedTexts) -> Tensor:
        """Return the states (B, S, D) of packed texts."""
        P = prefix_BPD.shape[1]
        words_BSD = self.model.get_input_embeddings()(packed.ids_BS)
        before_BP = torch.arange(P, device=words_BSD.device).expand(len(prefix_BPD), -1)
        hidden_BLD: Tensor = self.model.get_decoder()(
            inputs_embeds=torch.cat([prefix_BPD.to(words_BSD.dtype), words_BSD], 1),
            position_ids=torch.cat([before_BP, P + packed.positions_BS], 1),
            attention_mask=visible(packed.segments_BS, P)[:, None],
            use_cache=False,
        ).last_hidden_state
        return hidden_BLD[:, P:]

    def _states_apart(self, prefix_BPD: Tensor, texts: TextBatch) -> Tensor:
        """Return the states (C, T, D) of texts that each have a sequence of their own behind their image."""
        words_CTD = self.model.get_input_embeddings()(texts.ids_CT)
        before_CPD = prefix_BPD[texts.image_of_C].to(words_CTD.dtype)
        tokens_L = torch.arange(before_CPD.shape[1] + words_CTD.shape[1], device=words_CTD.device)
        hidden_CLD: Tensor = self.model.get_decoder()(
            inputs_embeds=torch.cat([before_CPD, words_CTD], 1),
            attention_mask=(tokens_L < before_CPD.shape[1] + texts.length_C[:, None]).long(),
            use_cache=False,
        ).last_hidden_state
        return hidden_CLD[:, before_CPD.shape[1] :]

    @torch.no_grad()
    def _probe(self) -> ProbeResult:
        """Compare two texts about one image, packed and apart: return whether both give the same states.

        Also what becomes of the scores. Raises TrainError if the model cannot write behind an image, or `_score_form` does.
        """
        device, was_training = next(self.model.parameters()).device, self.model.training
        draw = torch.Generator().manual_seed(0)  # not that of training, whose dropout must not depend on this
        vocabulary = self.model.get_input_embeddings().num_embeddings
        ids_CT = torch.randint(vocabulary, (2, PROBE_TOKENS), generator=draw)
        zeros_C = torch.zeros(2, dtype=torch.long)
        texts = TextBatch(zeros_C, ids_CT, zeros_C + 1, zeros_C + PROBE_TOKENS, zeros_C.bool()).to(device)
        prefix_BPD = self.model.get_input_embeddings()(torch.randint(vocabulary, (1, 3), generator=draw).to(device))
        self.model.eval()
        try:
            with torch.autocast(device.type, enabled=False):
                whole_CTD = self._states_apart(prefix_BPD, texts)
                form, apart_CTD = self._score_form(prefix_BPD, texts, whole_CTD), whole_CTD[:, :-1]
                with suppress(ValueError, RuntimeError, TypeError, AttributeError, IndexError):  # it takes no such mask
                    packed_BSD = self._states_packed(prefix_BPD, pack(texts, 1))
                    difference = (packed_BSD.reshape(apart_CTD.shape) - apart_CTD).abs().max()
                    return ProbeResult(bool(difference <= MAX_DIFFERENCE * apart_CTD.std()), form)
        except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
            problem = f"the decoder cannot write behind an image: {one_line(error)}"
            raise TrainError(problem, hint="choose a causal language model that takes embeddings: --decoder qwen3") from None
        finally:
            self.model.train(was_training)
        return ProbeResult(packs=False, form=form)

    def _score_form(self, prefix_BPD: Tensor, texts: TextBatch, states_CTD: Tensor) -> ScoreForm:
        """Return what the model makes of the scores of its head. Raises TrainError if that is none of the known forms."""
        words_CTD = self.model.get_input_embeddings()(texts.ids_CT)
        embeds_CLD = torch.cat([prefix_BPD[texts.image_of_C].to(words_CTD.dtype), words_CTD], 1)
        own_CTV = self.model(inputs_embeds=embeds_CLD, use_cache=False).logits[:, prefix_BPD.shape[1] :].float()
        head = self.model.get_output_embeddings()
        given_CTV = head(states_CTD).float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        is_free = torch.ones_like(own_CTV, dtype=torch.bool) if cap is None else own_CTV.abs() < MOST_OF_CAP * cap
        bare_K, given_K = own_CTV[is_free], given_CTV[is_free]
        bare_K = bare_K if cap is None else cap * torch.atanh(bare_K / cap)
        factor = float((bare_K * given_K).sum() / given_K.square().sum())
        form = ScoreForm(1.0 if abs(factor - 1) < MAX_SCORE_DIFFERENCE else factor, cap)
        difference = (form.apply(given_CTV) - own_CTV).abs().max()
        is_known = bool(difference <= MAX_SCORE_DIFFERENCE * own_CTV.std())  # not where either is no number
        if not isinstance(head, nn.Linear) or not is_known:
            hint = "choose another decoder: --decoder qwen3"
            raise TrainError("the decoder makes of its scores what is not known here: it would learn a wrong loss", hint=hint)
        return form

    def read(self, texts: TextBatch) -> Tensor:
        """Return the state of the last token of each text, without any image: (C, D)."""
        tokens_T = torch.arange(texts.ids_CT.shape[1], device=texts.ids_CT.device)
        mask_CT = (tokens_T < texts.length_C[:, None]).long()
        output = self.model.get_decoder()(input_ids=texts.ids_CT, attention_mask=mask_CT, use_cache=False)
        return texts.last_token(output.last_hidden_state)

    def generate(
        self, prefix_BPD: Tensor, prompt_BT: Tensor, decoding: DecodingConfig, max_tokens: int, eos_id: int
    ) -> list[list[int]]:
        """Generate one text per image; see CaptionerModel.generate."""
        sampling = (
            {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0} if decoding.temperature > 0 else {}
        )
        beams = {"num_beams": decoding.num_beams} | (UNTIL_THE_END if decoding.num_beams > 1 else {})
        options = {**beams, "do_sample": decoding.temperature > 0, **sampling}
        return _without_eos(self._generate(prefix_BPD, prompt_BT, max_tokens, eos_id, **options), eos_id)

    def require_beams(self, beams: int) -> None:
        """Raise TrainError if the model cannot search with this many beams, as some recurrent ones cannot."""
        states_11D = torch.zeros(1, 1, self.model.get_input_embeddings().embedding_dim, device=self.model.device)
        prompt_11 = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        try:
            self.generate(states_11D, prompt_11, DecodingConfig(num_beams=beams), max_tokens=2, eos_id=0)
        except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
            problem = f"this decoder cannot search with {beams} beams: {one_line(error)[:200]}"
            raise TrainError(problem, hint="set num_beams: 1, or choose another --decoder") from None

    def _generate(self, prefix_BPD: Tensor, prompt_BT: Tensor, max_tokens: int, eos_id: int, **options: Any) -> Any:
        """Return what `generate` of transformers does for a prompt behind images."""
        self.require_positions(prefix_BPD.shape[1], prompt_BT.shape[1] + 1, hint="ask a shorter question")
        max_tokens = int(min(max_tokens, self.max_positions - prefix_BPD.shape[1] - prompt_BT.shape[1]))
        words_BTD = self.model.get_input_embeddings()(prompt_BT)
        embeds_BLD = torch.cat([prefix_BPD.to(words_BTD.dtype), words_BTD], 1)
        return self.model.generate(
            inputs_embeds=embeds_BLD,
            attention_mask=torch.ones(embeds_BLD.shape[:2], dtype=torch.long, device=embeds_BLD.device),
            max_new_tokens=max_tokens,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
            **options,
        )


def _without_eos(ids_BT: Tensor, eos_id: int) -> list[list[int]]:
    return [row[: row.index(eos_id)] if eos_id in row else row for row in ids_BT.tolist()]


def new_decoder(
    tokenizer: CaptionTokenizer, *, width: int, depth: int, heads: int
) -> tuple[PretrainedDecoder, CaptionTokenizer]:
    """Return a language model of Qwen3's kind with random weights, for the tokens of a tokenizer that was trained here."""
    sizes: dict[str, Any] = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth, "head_dim": width // heads,
        "num_attention_heads": heads, "num_key_value_heads": heads, "tie_word_embeddings": True,
        "vocab_size": tokenizer.backend.get_vocab_size(), "eos_token_id": tokenizer.eos_id,
    }  # fmt: skip
    config = Qwen3Config(**sizes)
    tokenizer = CaptionTokenizer(tokenizer.backend, "pretrained", tokenizer.eos_id)
    return PretrainedDecoder(settings_of(config), Qwen3ForCausalLM(config)), tokenizer


def load_decoder(name: str) -> tuple[PretrainedDecoder, CaptionTokenizer]:
    """Load a language model and its tokenizer by name (qwen3, smollm2), folder or Hub id. Raises TrainError if it fails."""
    model_id = DECODERS.get(name, name)
    try:
        config = load_config(model_id)
        loaded, missing = load_weights(AutoModelForCausalLM, model_id, config=config)
        if missing:
            raise ValueError(f"its files lack weights of a language model, such as {missing[0]}")
        with silence_transformers():
            tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=False)
        if tokenizer.eos_token_id is None:
            raise ValueError("its tokenizer has no token that ends a text (eos_token in tokenizer_config.json)")
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.encode_special_tokens = True  # the text "<|endoftext|>" in a caption is not the EOS token
        decoder = PretrainedDecoder(settings_of(config), loaded)
        require_known_tokens(backend, config.vocab_size)
        if tokenizer.eos_token_id >= config.vocab_size:  # it was added without a row of the embeddings
            raise ValueError(
                f"{tokenizer.eos_token!r} ends a text, and the decoder has {config.vocab_size:,} tokens without it"
            )
    except LOAD_ERRORS as error:
        hint = "pass scratch, qwen3, smollm2, a folder, or an id of the Hub"
        raise TrainError(f"no decoder {name}: {reason_of(error)}", hint=hint) from None
    return decoder, CaptionTokenizer(backend, "pretrained", int(tokenizer.eos_token_id))


def add_adapters(model: PreTrainedModel, rank: int, dropout: float) -> None:
    """Give every linear layer but the head and experts an adapter, and freeze all else.

    Adapters are scaled by 2, whatever the rank, as is usual.

    Raises TrainError if peft is not installed, or knows no linear layer of the model.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise TrainError("peft is not installed, and lora_rank needs it", hint=install_command("lora")) from None
    head = model.get_output_embeddings()
    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head and "expert" not in name
    ]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=names)
    try:
        if not names:
            raise ValueError("it has no linear layers")
        with warnings.catch_warnings():  # of GPT-2's layers, which peft knows how to handle
            warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)
            inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:
        raise TrainError(f"this language model takes no adapters: {error}", hint="train all of it: --lora-rank 0") from None


def is_adapter(name: str) -> bool:
    """Return whether a weight of this name is of an adapter."""
    return ".lora_" in name


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a module as if it had no adapters, each added to the matrix that it adapts, on the CPU."""
    state = {name: weights for name, weights in module.state_dict().items() if not is_adapter(name)}
    if len(state) == len(module.state_dict()):
        return state
    from peft.tuners.lora import LoraLayer

    # A GPU has no room for a second language model. Matrices that are tied stay one.
    places = {name: (weights.data_ptr(), weights.shape) for name, weights in state.items()}
    copies = {places[name]: weights.cpu() for name, weights in state.items()}
    state = {name: copies[places[name]] for name in state}
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            with torch.no_grad():
                delta: Tensor = layer.get_delta_weight(ADAPTER)  # type: ignore[attr-defined]  # of each kind of layer
                state[f"{name}.weight"] = state.pop(f"{name}.base_layer.weight") + delta.cpu()
            if f"{name}.base_layer.bias" in state:
                state[f"{name}.bias"] = state.pop(f"{name}.base_layer.bias")
    return state
