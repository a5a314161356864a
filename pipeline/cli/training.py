"""The commands that make captioners and score them: train, evaluate, experiment."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option

from pipeline.cli.options import LOCAL_PATH, AsJson, BeamsAsTrained, DataName, Images, Style
from pipeline.cli.output import last_dataset, note_previews, note_seen, note_unfinished, print_scores, say, show
from pipeline.errors import ConfigError, TrainError
from pipeline.progress import NullProgress, show_progress
from pipeline.storage.object_store import parse_dataset_path

if TYPE_CHECKING:
    from pipeline.check import Checked
    from pipeline.dataset.version import Version
    from pipeline.hub.package import Package


def train(
    data: DataName = None,
    images: Images = None,
    encoder: Annotated[
        str, Option(help="auto, vit, clip, siglip2, dinov2, clip-large, metaclip, tiny-clip, tiny-vit, a folder or a Hub id.")
    ] = "auto",
    encoder_layer: Annotated[
        int | None, Option(help="Whose hidden states: -1 the last, -2 the one before.", show_default="-1")
    ] = None,
    encoder_states: Annotated[
        str | None, Option(help="Of the layer: all, or patches averaged 2x2.", show_default="all")
    ] = None,
    decoder: Annotated[str, Option(help="auto, scratch, prefix, qwen3, smollm2, a folder, or an id of the Hub.")] = "auto",
    text_source: Annotated[
        str | None, Option(help="Whose texts to learn: synthetic, human or mixed.", show_default="those in the version")
    ] = None,
    preset: Annotated[
        str | None,
        Option(
            help="Settings that go together: auto, scenes, photos-few, photos or photos-lm.",
            show_default="auto; with --config, what stands there",
        ),
    ] = None,
    epochs: Annotated[int | None, Option(min=1, help="How often each image is seen.", show_default="by the preset")] = None,
    steps: Annotated[int | None, Option(min=1, help="How many steps, instead of epochs.", show_default="by epochs")] = None,
    batch_size: Annotated[int | None, Option(min=1, help="Images in a step.", show_default="by the preset")] = None,
    lr: Annotated[
        float | None, Option(min=0, help="Learning rate of decoder and connector.", show_default="by the preset")
    ] = None,
    lora_rank: Annotated[
        int | None,
        Option(min=0, help="Of the adapters that a language model learns; 0: all of it.", show_default="by the preset"),
    ] = None,
    precision: Annotated[
        str | None, Option(help="Of products: fp32, tf32 or bf16.", show_default="fp32; on a GPU by the preset")
    ] = None,
    align_steps: Annotated[
        int | None, Option(min=0, help="First train the connector alone, so many steps.", show_default="by the preset")
    ] = None,
    seed: Annotated[int | None, Option(help="Decides weights, dropout and the order of the data.", show_default="0")] = None,
    config: Annotated[
        Path | None, Option(help="YAML or train.json with the same settings and more; flags win over it.")
    ] = None,
    out: Annotated[
        Path | None, Option(**LOCAL_PATH, help="Checkpoint folder.", show_default="DATASET/checkpoints/VERSION-ENCODER-DECODER")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with a run that was interrupted.")] = False,
    tensorboard: Annotated[
        bool, Option("--tensorboard", help="Write the curves for TensorBoard, too, into the checkpoint folder.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a captioner on a version, and score it on the test split.

    Prints first how many weights learn, and how long and how much memory it will take.
    """
    from pipeline.dataset.directory import DatasetDir
    from pipeline.storage.files import translate_disk_errors
    from trainer.config import resolve
    from trainer.launch import plan_training

    options: dict[str, Any] = {"encoder": encoder, "encoder_states": encoder_states, "decoder": decoder}
    options |= {"encoder_layer": encoder_layer, "text_source": text_source}
    options |= {"epochs": epochs, "steps": steps, "batch_size": batch_size, "connector_lr": lr, "decoder_lr": lr}
    options |= {"lora_rank": lora_rank, "precision": precision, "align_steps": align_steps, "seed": seed, "preset": preset}
    if not resume:
        resolve(config, **options)  # a mistake is an error before data is fetched
    version = open_data(data, images)
    is_first = os.environ.get("RANK", "0") == "0"  # of several processes that train together
    tell = say if is_first else NullProgress().message
    planned = plan_training(version, options, config, out, tell, resume=resume)
    settings, folder = planned.config, planned.folder
    from trainer.train import train as train_captioner  # torch takes seconds: only once paths and settings are right

    texts = {"synthetic": "", "human": ", texts of people", "mixed": ", texts of people and of the model"}[settings.text_source]
    tell(f"training on {version.path}: encoder {settings.encoder}, decoder {settings.decoder}{texts}")
    lock = DatasetDir(folder).lock() if is_first else nullcontext()
    with show_progress() as progress, translate_disk_errors(folder), lock:
        metrics = train_captioner(version, settings, folder, resume=resume, tensorboard=tensorboard, progress=progress)
    if metrics:  # only the first of several processes has them
        print_scores(metrics)
        show(metrics | {"path": str(folder)}, as_json, "path")


def check_checkpoint(folder: Path) -> "Checked":
    """Return the state of a checkpoint folder."""
    from pipeline.check import Checked
    from pipeline.errors import SynthError
    from trainer.description import describe_checkpoint

    try:
        return Checked(str(folder), describe_checkpoint(folder))
    except SynthError as error:
        return Checked(str(folder), str(error), False, "train again, or fetch it again; resume.pt may still be good")


