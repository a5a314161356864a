"""`train`: open a dataset version, choose settings and a checkpoint folder, and train a captioner."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from pipeline.config import DECKS, SCENES
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.version import Version, slugify
from pipeline.errors import ConfigError, TrainError
from pipeline.hub.pull import is_hub_name, open_or_download, pull_version
from pipeline.hub_errors import HUB_NAME, translate_hub_errors
from pipeline.images.clip import TINY_CLIP
from pipeline.progress import NullProgress, Progress
from pipeline.sources.join import with_pixels
from pipeline.storage.files import translate_disk_errors
from pipeline.storage.object_store import parse_dataset_path
from pipeline.tables import SPLITS
from trainer.config import (
    DECODERS,
    ENCODERS,
    MIN_EPOCHS,
    MIN_IMAGES_SEEN,
    TINY_VIT,
    TrainConfig,
    choose_preset,
    default_texts,
    resolve,
)
from trainer.runtime.checkpoint_folder import find_captioner, read_models, require_free


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Result of a finished training run. `path` is the checkpoint folder."""

    path: Path
    version: Version
    config: TrainConfig
    # This is the content of metrics.json, or {} in all processes but the first.
    metrics: dict[str, Any]

    @property
    def scores(self) -> dict[str, float]:
        """Scores on the test split: `bleu_1` to `bleu_4`, `rouge_l` and `cider_d`. Larger is better."""
        return dict(self.metrics["scores"])


