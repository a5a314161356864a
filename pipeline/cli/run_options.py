"""The options of a run, which `generate`, `preview` and `estimate` share.

`--help` shows the options that most runs need. `--help-all` shows all options.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Exit, Option, echo
from typer.core import TyperOption

from pipeline.cli.options import read_names, read_pairs, vllm_flags
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config import Config

IMAGES, TEXTS, MODEL = "Images", "What to ask", "Model"
BUDGET, DATASET, CLUSTER = "Budget", "Dataset", "Cluster"
NO_MODEL = "--no-model"
METAVARS: dict[Any, str] = {int: "N", Path: "FILE", list[Path]: "FILE"}


@dataclass(frozen=True, slots=True)
class RunOption:
    """An option that sets a settings key. Flags set it to `value`, other options to `read(argument)`."""

    flag: str
    kind: Any
    group: str
    help: str
    # The setting is a name such as `generate.samples`. By default, it is the name of the flag.
    setting: str = ""
    metavar: str | None = None
    default: str | None = None
    min: int | None = None
    value: Any = None
    read: Callable[[Any], Any] = lambda argument: argument
    is_common: bool = False

    @property
    def name(self) -> str:
        """The name of the command's parameter."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def key(self) -> str:
        """The key of the settings."""
        return self.setting or self.name

    @property
    def parameter(self) -> inspect.Parameter:
        """The command's parameter, as Typer reads it."""
        option = Option(
            self.flag,
            help=self.help,
            min=self.min,
            metavar=self.metavar or METAVARS.get(self.kind),
            show_default=self.default or False,
            rich_help_panel=self.group,
            hidden=not self.is_common,
        )
        return _parameter(self.name, Annotated[self.kind | None, option], None)


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _only_source(names: list[str]) -> str:
    """Return the only source. Raises ConfigError if there are several sources."""
    if len(names) > 1:
        hint = "run the command once per source, with different --out, or put all images into one folder"
        problem = f"a dataset has one source, but {len(names)} are given: {', '.join(names)}"
        raise ConfigError(problem, hint=hint)
    return names[0]


OPTIONS = (
    RunOption("--source", list[str], IMAGES, "Source of the images, as listed by `synth doctor --sources`.",
        metavar="NAME", read=_only_source, is_common=True),
    RunOption("--split", str, IMAGES, "Split to read from the source: train, validation or test.",
        "source_split", metavar="SPLIT", default="all"),
    RunOption("--columns", str, IMAGES,
        "Column of each role: image, references, question, answer, pages, split, or context (for prompts).",
        metavar="ROLE=COLUMN,...", read=partial(read_pairs, option="--columns")),
    RunOption("--captions", list[Path], IMAGES,
        "File of human captions or questions for a folder: COCO, Karpathy, CSV, JSON lines. Repeatable.",
        is_common=True),
    RunOption("--follow-links", bool, IMAGES, "Follow symlinks to files outside of the folder."),
    RunOption("--exclude", list[str], IMAGES,
        "Leave out the images of this source, e.g. flickr30k#test. Repeatable.", metavar="SOURCE[#SPLIT]"),
    RunOption("--limit", int, IMAGES, "Stop after reading N images.", min=1, default="all; 1000 for scenes",
        is_common=True),
    RunOption("--every", float, IMAGES, "Seconds between two frames of a video.", "frame_seconds",
        metavar="SECONDS", default="5"),
    RunOption("--license", str, IMAGES, "License of your own images, such as cc-by-4.0.", metavar="NAME"),
    RunOption("--group-by", str, IMAGES, "Keep images of one folder, or with one name prefix, in one split.",
        "split.group_by", metavar="folder|prefix"),
    RunOption("--tasks", str, TEXTS, "Tasks: caption, qa, deck_qa.", metavar="TASKS", read=read_names,
        default="caption,qa; deck_qa for decks", is_common=True),
    RunOption(NO_MODEL, bool, TEXTS, "Make the dataset from human captions and questions only.", "tasks",
        value="none", is_common=True),
    RunOption("--task", list[Path], TEXTS,
        "YAML file of a custom task. It replaces the default of --tasks. Repeatable.", "custom_tasks",
        is_common=True),
    RunOption("--keep-human", bool, TEXTS, "Keep human captions and questions in the dataset.", "human_texts",
        value="keep"),
    RunOption("--only-missing", bool, TEXTS, "Keep human texts, and ask the model for the missing texts.",
        "human_texts", value="fill"),
    RunOption("--language", str, TEXTS,
        "Language of prompts and texts, or any. Texts in other languages are rejected.", "filter.language",
        metavar="CODE", default="en"),
    RunOption("--styles", str, TEXTS, "Styles: plain, detailed, dense, brief, alt, tags, ocr, or your own.",
        "generate.caption_styles", metavar="NAME,...", read=read_names, is_common=True,
        default="plain,detailed; brief,detailed for scenes"),
    RunOption("--words", int, TEXTS, "Approximate number of words per caption.", "generate.caption_words",
        default="depends on the style"),
    RunOption("--samples", int, TEXTS, "Candidate captions per image and style. The best one is kept.",
        "generate.samples", min=1, default="1"),
    RunOption("--select", str, TEXTS, "Rule that chooses the best of --samples: likelihood, clip or judge.",
        "select.by", metavar="HOW", default="likelihood"),
    RunOption("--pairs", bool, TEXTS, "Also keep the worst candidate, for preference training.",
        "select.pairs"),
    RunOption("--verify", str, TEXTS,
        "Checks: round_trip, claims, covers, blind, evidence, alignment.", "verify.checks",
        metavar="CHECKS", default="nothing", read=read_names, is_common=True),
    RunOption("--repair", bool, TEXTS, "Rewrite captions that have false claims (--verify claims).",
        "verify.repair"),
    RunOption("--judge", str, TEXTS, "Second model that rates each text. Its scores become columns.",
        "verify.judge", metavar="MODEL@URL"),
    RunOption("--seed", int, TEXTS, "Seed of --source scenes, sampled replies, balancing and splits.",
        default="0"),
    RunOption("--engine", str, MODEL, "Engine: auto, embedded (the tiny model) or vllm (a server).",
        metavar="ENGINE", default="auto"),
    RunOption("--model", str, MODEL,
        "Hub id or folder of a vision-language model, or tiny (only for --source scenes).", metavar="MODEL",
        default="chosen by source and engine", is_common=True),
    RunOption("--base-url", list[str], MODEL, "URL of a running OpenAI-compatible server. Repeatable.",
        metavar="URL", is_common=True),
    RunOption("--no-enforced-schema", bool, MODEL,
        "Accept a server that does not enforce JSON schemas, and retry invalid replies.",
        "server.enforced_schema", value=False),
    RunOption("--price-in", float, MODEL, "Price per million input tokens.",
        "server.price_in", metavar="PRICE", min=0),
    RunOption("--price-out", float, MODEL, "Price per million output tokens.",
        "server.price_out", metavar="PRICE", min=0),
    RunOption("--max-requests", int, BUDGET, "Stop after N requests, counted over all runs in this folder.",
        "server.max_requests", min=1),
    RunOption("--max-tokens", int, BUDGET, "Stop after N tokens, input plus output.",
        "server.max_total_tokens", min=1),
    RunOption("--max-cost", float, BUDGET, "Stop when the tokens have cost PRICE.", "server.max_cost",
        metavar="PRICE"),
    RunOption("--title", str, DATASET, "Title of the dataset card.", metavar="TEXT",
        default="named after the source"),
)  # fmt: skip
CONFIG = Option(
    metavar="FILE", help="YAML file of settings. Options override the file.", rich_help_panel=DATASET
)


