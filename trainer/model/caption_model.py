"""Captioner: an image encoder, a connector that projects its states to the decoder's width, and a text decoder.

Shapes: B images, C texts (several may share an image), T tokens, N image states, V encoder width, D decoder width.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import TrainError
from trainer.model.decoder import DecoderConfig, ScratchDecoder
from trainer.model.decoding import DecodingConfig
from trainer.model.encoder import Encoder, EncoderConfig
from trainer.model.language_model import PretrainedDecoder, merged_state
from trainer.tokenizer import TextBatch

MOST_IMAGES_AT_ONCE = 1 << 16  # whose texts are generated, until a GPU shows that they do not fit


class GpuMemoryError(TrainError):
    """Raised where the text about a single image does not fit the memory of a GPU."""


@dataclass(frozen=True, slots=True)
class CaptionerConfig:
    """Everything needed to rebuild the model; `data` records the training data.

    `prompts` are the learned pairs of source and style; the style of an answer is empty.
    `decoder` holds the fields of DecoderConfig for a decoder from scratch, or `{"language_model": {...}}` for a pretrained one.
    """

    encoder: dict[str, Any]
    decoder: dict[str, Any]
    prompts: list[tuple[str, str]]
    eos_id: int
    max_caption_tokens: int
    contrast_width: int = 0  # of the contrastive space of images and texts; 0: no contrastive head
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def num_beams(self) -> int:
        """The candidates of the search with which it was scored after its training; 1 if it does not say."""
        beams: int = self.data.get("num_beams", 1)
        return beams


class CaptionerModel(nn.Module, PyTorchModelHubMixin):
    """Saved and loaded with `save_pretrained` and `from_pretrained`: config.json and model.safetensors.

    `loss` and `generate` take hidden states, so that those of a frozen encoder can be cached.
    """

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        config = replace(config, prompts=[(source, style) for source, style in config.prompts])  # JSON has no tuples
        self.config = config
        self.encoder = Encoder(EncoderConfig(**config.encoder))
        V = self.encoder.width
        self.decoder: ScratchDecoder | PretrainedDecoder
        if "language_model" in config.decoder:
            self.decoder = PretrainedDecoder(config.decoder["language_model"])
            self.connector = prefix_connector(V, self.decoder.width)
        else:
            self.decoder = ScratchDecoder(DecoderConfig(**config.decoder))
            self.connector = nn.Sequential(nn.LayerNorm(V), nn.Linear(V, self.decoder.width))
        if config.contrast_width:
            self.contrast = ContrastiveHead(self.decoder.width, config.contrast_width)
        self._images_at_once = MOST_IMAGES_AT_ONCE

    def without_adapters(self) -> "CaptionerModel":
        """Return this captioner with its adapters merged into the matrices that they adapt; itself where it has none."""
        state = merged_state(self)
        if len(state) == len(self.state_dict()):
            return self
        with torch.device("meta"):
            merged = CaptionerModel(self.config)
        merged.load_state_dict(state, assign=True)
        return merged.eval()

    def loss(
        self, states_BNV: Tensor, texts: TextBatch, label_smoothing: float = 0.0, weight_C: Tensor | None = None
    ) -> Tensor:
        """Return the sum of negative log-likelihoods of all target tokens; no text about an image attends to another.

        `label_smoothing` is the share of the target that all tokens of the vocabulary have in common (Szegedy et al., 2016);
        `weight_C` that of each text in the sum, 1 if not given.
        Texts on the CPU are packed without waiting for the device of the states.
        """
        loss: Tensor = self.decoder.loss(self.connector(states_BNV), texts, label_smoothing, weight_C)
        return loss

    def contrast_loss(self, states_BNV: Tensor, texts: TextBatch) -> Tensor:
        """Return the contrastive loss of pooled images and captions read without an image; 0 with fewer than two of either."""
        captions = texts.only(texts.caption_C).to(states_BNV.device)
        image_of_K = captions.image_of_C
        if len(image_of_K) < 2 or len(states_BNV) < 2:
            return states_BNV.new_zeros(())
        loss: Tensor = self.contrast(self.connector(states_BNV).mean(1), self.decoder.read(captions), image_of_K)
        return loss

    @torch.inference_mode()
    def generate(self, states_BNV: Tensor, prompt_BT: Tensor, decoding: DecodingConfig) -> list[list[int]]:
        """Generate one text per image after its prompt (all of one length), until EOS or `max_caption_tokens`.

        Returns token ids without the prompt and without EOS. Stops as soon as every text has ended. Images that do not fit the
        memory of a GPU at once are taken in parts; raises GpuMemoryError if a single one does not.
        """
        device = next(self.connector.parameters()).device  # cached features are on the CPU
        texts: list[list[int]] = []
        while len(texts) < len(states_BNV):
            part = slice(len(texts), len(texts) + self._images_at_once)
            with suppress(torch.OutOfMemoryError):
                memory_BND, prompt_CT = self.connector(states_BNV[part].to(device)), prompt_BT[part].to(device)
                most, eos_id = self.config.max_caption_tokens, self.config.eos_id
                texts += self.decoder.generate(memory_BND, prompt_CT, decoding, most, eos_id)
                continue
            torch.cuda.empty_cache()  # only here is what the attempt held free
            self._images_at_once = len(states_BNV[part]) // 2
            if not self._images_at_once:
                hint = "take fewer beams (--num-beams), or a smaller max_caption_tokens"
                raise GpuMemoryError("the text about one image does not fit the memory of the GPU", hint=hint)
        return texts

    def most_tokens(self, num_states: int, prompt_tokens: int) -> int:
        """Return how many tokens a text may have behind an image and a prompt: a language model may have few positions."""
        left = self.decoder.max_positions - num_states - prompt_tokens
        return int(min(self.config.max_caption_tokens, left))


def prefix_connector(V: int, D: int) -> nn.Sequential:
    """Return the connector that makes states a prefix of the text: two layers, as in LLaVA-1.5."""
    return nn.Sequential(nn.LayerNorm(V), nn.Linear(V, D), nn.GELU(), nn.Linear(D, D))


class ContrastiveHead(nn.Module):
    """CLIP's contrastive loss (Radford et al., 2021) for images with several matching texts."""

    def __init__(self, width: int, shared: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(width, shared, bias=False), nn.Linear(width, shared, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, image_BD: Tensor, text_KD: Tensor, image_of_K: Tensor) -> Tensor:
        """Return the mean of both directions: texts to images, and images to any of their texts."""
        image_BE, text_KE = (functional.normalize(x, dim=-1) for x in (self.image(image_BD), self.text(text_KD)))
        scores_KB = self.log_scale.exp().clamp(max=100) * text_KE @ image_BE.T
        to_images = functional.cross_entropy(scores_KB, image_of_K)
        log_KB = scores_KB.log_softmax(0)  # for each image, over all texts
        own_KB = functional.one_hot(image_of_K, len(image_BD)).bool()
        to_texts = -log_KB.masked_fill(~own_KB, -torch.inf).logsumexp(0)
        return (to_images + to_texts[own_KB.any(0)].mean()) / 2


def build_captioner(encoder: Encoder, decoder: DecoderConfig | PretrainedDecoder, **fields: Any) -> CaptionerModel:
    """Return a captioner with a loaded encoder, and a new or pretrained decoder; `fields` are those of CaptionerConfig."""
    settings = asdict(decoder) if isinstance(decoder, DecoderConfig) else {"language_model": decoder.settings}
    config = CaptionerConfig(encoder=asdict(encoder.config), decoder=settings, **fields)
    if isinstance(decoder, DecoderConfig):
        captioner = CaptionerModel(config)
        captioner.encoder.load_state_dict(encoder.state_dict())
        return captioner
    with torch.device("meta"):  # no second copy of a language model
        captioner = CaptionerModel(config)
    captioner.encoder, captioner.decoder = encoder, decoder
    captioner.connector = prefix_connector(encoder.width, decoder.width)
    if config.contrast_width:
        captioner.contrast = ContrastiveHead(decoder.width, config.contrast_width)
    return captioner
