"""Run a training: build its parts, run the loop (trainer/loop.py), and score the best captioner once.

An optional first stage aligns: only the connector is trained. The second stage trains every part at its own rate, with AdamW,
warm-up and a cosine schedule. An optional third rewards captions that it draws. An interrupted training resumes, bit-exact on
a CPU.
"""

import math
from collections.abc import Container
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed

from pipeline.dataset.version import FEATURES, Version
from pipeline.digests import digest
from pipeline.progress import NullProgress, Progress
from pipeline.storage.files import read_json, remove, write_json
from pipeline.storage.untrusted import UnsafeFileError
from trainer.caption_files import write_captions
from trainer.config import TrainConfig
from trainer.data import Example, Sets, choose_examples, texts_of
from trainer.evaluate import EvalOptions, choose_references, evaluate
from trainer.features import LoadedFeatures, OnlineFeatures, store_features
from trainer.loop import BatchLoader, Trainer, build_trainer, run_steps
from trainer.model.checkpoint import Checkpoint, build_checkpoint, load_checkpoint
from trainer.model.decoding import DecodingConfig
from trainer.model.encoder import Encoder
from trainer.model.language_model import PretrainedDecoder
from trainer.runtime.devices import best_device, join_processes, products_in
from trainer.runtime.forecast import Forecast, fit_and_forecast
from trainer.runtime.training_state import Log, load_resume, require_tensorboard
from trainer.tokenizer import TargetText, prompt_parts, scored_prompt

LAST = "last"  # the captioner of the last step, where an earlier one is better


