"""Export a captioner to ONNX: the encoder, the decoder for the prompt, and the decoder for later tokens.

Files, inputs and outputs are named as in Optimum. Each part is compared with PyTorch.

Shapes: B images, N image states, T tokens, S tokens plus image states, D decoder width, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim

from pipeline.errors import TrainError, one_line
from pipeline.install import install_command
from pipeline.progress import Progress
from pipeline.storage.files import json_text
from trainer.model.caption_model import CaptionerModel
from trainer.model.checkpoint import load_checkpoint
from trainer.model.decoder import BlockCache, Cache, ScratchDecoder
from trainer.model.pretrained import SIDES
from trainer.publish.run_onnx import PARTS, prepare
from trainer.publish.transformers_files import standalone_source, transformers_files

ENCODER, FIRST, NEXT = PARTS
RUNNER = "caption.py"
# An ONNX file can have at most 2 GiB, so the weights of larger parts are stored in a second file.
MAX_EMBEDDED_BYTES = 1_500_000_000
# Largest allowed difference from a PyTorch value.
MAX_DIFFERENCE = 1e-3
# Single encoder values may differ by this factor more, because bfloat16 ties may round differently.
MAX_ROUNDING_FACTOR = 50
# Largest allowed mean difference of normalized pixels, because libraries resize slightly differently.
MAX_PIXEL_DIFFERENCE = 0.05
PIXEL_SETTINGS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip
BLOCK_TENSORS = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")


def export_onnx(checkpoint: Path, out: Path, progress: Progress) -> dict[str, int]:
    """Write a captioner to a new folder, and return the size of each file in bytes.

    `onnx/` contains the parts. `caption.py` runs them without PyTorch. Raises TrainError if a package is
    missing, the folder exists, the decoder is a language model, or a part differs from PyTorch.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise TrainError(f"the export needs the package {error.name}", hint=install_command("onnx")) from None
    if out.exists():
        raise TrainError(f"{out} already exists", hint="choose another folder: --out DIR")
    captioner = load_checkpoint(checkpoint, torch.device("cpu")).captioner
    decoder = captioner.decoder
    if not isinstance(decoder, ScratchDecoder):
        hint = "run it with transformers, or train with --decoder scratch"
        raise TrainError("export to ONNX does not support language models as decoders", hint=hint)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-") as folder:
        draft = Path(folder) / out.name
        (draft / "onnx").mkdir(parents=True)
        for done, name in enumerate(_write_parts(captioner, decoder, draft / "onnx"), start=1):
            progress("export", done, len(PARTS), {"last": name})
        files = transformers_files(checkpoint)
        files = {name: files[name] for name in files if name.endswith(".json")}
        # The exported captioner supports only greedy search.
        del files["generation_config.json"]
        files["config.json"] = json_text(_runner_config(captioner)).encode()
        files["preprocessor_config.json"] = json_text(_pixel_settings(captioner)).encode()
        files["tokenizer.json"] = (checkpoint / "tokenizer.json").read_bytes()
        files[RUNNER] = standalone_source("run_onnx").encode()
        for name, data in files.items():
            (draft / name).write_bytes(data)
        draft.rename(out)
    paths = sorted(path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): path.stat().st_size for path in paths}


def _runner_config(captioner: CaptionerModel) -> dict[str, Any]:
    return {
        "model_type": "vision-encoder-decoder",
        "is_encoder_decoder": True,
        "eos_id": captioner.config.eos_id,
        "max_caption_tokens": captioner.config.max_caption_tokens,
    }


def _pixel_settings(captioner: CaptionerModel) -> dict[str, Any]:
    """Return the image processor's settings. Raises TrainError if `caption.py` does not support them."""
    processor = captioner.encoder.processor
    settings: dict[str, Any] = {name: getattr(processor, name, None) for name in PIXEL_SETTINGS}
    for name in ("size", "crop_size"):
        sides = settings[name]
        settings[name] = {side: getattr(sides, side) for side in SIDES if getattr(sides, side, None)}
    if settings["resample"] is not None:
        settings["resample"] = int(settings["resample"])
    image = _gradient_image(0).resize((90, 60))
    expected = captioner.encoder.pixels([image])[0].numpy()
    try:
        difference = np.abs(prepare(image.copy(), settings) - expected).mean()
    except (KeyError, TypeError, ValueError):
        difference = np.inf
    if difference > MAX_PIXEL_DIFFERENCE:
        raise TrainError(
            f"{RUNNER} cannot prepare images as {type(processor).__name__} does",
            hint="train with an encoder whose images are only resized, cropped and normalized",
        )
    return {"image_processor_type": captioner.encoder.config.processor["image_processor_type"], **settings}


