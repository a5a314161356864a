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
from trainer.config import TrainConfig, choose_preset, resolve, usual_precision, usual_texts
from trainer.runtime.checkpoint_folder import find_interrupted, require_free

CLIP = CLIP_MODELS["clip"]
CHOSEN = {"encoder": "auto", "decoder": "auto"}  # where nothing else is named


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A training that has ended."""

    path: Path  # the checkpoint folder, for Captioner.from_pretrained
    version: Version  # the data, with pixels
    config: TrainConfig  # with all that followed from the data and this machine
    metrics: dict[str, Any]  # the content of metrics.json; empty in all but the first of several processes

    @property
    def scores(self) -> dict[str, float]:
        """The scores on the test split: `bleu_1` to `bleu_4`, `rouge_l` and `cider_d`; larger is better."""
        return dict(self.metrics["scores"])

    @property
    def shuffled_scores(self) -> dict[str, float]:
        """The same scores with the images shuffled: a captioner that ignores its image scores as well."""
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
        data: a dataset folder, DIR@VERSION, ORG/NAME@VERSION on the Hub, or an open version; None: the
            dataset made last.
        config: settings, or the path of a YAML file or a train.json with settings.
        out: the checkpoint folder; None: DATASET/checkpoints/VERSION-ENCODER-DECODER.
        images: where the images of a version without pixels are: a folder of files, a dataset folder, or a
            source.
        resume: whether an interrupted training resumes; it keeps the settings with which it began.
        tensorboard: whether the curves are also written for TensorBoard.
        progress: receives progress and messages, such as that of `pipeline.progress.show_progress()`; None:
            nothing is shown.
        **settings: fields of TrainConfig, which win over `config`. If no setting names them, the preset, the
            encoder, the precision and the texts follow from the data and this machine, as in `synth train`.

    A training that is finished in `out` is not repeated: its result is returned.

    Raises ConfigError for an invalid setting or a folder that holds another captioner, StoreError if the data
    does not exist or is damaged, and TrainError if there is nothing to learn from or to resume, a model is
    missing, or the loss diverges. All of them are SynthErrors, whose `hint` states the next step.
    """
    is_first = os.environ.get("RANK", "0") == "0"  # of several processes that train together
    progress = progress or NullProgress()
    file = None if isinstance(config, TrainConfig) else Path(config) if config else None
    given = config.model_dump(exclude_unset=True) if isinstance(config, TrainConfig) else {}
    options = {**CHOSEN, **given, **settings}
    if not resume:
        resolve(file, **options)  # a mistake is an error before data is fetched
    version = open_version(data, images)
    message = progress.message if is_first else NullProgress().message
    planned = plan_training(version, options, file, Path(out) if out else None, message, resume=resume)

    from trainer.training import train_captioner  # torch takes seconds: only for correct paths and settings

    chosen, folder = planned.config, planned.folder
    texts = {"synthetic": "", "human": ", texts of people", "mixed": ", texts of people and of the model"}
    parts = f"encoder {chosen.encoder}, decoder {chosen.decoder}{texts[chosen.text_source]}"
    message(f"training on {version.path}: {parts}")
    with translate_disk_errors(folder), DatasetDir(folder).lock() if is_first else nullcontext():
        metrics = train_captioner(version, chosen, folder, resume=resume, tensorboard=tensorboard, progress=progress)
    return TrainResult(folder, version, chosen, metrics)


def open_version(data: str | Path | Version | None, images: str | None = None) -> Version:
    """Open a version to learn from: local, in an object store or on the Hub.

    A version without pixels gets those of `images`. Raises StoreError if it does not exist or is damaged, and
    ConfigError if pixels are missing.
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
    """Return what a training on a version will be.

    `options` are settings that win over the file; settings without a value follow from the version and this
    machine. A training that resumes has the settings with which it began.

    Raises ConfigError if the folder holds another captioner or an interrupted training, or if several could
    resume.
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
    """Return the settings of options and file, with preset, encoder, precision and texts that follow."""
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
        has_bfloat16 = multiplies_bfloat16(device)
        chosen["precision"] = usual_precision(config.preset, on_gpu=device.type == "cuda", has_bfloat16=has_bfloat16)
    if "text_source" not in config.model_fields_set:
        chosen["text_source"] = usual_texts(version.manifest)
    return config.model_copy(update=chosen)


def choose_encoder(message: Callable[[str], None], *, is_drawn: bool) -> str:
    """Return CLIP if its config is cached or can be downloaded, else the shipped encoder of drawn scenes.

    Raises TrainError for other images: this encoder would train for hours and learn nothing.
    """
    try:
        snapshot_download(CLIP, allow_patterns=["config.json"], etag_timeout=3)
    except (OSError, HfHubHTTPError, httpx2.TransportError):
        if not is_drawn:
            hint = f"name a folder that holds one: --encoder FOLDER; {TINY_CLIP} knows drawn scenes only"
            raise TrainError(f"{CLIP} cannot be had here, and these images need an encoder of photographs", hint=hint) from None
        message(f"{CLIP} cannot be had here: the encoder is {TINY_CLIP}, which knows drawn scenes only")
        return TINY_CLIP
    return "clip"
