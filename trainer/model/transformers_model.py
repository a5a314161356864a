"""Config, model and processor of a synth captioner for transformers. The published file does not need synth.

    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(REPO, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(REPO, trust_remote_code=True)
    # text: "" (default style), a style, a question or a request such as "Describe this image."
    inputs = processor(images=image, text="", return_tensors="pt")
    tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    print(processor.batch_decode(tokens, skip_special_tokens=True))

Shapes: B images and texts, N image states, T new tokens, S tokens so far, P prefix states, L = P + S,
V encoder width, D decoder width.
"""

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BatchFeature,
    GenerationMixin,
    MaxLengthCriteria,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.image_utils import load_image
from transformers.modeling_outputs import CausalLMOutputWithPast

from pipeline.images.upright import upright_rgb
from trainer.model.decoder import CrossAttentionDecoder, DecoderConfig
from trainer.model.encoder import Tower
from trainer.prompts import choose_prompt, prompt_ids, prompt_parts


class SynthCaptionerConfig(PreTrainedConfig):
    """Settings of a captioner. `prompts` are the learned (source, style) pairs. Answers have style ""."""

    model_type = "synth_captioner"

    def __init__(
        self,
        encoder: dict[str, Any] | None = None,
        decoder: dict[str, Any] | None = None,
        prompts: Any = (),
        eos_id: int = 1,
        max_caption_tokens: int = 64,
        data: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        self.encoder, self.decoder = encoder or {}, decoder or {}
        self.prompts = [tuple(prompt) for prompt in prompts]
        self.eos_id, self.max_caption_tokens = eos_id, max_caption_tokens
        self.data = data or {}
        text = self.decoder.get("language_model", self.decoder)
        self.vocab_size = text.get("vocab_size", 0)
        self.hidden_size = text.get("hidden_size", text.get("width", 0))
        # The cache has two layers for each block: one for the words, one for the image.
        self.num_hidden_layers = 2 * text["depth"] if "depth" in text else text.get("num_hidden_layers", 0)
        super().__init__(**more)

    def get_text_config(self, *_: Any, **__: Any) -> "SynthCaptionerConfig":
        """Return this config, because `encoder` and `decoder` are dicts, not configs."""
        return self


class PrefixDecoder(nn.Module):
    """A language model that reads the image states as a prefix before the text."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model
        self.width: int = self.embedding.embedding_dim
        self.max_positions: float = getattr(model.config, "max_position_embeddings", None) or math.inf

    def make_connector(self, V: int) -> nn.Sequential:
        """Return a new LLaVA-1.5-style connector (two layers) from the width of an encoder."""
        return nn.Sequential(
            nn.LayerNorm(V), nn.Linear(V, self.width), nn.GELU(), nn.Linear(self.width, self.width)
        )

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """The names of tied weights. `post_init` collects them from the submodules of a model."""
        tied = self.model.all_tied_weights_keys
        return {f"model.{name}": f"model.{source}" for name, source in tied.items()}

    @property
    def embedding(self) -> Any:
        """The input embedding layer."""
        return self.model.get_input_embeddings()

    def forward(
        self, ids_BT: Tensor, states_BPD: Tensor | None, mask_BS: Tensor, cache: Cache | None, prefix: int
    ) -> tuple[Tensor, Cache | None]:
        """Return logits of the text (B, T, vocabulary), and the cache for the next step.

        `states_BPD` is None if the cache has the image.
        """
        # Pass no new default cache, because recurrent layers need another one.
        is_default = states_BPD is not None and type(cache) is DynamicCache
        words_BTD = self.embedding(ids_BT)
        mask_BL = torch.cat([mask_BS.new_ones(len(mask_BS), prefix), mask_BS], 1)
        # Move padding before the image, because recurrent layers would process padding in the middle.
        place_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
        pads_B1 = (mask_BS.cumsum(-1) == 0).sum(-1, keepdim=True)
        from_BL = torch.where(place_L < pads_B1, place_L + prefix, place_L - pads_B1)
        from_BL = torch.where(place_L < pads_B1 + prefix, from_BL, place_L)
        mask_BL = mask_BL.gather(1, from_BL)
        embeds_BLD = words_BTD
        if states_BPD is not None:
            embeds_BLD = torch.cat([states_BPD.to(words_BTD.dtype), words_BTD], 1)
            embeds_BLD = embeds_BLD.gather(1, from_BL[..., None].expand_as(embeds_BLD))
        positions_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)[:, -embeds_BLD.shape[1] :]
        out = self.model(
            inputs_embeds=embeds_BLD,
            attention_mask=mask_BL,
            position_ids=positions_BL,
            past_key_values=None if is_default else cache,
            use_cache=cache is not None,
        )
        return out.logits[:, -ids_BT.shape[1] :], getattr(out, "past_key_values", None)


class _AtLastPosition(MaxLengthCriteria):
    """Ends texts at the last position of the language model.

    A plain MaxLengthCriteria would replace the limit that is passed to `generate`.
    """


class SynthCaptioner(PreTrainedModel, GenerationMixin):
    """Writes a caption for an image, or answers a question about it."""

    config_class = SynthCaptionerConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    _supports_sdpa = True

    def __init__(
        self, config: SynthCaptionerConfig, decoder: CrossAttentionDecoder | PrefixDecoder | None = None
    ) -> None:
        """Build a captioner or, with a `decoder`, a model that only generates from `image_states`."""
        super().__init__(config)
        if decoder is None:
            vision, text = config.encoder, config.decoder.get("language_model")
            options = {"states": vision.get("states", "all"), "is_rounded": vision.get("frozen", False)}
            self.encoder = Tower(AutoConfig.for_model(**vision["model"]), width=vision["width"], **options)
            if text:
                decoder = PrefixDecoder(AutoModelForCausalLM.from_config(AutoConfig.for_model(**text)))
            else:
                decoder = CrossAttentionDecoder(DecoderConfig(**config.decoder))
            self.connector = decoder.make_connector(self.encoder.width)
        self.decoder: CrossAttentionDecoder | PrefixDecoder = decoder
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        return self.decoder.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding of tokens, as `resize_token_embeddings` does."""
        if isinstance(self.decoder, PrefixDecoder):
            self.decoder.model.set_input_embeddings(value)
        else:
            self.decoder.embedding = value  # type: ignore[assignment]

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Return the image states that the decoder reads: (B, 3, H, W) -> (B, N, D)."""
        states_BND: Tensor = self.connector(self.encoder(pixel_values.to(self.dtype)))
        return states_BND

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return next-token logits (B, T, vocabulary), and the mean loss for `labels` (-100 is ignored).

        `num_items_in_batch` is the number of labels in all micro-batches, and is passed by
        `transformers.Trainer`. A language model may return another cache than the one passed.
        """
        if image_states is None and pixel_values is not None:
            image_states = self.encode(pixel_values)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        prefix = 0
        if isinstance(self.decoder, PrefixDecoder) and image_states is not None:
            prefix = image_states.shape[1]
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), max(0, past - prefix) + input_ids.shape[1])
        if image_states is None and not past:
            raise ValueError("a captioner needs an image: pass pixel_values")
        shown = None if past else image_states
        inputs = input_ids, shown, attention_mask, past_key_values
        if isinstance(self.decoder, PrefixDecoder):
            logits, past_key_values = self.decoder(*inputs, prefix)
        else:
            logits = self.decoder(*inputs)
        loss = None
        if labels is not None:
            next_logits, next_labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            count = (next_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
            loss = nn.functional.cross_entropy(next_logits, next_labels, reduction="sum") / count
        return CausalLMOutputWithPast(loss, logits, past_key_values)  # type: ignore[arg-type]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        image_states: Tensor | None = None,
        cache: Cache | None = None,  # transformers 5.24 renamed past_key_values to cache
        **_: Any,
    ) -> dict[str, Any]:
        """Return the inputs for the next step: the prompt in the first step, then the last token."""
        past_key_values = cache if past_key_values is None else past_key_values
        is_first = past_key_values is None or not past_key_values.get_seq_length()
        return {
            "input_ids": input_ids if is_first else input_ids[:, -1:],
            "image_states": image_states,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": True,
        }

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self, input_ids: Tensor, pixel_values: Tensor | None = None, **options: Any
    ) -> Any:
        """Return the token ids of prompts and texts. For `options`, see `GenerationMixin.generate`.

        Raises ValueError if the prompt is too long for a text to follow.
        """
        if pixel_values is not None:
            options["image_states"] = self.encode(pixel_values)
        if "image_states" in options and self.decoder.max_positions < math.inf:
            max_length = int(self.decoder.max_positions) - options["image_states"].shape[1]
            if input_ids.shape[1] >= max_length:
                raise ValueError("the prompt leaves no room for the output: ask a shorter question")
            criteria = options.get("stopping_criteria") or ()
            options["stopping_criteria"] = [*criteria, _AtLastPosition(max_length)]
        if options.get("num_beams", 1) != 1 and options.get("generation_config") is None:
            # Do not stop at the first complete texts, because a longer text may have a better mean score.
            options.setdefault("early_stopping", "never")
        return super().generate(input_ids=input_ids, **options)  # type: ignore[misc]


