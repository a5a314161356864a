"""The commands that use a captioner: on images, on a page, by a server, in other formats."""

import json
import os
import socket
import sys
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from typer import Argument, BadParameter, Option

from pipeline.cli.options import AsJson, BeamsAsTrained
from pipeline.cli.output import echo, find_checkpoint, say, show
from pipeline.errors import ConfigError, TrainError
from pipeline.progress import WARNING, show_progress

if TYPE_CHECKING:
    from pipeline.storage.sidecars import Existing


def caption(
    captioner: Annotated[str, Argument(help="Checkpoint folder, or ORG/NAME of the Hub.")],
    images: Annotated[list[str], Argument(help="Image files, folders, patterns in quotes; - reads names from stdin.")],
    style: Annotated[
        str | None, Option(help="Which style to write; all: each that it has learned.", show_default="brief, else plain")
    ] = None,
    question: Annotated[str | None, Option(help="Answer this about each image instead.")] = None,
    num_beams: BeamsAsTrained = None,
    batch_size: Annotated[int, Option(min=1, help="Images at once.")] = 32,
    out: Annotated[
        Path | None,
        Option(help="A .jsonl file; txt: a text file beside each image.", show_default="stdout"),
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
    from trainer.caption_files import SIDECARS, find_images

    chosen = [name for name, is_given in (("skip", skip), ("append", append), ("overwrite", overwrite)) if is_given]
    if len(chosen) > 1 or (chosen and out is None):
        raise BadParameter("--skip-existing, --append and --overwrite go with --out, and not with each other")
    if question is not None and not question.strip():
        raise BadParameter("ask something, or leave it out for a caption", param_hint="--question")
    if style and question:
        raise BadParameter("a question is answered in no style", param_hint="--style")
    folder = find_checkpoint(captioner)
    paths = find_images(name for name in images if name != "-")
    if "-" in images:
        paths = list(dict.fromkeys([*paths, *_images_named_on_stdin()]))
    if not paths:
        raise BadParameter("no image was named", param_hint="IMAGES")

    from trainer.caption_files import CaptionTask, caption_images
    from trainer.captioner import Captioner  # imports torch, which takes seconds

    loaded = Captioner.from_pretrained(folder)
    styles = ("",) if question else tuple(loaded.styles) if style == "all" else (style or loaded.usual_style,)
    job = CaptionTask(loaded, paths, styles, question or "", num_beams or loaded.usual_beams, batch_size)
    with show_progress() as progress, translate_disk_errors(out or Path()):
        existing = cast("Existing", chosen[0] if chosen else "refuse")
        names = ("image", "caption", "answer", *(["style"] if len(styles) > 1 else []))
        show_row = partial(_print_caption, names=names, as_json=as_json)
        result = caption_images(job, out, existing, folder, progress, show_row)
    for path, error in result.unread:
        say(f"cannot read {path}: {error}", WARNING)
    if out is not None and out != SIDECARS and result.num_written:
        say(f"wrote {out} ({result.num_written:,} new)")
    elif out is not None and not result.num_written and len(result.unread) < len(paths):
        which = "every other image" if result.unread else "each image"
        say(f"nothing new: {out} has a text of {which} already, maybe of another captioner; --overwrite writes it anew")
    if out is not None and as_json:
        unread = [str(path) for path, _ in result.unread]
        echo(json.dumps({"path": str(out), "written": result.num_written, "unread": unread}))
    if len(result.unread) == len(paths):
        raise TrainError("no image could be read", hint="pass image files")


def _images_named_on_stdin() -> Iterator[Path]:
    """Yield the images that lines of the standard input name. A line that names none is a warning: lists grow old."""
    from trainer.caption_files import find_images

    names = sys.stdin.read()
    for line in filter(None, names.split("\0") if "\0" in names else names.splitlines()):  # `find -print0`
        try:
            yield from find_images([line])
        except ConfigError as error:
            say(f"cannot read: {error}", WARNING)


def _print_caption(row: dict[str, str], names: Collection[str], *, as_json: bool) -> None:
    """Print a row of `caption_images`: as JSON with these of its values, or as a line."""
    style = f" ({row['style']})" if "style" in names else ""
    text = row.get("caption", row.get("answer"))
    echo(
        json.dumps({name: value for name, value in row.items() if name in names})
        if as_json
        else f"{row['image']}{style}: {text}"
    )


def export_captioner(captioner: str, out: Path | None, *, int8: bool, as_json: bool) -> None:
    """Export a captioner, a checkpoint folder or ORG/NAME of the Hub, to ONNX."""
    from pipeline.storage.files import translate_disk_errors

    folder = find_checkpoint(captioner)

    from trainer.publish.onnx_export import RUNNER, export_onnx  # imports torch, which takes seconds

    target = out or Path(f"{Path(captioner.partition('@')[0]).resolve().name}-onnx")
    with show_progress() as progress, translate_disk_errors(target):
        files = export_onnx(folder, target, progress, int8=int8)
    for file, size in files.items():
        if file.endswith(".onnx"):
            say(f"{file}: {size / 1e6:.1f} MB")
    say(f"try it: python {target / RUNNER} photo.jpg", "dim")
    show({"path": str(target), "files": files}, as_json, "path")


def serve_captioner(
    captioner: Annotated[str, Argument(help="Checkpoint folder, or ORG/NAME of the Hub.")],
    demo: Annotated[bool, Option("--demo", help="Open a page where you drop photos instead; needs Gradio.")] = False,
    host: Annotated[str, Option(help="The address to listen at; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: one that is free.")] = 8200,
    name: Annotated[str | None, Option(help="The name of the model in requests.", show_default="the folder's")] = None,
    batch_size: Annotated[int, Option(min=1, help="Images at once.")] = 32,
    num_beams: BeamsAsTrained = None,
) -> None:
    """Serve a captioner by OpenAI's chat protocol, or on a page with --demo.

    If SYNTH_API_KEY is set, all requests but /health must carry this key. The page has no key, and is for this machine alone.
    """
    folder = find_checkpoint(captioner)
    title = name or (Path(captioner).resolve().name if Path(captioner).exists() else captioner.partition("@")[0])
    if demo:
        if host not in ("127.0.0.1", "localhost"):
            hint = "leave --host out; to publish the page: synth push CAPTIONER --repo ORG/NAME --space ORG/PAGE"
            raise ConfigError("the page of --demo is for this machine alone", hint=hint)
        from trainer.serving.demo import run_demo  # imports torch, which takes seconds

        try:
            run_demo(folder, title, port, num_beams, say)
        except OSError as error:  # of Gradio, which finds no free port in its range
            raise TrainError(f"cannot listen at port {port}: {error}", hint="choose another port: --port") from None
        return

    from concurrent.futures import ThreadPoolExecutor

    from trainer.captioner import Captioner
    from trainer.serving.server import CaptionServer, is_loopback, serve

    key = os.environ.get("SYNTH_API_KEY", "")
    if not is_loopback(host) and not key:
        say(f"anyone who reaches {host} can use this captioner: set SYNTH_API_KEY", WARNING)
    # Loaded where it runs: OpenMP has its threads spin for the first thread that needs some, which is 1.5 times faster.
    thread = ThreadPoolExecutor(1)
    loaded = thread.submit(Captioner.from_pretrained, folder).result()
    server = CaptionServer(loaded, title, key, host, batch_size, num_beams or loaded.usual_beams, model_thread=thread)
    try:
        serve(server, port, say)
    except (OSError, UnicodeError) as error:
        if isinstance(error, socket.gaierror | UnicodeError):
            raise TrainError(f"there is no address {host}", hint="name one of this machine: --host 127.0.0.1") from None
        raise TrainError(
            f"cannot listen at {host}:{port}: {getattr(error, 'strerror', None) or error}", hint="choose another port: --port"
        ) from None
