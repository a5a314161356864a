"""Export a captioner to ONNX: an encoder, and a decoder for the first and for the following tokens.

Names of files, inputs and outputs are those of Optimum. Each part is compared with PyTorch. A language model reads the states
of the image before the words: its keys and values of both are kept together.

Shapes: B images, N image states, T tokens, S tokens (and states) before, V encoder width, D decoder width.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache

from pipeline.errors import TrainError, one_line
from pipeline.install import install_command
from pipeline.progress import Progress
from pipeline.storage.files import json_text
from trainer.model.caption_model import CaptionerModel
from trainer.model.checkpoint import load_checkpoint
from trainer.model.decoder import BlockCache, Cache, ScratchDecoder
from trainer.model.language_model import PretrainedDecoder
from trainer.model.pretrained import SIDES, attention_window
from trainer.publish.captioner_package import standalone_source, transformers_files
from trainer.publish.run_onnx import prepare

ENCODER, FIRST, NEXT = "encoder_model", "decoder_model", "decoder_with_past_model"
EXPORTED_HINT = "decoders that see all, and keep keys and values alone, are exported: --decoder scratch, qwen3, smollm2"
MAX_TEXT_TOKENS = 512  # of a question and its answer, which a window has to hold with the image
MAX_BYTES_WITHIN = 1_500_000_000  # of weights in the file of a part, which may have 2 GiB; more lie beside it
MAX_DIFFERENCE = 1e-3  # of any value, from that of PyTorch
MAX_FLIP = 50  # times as far may one value of an encoder be away, where the mean is not
INT8 = "_quantized"  # after the name of a part
RUNNER = "caption.py"
PIXEL_SETTINGS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std",
)  # fmt: skip
MAX_PIXEL_DIFFERENCE = 0.05  # on average, of normalized pixels: two libraries resize a little differently
KINDS = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")  # of a block: of the words, and of the image
LANGUAGE_KINDS = ("key", "value")  # of a layer of a language model


def export_onnx(checkpoint: Path, out: Path, progress: Progress, *, int8: bool = False) -> dict[str, int]:
    """Write a captioner to a new folder, and return the bytes of each file.

    `onnx/` holds the parts; with `int8` also with weights of 8 bits. `caption.py` runs them with onnxruntime, tokenizers, NumPy
    and Pillow alone. Raises TrainError if the decoder keeps other things than keys and
    values, a package is missing, the folder is there already, or a part gives other values than PyTorch.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise TrainError(f"the export needs the package {error.name}", hint=install_command("onnx")) from None
    if out.exists():
        raise TrainError(f"{out} is there already", hint="choose another: --out DIR")
    loaded = load_checkpoint(checkpoint, torch.device("cpu"))
    captioner = loaded.captioner
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-") as folder:
        draft = Path(folder) / out.name
        parts = draft / "onnx"
        parts.mkdir(parents=True)
        for done, name in enumerate(_write_files(captioner, parts, int8=int8), start=1):
            progress("export", done, 6 if int8 else 3, {"last": name})
        files = {name: data for name, data in transformers_files(checkpoint).items() if not name.endswith(".py")}
        files["config.json"] = json_text(_config(captioner)).encode()
        del files["generation_config.json"]  # the search of its beams is not exported
        files["preprocessor_config.json"] = json_text(_pixel_settings(captioner)).encode()
        files["tokenizer.json"] = (checkpoint / "tokenizer.json").read_bytes()
        files[RUNNER] = standalone_source("run_onnx").encode()
        for name, data in files.items():
            (draft / name).write_bytes(data)
        draft.rename(out)
    return {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}


def _write_files(captioner: CaptionerModel, folder: Path, *, int8: bool) -> Iterator[str]:
    """Write all parts, and yield the name of each when it is there."""
    yield from write_parts(captioner, folder)
    for name in (ENCODER, FIRST, NEXT) if int8 else ():
        quantize(folder / f"{name}.onnx", folder / f"{name}{INT8}.onnx")
        yield f"{name}{INT8}"