class SynthCaptionerProcessor(ProcessorMixin):
    """Prepares images and prompts. `choose_prompt` describes the supported texts."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        prompts: Any = (),
        kind: str = "scratch",
        chat_template: str | None = None,
        **more: Any,
    ) -> None:
        self.prompts, self.kind = [tuple(prompt) for prompt in prompts], kind
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **more)  # type: ignore[no-untyped-call]
        self.tokenizer.padding_side = "left"
        # In a question, treat the names of special tokens as plain text.
        self.tokenizer.backend_tokenizer.encode_special_tokens = True

    def __call__(
        self, images: Any = None, text: Any = None, return_tensors: str = "pt", **_: Any
    ) -> BatchFeature:
        """Return `pixel_values`, `input_ids` and `attention_mask` for images (PIL, paths or URLs).

        `text` is one text for all images, or a list with one text per image. Raises ValueError if there
        is no image, or if `text` is the name of a style that was not learned.
        """
        if images is None:
            raise ValueError('a captioner needs an image: pass images=..., and in a pipeline also text=""')
        images = list(images) if isinstance(images, list | tuple) else [images]
        # A chat template passes the images of each conversation as a list. The last image is described.
        images = [image[-1] if isinstance(image, list | tuple) else image for image in images]
        texts = [text or ""] * len(images) if text is None or isinstance(text, str) else list(text)
        if len(texts) != len(images):
            raise ValueError(f"got {len(images)} images but {len(texts)} texts")
        prompts = [self.prompt(text or "") for text in texts]
        longest = max(map(len, prompts))
        padded = [[self.tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        opened = [read_image(image) for image in images]
        pixels = self.image_processor(images=opened, return_tensors=return_tensors)["pixel_values"]
        inputs = {"pixel_values": pixels, "input_ids": padded, "attention_mask": mask}
        return BatchFeature(inputs, tensor_type=return_tensors)

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of a prompt."""
        parts = prompt_parts(self.kind, *choose_prompt(self.prompts, text))
        token_id, tokenize = self.tokenizer.convert_tokens_to_ids, self.tokenizer
        return prompt_ids(parts, token_id, lambda part: tokenize(part, add_special_tokens=False)["input_ids"])

    def batch_decode(self, *given: Any, **options: Any) -> list[str]:
        """Return the decoded texts without leading and trailing spaces."""
        return [text.strip() for text in self.tokenizer.batch_decode(*given, **options)]

    def post_process_image_text_to_text(  # type: ignore[override]
        self, generated_outputs: Any, **options: Any
    ) -> list[str]:
        """Return the decoded texts for a pipeline. `options` go to the tokenizer."""
        return self.batch_decode(generated_outputs, **{"skip_special_tokens": True, **options})


def read_image(image: Any) -> Image.Image:
    """Return an image (PIL, a path or a URL) upright and in RGB, with transparency over white."""
    if not isinstance(image, Image.Image):
        is_url = str(image).startswith(("http://", "https://"))
        image = load_image(image) if is_url else Image.open(image)
    return upright_rgb(image)
