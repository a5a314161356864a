"""Commands about captioners: train, evaluate, caption, look, compare, demo, serve-captioner, export-model, experiment."""

import json
import os
import sys
from collections.abc import Callable, Collection
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from typer import Argument, BadParameter, Option

from pipeline.cli.options import LOCAL_PATH, AsJson, Checkpoint, DataName, Images, NumBeams, Style
from pipeline.cli.output import echo, last_dataset, note_previews, print_scores, say, show
from pipeline.errors import ConfigError, TrainError
from pipeline.progress import WARNING, show_progress
from pipeline.storage.object_store import parse_dataset_path

if TYPE_CHECKING:
    from pipeline.check import Checked
    from pipeline.dataset.version import Version
    from pipeline.hub.package import Package
    from trainer.caption_files import Existing
    from trainer.side_by_side import Shown

PICTURE_KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def train(
    data: DataName = None,
    images: Images = None,
    encoder: Annotated[
        str, Option(help="auto, vit, clip, siglip2, dinov2, clip-large, metaclip, tiny-clip, tiny-vit, a folder or a Hub id.")
    ] = "auto",
    encoder_layer: Annotated[
        str | None, Option(help="Whose hidden states: -1 the last; several side by side: -2,-5,-8.", show_default="-1")
    ] = None,
    encoder_states: Annotated[
        str | None, Option(help="Of the layer: all, patches averaged 2x2 or together (mean), or class.", show_default="all")
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
    from pipeline.dataset.paths import slugify
    from pipeline.storage.files import translate_disk_errors
    from trainer.config import has_other_settings, resolve, usual_texts
    from trainer.presets import choose_preset, usual_precision

    flags: dict[str, Any] = {"encoder": encoder, "encoder_states": encoder_states, "decoder": decoder}
    flags |= {"encoder_layer": encoder_layer and encoder_layer.split(","), "text_source": text_source}
    flags |= {"epochs": epochs, "steps": steps, "batch_size": batch_size, "connector_lr": lr, "decoder_lr": lr}
    flags |= {"lora_rank": lora_rank, "precision": precision, "align_steps": align_steps, "seed": seed, "preset": preset}
    if not resume:
        resolve(config, **flags)  # a mistake is an error before data is fetched
    version = open_data(data, images)
    if resume and out is None and encoder == decoder == "auto":
        out = _interrupted(version)
    if resume and config is None and out and (out / "train.json").exists():
        config = out / "train.json"  # with the settings that it began with
    settings = resolve(config, **flags)
    is_drawn = "facts" in version.manifest["columns"]
    if settings.preset == "auto" or (settings.preset is None and config is None):
        rows = version.manifest["rows"]["train"]
        flags["preset"] = choose_preset(is_drawn=is_drawn, images=rows, decoder=settings.decoder)
        settings = resolve(config, **flags)

    import torch  # takes seconds: only once paths and settings are right

    from trainer.train import choose_encoder
    from trainer.train import train as train_captioner

    if "encoder" not in settings.model_fields_set:
        settings = settings.model_copy(update={"encoder": choose_encoder(say, is_drawn=is_drawn)})
    if settings.preset and "precision" not in settings.model_fields_set:
        usual = usual_precision(settings.preset, on_gpu=torch.cuda.is_available())
        settings = settings.model_copy(update={"precision": usual})
    if "text_source" not in settings.model_fields_set:
        settings = settings.model_copy(update={"text_source": usual_texts(version.manifest)})
    name = slugify(f"{version.name}-{Path(settings.encoder).name}-{Path(settings.decoder).name}")
    folder = out or version.dataset_dir / "checkpoints" / name
    if resume and config is None and (folder / "train.json").exists():
        settings = resolve(folder / "train.json", **flags | {"preset": preset})
    texts = {"synthetic": "", "human": ", texts of people", "mixed": ", texts of people and of the model"}[settings.text_source]
    say(f"training on {version.path}: encoder {settings.encoder}, decoder {settings.decoder}{texts}")
    if not resume and has_other_settings(folder, settings):
        raise ConfigError(f"{folder} holds a captioner of other settings", hint="say where this one goes: --out DIR")
    if not resume and (folder / "resume.pt").exists():
        hint = f"go on with it: --resume; to start anew, remove {folder / 'resume.pt'}"
        raise ConfigError(f"{folder} holds a training that was interrupted", hint=hint)
    is_first = os.environ.get("RANK", "0") == "0"  # of several processes that train together
    lock = DatasetDir(folder).lock() if is_first else nullcontext()
    with show_progress() as progress, translate_disk_errors(folder), lock:
        metrics = train_captioner(version, settings, folder, resume=resume, tensorboard=tensorboard, progress=progress)
    if metrics:  # only the first of several processes has them
        print_scores(metrics)
        show(metrics | {"path": str(folder)}, as_json, "path")


def _interrupted(version: "Version") -> Path | None:
    """Return the folder of the only training of a dataset that was interrupted. Raises ConfigError if there are several."""
    folders = sorted(state.parent for state in (version.dataset_dir / "checkpoints").glob("*/resume.pt"))
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise ConfigError(f"several trainings were interrupted: {names}", hint=f"name one: --out {folders[0]}")
    return folders[0] if folders else None


def check_checkpoint(folder: Path) -> "Checked":
    """Return the state of a checkpoint folder."""
    from pipeline.check import Checked
    from pipeline.errors import SynthError
    from trainer.checkpoint import describe_checkpoint

    try:
        return Checked(str(folder), describe_checkpoint(folder))
    except SynthError as error:
        return Checked(str(folder), str(error), False, "train again, or fetch it again; resume.pt may still be good")


def package_captioner(folder: Path, repo: str) -> "Package":
    """Return what to push of a checkpoint folder: a captioner that transformers loads, too."""
    from pipeline.hub.package import build_checkpoint_package
    from trainer.presets import DECODERS, ENCODERS
    from trainer.publish.files import transformers_files

    return build_checkpoint_package(folder, repo, transformers_files, {**ENCODERS, **DECODERS})


def package_space(package: "Package", folder: Path, repo: str, revision: str) -> "Package":
    """Return what to push of a page for a captioner, which is in `repo` at a revision."""
    from pipeline.hub.package import build_space_package
    from trainer.publish.files import space_files

    return build_space_package(package, space_files(folder, repo, revision))


def evaluate(
    checkpoint: Checkpoint,
    data: DataName = None,
    images: Images = None,
    split: Annotated[str, Option(help="train, validation or test.")] = "test",
    style: Style = None,
    num_beams: NumBeams = 1,
    clip_score: Annotated[
        str | None, Option(help="Score the fit too, by this CLIP: clip, metaclip, tiny-clip, a folder, or an id.")
    ] = None,
    spice: Annotated[
        bool, Option("--spice", help="Score by SPICE too, in minutes; needs Java, and says where to get its parser.")
    ] = False,
    captions: Annotated[
        Path | None, Option(help="Write what it says of each image, with the scores, to this file as JSON lines.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a captioner, on its images and on shuffled ones."""
    from pipeline.tables import SPLITS

    if split not in SPLITS:
        raise BadParameter(f"{split} is none of {', '.join(SPLITS)}", param_hint="--split")
    from trainer.config import require_checkpoint

    require_checkpoint(checkpoint)
    version = open_data(data, images)

    from trainer.checkpoint import load_checkpoint, write_captions  # see train
    from trainer.evaluate import evaluate_version

    loaded = load_checkpoint(checkpoint)
    if version.manifest["digest"] != loaded.captioner.config.data.get("digest"):
        say(f"note: this captioner was trained on other data than {version.path}; the split may hold images it has seen")
    metrics = evaluate_version(loaded, version, split, style, num_beams, clip_score, with_spice=spice)
    image_results = metrics.pop("each")
    if captions:
        write_captions(captions, image_results)
    print_scores(metrics)
    show(metrics, as_json, "scores")


def caption(
    captioner: Annotated[str, Argument(help="Checkpoint folder, or ORG/NAME of the Hub.")],
    images: Annotated[list[str], Argument(help="Image files, folders, patterns in quotes; - reads names from stdin.")],
    style: Annotated[
        str | None, Option(help="Which style to write; all: each that it has learned.", show_default="brief")
    ] = None,
    question: Annotated[str, Option(help="Answer this about each image instead.")] = "",
    num_beams: NumBeams = 1,
    batch_size: Annotated[int, Option(min=1, help="Images at once.")] = 32,
    out: Annotated[
        Path | None,
        Option(help="A .jsonl, .csv or .parquet file; txt: a text file beside each image.", show_default="stdout"),
    ] = None,
    skip: Annotated[bool, Option("--skip-existing", help="Leave images that have a text file.")] = False,
    append: Annotated[bool, Option("--append", help="Add to what is there.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Write anew what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a caption for each image, or the answer to a question about it.

    With --out FILE, the same command goes on where it was stopped.
    """
    from pipeline.storage.files import translate_disk_errors
    from trainer.caption_files import find_images
    from trainer.config import require_checkpoint
    from trainer.hub import find_captioner

    chosen = [name for name, is_given in (("skip", skip), ("append", append), ("overwrite", overwrite)) if is_given]
    if len(chosen) > 1 or (chosen and out is None):
        raise BadParameter("--skip-existing, --append and --overwrite go with --out, and not with each other")
    if style and question:
        raise BadParameter("a question is answered in no style", param_hint="--style")
    folder = find_captioner(captioner)
    require_checkpoint(folder)
    given = [line for name in images for line in (sys.stdin.read().splitlines() if name == "-" else [name]) if line]
    if not given:
        raise BadParameter("no image was named", param_hint="IMAGES")
    paths = find_images(given)

    from trainer.caption_images import Job, caption_images
    from trainer.captioning import Captioner  # see train

    loaded = Captioner.from_pretrained(folder)
    styles = ("",) if question else tuple(loaded.styles) if style == "all" else (style or loaded.usual_style,)
    job = Job(loaded, paths, styles, question, num_beams, batch_size)
    with show_progress() as progress, translate_disk_errors(out or Path()):
        existing = cast("Existing", chosen[0] if chosen else "refuse")
        names = ("image", "caption", "answer", *(["style"] if len(styles) > 1 else []))
        show_row = partial(_print_caption, names=names, as_json=as_json)
        unread = caption_images(job, out, existing, folder, progress, show_row)
    for path, error in unread:
        say(f"cannot read {path}: {error}", WARNING)
    if len(unread) == len(paths):
        raise TrainError("no image could be read", hint="pass image files")


def _print_caption(row: dict[str, str], names: Collection[str], *, as_json: bool) -> None:
    """Print a row of `caption_images`: as JSON with these of its values, or as a line."""
    style = f" ({row['style']})" if "style" in names else ""
    text = row.get("caption", row.get("answer"))
    echo(
        json.dumps({name: value for name, value in row.items() if name in names})
        if as_json
        else f"{row['image']}{style}: {text}"
    )


def export_model(
    captioner: Annotated[str, Argument(help="Checkpoint folder, or ORG/NAME of the Hub.")],
    out: Annotated[Path | None, Option(**LOCAL_PATH, help="A new folder for the files.", show_default="CAPTIONER-onnx")] = None,
    int8: Annotated[bool, Option("--int8", help="Also with weights of 8 bits: smaller, and less exact.")] = False,
    as_json: AsJson = False,
) -> None:
    """Export a captioner to ONNX, which runs without torch."""
    from pipeline.storage.files import translate_disk_errors
    from trainer.config import require_checkpoint
    from trainer.hub import find_captioner

    folder = find_captioner(captioner)
    require_checkpoint(folder)

    from trainer.publish.onnx import RUNNER, export_onnx  # see train

    target = out or Path(f"{Path(captioner.partition('@')[0]).resolve().name}-onnx")
    with show_progress() as progress, translate_disk_errors(target):
        files = export_onnx(folder, target, progress, int8=int8)
    for file, size in files.items():
        if file.endswith(".onnx"):
            say(f"{file}: {size / 1e6:.1f} MB")
    say(f"try it: python {target / RUNNER} photo.jpg", "dim")
    show({"path": str(target), "files": files}, as_json, "path")


def look(
    captioner: Annotated[str, Argument(help="Checkpoint folder, or ORG/NAME of the Hub.")],
    image: Annotated[Path, Argument(**LOCAL_PATH, help="A photo.")],
    style: Style = None,
    question: Annotated[str, Option(help="Look at what answers this.")] = "",
    out: Annotated[
        Path | None, Option(**LOCAL_PATH, help="The picture (.png, .jpg, .webp).", show_default="PHOTO-look.png here")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a captioner looks at for each word, and what else it might have written."""
    from pipeline.storage.files import atomic_write, translate_disk_errors
    from trainer.config import require_checkpoint
    from trainer.hub import find_captioner

    target = out or Path(f"{image.stem}-look.png")
    kind = PICTURE_KINDS.get(target.suffix.lower())
    if kind is None:
        raise BadParameter(f"{target.name} is none of {', '.join(PICTURE_KINDS)}", param_hint="--out")
    if style and question:
        raise BadParameter("a question is answered in no style", param_hint="--style")
    folder = find_captioner(captioner)
    require_checkpoint(folder)

    from trainer.captioning import Captioner  # see train
    from trainer.look import draw
    from trainer.look import look as look_at

    seen = look_at(Captioner.from_pretrained(folder), image, style, question)
    with translate_disk_errors(target), atomic_write(target) as draft:
        draw(seen).save(draft, kind)
    for text, score in seen.alternatives:
        say(f"{score:.3f}  {text}", "dim")
    show(seen.values() | {"path": str(target)}, as_json, "text")


def compare(
    captioners: Annotated[list[str], Argument(help="Checkpoint folders, or ORG/NAME of the Hub: two or more.")],
    images: Annotated[
        list[str] | None, Option(help="Image files, folders or patterns; several times. Else those of --data.")
    ] = None,
    captions: Annotated[
        Path | None, Option(help="What people say of --images: COCO, Karpathy, CSV, JSON lines or Flickr30k.")
    ] = None,
    data: DataName = None,
    split: Annotated[str, Option(help="Of --data: train, validation or test.")] = "test",
    style: Style = None,
    num_beams: NumBeams = 1,
    limit: Annotated[int, Option(min=1, help="Images at most.")] = 1000,
    out: Annotated[Path | None, Option(**LOCAL_PATH, help="The page.", show_default="compare.html")] = None,
    as_json: AsJson = False,
) -> None:
    """Put the captions of several captioners side by side, on one page, with scores where people have captioned the images."""
    from pipeline.storage.files import translate_disk_errors
    from pipeline.tables import SPLITS
    from trainer.config import require_checkpoint
    from trainer.hub import find_captioner

    if len(captioners) < 2:
        raise BadParameter("there is nothing to compare one captioner with", param_hint="CAPTIONERS")
    if len(set(captioners)) < len(captioners):
        raise BadParameter("one captioner is named twice", param_hint="CAPTIONERS")
    if split not in SPLITS:
        raise BadParameter(f"{split} is none of {', '.join(SPLITS)}", param_hint="--split")
    if (data and images) or (captions and not images):
        raise BadParameter("--images goes with --captions, and --data with --split")
    folders = {_short_name(name, captioners): find_captioner(name) for name in captioners}
    for folder in folders.values():
        require_checkpoint(folder)
    shown = _images_named(images, captions, limit) if images else _images_of(open_data(data, None), split, limit)

    from trainer.side_by_side import compare_captioners, write_page  # see train

    page = out or Path("compare.html")
    with show_progress() as progress, translate_disk_errors(page):
        result = compare_captioners(folders, shown, style, num_beams, progress)
        write_page(result, shown, page)
    for one in result["captioners"]:
        say(
            f"{one['name']}: "
            + (f"CIDEr-D {one['scores']['cider_d']:.3f}, " if "scores" in one else "")
            + f"{one['words']:.1f} words"
        )
    for one in result["differences"]:
        say(f"{one['captioner']} than {one['than']}: {one['difference']:+.3f}, {one['verdict']}")
    for name, reason in result["unread"].items():
        say(f"cannot read {name}: {reason}", WARNING)
    show(result | {"path": str(page)}, as_json, "path")


def _short_name(name: str, names: list[str]) -> str:
    """Return the last part of a captioner's name, or all of it where another one ends so."""
    last = Path(name).name
    return name if sum(Path(other).name == last for other in names) > 1 else last


def _images_named(names: list[str], captions: Path | None, limit: int) -> list["Shown"]:
    """Return the images that names lead to, with what a file of captions says of them."""
    from pipeline.sources.captions import describe_unknown, match_images, read_captions
    from trainer.caption_files import find_images
    from trainer.side_by_side import Shown

    paths = {str(path): path for path in find_images(names)}
    written, unknown = match_images(read_captions(captions), list(paths)) if captions else ({}, [])
    for warning in describe_unknown(captions, unknown) if captions and unknown else ():
        say(warning, WARNING)
    chosen = list(paths.items())[:limit]
    return [Shown(name, path, tuple(written[name].captions) if name in written else ()) for name, path in chosen]


def _images_of(version: "Version", split: str, limit: int) -> list["Shown"]:
    """Return the images of a split with their references."""
    from trainer.image_index import map_images
    from trainer.side_by_side import Shown

    rows = version.read(split, ["sample_id", "references"]).slice(0, limit).to_pylist()
    images = map_images(version, split)
    return [Shown(row["sample_id"], bytes(images[row["sample_id"]].read()), tuple(row["references"])) for row in rows]


def serve_captioner(
    captioner: Annotated[str, Argument(help="Checkpoint folder, or ORG/NAME of the Hub.")],
    host: Annotated[str, Option(help="The address to listen at; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: one that is free.")] = 8200,
    name: Annotated[str | None, Option(help="Of the model, in requests.", show_default="the folder's")] = None,
    batch_size: Annotated[int, Option(min=1, help="Images at once.")] = 32,
    num_beams: NumBeams = 1,
) -> None:
    """Serve a captioner by OpenAI's chat protocol, with a page to try it.

    A key in SYNTH_API_KEY is asked of every request but /health; there is no page then.
    """
    _serve(captioner, host, port, name, batch_size, num_beams, os.environ.get("SYNTH_API_KEY", ""), say)


def demo(
    captioner: Annotated[str, Argument(help="Checkpoint folder, or ORG/NAME of the Hub.")],
    port: Annotated[int, Option(min=0, max=65535, help="0: one that is free.")] = 0,
    no_browser: Annotated[bool, Option("--no-browser", help="Only print the address.")] = False,
) -> None:
    """Open a page where you drop photos, and see captions and what each word looks at; nothing leaves this machine."""

    import webbrowser
    from threading import Thread

    def open_page(address: str) -> None:
        say(address)
        if not no_browser:  # on a thread: a browser in this terminal would keep the server from answering
            Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    _serve(captioner, "127.0.0.1", port, None, 32, 1, "", open_page)


def _serve(
    captioner: str,
    host: str,
    port: int,
    name: str | None,
    batch_size: int,
    num_beams: int,
    key: str,
    announce: Callable[[str], None],
) -> None:
    import asyncio
    import socket
    from concurrent.futures import ThreadPoolExecutor

    from trainer.config import require_checkpoint
    from trainer.hub import find_captioner

    folder = find_captioner(captioner)
    require_checkpoint(folder)

    from trainer.captioning import Captioner  # see train
    from trainer.serving.server import CaptionServer, is_loopback, serve

    if not is_loopback(host) and not key:
        say(f"anyone who reaches {host} can use this captioner: set SYNTH_API_KEY", WARNING)
    # Loaded where it runs: OpenMP has its threads spin for the first thread that needs some, which is 1.5 times faster.
    thread = ThreadPoolExecutor(1)
    loaded = thread.submit(Captioner.from_pretrained, folder).result()
    shown = name or (Path(captioner).resolve().name if Path(captioner).exists() else captioner.partition("@")[0])
    server = CaptionServer(loaded, shown, key, host, batch_size, num_beams, model_thread=thread)
    try:
        asyncio.run(serve(server, port, announce))
    except (OSError, UnicodeError) as error:
        if isinstance(error, socket.gaierror | UnicodeError):
            raise TrainError(f"there is no address {host}", hint="name one of this machine: --host 127.0.0.1") from None
        raise TrainError(
            f"cannot listen at {host}:{port}: {getattr(error, 'strerror', None) or error}", hint="choose another port: --port"
        ) from None


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
    from trainer.experiment.runs import default_jobs, plan, run_cells

    folder = out or Path("experiments") / file.stem
    with translate_disk_errors(folder), DatasetDir(folder).lock():
        runs = plan(spec, cells_of(spec), open_data, folder)
        say(f"{len(runs)} cells, of which {sum(run.is_done for run in runs)} are done; in {folder}")
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
    from pipeline.dataset.pixels import find_joined, images_of_dataset, images_of_files, join_pixels, lacks_pixels
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
    home = DatasetDir(version.dataset_dir / "joined")
    with translate_disk_errors(home.path), home.lock(wait=True):  # one of several processes joins, the others wait
        if joined := find_joined(version, home.path):
            return joined
        if images is None:
            raise ConfigError(f"{name or version.path} holds no pixels", hint="say where the images are: --images FOLDER")
        folder = Path(images)
        if not folder.is_dir():
            from pipeline.sources import read_images

            return join_pixels(version, read_images(images), home.path)
        is_dataset = (folder / "versions").is_dir() or (folder / "manifest.json").exists()
        return join_pixels(version, images_of_dataset(folder) if is_dataset else images_of_files(folder), home.path)
