"""The `synth` command: its subcommands in the order of `--help`, and its handling of errors and signals.

A subcommand parses its options, calls one function and prints the result. Subcommands import heavy
packages when they run, so that `synth --help` does not load torch, transformers or datasets.
"""

import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.cli import generate
from pipeline.cli.captioners import caption, serve_captioner
from pipeline.cli.datasets import check, export, report, review_apply, review_open, review_sample
from pipeline.cli.options import VLLM_FLAGS
from pipeline.cli.output import say
from pipeline.cli.push import push
from pipeline.cli.training import evaluate, train
from pipeline.cli.versions import versions_gc, versions_list
from pipeline.errors import SynthError
from pipeline.install import PACKAGES, install_command, installed_version
from pipeline.logs import show_log
from pipeline.progress import LOSS
from pipeline.text.escape import printable

EXIT_CODE_INTERRUPTED = 130
EXIT_CODE_TERMINATED = 143
REPLIES_KEPT = "all replies are kept; run the same command to resume"
INTERRUPTED = {
    "generate": REPLIES_KEPT,
    "preview": REPLIES_KEPT,
    "estimate": REPLIES_KEPT,
    "train": "add --resume to the same command to resume",
    "caption": "if you passed --out, run the same command to resume",
}
# The error about a missing package suggests these extras of the command. The default is `train`.
EXTRAS = {"serve-captioner": ("train", "serve")}
MAKE, USE, TRAIN = "Make a dataset", "Review and publish a dataset", "Train a captioner"
EXAMPLES = {
    "generate": (
        "synth generate --source folder:photos --base-url http://localhost:8000/v1",
        "synth generate --source folder:photos --captions captions_val2017.json --no-model",
    ),
    "preview": ("synth preview --source folder:photos -n 6 --base-url http://localhost:8000/v1",),
    "push": ("synth push data/folder-photos --repo ORG/NAME --license cc-by-4.0",),
    "export": (
        "synth export data/folder-photos --format webdataset",
        "synth export --format sidecar --names source --style plain",
    ),
    "check": ("synth check data/folder-photos", "synth check ORG/NAME@v1.0.0"),
    "train": ("synth train data/folder-photos --encoder clip --decoder scratch",),
    "caption": (
        "synth caption data/folder-photos/checkpoints/v1.0.0-clip-scratch photos --out captions.jsonl",
        "synth caption ORG/NAME photos --out txt",
    ),
    "serve-captioner": ("synth serve-captioner ORG/NAME --port 8200",),
}


class Group(TyperGroup):
    """Group of all commands. Escapes control characters in click's errors, which may contain file names."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """See click.Command."""
        with _printable_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """See click.Command."""
        with _printable_errors():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """See click.Group. The error about an unknown subcommand lists all subcommands."""
        if ctx.parent and args[0] not in self.commands:
            names = " or ".join(f"`{ctx.command_path} {name}`" for name in self.commands)
            ctx.fail(f"No such command {args[0]!r}: use {names}.")
        return super().resolve_command(ctx, args)


@contextmanager
def _printable_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            vars(error)["message"] = printable(message)
        raise


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
versions = typer.Typer(cls=Group, no_args_is_help=True, help="List versions, or free disk space.")
review = typer.Typer(cls=Group, help="Judge 200 texts in a browser, or apply reviews.")


def add(group: str, *commands: Callable[..., None], **more: Any) -> None:
    """Add commands to a group of `synth --help`. The help of each command shows its examples."""
    for command in commands:
        name = command.__name__.replace("_", "-")
        epilog = "\n\n".join(f"Example: {example}" for example in EXAMPLES.get(name, ())) or None
        app.command(name, rich_help_panel=group, epilog=epilog, **more)(command)


add(MAKE, generate.init, generate.doctor)
add(MAKE, generate.preview, generate.estimate, generate.generate, generate.serve, context_settings=VLLM_FLAGS)
add(USE, report)
app.add_typer(review, name="review", rich_help_panel=USE)
review.callback(invoke_without_command=True)(review_open)
review.command("sample")(review_sample)
review.command("apply")(review_apply)
app.add_typer(versions, name="versions", rich_help_panel=USE)
versions.command("list")(versions_list)
versions.command("gc")(versions_gc)
add(USE, check, push, export)
add(TRAIN, train, evaluate, caption, serve_captioner)


def print_version(value: bool) -> None:
    """Print the version, and exit."""
    if value:
        typer.echo(f"synth {installed_version()}")
        raise typer.Exit


@app.callback()
def synth(
    is_verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also print the log.")] = False,
    _: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make a vision-language dataset, publish it, and train a captioner on it."""
    if is_verbose:
        show_log()


def main() -> None:
    """Run the command line. Print a SynthError as one line with a hint, and propagate unknown errors."""
    try:
        with sigterm_as_ctrl_c() as terminated:
            _run(terminated)
    finally:
        if isolation := sys.modules.get("pipeline.images.isolation"):
            isolation.end_workers()
        # The exit is a second faster after this call, if torch is loaded.
        gc.freeze()


def _run(terminated: list[int]) -> None:
    """Run the command. Exit with 130 after Ctrl-C, or with 143 if `terminated` records a SIGTERM."""
    try:
        app()
    except SynthError as error:
        _exit_with(str(error), error.hint)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in PACKAGES:
            raise
        extras = next((EXTRAS[argument] for argument in sys.argv[1:] if argument in EXTRAS), ("train",))
        hint = install_command(*extras, package=package)
        _exit_with(f"this command needs the package {package}", hint)
    except SystemExit as exit_:
        if exit_.code == EXIT_CODE_INTERRUPTED:
            command = next((argument for argument in sys.argv[1:] if argument in INTERRUPTED), "")
            say(f"interrupted: {INTERRUPTED.get(command, 'run the same command again')}")
            if terminated:
                raise SystemExit(EXIT_CODE_TERMINATED) from None
        raise


def _exit_with(problem: str, hint: str) -> None:
    say(f"synth: {problem}", LOSS)
    if hint:
        say(f"  hint: {hint}")
    raise SystemExit(1) from None


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt on SIGTERM. Yield a list that gets the signal's number each time it arrives."""
    arrived: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        arrived.append(number)
        # Shell scripts start background jobs with SIGINT ignored. There, raising SIGINT would have no effect.
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield arrived
    finally:
        signal.signal(signal.SIGTERM, before)
