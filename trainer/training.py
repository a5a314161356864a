"""Train a captioner: build model and data, run the training loop (loop.py), and score the best captioner.

A run has up to three stages. `align` trains only the connector, `train` trains all parts with separate
learning rates, and `scst` maximizes the rewards of sampled captions. Each stage uses AdamW with warm-up and
cosine decay. An interrupted run can be resumed. On a CPU, its results are bit-identical.
"""

from pathlib import Path
from typing import Any

import torch

from pipeline.dataset.card import list_training_data
from pipeline.dataset.version import FEATURES, Version
from pipeline.digests import digest, file_digest
from pipeline.errors import TrainError, one_line
from pipeline.progress import NullProgress, Progress
from pipeline.storage.files import read_json, write_json
from trainer.caption_files import write_captions
from trainer.config import TrainConfig
from trainer.data import Example, choose_examples, texts_of
from trainer.evaluate import choose_references, evaluate
from trainer.features import LoadedFeatures, OnlineFeatures, store_features
from trainer.loop import BatchLoader, Trainer, build_trainer, run_steps
from trainer.model.checkpoint import Checkpoint, build_checkpoint, load_checkpoint
from trainer.model.language_model import PretrainedDecoder
from trainer.optimizer import parameter_groups
from trainer.runtime.checkpoint_folder import READ_ERRORS, describe_difference, find_captioner
from trainer.runtime.devices import best_device, join_processes, leave_processes, matmul_precision
from trainer.runtime.training_state import Log, load_resume
from trainer.tokenizer import TargetText, scored_prompt

MAX_CUT_SHARE = 0.01  # a larger share of truncated texts is reported
# These settings may contain names of local folders.
FOLDER_SETTINGS = {"preset", "init", "encoder", "decoder"}


