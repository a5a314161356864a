"""Commands that use a captioner: caption and serve-captioner."""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, BadParameter

from pipeline.cli.options import (
    BY_STYLE,
    AsJson,
    BatchSize,
    CaptionerName,
    NumBeams,
    Overwrite,
    SkipExisting,
    option,
)
from pipeline.cli.output import echo, find_checkpoint, say
from pipeline.errors import TrainError
from pipeline.progress import WARNING, show_progress

if TYPE_CHECKING:
    from pipeline.storage.sidecars import Existing


def caption(
    captioner: CaptionerName,
    images: Annotated[list[str], Argument(help="Images, folders or quoted patterns.")],
    style: Annotated[str | None, option("Caption style, or all of them.", BY_STYLE)] = None,
    question: Annotated[
        str | None, option("Question to answer about each image, instead of captioning it.")
    ] = None,
    num_beams: NumBeams = None,
    batch_size: BatchSize = 32,
    out: Annotated[
        Path | None, option("File (.jsonl), or txt for one text file per image.", "stdout")
    ] = None,
    skip: SkipExisting = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a caption for each image, or the answer to a question.

    With --out FILE, the same command resumes after an interruption.
    """
    from pipeline.storage.files import translate_disk_errors
    from trainer.caption_files import SIDECARS, find_images, require_caption_file
    from trainer.runtime.checkpoint_folder import require_prompt

    if (skip or overwrite) and (out is None or (skip and overwrite)):
        problem = "pass only one of --skip-existing and --overwrite, and only with --out"
        raise BadParameter(problem, param_hint="--out")
    if question is not None and not question.strip():
        raise BadParameter(
            "the question is empty; leave out --question to get captions", param_hint="--question"
        )
    if style and question:
        raise BadParameter(
            "--style and --question exclude each other: an answer has no style", param_hint="--style"
        )
    folder = find_checkpoint(captioner)
    paths = find_images(images)
    require_prompt(folder, None if style == "all" else style, question or "")
    if out not in (None, SIDECARS):
        require_caption_file(out)  # before the captioner is loaded

    from trainer.caption_files import CaptionTask, caption_images
    from trainer.captioner import Captioner  # imports torch, which takes seconds

    loaded = Captioner.from_pretrained(folder)
    styles = ("",) if question else tuple(loaded.styles) if style == "all" else (style or loaded.usual_style,)
    job = CaptionTask(loaded, paths, styles, question or "", num_beams or loaded.usual_beams, batch_size)
    existing: Existing = "skip" if skip else "overwrite" if overwrite else "refuse"
    with show_progress() as progress, translate_disk_errors(out or Path()):
        names = ("image", "caption", "answer", *(["style"] if len(styles) > 1 else []))
        show_row = partial(_print_caption, names=names, as_json=as_json)
        result = caption_images(job, out, existing, folder, progress, show_row)
    for path, error in result.unread:
        say(f"cannot read {path}: {error}", WARNING)
    if out is not None:
        if result.num_written and out != SIDECARS:
            say(f"wrote {out} ({result.num_written:,} new)")
        elif not result.num_written and len(result.unread) < len(paths):
            say(f"nothing new: {out} already has a text for each readable image; --overwrite replaces them")
        if as_json:
            unread = [str(path) for path, _ in result.unread]
            echo(json.dumps({"path": str(out), "written": result.num_written, "unread": unread}))
    if len(result.unread) == len(paths):
        raise TrainError("no image could be read", hint="pass image files")


def _print_caption(row: dict[str, str], names: Collection[str], *, as_json: bool) -> None:
    if as_json:
        echo(json.dumps({name: value for name, value in row.items() if name in names}))
        return
    style = f" ({row['style']})" if "style" in names else ""
    echo(f"{row['image']}{style}: {row.get('caption', row.get('answer'))}")


def serve_captioner(
    captioner: CaptionerName,
    host: Annotated[str, option("Address to listen on, or 0.0.0.0 for all addresses.")] = "127.0.0.1",
    port: Annotated[int, option("Port to listen on, or 0 for any free one.", min=0, max=65535)] = 8200,
    name: Annotated[str | None, option("Name of the model in requests.", "the folder's")] = None,
    num_beams: NumBeams = None,
) -> None:
    """Serve a captioner over an OpenAI-compatible API.

    If SYNTH_API_KEY is set, all requests except /health need this key.
    """
    folder = find_checkpoint(captioner)
    title = name or (
        Path(captioner).resolve().name if Path(captioner).exists() else captioner.partition("@")[0]
    )
    from trainer.serving.address import is_loopback, listen

    with _translate_listen_errors(host, port):
        listen(host, port).close()  # report a wrong address before the captioner is loaded
    from concurrent.futures import ThreadPoolExecutor

    from trainer.captioner import Captioner  # imports torch, which takes seconds
    from trainer.serving.server import CaptionServer, serve

    key = os.environ.get("SYNTH_API_KEY", "")
    if not is_loopback(host) and not key:
        say(f"anyone who reaches {host} can use this captioner: set SYNTH_API_KEY", WARNING)
    # Run the model in the thread that loaded it. This is 1.5 times faster: OpenMP prefers its first thread.
    thread = ThreadPoolExecutor(1)
    loaded = thread.submit(Captioner.from_pretrained, folder).result()
    beams = num_beams or loaded.usual_beams
    server = CaptionServer(loaded, title, key, host, num_beams=beams, model_thread=thread)
    with _translate_listen_errors(host, port):
        serve(server, port, say)


@contextmanager
def _translate_listen_errors(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        hint = "name an address of this machine (--host 127.0.0.1) or another port (--port 0: any free one)"
        raise TrainError(f"cannot listen on {host}:{port}: {reason}", hint=hint) from None