def package_captioner(folder: Path, repo: str) -> "Package":
    """Return what to push of a checkpoint folder: a captioner that transformers loads, too."""
    from pipeline.hub.package import build_checkpoint_package
    from trainer.presets import DECODERS, ENCODERS
    from trainer.publish.files import transformers_files

    if (folder / "model.safetensors").is_file():
        from trainer.checkpoint import load_checkpoint  # what is damaged would be there for good

        load_checkpoint(folder)
    return build_checkpoint_package(folder, repo, transformers_files, {**ENCODERS, **DECODERS})


def package_space(package: "Package", folder: Path, repo: str, revision: str) -> "Package":
    """Return what to push of a page for a captioner, which is in `repo` at a revision."""
    from pipeline.hub.package import build_space_package
    from trainer.publish.files import space_files

    return build_space_package(package, space_files(folder, repo, revision))


def evaluate(
    captioner: Annotated[str, Argument(help="Checkpoint folder, or ORG/NAME of the Hub.")],
    data: DataName = None,
    images: Images = None,
    split: Annotated[str, Option(help="train, validation or test.")] = "test",
    style: Style = None,
    num_beams: BeamsAsTrained = None,
    clip_score: Annotated[
        str | None, Option(help="Score the fit too, by this CLIP: clip, metaclip, tiny-clip, a folder, or an id.")
    ] = None,
    captions: Annotated[
        Path | None, Option(help="Write what it says of each image, with the scores, to this file as JSON lines.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a captioner, on its images and on shuffled ones."""
    from pipeline.storage.files import translate_disk_errors
    from pipeline.tables import SPLITS

    if split not in SPLITS:
        raise BadParameter(f"{split} is none of {', '.join(SPLITS)}", param_hint="--split")
    from trainer.config import require_checkpoint
    from trainer.hub import find_captioner

    checkpoint = find_captioner(captioner)
    require_checkpoint(checkpoint)
    note_unfinished(checkpoint)
    version = open_data(data, images)

    from trainer.caption_files import write_captions  # see train
    from trainer.checkpoint import load_checkpoint
    from trainer.evaluate import evaluate_version

    loaded = load_checkpoint(checkpoint)
    note_seen(checkpoint, version, split)
    if captions:
        with translate_disk_errors(captions):  # before minutes of scoring, and without a change to what is there
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
    file: Annotated[Path, Argument(help="A YAML file; docs/experiment.yaml is one.")],
    out: Annotated[
        Path | None, Option(**LOCAL_PATH, help="Folder of the experiment.", show_default="experiments/NAME OF THE FILE")
    ] = None,
    jobs: Annotated[int | None, Option(min=1, help="Cells at once.", show_default="GPUs, or cores")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a grid of captioners, and say which data, encoder, decoder or alignment makes the better one."""
    from pipeline.dataset.directory import DatasetDir
    from pipeline.storage.files import translate_disk_errors
    from trainer.experiment.grid import cells_of, read_experiment

    spec = read_experiment(file)

    from trainer.experiment.report import markdown, write_result  # see train
    from trainer.experiment.runs import default_jobs, plan, require_models, run_cells

    folder = out or Path("experiments") / file.stem
    with translate_disk_errors(folder), DatasetDir(folder).lock():
        runs = plan(spec, cells_of(spec), open_data, folder)
        say(f"{len(runs)} cells, of which {sum(run.is_done for run in runs)} are done; in {folder}")
        require_models(runs)
        with show_progress() as progress:
            failed = run_cells(runs, jobs or default_jobs(), progress)
        finished = [run for run in runs if run.is_done]
        result = write_result(finished, folder) if finished else None
    if result:
        say(markdown(result))
        show(result | {"path": str(folder / "experiment.html")}, as_json, "path")
    if failed:
        for failure in failed:
            say(f"failed: {failure}")
        hint = "the others are in the result; mend it, and the same command trains what is missing"
        raise TrainError(f"{len(failed)} of {len(runs)} cells failed", hint=hint)


def open_data(name: str | None, images: str | None) -> "Version":
    """Open the version that `--data` names, local or on the Hub; if it has no pixels, join them from `--images`."""
    from pipeline.dataset.directory import DatasetDir
    from pipeline.dataset.pixels import find_joined, images_of_dataset, images_of_files, join_images, lacks_pixels
    from pipeline.dataset.version import JOINED
    from pipeline.hub.pull import is_hub_name, open_or_download, pull_version
    from pipeline.storage.files import translate_disk_errors

    if name and is_hub_name(name):
        version = pull_version(name)
    else:
        path = parse_dataset_path(name) if name else last_dataset()
        version = open_or_download(path, previews=False)
        note_previews(version, path)
    if not lacks_pixels(version):
        return version
    home = DatasetDir(version.dataset_dir / JOINED)
    with translate_disk_errors(home.path), home.lock(wait=True):  # one of several processes joins, the others wait
        if joined := find_joined(version):
            return joined
        if images is None:
            raise ConfigError(f"{name or version.path} holds no pixels", hint="say where the images are: --images FOLDER")
        folder = Path(images)
        if not folder.is_dir():
            from pipeline.sources import read_images

            return join_images(version, read_images(images))
        is_dataset = (folder / "versions").is_dir() or (folder / "manifest.json").exists()
        return join_images(version, images_of_dataset(folder) if is_dataset else images_of_files(folder))