class EncoderPart(nn.Module):
    """Maps pixels to the image states that the decoder reads."""

    def __init__(self, captioner: CaptionerModel) -> None:
        super().__init__()
        self.encoder, self.connector = captioner.encoder, captioner.connector

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the image states: (B, N, D)."""
        states_BNV = self.encoder.exact_states(pixels_BCHW)
        if self.encoder.config.frozen:
            states_BNV = _round_to_bfloat16(states_BNV)
        states_BND: Tensor = self.connector(states_BNV)
        return states_BND


def _round_to_bfloat16(values: Tensor) -> Tensor:
    """Round float32 to bfloat16 precision (8 bits), without using the type, which some runtimes lack.

    This is Dekker's splitting (1971). Ties may be rounded to the other neighbor.
    """
    wide = values * (2.0**16 + 1)
    return wide - (wide - values)


class DecoderPart(nn.Module):
    """Wraps a decoder step as a module for export. `step` is called with the decoder and the inputs."""

    def __init__(self, step: Callable[..., tuple[Tensor, ...]], decoder: nn.Module) -> None:
        super().__init__()
        self.step, self.decoder = step, decoder

    def forward(self, ids_BT: Tensor, states: Any) -> tuple[Tensor, ...]:
        """Return logits, keys and values. `states` are image states, or past keys and values."""
        return self.step(self.decoder, ids_BT, states)


def _first_step(decoder: ScratchDecoder, ids_BT: Tensor, states_BND: Tensor) -> tuple[Tensor, ...]:
    """Return the logits for a prompt (B, T, V), and the BLOCK_TENSORS of all blocks."""
    caches = [BlockCache() for _ in decoder.blocks]
    logits_BTV = decoder.head(decoder(ids_BT, states_BND, Cache(caches, 0)))
    return logits_BTV, *(part for cache in caches for part in (*(cache.words or ()), *(cache.image or ())))


def _next_step(decoder: ScratchDecoder, ids_B1: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the logits for a token (B, 1, V), and each block's keys and values for the text."""
    starts = range(0, len(past), len(BLOCK_TENSORS))
    caches = [BlockCache(words=(past[n], past[n + 1]), image=(past[n + 2], past[n + 3])) for n in starts]
    logits_B1V = decoder.head(decoder(ids_B1, None, Cache(caches, past[0].shape[2])))
    return logits_B1V, *(part for cache in caches for part in cache.words or ())


def _write_parts(captioner: CaptionerModel, decoder: ScratchDecoder, folder: Path) -> Iterator[str]:
    """Write all parts. Yield the name of each part after it is written and compared."""
    first, following = DecoderPart(_first_step, decoder), DecoderPart(_next_step, decoder)
    encoder = EncoderPart(captioner)
    for part in (encoder, first, following):
        part.eval()
    # Example sizes must differ and be greater than 1, or the exporter treats them as constants.
    pixels_BCHW = captioner.encoder.pixels([_gradient_image(quarter_turns) for quarter_turns in range(2)])
    batch, tokens, states, past_tokens = map(Dim, ("batch_size", "tokens", "states", "past_tokens"))
    ids_BT = torch.tensor([[2, 3, 4], [4, 3, 2]])
    with torch.inference_mode():
        states_BND = encoder(pixels_BCHW).clone()
        past = [part.clone() for part in first(ids_BT, states_BND)[1:]]
    names = [f"{block}.{tensor}" for block in range(len(decoder.blocks)) for tensor in BLOCK_TENSORS]
    growing = [name for name in names if ".encoder." not in name]
    _export(encoder, (pixels_BCHW,), folder / ENCODER, ["pixel_values"], ["last_hidden_state"], [{0: batch}])
    yield ENCODER
    inputs = ["input_ids", "encoder_hidden_states"]
    outputs = ["logits", *(f"present.{name}" for name in names)]
    shapes: list[Any] = [{0: batch, 1: tokens}, {0: batch, 1: states}]
    _export(first, (ids_BT, states_BND), folder / FIRST, inputs, outputs, shapes)
    yield FIRST
    inputs = ["input_ids", *(f"past_key_values.{name}" for name in names)]
    outputs = ["logits", *(f"present.{name}" for name in growing)]
    shapes = [{0: batch}, [{0: batch, 2: past_tokens if name in growing else states} for name in names]]
    _export(following, (ids_BT[:, :1], past), folder / NEXT, inputs, outputs, shapes)
    yield NEXT


def _export(
    module: nn.Module, args: tuple[Any, ...], path: Path, inputs: list[str], outputs: list[str], shapes: Any
) -> None:
    """Write one part. Raises TrainError if its outputs differ from PyTorch."""
    file, is_encoder = path.with_suffix(".onnx"), path.name == ENCODER
    with _without_warnings():
        try:
            program = torch.onnx.export(
                module,
                args,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=tuple(shapes),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            problem = f"PyTorch cannot export {path.name}: {one_line(error)}"
            raise TrainError(problem, hint="train with another encoder") from None
        assert program is not None
        # The exporter's stack traces contain local paths.
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
        weight_bytes = sum(weights.nbytes for weights in module.parameters())
        program.save(str(file), external_data=weight_bytes > MAX_EMBEDDED_BYTES)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    tensors = [args[0], *args[1]] if path.name == NEXT else args
    values = session.run(None, {name: tensor.numpy() for name, tensor in zip(inputs, tensors, strict=True)})
    with torch.inference_mode():
        expected = module(*args)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for name, value, expected_value in zip(outputs, values, expected, strict=True):
        if not _is_near(value, expected_value.numpy(), is_rounded=is_encoder):
            problem = f"the values of {name} in {file.name} differ from those of PyTorch"
            raise TrainError(problem, hint="please report this bug")


def _is_near(values: Any, expected: Any, *, is_rounded: bool) -> bool:
    """Return whether values are close to PyTorch's. With `is_rounded`, a few may be rounded differently."""
    if values.shape != expected.shape:
        return False
    differences = np.abs(values - expected)
    if not is_rounded:
        return bool(differences.max() <= MAX_DIFFERENCE)
    limit = MAX_DIFFERENCE * max(1.0, float(expected.std()))
    return bool(differences.mean() <= limit and differences.max() <= MAX_ROUNDING_FACTOR * limit)


def _gradient_image(quarter_turns: int) -> Image.Image:
    return Image.linear_gradient("L").rotate(90 * quarter_turns).convert("RGB")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence the exporter, which warns about axis names and its own deprecations."""
    disabled_level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with catch_warnings():
            simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_level)
