"""Export a captioner to ONNX: an encoder, and a decoder for the first and for the following tokens.

Names of files, inputs and outputs are those of transformers.js, which loads both steps of the decoder from one file, and of
Optimum. Each part (onnx_parts.py) is compared with PyTorch (onnx_writer.py). A language model reads the states of the image
before the words: its keys and values of both are kept together.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from pipeline.errors import TrainError
from pipeline.install import install_command
from pipeline.progress import Progress
from pipeline.storage.files import json_text
from trainer.checkpoint import Checkpoint, load_checkpoint
from trainer.model.captioner import CaptionerModel
from trainer.model.decoder import ScratchDecoder
from trainer.model.hf_config import SIDES
from trainer.prompts import preferred_style
from trainer.publish.files import standalone_source, transformers_files
from trainer.publish.onnx_merge import merge_steps
from trainer.publish.onnx_writer import ENCODER, FIRST, NEXT, gradient_image, quantize, write_parts
from trainer.publish.run_onnx import prepare

BOTH = "decoder_model_merged"  # steps of the decoder
INT8 = "_quantized"  # behind the name of a part
RUNNER, JS_RUNNER = "caption.py", "caption.mjs"
PIXEL_SETTINGS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std",
)  # fmt: skip
MAX_PIXEL_DIFFERENCE = 0.05  # on average, of normalized pixels: two libraries resize a little differently


def export_onnx(checkpoint: Path, out: Path, progress: Progress, *, int8: bool = False) -> dict[str, int]:
    """Write a captioner to a new folder, and return the bytes of each file.

    `onnx/` holds the parts; with `int8` also with weights of 8 bits. `caption.py` runs them with onnxruntime, tokenizers, NumPy
    and Pillow alone, `caption.mjs` with transformers.js. Raises TrainError if the decoder keeps other things than keys and
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
            progress("export", done, 8 if int8 else 4, {"last": name})
        files = {name: data for name, data in transformers_files(checkpoint).items() if not name.endswith(".py")}
        files["config.json"] = json_text(_config(captioner, json.loads(files["processor_config.json"]))).encode()
        generation = json.loads(files["generation_config.json"]) | _start(loaded)
        for name in ("num_beams", "early_stopping"):  # those who read it write greedily
            generation.pop(name, None)
        files["generation_config.json"] = json_text(generation).encode()
        files["preprocessor_config.json"] = json_text(_pixel_settings(captioner)).encode()
        files["tokenizer.json"] = (checkpoint / "tokenizer.json").read_bytes()
        files[RUNNER] = standalone_source("run_onnx").encode()
        files[JS_RUNNER] = Path(__file__).with_name("run_onnx.mjs").read_bytes()
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
    for suffix in ("", INT8) if int8 else ("",):
        first, following = (folder / f"{name}{suffix}.onnx" for name in (FIRST, NEXT))
        if not first.with_name(f"{first.name}.data").exists():  # no page loads so large a one
            merge_steps(first, following, folder / f"{BOTH}{suffix}.onnx")
        yield f"{BOTH}{suffix}"


def _config(captioner: CaptionerModel, processor: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that transformers.js takes for that of a known encoder-decoder, with the same names of caches."""
    decoder, config = captioner.decoder, captioner.config
    if isinstance(decoder, ScratchDecoder):
        shape = config.decoder
        sizes = {"decoder_layers": shape["depth"], "decoder_attention_heads": shape["heads"], "d_model": shape["width"]}
        kind = {"model_type": "trocr", **sizes}  # keys and values of the words and of the image
    else:
        text = decoder.model.config
        layers, heads = text.num_hidden_layers, getattr(text, "num_key_value_heads", text.num_attention_heads)
        kind = {"model_type": "qwen3", "num_hidden_layers": layers, "num_key_value_heads": heads}  # of both together
    return {
        "model_type": "vision-encoder-decoder",
        "is_encoder_decoder": True,
        "decoder": kind,
        "prompts": processor["prompts"],
        "kind": processor["kind"],
        "usual_style": preferred_style(config.prompts),
        "eos_id": config.eos_id,
        "max_caption_tokens": config.max_caption_tokens,
        "text_positions": _text_positions(captioner),
    }


def _text_positions(captioner: CaptionerModel) -> int | None:
    """Return how many tokens a prompt and its text may have behind an image; None if that has no end."""
    if captioner.decoder.max_positions == math.inf:
        return None
    return int(captioner.decoder.max_positions) - captioner.encoder.count_states()


def _start(loaded: Checkpoint) -> dict[str, int]:
    """Return where a pipeline of transformers.js begins if nobody says more: with the usual prompt, if that is two tokens."""
    prompts = loaded.captioner.config.prompts
    if not any(style for _, style in prompts):
        return {}
    prompt = loaded.scored_prompt()
    if len(prompt) != 2:
        return {}
    longest = loaded.captioner.config.max_caption_tokens + 1  # the second token of the prompt is counted
    return {"decoder_start_token_id": prompt[0], "forced_bos_token_id": prompt[1], "max_new_tokens": longest}


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
