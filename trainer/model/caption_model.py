"""The captioner: an image encoder, a connector to the decoder's width, and a text decoder.

Shapes: B images, C texts (several per image are possible), T tokens, N hidden states per image, V encoder
width, D decoder width.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from pipeline.errors import TrainError
from trainer.model.adapters import merged_state, reduce_frozen
from trainer.model.decoder import DecoderConfig, ScratchDecoder
from trainer.model.decoding import DecodingConfig
from trainer.model.encoder import Encoder, EncoderConfig
from trainer.model.language_model import PretrainedDecoder
from trainer.model.transformers_model import SynthCaptioner, SynthCaptionerConfig
from trainer.tokenizer import TextBatch


@dataclass(frozen=True, slots=True)
class CaptionerConfig:
    """Everything needed to rebuild a captioner.

    `decoder` holds the fields of DecoderConfig, or {"language_model": transformers config} for a pretrained
    decoder. `prompts` lists the learned (source, style) pairs. Answers have the style "".
    """

    encoder: dict[str, Any]
    decoder: dict[str, Any]
    prompts: list[tuple[str, str]]
    eos_id: int
    max_caption_tokens: int
    data: dict[str, Any] = field(default_factory=dict)

    def decoding(self, num_beams: int | None = None) -> DecodingConfig:
        """Return the decoding options of the final evaluation, optionally with another number of beams."""
        options = DecodingConfig(**self.data.get("decoding", {}))
        return replace(options, num_beams=num_beams or options.num_beams)


class CaptionerModel(nn.Module, PyTorchModelHubMixin):
    """A captioner. Its inputs are hidden states of the encoder, not pixels."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        config = replace(config, prompts=[(source, style) for source, style in config.prompts])  # JSON lists
        self.config = config
        self.encoder = Encoder(EncoderConfig(**config.encoder))
        self.decoder: ScratchDecoder | PretrainedDecoder
        if "language_model" in config.decoder:
            self.decoder = PretrainedDecoder(config.decoder["language_model"])
        else:
            self.decoder = ScratchDecoder(DecoderConfig(**config.decoder))
        self.connector = self.decoder.make_connector(self.encoder.width)
        self.exact: dict[str, Tensor] = {}

    def loss(self, states_BNV: Tensor, texts: TextBatch, label_smoothing: float = 0) -> Tensor:
        """Return the negative log-likelihood summed over all target tokens, weighted by `texts.weight_C`.

        Texts about one image do not attend to each other. `texts` should be on the CPU, to avoid waiting for
        the GPU.
        """
        loss: Tensor = self.decoder.loss(self.connector(states_BNV), texts, label_smoothing)
        return loss

    @torch.inference_mode()
    def generate(self, states_BNV: Tensor, prompt_BT: Tensor, decoding: DecodingConfig) -> list[list[int]]:
        """Generate one text per image, up to EOS or `max_caption_tokens`.

        Returns token ids without prompt and EOS. Raises TrainError if the prompt is too long, or if a GPU
        lacks memory.
        """
        memory_BND, prompt_BT = self.connector(states_BNV.to(self.device)), prompt_BT.to(self.device)
        max_tokens = self.max_new_tokens(memory_BND.shape[1], prompt_BT.shape[1])
        if max_tokens < 1:
            raise TrainError("the prompt leaves no position for a text", hint="ask a shorter question")
        inputs = {"attention_mask": torch.ones_like(prompt_BT), "image_states": memory_BND}
        eos_id, options = self.config.eos_id, decoding.options(max_tokens)
        try:
            ids_BT = self._writer.generate(
                prompt_BT, **inputs, **options, eos_token_id=eos_id, pad_token_id=eos_id
            )
        except torch.OutOfMemoryError:
            hint = "use fewer beams (num_beams: 1) or a smaller batch"
            raise TrainError("the texts of a batch do not fit in GPU memory", hint=hint) from None
        rows = ids_BT[:, prompt_BT.shape[1] :].tolist()
        return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]

    @torch.inference_mode()
    def logprobs(self, states_1NV: Tensor, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each token of a text that follows a prompt about one image."""
        tokens_1T = torch.tensor([[*prompt, *ids]], device=self.device)
        memory_1ND = self.connector(states_1NV.to(self.device))
        logits_TV = self._writer(tokens_1T, image_states=memory_1ND).logits[0, len(prompt) - 1 : -1]
        values: list[float] = (
            logits_TV.float().log_softmax(-1).gather(1, tokens_1T[0, len(prompt) :, None]).flatten().tolist()
        )
        return values

    def max_new_tokens(self, num_states: int, prompt_tokens: int) -> int:
        """Return the maximum number of tokens that a text may have after the prompt."""
        num_positions_left = self.decoder.max_positions - num_states - prompt_tokens
        return int(min(self.config.max_caption_tokens, num_positions_left))

    @cached_property
    def _writer(self) -> SynthCaptioner:
        # Create this object only once, because no_init_weights affects torch.nn.init in all threads.
        with no_init_weights():
            return SynthCaptioner(SynthCaptionerConfig(decoder=self.config.decoder), self.decoder)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.connector.parameters()).device

    def reduce_frozen(self) -> None:
        """Store frozen weights in bfloat16 if there are adapters. Forward passes then need autocast."""
        if isinstance(self.decoder, PretrainedDecoder) and self.decoder.frozen_names():
            # The properties of the decoder must be measured in float32.
            _ = self.decoder.probed
            self.exact = reduce_frozen(self, self.decoder.embedding)

    def without_adapters(self) -> "CaptionerModel":
        """Return a captioner with LoRA adapters merged into the weights, or `self` if it has no adapters."""
        state = merged_state(self, self.exact)
        if len(state) == len(self.state_dict()):
            return self
        with torch.device("meta"):
            merged = CaptionerModel(self.config)
        merged.load_state_dict(state, assign=True)
        return merged.eval()


def build_captioner(
    encoder: Encoder, decoder: DecoderConfig | PretrainedDecoder, **fields: Any
) -> CaptionerModel:
    """Build a captioner around a loaded encoder. `fields` are the other fields of CaptionerConfig."""
    settings = asdict(decoder) if isinstance(decoder, DecoderConfig) else {"language_model": decoder.settings}
    config = CaptionerConfig(encoder=asdict(encoder.config), decoder=settings, **fields)
    if isinstance(decoder, DecoderConfig):
        captioner = CaptionerModel(config)
        captioner.encoder.load_state_dict(encoder.state_dict())
        return captioner
    # This avoids a second copy of the language model.
    with torch.device("meta"):
        captioner = CaptionerModel(config)
    captioner.encoder, captioner.decoder = encoder, decoder
    captioner.connector = decoder.make_connector(encoder.width)
    return captioner
