"""A checkpoint folder: it loads with `from_pretrained`, and training resumes from `resume.pt`.

A checkpoint may be a stranger's. Its config.json holds known keys only, its weights are safetensors, and no memory is taken
before their shapes are those that the config asks for.

`log.jsonl` holds the training curves, `captions.jsonl` the caption and scores of each test image.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import constants
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers.initialization import no_init_weights

from pipeline.errors import TrainError, one_line
from pipeline.install import install_command
from pipeline.storage.files import atomic_write, flush_file, flush_folder, read_json, remove, scratch_folder, write_text
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from trainer.config import (
    CAPTIONER_FILES,
    MAX_CAPTION_TOKENS,
    MAX_LAYERS,
    TrainConfig,
    describe_changes,
    no_captioner,
    read_settings,
    require_checkpoint,
)
from trainer.distributed import best_device
from trainer.model.captioner import CaptionerConfig, CaptionerModel
from trainer.model.hf_config import require_few_layers
from trainer.presets import EncoderStates
from trainer.tokenizer import CaptionTokenizer, TargetText, require_known_tokens

MAX_CONFIG_BYTES = 10_000_000
PUBLISHED_TYPE = "synth_captioner"  # the model type of a captioner for transformers
MAX_BEAMS = 64  # with which a captioner may say that it was scored: a search with more may have no end
MAX_TOKENIZER_BYTES = 100_000_000
MAX_LOG_BYTES = 1_000_000_000
MAX_SHARED = 2  # times the stored weights that a model may have: some decoders use their embedding as head, too


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained captioner with its tokenizer."""

    captioner: CaptionerModel
    tokenizer: CaptionTokenizer

    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors and tokenizer.json, each file atomically."""
        with scratch_folder(folder) as draft:
            try:
                self.captioner.without_adapters().save_pretrained(draft)
            except SafetensorError as error:  # as it says that the disk is full, too
                raise TrainError(
                    f"cannot write the weights to {folder}: {error}", hint="free some space, and go on: --resume"
                ) from None
            (draft / "model.safetensors").chmod((draft / "config.json").stat().st_mode)  # others may read the other files
            self.tokenizer.backend.save(str(draft / "tokenizer.json"))
            for name in CAPTIONER_FILES:
                flush_file(draft / name)
                (draft / name).replace(folder / name)
            flush_folder(folder)


def load_checkpoint(folder: Path | str, device: torch.device | None = None) -> Checkpoint:
    """Load a checkpoint folder in evaluation mode. Raises TrainError if the folder holds no valid captioner."""
    folder = Path(folder)
    require_checkpoint(folder)
    try:
        with without_network():
            checkpoint = _load(folder, device)
        _require_numbers(checkpoint.captioner, folder)
        return checkpoint
    except TrainError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever transformers raises for a config that is odd
        raise no_captioner(folder, one_line(error)) from None


def describe_checkpoint(folder: Path) -> str:
    """Return what a checkpoint folder holds, in words, after every file in it was read. Raises TrainError for a damaged one."""
    if not any((folder / name).exists() for name in CAPTIONER_FILES):
        if not (folder / "resume.pt").exists():
            return "a training that has saved nothing so far"
        return f"an unfinished training at step {_read_resume(folder / 'resume.pt')['step']:,}, without a captioner so far"
    captioner = load_checkpoint(folder, torch.device("cpu")).captioner
    steps = max((entry["step"] for entry in read_log(folder / "log.jsonl")), default=0)
    parts = [
        f"a captioner of {sum(weights.numel() for weights in captioner.parameters()):,} weights",
        f"{steps:,} steps logged",
    ]
    for name in ("train.json", "metrics.json"):
        try:
            if (folder / name).exists():
                read_json(folder / name)
        except (OSError, ValueError, RecursionError, UnsafeFileError) as error:
            raise no_captioner(folder, f"{name} is damaged: {one_line(error)}") from None
    parts.append("scored" if (folder / "metrics.json").exists() else "not scored yet")
    if (folder / "resume.pt").exists():
        parts.append(f"a state to resume from at step {_read_resume(folder / 'resume.pt')['step']:,}")
    return ", ".join(parts)


def _require_numbers(captioner: CaptionerModel, folder: Path) -> None:
    """Raise TrainError for weights that are no numbers, which a damaged file may have: its captions would be empty."""
    if odd := [name for name, weights in captioner.named_parameters() if not torch.isfinite(weights.sum())]:
        raise no_captioner(folder, f"{odd[0]} has weights that are not numbers")


@contextmanager
def without_network() -> Iterator[None]:
    """Keep huggingface_hub from asking the Hub: the configs of some models fetch others."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _load(folder: Path, device: torch.device | None) -> Checkpoint:
    config = read_config(folder)
    require_shapes(config, folder / "model.safetensors")
    tokenizer = read_tokenizer(folder / "tokenizer.json", config)
    # huggingface_hub prints to stdout, which is for data. Every weight is in the file: none needs a random value before.
    with redirect_stdout(StringIO()), no_init_weights():
        captioner = CaptionerModel.from_pretrained(str(folder), strict=True).eval().to(device or best_device())
    return Checkpoint(captioner, tokenizer)


