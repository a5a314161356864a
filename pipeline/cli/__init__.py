"""The `synth` command: the application, its commands in the order of `synth --help`, and how errors are printed.

Commands parse their options, call one function and print its result; decisions live elsewhere. Heavy imports are made within
commands: `synth --help` must not load torch, transformers or datasets.
"""

from typing import Annotated

import typer

from pipeline.cli import generate
from pipeline.cli.datasets import diff, push, report, review_apply, versions
from pipeline.cli.options import OLD_OPTIONS, VLLM_FLAGS
from pipeline.cli.output import say
from pipeline.cli.training import caption, evaluate, experiment, train
from pipeline.errors import SynthError
from pipeline.logs import show_log

INTERRUPTED = 130  # Typer's exit code on Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": lambda name: OLD_OPTIONS.get(name, name)},
)
review = typer.Typer(no_args_is_help=True, help="Review texts: mark them in a report, then apply the marks.")
app.add_typer(review, name="review")
app.command(context_settings=VLLM_FLAGS)(generate.generate)
app.command(context_settings=VLLM_FLAGS)(generate.serve)
for command in (generate.doctor, generate.sources, versions, diff, push, train, evaluate, caption, experiment, report):
    app.command()(command)
review.command("apply")(review_apply)


@app.callback()
def synth(
    is_verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also print the log: what happens in the background, and why.")
    ] = False,
) -> None:
    """Make a vision-language dataset, publish it, and train a captioner on it."""
    if is_verbose:
        show_log()


def main() -> None:
    """Run the command line; print a SynthError as one line with a hint, and let unknown errors raise."""
    try:
        app()
    except SynthError as error:
        say(f"synth: {error}")
        if error.hint:
            say(f"  hint: {error.hint}")
        raise SystemExit(1) from None
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("pipeline", "trainer", "prompts", "data_cards"):
            raise
        say(f"synth: this command needs the package {error.name}")
        say("  hint: install synth with its extras `embedded` and `train`")
        raise SystemExit(1) from None
    except SystemExit as exit_:
        if exit_.code == INTERRUPTED:
            say("interrupted: what was done is kept; run the same command to go on (train: with --resume)")
        raise
