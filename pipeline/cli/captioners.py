"""Commands that use a captioner: caption and serve-captioner."""

import json
import os
from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter

from pipeline.cli.options import BY_STYLE, AsJson, BatchSize, CaptionerName, NumBeams, option
from pipeline.cli.output import echo, find_checkpoint, say
from pipeline.errors import TrainError
from pipeline.progress import WARNING, show_progress


def caption(
    captioner: CaptionerName,
    images: Annotated[list[str], Argument(help="Images, folders or quoted patterns.")],
    style: Annotated[str | None, option("Caption style, or all (one caption per style).", BY_STYLE)] = None,
    question: Annotated[
        str | None, option("Question to answer about each image, instead of captioning it.")
    ] = None,
    num_beams: NumBeams = None,
    batch_size: BatchSize = 32,
    out: Annotated[
        Path | None, option("Output file (NAME.jsonl), or txt for one text file per image.", "stdout")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a caption for each image, or the answer to a question.

    With --out, the same command resumes after an interruption, and captions only new images after that.
    """
    from pipeline.storage.files import translate_disk_errors
    from trainer.caption_files import SIDECARS, find_images, require_caption_file
    from trainer.runtime.checkpoint_folder import require_prompt

    if question is not None and not question.strip():
        problem = "the question is empty; leave out --question to get captions"
        raise BadParameter(problem, param_hint="--question")
    if style and question:
        problem = "--style and --question cannot be combined: an answer has no style"
        raise BadParameter(problem, param_hint="--style")
    folder = find_checkpoint(captioner)
    paths = find_images(images)
    require_prompt(folder, None if style == "all" else style, question or "")
    if out not in (None, SIDECARS):
        require_caption_file(out)

    from trainer.caption_files import CaptionTask, caption_images
    from trainer.captioner import Captioner

    loaded = Captioner.from_pretrained(folder)
    styles = ("",) if question else tuple(loaded.styles) if style == "all" else (style or loaded.usual_style,)
    job = CaptionTask(loaded, paths, styles, question or "", num_beams or loaded.usual_beams, batch_size)
    with show_progress() as progress, translate_disk_errors(out or Path()):
        names = ("image", "caption", "answer", *(["style"] if len(styles) > 1 else []))

        def show_row(row: dict[str, str]) -> None:
            if as_json:
                echo(json.dumps({name: value for name, value in row.items() if name in names}))
                return
            style = f" ({row['style']})" if "style" in names else ""
            echo(f"{row['image']}{style}: {row.get('caption', row.get('answer'))}")

        num_written, unread = caption_images(job, out, folder, progress, show_row)
    for path, error in unread:
        say(f"cannot read {path}: {error}", WARNING)
    if out is not None:
        if num_written and out != SIDECARS:
            say(f"wrote {out} ({num_written:,} new texts)")
        if as_json:
            names_unread = [str(path) for path, _ in unread]
            echo(json.dumps({"path": str(out), "written": num_written, "unread": names_unread}))
    if len(unread) == len(paths):
        raise TrainError("no image could be read", hint="pass image files")


def serve_captioner(
    captioner: CaptionerName,
    host: Annotated[str, option("Address to listen on, or 0.0.0.0 for all addresses.")] = "127.0.0.1",
    port: Annotated[int, option("Port to listen on, or 0 for any free one.", min=0, max=65535)] = 8200,
    name: Annotated[str | None, option("Name of the model in requests.", "the folder's")] = None,
    num_beams: NumBeams = None,
) -> None:
    """Serve a captioner over an OpenAI-compatible API.

    If SYNTH_API_KEY is set, all requests need this key.
    """
    folder = find_checkpoint(captioner)
    path = Path(captioner)
    title = name or (path.resolve().name if path.exists() else captioner.partition("@")[0])
    from concurrent.futures import ThreadPoolExecutor

    from trainer.server import CaptionServer, is_loopback, listen

    key = os.environ.get("SYNTH_API_KEY", "")
    try:
        listener = listen(host, port)
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        hint = "pass an address of this machine (--host 127.0.0.1) or another port (--port 0: any free one)"
        raise TrainError(f"cannot listen on {host}:{port}: {reason}", hint=hint) from None
    if not is_loopback(host) and not key:
        say(f"the server on {host} accepts all clients: to require a key, set SYNTH_API_KEY", WARNING)

    from trainer.captioner import Captioner

    # Load and run the captioner in one thread: the first that uses OpenMP runs a model 1.5 times faster.
    thread = ThreadPoolExecutor(1)
    loaded = thread.submit(Captioner.from_pretrained, folder).result()
    beams = num_beams or loaded.usual_beams
    server = CaptionServer(loaded, title, key, host, num_beams=beams, thread=thread).make_server()
    say(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}")
    server.run(sockets=[listener])