def _config(captioner: CaptionerModel) -> dict[str, Any]:
    """Return what `caption.py` needs to know of a captioner."""
    config = captioner.config
    return {
        "model_type": "vision-encoder-decoder",
        "is_encoder_decoder": True,
        "eos_id": config.eos_id,
        "max_caption_tokens": config.max_caption_tokens,
        "text_positions": _text_positions(captioner),
    }


def _text_positions(captioner: CaptionerModel) -> int | None:
    """Return how many tokens a prompt and its text may have behind an image; None if that has no end."""
    if captioner.decoder.max_positions == math.inf:
        return None
    return int(captioner.decoder.max_positions) - captioner.encoder.count_states()


def _pixel_settings(captioner: CaptionerModel) -> dict[str, Any]:
    """Return how images are prepared, with every default. Raises TrainError if the file that runs the parts cannot do it."""
    processor = captioner.encoder.processor
    settings: dict[str, Any] = {name: getattr(processor, name, None) for name in PIXEL_SETTINGS}
    for name in ("size", "crop_size"):
        sides = settings[name]
        settings[name] = {side: getattr(sides, side) for side in SIDES if getattr(sides, side, None)}
    if settings["resample"] is not None:
        settings["resample"] = int(settings["resample"])
    image = gradient_image(0).resize((90, 60))
    try:
        difference = np.abs(prepare(image.copy(), settings) - captioner.encoder.pixels([image])[0].numpy()).mean()
    except (KeyError, TypeError, ValueError):
        difference = np.inf
    if difference > MAX_PIXEL_DIFFERENCE:
        problem = f"{RUNNER} cannot prepare images as {type(processor).__name__} does"
        raise TrainError(problem, hint="train with an encoder whose images are resized, cropped and normalized alone")
    return {"image_processor_type": captioner.encoder.config.processor["image_processor_type"], **settings}


class EncoderPart(nn.Module):
    """Pixels to the states that the decoder reads."""

    def __init__(self, captioner: CaptionerModel) -> None:
        super().__init__()
        self.encoder, self.connector = captioner.encoder, captioner.connector

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the states of images: (B, N, D)."""
        states_BNV = self.encoder.exact_states(pixels_BCHW)
        if self.encoder.config.frozen:
            states_BNV = round_to_bfloat16(states_BNV)
        states_BND: Tensor = self.connector(states_BNV)
        return states_BND


def round_to_bfloat16(values: Tensor) -> Tensor:
    """Round float32 to the 8 significant bits of bfloat16 by products and differences alone: not every runtime has this type.

    Dekker (1971) splits numbers so; halfway between two of them the other one may be taken.
    """
    wide = values * (2.0**16 + 1)
    return wide - (wide - values)


class DecoderStep(nn.Module):
    """One step of the decoder, with the keys and values of a step before, or of none."""

    def __init__(self, decoder: ScratchDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def step(self, ids_BT: Tensor, states_BND: Tensor | None, caches: list[BlockCache], before: int) -> Tensor:
        """Return the logits (B, T, vocabulary), and leave keys and values in the caches."""
        return self.decoder.head(self.decoder(ids_BT, states_BND, Cache(caches, before)))


class FirstStep(DecoderStep):
    """The step that reads a prompt and the image."""

    def forward(self, ids_BT: Tensor, states_BND: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of a prompt, and the keys and values of all blocks in the order of KINDS."""
        caches = [BlockCache() for _ in self.decoder.blocks]
        logits_BTV = self.step(ids_BT, states_BND, caches, 0)
        return logits_BTV, *(part for cache in caches for part in (*(cache.words or ()), *(cache.image or ())))


