"""`train`: open the data of a training, choose its settings and its folder, and run it.

import trainer

result = trainer.train("data/scenes@v1.0.0", encoder="tiny-clip", epochs=4)
print(result.path, result.scores["cider_d"])
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from pipeline.config import DECKS, SCENES
from pipeline.dataset.directory import DatasetDir
from pipeline.dataset.version import Version, slugify
from pipeline.errors import TrainError
from pipeline.hub.pull import is_hub_name, open_or_download, pull_version
from pipeline.images.clip import CLIP_MODELS, TINY_CLIP
from pipeline.progress import NullProgress, Progress
from pipeline.sources.join import with_pixels
from pipeline.storage.files import translate_disk_errors
from pipeline.storage.object_store import parse_dataset_path
from trainer.config import TrainConfig, choose_preset, default_precision, default_texts, resolve
from trainer.runtime.checkpoint_folder import find_interrupted, require_free

CLIP = CLIP_MODELS["clip"]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A training that has ended."""

    path: Path  # checkpoint folder, for Captioner.from_pretrained
    version: Version  # data with pixels
    config: TrainConfig
    metrics: dict[str, Any]  # content of metrics.json, empty in all but the first of several processes

    @property
    def scores(self) -> dict[str, float]:
        """The scores on the test split: `bleu_1` to `bleu_4`, `rouge_l` and `cider_d`. Larger is better."""
        return dict(self.metrics["scores"])

    @property
    def shuffled_scores(self) -> dict[str, float]:
        """The scores with shuffled images, which are as good if a captioner ignores its image."""
        return dict(self.metrics["shuffled_scores"])


