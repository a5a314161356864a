"""The `synth` command: the application, its commands in the order of `synth --help`, and how errors and signals end it.

Commands parse their options, call one function and print its result; decisions live elsewhere. Heavy imports are made within
commands: `synth --help` must not load torch, transformers or datasets.
"""

import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.cli import generate
from pipeline.cli.captioners import caption, serve_captioner
from pipeline.cli.datasets import check, diff, export, report, review_apply
from pipeline.cli.options import VLLM_FLAGS
from pipeline.cli.output import say
from pipeline.cli.push import push
from pipeline.cli.training import evaluate, experiment, train
from pipeline.cli.versions import versions_gc, versions_list, versions_rm, versions_tag
from pipeline.errors import SynthError
from pipeline.install import PACKAGES, extra_of, installed_version
from pipeline.logs import show_log
from pipeline.progress import LOSS
from pipeline.text.escape import printable

INTERRUPTED = 130  # Typer's exit code on Ctrl-C
TERMINATED = 143  # and that of a command which SIGTERM ends
POSTPONED_SECONDS = 0.02
MAX_IMPORT_SECONDS = 10.0  # then a module is not waited for any longer
_IMPORT_SYSTEM = "<frozen importlib"  # how the names of its files begin
COLLECTED_OBJECTS = 500_000  # new objects before the garbage collector runs: importing torch takes 7 % less CPU
MAKE, USE, TRAIN = "Make a dataset", "Review and publish it", "Train a captioner"  # groups of commands
EXAMPLES = {  # by command, shown below its options
    "generate": (
        "synth generate --source folder:photos --base-url http://localhost:8000/v1",
        "synth generate --source folder:photos --captions captions_val2017.json --no-model",
        "synth generate --config synth.yaml --dry-run",
    ),
    "preview": ("synth preview --source folder:photos -n 6 --base-url http://localhost:8000/v1",),
    "push": ("synth push data/folder-photos --repo ORG/NAME --license cc-by-4.0",),
    "export": (
        "synth export --format webdataset",
        "synth export --in-place photos --style plain",
        "synth export CAPTIONER --format onnx --int8",
    ),
    "check": ("synth check data/folder-photos", "synth check ORG/NAME@v1.0.0"),
    "train": ("synth train --data data/folder-photos --encoder clip --decoder scratch",),
    "caption": (
        "synth caption data/folder-photos/checkpoints/v1.0.0-clip-scratch photos --out captions.jsonl",
        "synth caption ORG/NAME photos --out txt --skip-existing",
    ),
    "serve-captioner": ("synth serve-captioner ORG/NAME --port 8200", "synth serve-captioner ORG/NAME --demo"),
    "init": ("synth init my-captions",),
}


class Group(TyperGroup):
    """The group of all commands. Its errors may quote names of files, which may hold what a terminal obeys."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """See click.Command."""
        with _printable_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """See click.Command."""
        with _printable_errors():
            return super().invoke(ctx)


@contextmanager
def _printable_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):  # click's, which newer releases of Typer bring along
            vars(error)["message"] = printable(message)
        raise


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
versions = typer.Typer(no_args_is_help=True, help="List, tag and remove the versions of a dataset; free disk space.")
review = typer.Typer(no_args_is_help=True, help="Review texts in a report, then apply the reviews.")


def add(command: Callable[..., None], group: str, **more: Any) -> None:
    """Add a command to the application, in a group of its help, with its examples."""
    name = command.__name__.replace("_", "-")
    examples = EXAMPLES.get(name, ())
    epilog = "\n\n".join([f"Example: {example}" for example in examples]) or None
    app.command(name, rich_help_panel=group, epilog=epilog, **more)(command)


add(generate.init, MAKE)
add(generate.doctor, MAKE)
add(generate.preview, MAKE, context_settings=VLLM_FLAGS)
add(generate.generate, MAKE, context_settings=VLLM_FLAGS)
add(generate.serve, MAKE, context_settings=VLLM_FLAGS)
add(report, USE)
app.add_typer(review, name="review", rich_help_panel=USE)
review.command("apply")(review_apply)
app.add_typer(versions, name="versions", rich_help_panel=USE)
versions.command("list")(versions_list)
versions.command("tag")(versions_tag)
versions.command("rm")(versions_rm)
versions.command("gc")(versions_gc)
add(diff, USE)
add(check, USE)
add(push, USE)
add(export, USE)
add(train, TRAIN)
add(evaluate, TRAIN)
add(caption, TRAIN)
add(serve_captioner, TRAIN)
add(experiment, TRAIN)


def print_version(value: bool) -> None:
    """Print the version, and exit."""
    if value:
        typer.echo(f"synth {installed_version()}")
        raise typer.Exit


@app.callback()
def synth(
    is_verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also print the log: what happens in the background, and why.")
    ] = False,
    _: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    """Make a vision-language dataset, publish it, and train a captioner on it."""
    if is_verbose:
        show_log()


def main() -> None:
    """Run the command line; print a SynthError as one line with a hint, and let unknown errors raise."""
    gc.set_threshold(COLLECTED_OBJECTS, 20, 20)
    try:
        with sigterm_as_ctrl_c() as terminated:
            _run(terminated)
    finally:
        if isolation := sys.modules.get("pipeline.images.isolation"):
            isolation.end_workers()
        gc.freeze()  # the collector would walk over all that torch has made once more: a second, for nothing


def _run(terminated: list[float]) -> None:
    """Run the command; it exits with 130 if Ctrl-C ends it, or 143 if it was `terminated`."""
    try:
        app()
    except SynthError as error:
        say(f"synth: {error}", LOSS)
        if error.hint:
            say(f"  hint: {error.hint}")
        raise SystemExit(1) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in PACKAGES:
            raise
        say(f"synth: this command needs the package {package}", LOSS)
        say(f"  hint: {extra_of(package)}")
        raise SystemExit(1) from None
    except SystemExit as exit_:
        if exit_.code == INTERRUPTED:
            how = "train: with --resume; caption --out txt: with --skip-existing"
            say(f"interrupted: what was done is kept; run the same command to go on ({how})")
            if terminated:
                raise SystemExit(TERMINATED) from None
        raise


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[list[float]]:
    """Raise KeyboardInterrupt on SIGTERM; yield a list of the times when it came, empty until then.

    It waits for the end of an import: modules in C make another error of the exception, importers pass over some errors, and
    the interpreter passes over all in callbacks of its own; the command would go on, or end with a traceback.
    """
    arrived: list[float] = []
    if threading.current_thread() is not threading.main_thread():  # others can set no handler
        yield arrived
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        arrived.append(monotonic())
        if _is_importing(frame) and arrived[-1] - arrived[0] < MAX_IMPORT_SECONDS:
            again = threading.Timer(POSTPONED_SECONDS, signal.raise_signal, (number,))
            again.daemon = True
            again.start()
            return
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for what runs in its background
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield arrived
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORT_SYSTEM):
            return True
        frame = frame.f_back
    return False