class NextStep(DecoderStep):
    """The step that reads one more token."""

    def forward(self, ids_B1: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the logits of a token, and the keys and values of the words of all blocks."""
        parts = [past[first : first + len(KINDS)] for first in range(0, len(past), len(KINDS))]
        caches = [BlockCache(words=(part[0], part[1]), image=(part[2], part[3])) for part in parts]
        logits_B1V = self.step(ids_B1, None, caches, past[0].shape[2])
        return logits_B1V, *(part for cache in caches for part in cache.words or ())


class LanguageStep(nn.Module):
    """One step of a language model behind an image, with the keys and values of a step before, or of none."""

    def __init__(self, decoder: PretrainedDecoder) -> None:
        super().__init__()
        self.model = decoder.model

    def step(self, embeds_BTD: Tensor, past: list[Tensor], before: int) -> tuple[Tensor, ...]:
        """Return the logits of the last token (B, 1, vocabulary), and keys and values of all layers, as in LANGUAGE_KINDS."""
        cache, T = DynamicCache(), embeds_BTD.shape[1]
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        # A token sees itself and all before it: a single new one sees all. A mask that is added suits every kind of attention.
        mask_TS = torch.zeros(T, before + T, dtype=embeds_BTD.dtype)
        if T > 1:
            mask_TS = torch.full_like(mask_TS, torch.finfo(mask_TS.dtype).min).triu(1)
        logits_BTV = self.model(
            inputs_embeds=embeds_BTD,
            attention_mask=mask_TS[None, None],
            position_ids=torch.arange(before, before + T)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,  # a vocabulary may have 150,000 tokens
        ).logits
        layers: list[Any] = cache.layers
        return logits_BTV, *(part for layer in layers for part in (layer.keys, layer.values))


class LanguageFirstStep(LanguageStep):
    """The step that reads an image and the prompt behind it."""

    def forward(self, ids_BT: Tensor, states_BND: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of what follows a prompt behind images, and all keys and values."""
        words_BTD = self.model.get_input_embeddings()(ids_BT)
        return self.step(torch.cat([states_BND.to(words_BTD.dtype), words_BTD], 1), [], 0)


class LanguageNextStep(LanguageStep):
    """The step that reads one more token."""

    def forward(self, ids_B1: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the logits of a token, and all keys and values."""
        return self.step(self.model.get_input_embeddings()(ids_B1), past, past[0].shape[2])


def write_parts(captioner: CaptionerModel, folder: Path) -> Iterator[str]:
    """Write the parts, and yield the name of each when it is written and compared."""
    decoder = captioner.decoder
    kinds: tuple[str, ...]
    first: nn.Module
    following: nn.Module
    if isinstance(decoder, ScratchDecoder):
        kinds, first, following = KINDS, FirstStep(decoder).eval(), NextStep(decoder).eval()
    else:
        decoder.model.set_attn_implementation("eager")  # whose products of matrices every runtime knows
        kinds, first, following = LANGUAGE_KINDS, LanguageFirstStep(decoder).eval(), LanguageNextStep(decoder).eval()
    # Sizes of an example must not be 1, nor equal each other: the exporter takes such for constants.
    pixels_BCHW = captioner.encoder.pixels([gradient_image(number) for number in range(2)])
    batch, tokens, states, before = Dim("batch_size"), Dim("tokens"), Dim("states"), Dim("before")
    images = EncoderPart(captioner).eval()
    ids_BT = torch.tensor([[2, 3, 4], [4, 3, 2]])
    with torch.inference_mode():
        states_BND = images(pixels_BCHW).clone()
        past = _keys_and_values(first, ids_BT, states_BND)
    kept = [f"{block}.{kind}" for block in range(len(past) // len(kinds)) for kind in kinds]
    grown = [name for name in kept if ".encoder." not in name]
    _export(images, (pixels_BCHW,), folder / ENCODER, ["pixel_values"], ["last_hidden_state"], [{0: batch}])
    yield ENCODER
    outputs = ["logits", *(f"present.{name}" for name in kept)]
    shapes: list[Any] = [{0: batch, 1: tokens}, {0: batch, 1: states}]
    _export(first, (ids_BT, states_BND), folder / FIRST, ["input_ids", "encoder_hidden_states"], outputs, shapes)
    yield FIRST
    inputs = ["input_ids", *(f"past_key_values.{name}" for name in kept)]
    outputs = ["logits", *(f"present.{name}" for name in grown)]
    shapes = [{0: batch}, [{0: batch, 2: before if name in grown else states} for name in kept]]
    _export(following, (ids_BT[:, :1], past), folder / NEXT, inputs, outputs, shapes)
    yield NEXT


def _keys_and_values(first: nn.Module, ids_BT: Tensor, states_BND: Tensor) -> list[Tensor]:
    """Return what a decoder keeps of a first step. Raises TrainError if that is no keys and values of all that was seen."""
    config = getattr(getattr(first, "model", None), "config", None)
    window = math.inf if config is None else attention_window(config)
    if window < states_BND.shape[1] + MAX_TEXT_TOKENS:
        raise TrainError(f"a decoder that sees {window} tokens at once is not exported", hint=EXPORTED_HINT)
    try:
        _, *kept = first(ids_BT, states_BND)
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        what = "it keeps other things than keys and values, or takes no mask"
        raise TrainError(
            f"a decoder of the kind {getattr(config, 'model_type', '')} is not exported: {what}", hint=EXPORTED_HINT
        ) from None
    return [part.clone() for part in kept]


def _export(
    module: nn.Module, arguments: tuple[Any, ...], path: Path, inputs: list[str], outputs: list[str], shapes: Sequence[Any]
) -> None:
    """Write one part, and compare its values with those of PyTorch. Raises TrainError if they differ."""
    file = path.with_suffix(".onnx")
    with _quietly():
        try:
            program = torch.onnx.export(
                module,
                arguments,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=tuple(shapes),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            hint = "train with another encoder" if path.name == ENCODER else EXPORTED_HINT
            raise TrainError(f"PyTorch cannot export {path.name}: {one_line(error)}", hint=hint) from None
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # traces of the exporter, with the paths of this machine
        program.save(str(file), external_data=_is_large(module))
    values = [value for argument in arguments for value in (argument if isinstance(argument, list) else [argument])]
    with torch.inference_mode():
        expected = module(*arguments)
    values_of_part = _session(file).run(None, {name: value.numpy() for name, value in zip(inputs, values, strict=True)})
    for name, one, other in zip(outputs, values_of_part, expected if isinstance(expected, tuple) else [expected], strict=True):
        if one.shape != tuple(other.shape) or not _is_near(one, other.numpy(), is_rounded=path.name == ENCODER):
            raise TrainError(f"{file.name} gives other values of {name} than PyTorch", hint="please report this bug")


def _is_near(values: NDArray[np.float32], expected: NDArray[np.float32], *, is_rounded: bool) -> bool:
    """Return whether values are those of PyTorch. Of an encoder a few are rounded to the other of two neighbors in bfloat16."""
    differences, unit = np.abs(values - expected), MAX_DIFFERENCE * max(1.0, float(expected.std()))
    if is_rounded:
        return bool(differences.mean() <= unit and differences.max() <= MAX_FLIP * unit)
    return bool(differences.max() <= MAX_DIFFERENCE)


def _is_large(module: nn.Module) -> bool:
    return sum(weights.nbytes for weights in module.parameters()) > MAX_BYTES_WITHIN


def quantize(file: Path, out: Path) -> None:
    """Write a part with weights of 8 bits; activations are quantized as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    is_large = file.with_name(f"{file.name}.data").exists()
    with _quietly():
        quantize_dynamic(str(file), str(out), weight_type=QuantType.QInt8, use_external_data_format=is_large)


def _session(file: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def gradient_image(number: int) -> Image.Image:
    """Return an example of an image: a gradient, turned by so many quarters."""
    return Image.linear_gradient("L").rotate(90 * number).convert("RGB")


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out the exporter's warnings, about names of axes and deprecations of its own."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "root")]
    before = [logger.level for logger in loggers]
    with catch_warnings():
        simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