def read_config(folder: Path) -> CaptionerConfig:
    """Return the config of a checkpoint. Raises ValueError or UnsafeFileError if it is not one."""
    values = json.loads(read_regular(folder / "config.json", max_bytes=MAX_CONFIG_BYTES))
    known = {field.name for field in fields(CaptionerConfig)}
    if values.get("model_type") == PUBLISHED_TYPE:  # of publish/files.py, or saved by transformers; its keys are not read here
        values = {name: value for name, value in values.items() if name in known}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"config.json has an unknown key {unknown[0]}")
    config = TypeAdapter(CaptionerConfig).validate_python(values)
    if not config.prompts:
        raise ValueError("it has learned no prompt")
    if not 0 < config.max_caption_tokens <= MAX_CAPTION_TOKENS:
        raise ValueError(f"max_caption_tokens is {config.max_caption_tokens}")
    if type(config.num_beams) is not int or not 0 < config.num_beams <= MAX_BEAMS:
        raise ValueError(f"num_beams is {config.num_beams!r}")
    require_few_layers(config.decoder)
    return config


def require_shapes(config: CaptionerConfig, weights: Path) -> None:
    """Raise ValueError unless a file of weights has the tensors that a config asks for. No tensor is allocated."""
    with safe_open(weights, "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    with torch.device("meta"):
        captioner = CaptionerModel(config)
    expected = {name: tuple(tensor.shape) for name, tensor in captioner.state_dict().items()}
    encoder = captioner.encoder
    layers = encoder.config.layers
    if len(layers) > MAX_LAYERS or any(layer not in range(-encoder.depth - 1, encoder.depth + 1) for layer in layers):
        raise ValueError(f"the encoder has no layers {layers[: MAX_LAYERS + 1]}")
    if encoder.config.states not in get_args(EncoderStates):
        raise ValueError(f"the encoder has no states {encoder.config.states!r}")
    # Of tensors that share their memory, such as the embedding and the head, the file holds one.
    if wrong := [name for name, shape in stored.items() if expected.get(name) != shape]:
        raise ValueError(f"the weights do not fit the config: {wrong[0]}")
    allocated, held = sum(map(math.prod, expected.values())), sum(map(math.prod, stored.values()))
    if allocated > MAX_SHARED * held + 1:
        raise ValueError(f"the config asks for {allocated:,} weights, and there are {held:,}")


def read_tokenizer(path: Path, config: CaptionerConfig) -> CaptionTokenizer:
    """Return the tokenizer of a checkpoint. Raises ValueError if it has tokens that the decoder has not."""
    backend = Tokenizer.from_str(read_regular(path, max_bytes=MAX_TOKENIZER_BYTES).decode("utf-8"))
    vocab_size = config.decoder.get("language_model", config.decoder)["vocab_size"]
    if not 0 <= config.eos_id < vocab_size:
        raise ValueError(f"the token that ends a text is {config.eos_id}, and the decoder has {vocab_size:,} tokens")
    require_known_tokens(backend, vocab_size)
    tokenizer = CaptionTokenizer(backend, "pretrained" if "language_model" in config.decoder else "scratch", config.eos_id)
    backend.encode_special_tokens = True  # the name of a token in a text is not the token
    for source, style in config.prompts:
        ids = tokenizer.prompt(TargetText(source, "", style=style, question="" if style else "?"))
        if max(ids) >= vocab_size:
            raise ValueError(f"the prompt of the style {style or 'of answers'} has tokens that the decoder has not")
    return tokenizer


def save_resume(folder: Path, state: dict[str, Any]) -> None:
    """Write the state that the next step depends on to resume.pt, atomically."""
    with atomic_write(folder / "resume.pt") as draft:
        torch.save(state, draft)


def load_resume(folder: Path, config: TrainConfig, run_of: Callable[[int], str], processes: int) -> dict[str, Any]:
    """Return the state that `save_resume` wrote. Raises TrainError if there is none, or if another run wrote it.

    `run_of` gives the digest of a run with the settings and so many processes: it may go on with more of them, or fewer.
    """
    path = folder / "resume.pt"
    if not path.exists():
        raise TrainError(
            f"nothing to resume in {folder}", hint="leave --resume out: a training begins, or one that is finished is shown"
        )
    state = _read_resume(path)
    if state["run"] != run_of(state.get("processes", processes)):
        hint = f"use the same, name another folder (--out DIR), or remove {path} to start anew without --resume"
        raise TrainError(f"{folder} was trained with {_describe_run(folder, config)}", hint=hint)
    return state


def _describe_run(folder: Path, config: TrainConfig) -> str:
    """Return what another run in a folder had otherwise."""
    try:
        others = describe_changes(read_settings(folder), config.model_dump())
    except (OSError, ValueError, UnsafeFileError):
        return "other settings or data"
    return f"other settings ({'; '.join(others)})" if others else "other data"


def _read_resume(path: Path) -> dict[str, Any]:
    """Return the state in a resume.pt. Raises TrainError for a truncated file, or one of another program."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if not {"run", "step"} <= state.keys() or not isinstance(state["step"], int):
            raise ValueError("it is of another program")
    except Exception as error:  # noqa: BLE001  # whatever torch raises
        hint = f"remove {path}, and start anew without --resume"
        reason = one_line(error) if isinstance(error, OSError | ValueError) else "it is not what a training has written"
        raise TrainError(f"{path} is damaged: {reason}", hint=hint) from None
    return state


def write_captions(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the caption and scores of each image as JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class Log:
    """`log.jsonl`: one JSON object a line; on resume, lines from later steps are dropped.

    With `tensorboard`, the curves are also written as event files to the folder `tensorboard` beside it.
    """

    def __init__(self, path: Path, first_step: int, *, tensorboard: bool = False) -> None:
        self._path = path
        self._curves: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            if first_step == 0:
                remove(path.with_name("tensorboard"))  # a new run discards old curves
            self._curves = SummaryWriter(str(path.with_name("tensorboard")), purge_step=first_step + 1)
        kept = [line for line in read_log(path) if line["step"] <= first_step] if first_step else []
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.seconds: float = next((line["seconds"] for line in reversed(kept) if "seconds" in line), 0.0)  # up to there

    def write(self, **values: float | int | str) -> None:
        """Append one line, and a point to each TensorBoard curve; each stage has its own curves."""
        with self._path.open("a", encoding="utf-8") as file:
            # A step that is skipped may have a loss that is no number, which JSON does not know.
            finite = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
            }
            file.write(json.dumps(finite) + "\n")
        if self._curves and values["step"]:  # before the first step there are no curves
            for name, value in values.items():
                if name != "step" and not isinstance(value, str):
                    self._curves.add_scalar(f"{values.get('stage', 'validation')}/{name}", value, values["step"])
            self._curves.flush()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a log, or an empty list if the file does not exist.

    A line without its end was cut off, by a full disk or a kill: it is left out. Raises TrainError for any other damage.
    """
    text = read_regular(path, max_bytes=MAX_LOG_BYTES).decode("utf-8", "replace") if path.exists() else ""
    whole, _, _ = text.rpartition("\n")
    try:
        entries = [json.loads(line) for line in whole.split("\n") if line.strip()]
        if not all(isinstance(entry, dict) and isinstance(entry["step"], int) for entry in entries):
            raise ValueError("an entry has no step")
    except (ValueError, KeyError, RecursionError) as error:
        raise TrainError(f"{path} is damaged: {one_line(error)}", hint="move it away: only the curves are lost") from None
    return entries


def require_tensorboard() -> None:
    """Raise TrainError if TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise TrainError("TensorBoard is not installed", hint=install_command("export")) from None