def train_captioner(
    version: Version,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a captioner on a version, score it on the test split, and return the content of metrics.json.

    `out` receives the checkpoint with the best validation CIDEr-D (config.json, model.safetensors and
    tokenizer.json), train.json (settings), log.jsonl, metrics.json and captions.jsonl (test images). Until
    the run ends, resume.pt holds the state to resume from. Raises the errors of `trainer.train`.
    """
    rank, processes = join_processes()
    report = NullProgress() if rank or progress is None else progress
    device = best_device(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(config.seed)

    # Keep the settings without the values that depend on the data.
    settings = config
    sets, config = choose_examples(version, config)
    init = ""
    if config.init:
        # Download only once, because the repository may change.
        folder = find_captioner(config.init)
        init = file_digest(folder / "model.safetensors")
        config = config.model_copy(update={"init": str(folder)})
    ids = [example.sample_id for example in sets["train"]]
    run = digest([config.digest_values(), version.manifest["digest"], init, ids])
    if not (resume and (out / "resume.pt").exists()) and (out / "metrics.json").exists():
        metrics = _read_finished(out, settings, run)
        report.message(f"{out} already has this captioner. To train again, use another --out")
        leave_processes()
        return {} if rank else metrics

    # All checks come first, because storing hidden states may take hours.
    checkpoint = build_checkpoint(version, config, sets["train"], init)
    checkpoint.captioner.to(device)
    max_tokens = checkpoint.captioner.config.max_caption_tokens
    config = config.model_copy(update={"max_caption_tokens": max_tokens})
    encoder, decoder = checkpoint.captioner.encoder, checkpoint.captioner.decoder
    features: LoadedFeatures = OnlineFeatures(encoder, device)
    if isinstance(decoder, PretrainedDecoder):
        _ = decoder.probed  # the probe needs full float32 precision
        tokenizer, texts = checkpoint.tokenizer, texts_of([*sets["train"], *sets["validation"]])
        counts = zip(texts, tokenizer.count_tokens(texts), strict=True)
        longest = max(len(tokenizer.prompt(text)) + min(count, max_tokens) for text, count in counts)
        decoder.require_positions(features(sets["train"][:1]).shape[1], longest)
    _warn_of_unlearned(version, checkpoint, texts_of(sets["train"]), report)
    state = load_resume(out, settings, run) if resume else {}
    _, style = scored_prompt(checkpoint.captioner.config.prompts)
    for split in ("validation", "test"):
        choose_references(sets[split], style)

    out.mkdir(parents=True, exist_ok=True)
    if encoder.config.frozen and config.feature_storage != "none":
        examples = [example for examples in sets.values() for example in examples]
        features = store_features(encoder, examples, version.dataset_dir / FEATURES, device, report)
    loader = BatchLoader(config, checkpoint.tokenizer, sets["train"], features, rank, processes)
    trainer = build_trainer(checkpoint, loader, sets["validation"], device)
    with matmul_precision(config.precision):
        report.message(_describe(trainer))
        log: Log | None = None
        if rank == 0:
            write_json(out / "train.json", settings.model_dump(mode="json"))
            log = Log(out / "log.jsonl", first_step=state.get("step", 0))
        run_steps(trainer, out, run, log, report, state)
        leave_processes()
        return _score_test_split(trainer, out, sets["test"], run) if log else {}


def _read_finished(out: Path, config: TrainConfig, run: str) -> dict[str, Any]:
    """Return the metrics of the finished run in `out`. Raises TrainError if it is another run."""
    path = out / "metrics.json"
    try:
        metrics = read_json(path)
        if metrics["run"] == run:
            return metrics
    except READ_ERRORS as error:
        hint = f"choose a new folder (--out DIR), or remove {path} and train again"
        raise TrainError(f"{path} is damaged: {one_line(error)}", hint=hint) from None
    problem = f"{out} has a captioner trained with {describe_difference(out, config)}"
    raise TrainError(problem, hint="choose a new folder: --out DIR")


def _warn_of_unlearned(
    version: Version, checkpoint: Checkpoint, texts: list[TargetText], progress: Progress
) -> None:
    """Report truncated texts, earlier training on another source, and columns that training does not use."""
    limit = checkpoint.captioner.config.max_caption_tokens
    num_cut = sum(count > limit for count in checkpoint.tokenizer.count_tokens(texts))
    if num_cut > MAX_CUT_SHARE * len(texts):
        share = f"{num_cut:,} of {len(texts):,} texts are longer than {limit} tokens"
        progress.warn(f"{share}: they are cut after the last sentence that fits (max_caption_tokens)")
    earlier = list_training_data(checkpoint.captioner.config.data)[1:]
    if any(data.get("source") != version.manifest["source"] for data in earlier):
        source = "another source, which may include test images of"
        progress.message(f"the captioner was trained earlier on {source} {version.name}")
    if columns := version.manifest.get("own_columns"):
        progress.message(f"not used in training (columns of custom tasks): {', '.join(columns)}")


def _describe(trainer: Trainer) -> str:
    """Return the numbers of weights and steps of a run."""
    config, captioner = trainer.config, trainer.checkpoint.captioner
    groups = parameter_groups(captioner, config)
    trained = sum(weights.numel() for group in groups if group["rate"] for weights in group["params"])
    num_weights = sum(weights.numel() for weights in captioner.parameters())
    size = min(config.batch_size, len(trainer.loader.examples))
    preset = f"preset {config.preset}: " if config.preset else ""
    return (
        f"{preset}{num_weights:,} parameters, {trained:,} of them trainable. "
        f"At most {config.total_steps:,} steps of {size} images ({trainer.epochs:.1f} epochs)"
    )


def _score_test_split(trainer: Trainer, out: Path, examples: list[Example], run: str) -> dict[str, Any]:
    """Score the saved captioner on the test split. Writes and returns the metrics."""
    # Free memory for the captioner that is loaded next.
    trainer.checkpoint.captioner.decoder.to("meta")
    checkpoint, features = load_checkpoint(out, trainer.device), trainer.loader.features
    captioner = checkpoint.captioner
    if isinstance(features, OnlineFeatures):
        features = OnlineFeatures(captioner.encoder, trainer.device)
    prompt, decoding = scored_prompt(captioner.config.prompts), captioner.config.decoding()
    metrics: dict[str, Any] = {
        "run": run,
        "data": captioner.config.data,
        "settings": trainer.config.model_dump(mode="json", exclude=FOLDER_SETTINGS),
        "split": "test",
        "parameters": sum(weights.numel() for weights in captioner.parameters()),
        "best_validation": trainer.validation.best_cider_d,
        **evaluate(checkpoint, examples, features, prompt, decoding, questions=True),
    }
    write_captions(out / "captions.jsonl", metrics.pop("each"))
    write_json(out / "metrics.json", metrics)
    (out / "resume.pt").unlink(missing_ok=True)
    # Reading the file gives JSON types, as in `_read_finished`.
    return read_json(out / "metrics.json")
