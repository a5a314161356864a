"""Write the parts of a captioner as ONNX files, and compare the values of each with those of PyTorch."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim

from pipeline.errors import TrainError, one_line
from trainer.model.captioner import CaptionerModel
from trainer.model.decoder import ScratchDecoder
from trainer.model.hf_config import attention_window
from trainer.publish.onnx_parts import (
    KINDS,
    LANGUAGE_KINDS,
    EncoderPart,
    FirstStep,
    LanguageFirstStep,
    LanguageNextStep,
    NextStep,
)

ENCODER, FIRST, NEXT = "encoder_model", "decoder_model", "decoder_with_past_model"
EXPORTED_HINT = "decoders that see all, and keep keys and values alone, are exported: --decoder scratch, qwen3, smollm2"
MAX_TEXT_TOKENS = 512  # of a question and its answer, which a window has to hold with the image
MAX_BYTES_WITHIN = 1_500_000_000  # of weights in the file of a part, which may have 2 GiB; more lie beside it
MAX_DIFFERENCE = 1e-3  # of any value, from that of PyTorch
MAX_FLIP = 50  # times as far may one value of an encoder be away, where the mean is not


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
