"""Commands that train captioners and score them: train, evaluate."""

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from pipeline.cli.options import (
    BY_STYLE,
    AnyDataset,
    AsJson,
    CaptionerName,
    Images,
    NumBeams,
    Split,
    open_data,
    option,
    path_option,
)
from pipeline.cli.output import find_checkpoint, note_training_data, print_scores, show
from pipeline.progress import show_progress

ENCODERS = "auto, vit, clip, siglip2, dinov2, clip-large, metaclip, tiny-clip, tiny-vit, a folder or a Hub id"
DECODERS = "auto, scratch, prefix, qwen3, smollm2, a folder or a Hub id"


def _preset_option(text: str, **limits: Any) -> Any:
    return option(text, "set by the preset", **limits)


def train(
    data: AnyDataset = None,
    images: Images = None,
    init: Annotated[
        str | None, option("Captioner to train further: a folder or a Hub id.", "a new captioner")
    ] = None,
    encoder: Annotated[str, option(f"Image encoder: {ENCODERS}.")] = "auto",
    encoder_states: Annotated[
        str | None, option("Patch states to use: all, or 2x2 (averages of 2x2 patches).", "all")
    ] = None,
    decoder: Annotated[str, option(f"Text decoder: {DECODERS}.")] = "auto",
    text_source: Annotated[
        str | None, option("Captions to train on: synthetic, human or mixed.", "all in the version")
    ] = None,
    preset: Annotated[
        str | None,
        option(
            "Settings preset: auto, scenes, photos, photos-large or photos-lm.",
            "auto; with --config, the preset in the file",
        ),
    ] = None,
    epochs: Annotated[int | None, _preset_option("Passes over the training images.", min=1)] = None,
    steps: Annotated[
        int | None, option("Optimizer steps, instead of --epochs.", "computed from --epochs", min=1)
    ] = None,
    batch_size: Annotated[int | None, _preset_option("Images per step.", min=1)] = None,
    lr: Annotated[
        float | None, _preset_option("Learning rate of the decoder and the connector.", min=0)
    ] = None,
    lora_rank: Annotated[
        int | None, _preset_option("LoRA rank for a language model, or 0 to train all weights.", min=0)
    ] = None,
    seed: Annotated[int | None, option("Seed of initial weights, dropout and data order.", "0")] = None,
    config: Annotated[Path | None, option("YAML file or train.json. Options override it.", False)] = None,
    out: Annotated[
        Path | None, path_option("Checkpoint folder.", "DATASET/checkpoints/VERSION-ENCODER-DECODER")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Resume an interrupted training run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a captioner on a version, and score it on the test split.

    Before the first step, it prints the number of trainable parameters and the maximum number of steps.
    """
    from trainer.config import resolve

    options: dict[str, Any] = {"encoder": encoder, "encoder_states": encoder_states, "decoder": decoder}
    options |= {"text_source": text_source, "epochs": epochs, "steps": steps, "batch_size": batch_size}
    options |= {"connector_lr": lr, "decoder_lr": lr, "lora_rank": lora_rank}
    options |= {"seed": seed, "preset": preset, "init": init}
    if not resume:
        resolve(config, **options)  # report invalid settings before data is downloaded
    version = open_data(data, images)

    from trainer.launch import train as train_captioner

    with show_progress() as progress:
        result = train_captioner(version, config, out=out, resume=resume, progress=progress, **options)
    if result.metrics:  # only the first of several processes has metrics
        print_scores(result.metrics)
        show(result.metrics | {"path": str(result.path)}, as_json, "path")


def evaluate(
    captioner: CaptionerName,
    data: AnyDataset = None,
    images: Images = None,
    split: Annotated[Split, option("Split.")] = "test",
    style: Annotated[str | None, option("Caption style.", BY_STYLE)] = None,
    num_beams: NumBeams = None,
    clip_score: Annotated[
        str | None, option("CLIP model for the CLIP score: clip, metaclip, tiny-clip, a folder or a Hub id.")
    ] = None,
    captions: Annotated[Path | None, option("File (.jsonl) to write captions and their scores to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a captioner on a split, and again with shuffled images."""
    from pipeline.images.clip import require_clip
    from pipeline.storage.files import translate_disk_errors
    from trainer.runtime.checkpoint_folder import require_prompt

    checkpoint = find_checkpoint(captioner)
    require_prompt(checkpoint, style)
    if clip_score:
        require_clip(clip_score)
    version = open_data(data, images)

    from trainer.caption_files import write_captions
    from trainer.evaluate import evaluate_version
    from trainer.model.checkpoint import load_checkpoint

    loaded = load_checkpoint(checkpoint)
    note_training_data(checkpoint, version, split)
    if captions:
        # If the file cannot be written, fail before scoring starts. Keep the captions of the last evaluation.
        with translate_disk_errors(captions):
            captions.parent.mkdir(parents=True, exist_ok=True)
            captions.open("a").close()
    metrics = evaluate_version(loaded, version, split, style, num_beams, clip_score)
    image_results = metrics.pop("each")
    if captions:
        with translate_disk_errors(captions):
            write_captions(captions, image_results)
    print_scores(metrics)
    show(metrics, as_json, "scores")