def train(
    data: str | Path | Version | None = None,
    config: TrainConfig | Path | str | None = None,
    *,
    out: str | Path | None = None,
    images: str | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a captioner on a version of a dataset, and score it on the test split.

    Args:
        data: a dataset folder, DIR@VERSION, ORG/NAME@VERSION on the Hub, or an open version. None: the
            last dataset.
        config: settings, or the path of a YAML file or a train.json with settings.
        out: the checkpoint folder. None: DATASET/checkpoints/VERSION-ENCODER-DECODER.
        images: the images of a version without pixels: a folder of files, a dataset folder, or a source.
        resume: resume an interrupted training with its settings.
        tensorboard: write the curves for TensorBoard, too.
        progress: receives progress and messages, such as `pipeline.progress.show_progress()`. None: show
            nothing.
        **settings: fields of TrainConfig, which override `config`. By default, preset, encoder, precision
            and texts depend on the data and this machine, as in `synth train`.

    A training that has finished in `out` is not repeated: its result is returned.

    Raises ConfigError for an invalid setting or a folder with another captioner, StoreError if the data does
    not exist or is damaged, and TrainError if there is nothing to learn or to resume, a model is missing, or
    the loss diverges. All are a SynthError, whose `hint` states the next step.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    progress = progress or NullProgress()
    file = None if isinstance(config, TrainConfig) else Path(config) if config else None
    given = config.model_dump(exclude_unset=True) if isinstance(config, TrainConfig) else {}
    options = {"encoder": "auto", "decoder": "auto", **given, **settings}
    if not resume:
        resolve(file, **options)  # raises errors before data is downloaded
    version = open_version(data, images)
    message = progress.message if is_first else NullProgress().message
    planned = plan_training(version, options, file, Path(out) if out else None, message, resume=resume)

    from trainer.training import train_captioner  # imports torch, which takes seconds

    config, folder = planned.config, planned.folder
    texts = "" if config.text_source == "synthetic" else f", {config.text_source} texts"
    message(f"training on {version.path}: encoder {config.encoder}, decoder {config.decoder}{texts}")
    with translate_disk_errors(folder), DatasetDir(folder).lock() if is_first else nullcontext():
        options = {"resume": resume, "tensorboard": tensorboard, "progress": progress}
        metrics = train_captioner(version, config, folder, **options)
    return TrainResult(folder, version, config, metrics)


def open_version(data: str | Path | Version | None, images: str | None = None) -> Version:
    """Open a local version, or one in an object store or on the Hub; join pixels from `images` if it has
    none.

    Raises StoreError if it does not exist or is damaged, and ConfigError if pixels are missing.
    """
    if isinstance(data, str) and is_hub_name(data):
        data = pull_version(data)
    elif not isinstance(data, Version):
        data = open_or_download(parse_dataset_path(data) if isinstance(data, str) else data, previews=False)
    return with_pixels(data, images)


@dataclass(frozen=True, slots=True)
class PlannedTraining:
    """The settings of a training, and its checkpoint folder."""

    config: TrainConfig
    folder: Path


def plan_training(
    version: Version,
    options: dict[str, Any],
    config_file: Path | None,
    out: Path | None,
    message: Callable[[str], None],
    *,
    resume: bool,
) -> PlannedTraining:
    """Return the settings and the folder of a training. `options` override the file.

    A resumed training has the settings with which it began. Raises ConfigError if the folder holds another
    captioner or an interrupted training, or if several trainings could be resumed.
    """
    if resume and out is None and options.get("encoder") == options.get("decoder") == "auto":
        out = find_interrupted(version)
    if resume and config_file is None and out and (out / "train.json").exists():
        config_file = out / "train.json"
    config = choose_settings(version, options, config_file, message)
    name = slugify(f"{version.name}-{Path(config.encoder).name}-{Path(config.decoder).name}")
    folder = out or version.dataset_dir / "checkpoints" / name
    if resume and config_file is None and (folder / "train.json").exists():
        config = resolve(folder / "train.json", **options)
    if not resume:
        require_free(folder, config, version)
    return PlannedTraining(config, folder)


def choose_settings(
    version: Version, options: dict[str, Any], config_file: Path | None, message: Callable[[str], None]
) -> TrainConfig:
    """Return the settings, with a preset, encoder, precision and texts for the data and the machine."""
    config = resolve(config_file, **options)
    is_drawn = version.manifest["source"]["name"] in (SCENES, DECKS)
    if config.preset == "auto" or (config.preset is None and config_file is None):
        num_images = version.manifest["rows"]["train"]
        preset = choose_preset(is_drawn=is_drawn, images=num_images, decoder=config.decoder)
        config = resolve(config_file, **options | {"preset": preset})

    from trainer.runtime.devices import best_device, multiplies_bfloat16  # imports torch

    chosen: dict[str, Any] = {}
    if "encoder" not in config.model_fields_set:
        chosen["encoder"] = choose_encoder(message, is_drawn=is_drawn)
    if config.preset and "precision" not in config.model_fields_set:
        device = best_device()
        on_gpu, has_bfloat16 = device.type == "cuda", multiplies_bfloat16(device)
        chosen["precision"] = default_precision(config.preset, on_gpu=on_gpu, has_bfloat16=has_bfloat16)
    if "text_source" not in config.model_fields_set:
        chosen["text_source"] = default_texts(version.manifest)
    return config.model_copy(update=chosen)


def choose_encoder(message: Callable[[str], None], *, is_drawn: bool) -> str:
    """Return CLIP if it is cached or on the Hub, else for drawn scenes the encoder of this package.

    Raises TrainError for other images, from which that encoder would learn nothing.
    """
    try:
        snapshot_download(CLIP, allow_patterns=["config.json"], etag_timeout=3)
    except (OSError, HfHubHTTPError, httpx2.TransportError):
        problem = f"{CLIP} is not in the cache and cannot be downloaded"
        if not is_drawn:
            hint = f"pass an encoder for photos: --encoder FOLDER. {TINY_CLIP} is only for --source scenes"
            raise TrainError(problem, hint=hint) from None
        message(f"{problem}: using {TINY_CLIP}, which is only for --source scenes")
        return TINY_CLIP
    return "clip"