def train(
    data: str | Path | Version | None = None,
    config: TrainConfig | Path | str | None = None,
    *,
    out: str | Path | None = None,
    images: str | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a captioner on a dataset version, and score it on the test split.

    Args:
        data: a dataset folder, DIR@VERSION, ORG/NAME@VERSION on the Hub, or an open version. Defaults to the
            most recent dataset.
        config: settings, or the path of a YAML file or train.json with settings.
        out: the checkpoint folder. Defaults to DATASET/checkpoints/VERSION-ENCODER-DECODER.
        images: where to find the images if the version has no pixels: an image folder, a dataset folder, or
            a source.
        resume: resume an interrupted run with its settings.
        progress: receives progress and messages, such as `pipeline.progress.show_progress()`. By default,
            nothing is shown.
        **settings: fields of TrainConfig, which override `config`. By default, preset, encoder, precision
            and texts depend on the data and this machine, as in `synth train`.

    If the same run has already finished in `out`, its result is returned.

    Raises ConfigError for an invalid setting, or if `out` has other files or an interrupted run. Raises
    StoreError if the data does not exist or is damaged. Raises TrainError if there is nothing to learn or to
    resume, a model is missing, `out` has another captioner, or the loss diverges. All are subclasses of
    SynthError, whose `hint` states the next step.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    progress = progress or NullProgress()
    file = None if isinstance(config, TrainConfig) else Path(config) if config else None
    given = config.model_dump(exclude_unset=True) if isinstance(config, TrainConfig) else {}
    options = {"encoder": "auto", "decoder": "auto", **given, **settings}
    if not resume and not (out and Path(out, "metrics.json").exists()):
        # Report invalid settings before data and torch are loaded.
        require_models(resolve(file, **options))
    version = open_version(data, images)
    message = progress.message if is_first else NullProgress().message
    config, folder = plan_training(version, options, file, Path(out) if out else None, message, resume=resume)
    for split in SPLITS:
        if not version.manifest["rows"].get(split):
            version.read(split, ["sample_id"])  # raises StoreError before a folder is made

    from trainer.training import train_captioner

    texts = "" if config.text_source == "synthetic" else f", {config.text_source} texts"
    message(f"training on {version.path}: encoder {config.encoder}, decoder {config.decoder}{texts}")
    with translate_disk_errors(folder), DatasetDir(folder).lock() if is_first else nullcontext():
        metrics = train_captioner(version, config, folder, resume=resume, progress=progress)
    return TrainResult(folder, version, config, metrics)


def open_version(data: str | Path | Version | None, images: str | None = None) -> Version:
    """Open a version from disk, an object store or the Hub. Missing pixels are added from `images`.

    Raises StoreError if the version does not exist or is damaged. Raises ConfigError if pixels are missing
    and `images` is None.
    """
    if isinstance(data, str) and is_hub_name(data):
        data = pull_version(data)
    elif not isinstance(data, Version):
        data = open_or_download(parse_dataset_path(data) if isinstance(data, str) else data, previews=False)
    return with_pixels(data, images)


def plan_training(
    version: Version,
    options: dict[str, Any],
    config_file: Path | None,
    out: Path | None,
    message: Callable[[str], None],
    *,
    resume: bool,
) -> tuple[TrainConfig, Path]:
    """Return the settings of a training run, and its folder. `options` override those in `config_file`.

    A resumed run keeps its settings. Raises ConfigError if the folder has other files or an interrupted run.
    """
    keeps_settings = resume and config_file is None
    if keeps_settings and out and (out / "train.json").exists():
        config_file = out / "train.json"
    config = choose_settings(version, options, config_file, message)
    if out is None:
        suffix = "-continued" if config.init else ""
        name = slugify(f"{version.name}-{Path(config.encoder).name}-{Path(config.decoder).name}{suffix}")
        out = version.dataset_dir / "checkpoints" / name
        if keeps_settings and (out / "train.json").exists():
            config = resolve(out / "train.json", **options)
    if not resume:
        require_free(out)
    return config, out


def choose_settings(
    version: Version, options: dict[str, Any], config_file: Path | None, message: Callable[[str], None]
) -> TrainConfig:
    """Return the settings. Unset ones are chosen to suit the data and the machine."""
    from trainer.runtime.devices import best_device, default_precision  # imports torch

    config = resolve(config_file, **options)
    if config.init:
        models = read_models(find_captioner(config.init))
        for name in models.keys() & config.model_fields_set:
            if getattr(config, name) != models[name]:
                problem = f"{config.init} has {name} {models[name]}, not {getattr(config, name)}"
                raise ConfigError(problem, hint=f"leave out --{name.replace('_', '-')}")
        options = options | models
        config = resolve(config_file, **options)
    chosen: dict[str, Any] = {}
    is_drawn = version.manifest["source"]["name"] in (SCENES, DECKS)
    num_images = version.manifest["rows"]["train"]
    if config.preset == "auto" or (config.preset is None and config_file is None):
        has_gpu = best_device().type == "cuda"
        preset = choose_preset(is_drawn=is_drawn, images=num_images, decoder=config.decoder, has_gpu=has_gpu)
        config = resolve(config_file, **options | {"preset": preset})
    if "encoder" not in config.model_fields_set:
        chosen["encoder"] = choose_encoder(message, is_drawn=is_drawn)
    if config.preset == "photos" and not config.model_fields_set & {"epochs", "steps"}:
        chosen["epochs"] = max(MIN_EPOCHS, MIN_IMAGES_SEEN // max(1, num_images))
    if config.preset and "precision" not in config.model_fields_set:
        chosen["precision"] = default_precision(config.preset, best_device())
    if "text_source" not in config.model_fields_set:
        chosen["text_source"] = default_texts(version.manifest)
    return config.model_copy(update=chosen)


def require_models(config: TrainConfig) -> None:
    """Raise TrainError if a model to start from is neither a folder, nor cached, nor on the Hub."""
    if config.init:
        find_captioner(config.init)
        return
    for kind, names, default in (("encoder", ENCODERS, TINY_VIT), ("decoder", DECODERS, "scratch")):
        name = getattr(config, kind)
        model_id = names.get(name, name)
        if "/" not in model_id or Path(model_id).exists():
            continue
        if HUB_NAME.fullmatch(model_id) and not model_id.startswith((".", "~")):
            hint = f"check the name and the network; without a network, pass a folder or --{kind} {default}"
            with translate_hub_errors(model_id, "model", TrainError, hint):
                snapshot_download(model_id, allow_patterns=["config.json"], etag_timeout=3)
        else:
            raise TrainError(f"no {kind} {name}: the folder does not exist", hint="check the path")


def choose_encoder(message: Callable[[str], None], *, is_drawn: bool) -> str:
    """Return CLIP if it is cached or can be downloaded, otherwise TINY_CLIP for drawn scenes.

    Raises TrainError if CLIP is missing and the images are not drawn scenes.
    """
    try:
        require_models(TrainConfig(encoder="clip"))
    except TrainError as error:
        if not is_drawn:
            hint = f"pass --encoder FOLDER, or --encoder {TINY_VIT}, which needs no download but more images"
            raise TrainError(str(error), hint=hint) from None
        message(f"{error}: using {TINY_CLIP}, which only encodes drawn scenes")
        return TINY_CLIP
    return "clip"