def read_settings(context: Context, file: Path | None, arguments: Mapping[RunOption, Any]) -> "Config":
    """Merge options, file and defaults. Raises ConfigError if a setting is invalid."""
    from pipeline.config.files import resolve

    settings: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if flags := vllm_flags(context, "--source"):
        settings["server"] = {"flags": flags}
        origins["server.flags"] = "arguments after --"
    for option, argument in arguments.items():
        if argument in (None, "", [], [""]):
            continue
        if option.key in origins:
            problem = f"{option.flag} and {origins[option.key]} cannot be combined"
            raise ConfigError(problem, hint="pass one of them")
        section, _, name = option.key.rpartition(".")
        target = settings.setdefault(section, {}) if section else settings
        target[name] = option.read(argument) if option.value is None else option.value
        origins[option.key] = option.flag
    config = resolve(file, **settings)
    if NO_MODEL in origins.values() and config.asks_model:
        asked = ", ".join((*config.tasks, *config.verify.checks))
        raise ConfigError(f"{NO_MODEL} excludes models, but {asked} need one", hint="remove one of the two")
    return config


def _show_all_options(context: Context, value: bool) -> None:
    if value:
        for parameter in context.command.params:
            if isinstance(parameter, TyperOption):
                parameter.hidden = False
        echo(context.get_help())
        raise Exit


HELP_ALL = Option("--help-all", is_eager=True, callback=_show_all_options, help="Show all options, and exit.")


def with_run_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a run to a command, which receives the merged settings as `config`."""
    parameters = inspect.signature(command).parameters
    own = [parameter for name, parameter in parameters.items() if name != "config"]

    def run(**values: Any) -> None:
        arguments = {option: values[option.name] for option in OPTIONS}
        config = read_settings(values["context"], values["config"], arguments)
        command(config=config, **{parameter.name: values[parameter.name] for parameter in own})

    all_parameters = [
        _parameter("context", Context),
        *(option.parameter for option in OPTIONS),
        _parameter("config", Annotated[Path | None, CONFIG], None),
        _parameter("help_all", Annotated[bool, HELP_ALL], False),
        *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
    ]
    run.__signature__ = inspect.Signature(all_parameters)  # type: ignore[attr-defined]  # read by Typer
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in all_parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run