def train_captioner(
    version: Version,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    tensorboard: bool = False,
    only: Container[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a captioner on a version, and score it once on the test split; return the content of metrics.json.

    Writes to `out`: config.json, model.safetensors and tokenizer.json of the checkpoint with the best CIDEr-D on the
    validation split, `last` with those of the last step if another is the best, metrics.json, captions.jsonl (captions of the
    test images), log.jsonl, train.json (the settings) and, until done, resume.pt; with `tensorboard`, also the curves as event
    files. `only` limits the images to these sample ids.

    Raises StoreError if the version lacks a split, and TrainError if there is nothing to learn from or to resume, a model is
    missing, or the loss diverges.
    """
    if tensorboard:
        require_tensorboard()
    report = progress or NullProgress()
    rank, processes = join_processes()
    device = best_device(rank)
    if device.type != "cpu":
        torch.cuda.set_device(device)  # this process allocates memory there from here on
    torch.manual_seed(config.seed)
    sets, config = choose_examples(version, config, only)
    run_of = partial(_run_digest, version, config, sets["train"])
    is_cut = resume and (out / "resume.pt").exists()
    if not is_cut and (metrics := _read_finished(out, run_of(1))) is not None:
        report.message(f"{out} holds this captioner, trained before; to train it anew, remove the folder or name another one")
        if processes > 1:
            torch.distributed.destroy_process_group()
        return metrics if rank == 0 else {}
    checkpoint = build_checkpoint(version, config, sets["train"])
    checkpoint.captioner.to(device)
    _require_positions(checkpoint, config, texts_of([*sets["train"], *sets["validation"]]))
    if isinstance(checkpoint.captioner.decoder, PretrainedDecoder):
        _ = checkpoint.captioner.decoder.probed  # the model is probed here, before its products are rounded
    if rank == 0:
        _warn_of_cut_texts(checkpoint, config, texts_of(sets["train"]), report)
    if rank == 0 and (own := version.manifest.get("own_columns")):
        report.message(f"columns of own tasks are not learned: {', '.join(own)}")
    # What can be refused is refused here: what follows may take hours.
    state = load_resume(out, config, run_of) if resume else {}
    _, style = scored_prompt(checkpoint.captioner.config.prompts)
    for split in ("validation", "test"):
        choose_references(sets[split], style)
    out.mkdir(parents=True, exist_ok=True)
    features = _features_of(checkpoint.captioner.encoder, config, sets, version.dataset_dir / FEATURES, device, report)
    parts = config.gradient_accumulation_steps
    loader = BatchLoader(config, checkpoint.tokenizer, sets["train"], features, rank, processes, parts)
    trainer = build_trainer(checkpoint, config, loader, sets["validation"], device)
    # Only now: states in the store are float32. bfloat16 is for the steps alone, captions that are scored get TF32 at least.
    with products_in("fp32" if config.precision == "fp32" else "tf32", device):
        forecast = fit_and_forecast(trainer, report if rank == 0 else NullProgress())
        log = _begin_log(out, config, forecast, state.get("step", 0), tensorboard=tensorboard) if rank == 0 else None
        run_steps(trainer, out, run_of(processes), log, report, state)
        if rank == 0 and trainer.validation.evaluations_without_gain:
            (out / LAST).mkdir(exist_ok=True)
            with trainer.averaged():
                checkpoint.save(out / LAST)
        if processes > 1:  # before the test, for which nobody has to wait
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        return _test(trainer, out, sets["test"], run_of(1)) if rank == 0 else {}


def _run_digest(version: Version, config: TrainConfig, train_set: list[Example], processes: int) -> str:
    """Return the digest of a run of so many processes: another one cannot go on with its state."""
    ids = [example.sample_id for example in train_set]
    return digest([config.digest_values(), version.manifest["digest"], processes, ids])


def _read_finished(out: Path, run: str) -> dict[str, Any] | None:
    """Return the metrics of a run that has ended in a folder; None if there is none, or another one."""
    try:
        metrics = read_json(out / "metrics.json")
        return metrics if metrics["run"] == run else None
    except (OSError, ValueError, KeyError, TypeError, UnsafeFileError):
        return None


def _features_of(
    encoder: Encoder, config: TrainConfig, sets: Sets, folder: Path, device: torch.device, progress: Progress
) -> LoadedFeatures:
    """Return the hidden states of all images: of an encoder that learns, or without a store, computed in each step."""
    if not encoder.config.frozen or config.feature_storage == "none":
        return OnlineFeatures(encoder, device)
    return store_features(encoder, [example for examples in sets.values() for example in examples], folder, device, progress)


def _begin_log(out: Path, config: TrainConfig, forecast: Forecast, done: int, *, tensorboard: bool) -> Log:
    """Write the settings, remove what is stale as soon as weights change, and return the log of a run behind step `done`."""
    (out / "metrics.json").unlink(missing_ok=True)
    remove(out / LAST)
    write_json(out / "train.json", config.model_dump(mode="json"))
    log = Log(out / "log.jsonl", done, tensorboard=tensorboard)
    if not done:
        log.write(step=0, forecast_seconds=forecast.seconds, forecast_memory_mb=forecast.memory_mb)
    return log


def _warn_of_cut_texts(checkpoint: Checkpoint, config: TrainConfig, texts: list[TargetText], progress: Progress) -> None:
    """Warn of texts that lose their end."""
    if cut := checkpoint.tokenizer.count_cut(texts, config.max_caption_tokens):
        share = f"{cut:,} of {len(texts):,} texts are longer than {config.max_caption_tokens} tokens"
        progress.warn(f"{share}: their end is not learned (max_caption_tokens)")


def _require_positions(checkpoint: Checkpoint, config: TrainConfig, texts: list[TargetText]) -> None:
    """Raise TrainError if the language model has fewer positions than an image and the longest text take."""
    decoder, tokenizer = checkpoint.captioner.decoder, checkpoint.tokenizer
    if not isinstance(decoder, PretrainedDecoder) or decoder.max_positions == math.inf:
        return
    num_states = checkpoint.captioner.encoder.count_states()

    def most_tokens(text: TargetText) -> int:  # each of which has at least a byte
        prompt = prompt_parts(tokenizer.kind, text.source, text.style, text.question)
        return sum(len(part.encode()) for part, _ in prompt) + min(len(text.text.encode()) + 2, config.max_caption_tokens)

    may_be_long = (text for text in texts if num_states + most_tokens(text) > decoder.max_positions)
    encoded = (tokenizer.encode(text, config.max_caption_tokens) for text in may_be_long)
    decoder.require_positions(num_states, max((len(one.prompt) + len(one.target) for one in encoded), default=0))


def _test(trainer: Trainer, out: Path, examples: list[Example], run: str) -> dict[str, Any]:
    """Score the saved captioner on the test split; write and return its metrics, and of which run they are."""
    trainer.checkpoint.captioner.decoder.to("meta")  # its memory is for the one that is scored
    chosen, features = load_checkpoint(out, trainer.device), trainer.loader.features
    captioner = chosen.captioner
    if not captioner.encoder.config.frozen:
        features = OnlineFeatures(captioner.encoder, trainer.device)
    decoding = DecodingConfig(num_beams=trainer.config.num_beams)
    options = EvalOptions(scored_prompt(captioner.config.prompts), decoding, questions=True)
    metrics: dict[str, Any] = {
        "run": run,
        "data": captioner.config.data,
        "split": "test",
        "parameters": sum(weights.numel() for weights in chosen.captioner.parameters()),
        "best_validation": trainer.validation.best_cider_d,
        **evaluate(chosen, examples, options, features),
    }
    write_captions(out / "captions.jsonl", metrics.pop("each"))
    write_json(out / "metrics.json", metrics)
    (out / "resume.pt").unlink(missing_ok=True)
    return read_json(out / "metrics.json")  # as a later call returns them
