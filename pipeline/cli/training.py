"""Commands that train captioners and score them: train, evaluate, experiment."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from pipeline.cli.options import (
    BY_STYLE,
    AnyDataset,
    AsJson,
    CaptionerName,
    Images,
    NumBeams,
    open_data,
    option,
    path_option,
    require_split,
)
from pipeline.cli.output import find_checkpoint, note_training_data, print_scores, say, show
from pipeline.errors import TrainError
from pipeline.progress import show_progress

ENCODERS = "auto, vit, clip, siglip2, dinov2, clip-large, metaclip, tiny-clip, tiny-vit, a folder or a Hub id"
DECODERS = "auto, scratch, prefix, qwen3, smollm2, a folder or a Hub id"


def _preset_option(text: str, **limits: Any) -> Any:
    return option(text, "by preset", **limits)


def train(
    data: AnyDataset = None,
    images: Images = None,
    encoder: Annotated[str, option(f"Image encoder: {ENCODERS}.")] = "auto",
    encoder_layer: Annotated[
        int | None, option("Encoder layer whose hidden states are used; -1: the last.", "-1")
    ] = None,
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
            "Settings preset: auto, scenes, photos-few, photos or photos-lm.",
            "auto; with --config: the preset in the file",
        ),
    ] = None,
    epochs: Annotated[int | None, _preset_option("Passes over the training images.", min=1)] = None,
    steps: Annotated[
        int | None, option("Optimizer steps, instead of --epochs.", "by --epochs", min=1)
    ] = None,
    batch_size: Annotated[int | None, _preset_option("Images per step.", min=1)] = None,
    lr: Annotated[
        float | None, _preset_option("Learning rate of the decoder and the connector.", min=0)
    ] = None,
    lora_rank: Annotated[
        int | None, _preset_option("LoRA rank for a language model; 0: train all weights.", min=0)
    ] = None,
    precision: Annotated[
        str | None,
        option("Precision of matrix multiplications: fp32, tf32 or bf16.", "fp32; on a GPU by preset"),
    ] = None,
    align_steps: Annotated[int | None, _preset_option("Steps that train only the connector.", min=0)] = None,
    seed: Annotated[int | None, option("Seed of initial weights, dropout and data order.", "0")] = None,
    config: Annotated[Path | None, option("YAML file or train.json; options override it.", False)] = None,
    out: Annotated[
        Path | None, path_option("Checkpoint folder.", "DATASET/checkpoints/VERSION-ENCODER-DECODER")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Resume an interrupted training run.")] = False,
    tensorboard: Annotated[bool, Option("--tensorboard", help="Also write TensorBoard curves.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a captioner on a version, and score it on the test split.

    Before the first step, it prints the number of trainable parameters, and the expected time and memory.
    """
    from trainer.config import resolve

    options: dict[str, Any] = {"encoder": encoder, "encoder_states": encoder_states, "decoder": decoder}
    options |= {"encoder_layer": encoder_layer, "text_source": text_source}
    options |= {
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "connector_lr": lr,
        "decoder_lr": lr,
    }
    options |= {"lora_rank": lora_rank, "precision": precision, "align_steps": align_steps, "seed": seed}
    options |= {"preset": preset}
    if not resume:
        resolve(config, **options)  # report invalid settings before data is downloaded
    version = open_data(data, images)

    from trainer.launch import train as train_captioner  # imports torch, which takes seconds

    with show_progress() as progress:
        result = train_captioner(
            version, config, out=out, resume=resume, tensorboard=tensorboard, progress=progress, **options
        )
    if result.metrics:  # only the first of several processes has metrics
        print_scores(result.metrics)
        show(result.metrics | {"path": str(result.path)}, as_json, "path")


def evaluate(
    captioner: CaptionerName,
    data: AnyDataset = None,
    images: Images = None,
    split: Annotated[str, option("Split: train, validation or test.")] = "test",
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

    require_split(split)
    checkpoint = find_checkpoint(captioner)
    require_prompt(checkpoint, style)
    if clip_score:
        require_clip(clip_score)
    version = open_data(data, images)

    from trainer.caption_files import write_captions
    from trainer.evaluate import evaluate_version  # imports torch, which takes seconds
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


def experiment(
    file: Annotated[Path, Argument(help="YAML file of the experiment, such as docs/experiment.yaml.")],
    out: Annotated[Path | None, path_option("Folder to write the experiment to.", "experiments/FILE")] = None,
    jobs: Annotated[
        int | None, option("Training runs in parallel.", "number of GPUs, or of CPU cores", min=1)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a grid of captioners, and compare data, encoders, decoders and alignment."""
    from pipeline.dataset.directory import DatasetDir
    from pipeline.storage.files import translate_disk_errors
    from trainer.experiment.grid import cells_of, read_experiment

    spec = read_experiment(file)

    from trainer.experiment.report import markdown, write_result  # imports torch, which takes seconds
    from trainer.experiment.runs import default_jobs, plan, require_models, run_cells

    folder = out or Path("experiments") / file.stem
    with translate_disk_errors(folder), DatasetDir(folder).lock():
        runs = plan(spec, cells_of(spec), open_data, folder)
        say(f"{len(runs)} cells in {folder}, {sum(run.is_done for run in runs)} finished earlier")
        require_models(runs)
        with show_progress() as progress:
            failures = run_cells(runs, jobs or default_jobs(), progress)
        finished = [run for run in runs if run.is_done]
        result = write_result(finished, folder) if finished else None
    if result:
        say(markdown(result))
        show(result | {"path": str(folder / "experiment.html")}, as_json, "path")
    if failures:
        for failure in failures:
            say(f"failed: {failure}")
        hint = "fix the cause, and run the same command: it trains only the missing cells"
        raise TrainError(f"{len(failures)} of {len(runs)} cells failed", hint=hint)
