"""The options of a run, defined once for `generate` and `preview`.

`--help` shows the options that most runs need, `--help-all` shows all of them.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Exit, Option, echo
from typer.core import TyperOption

from pipeline.cli.options import read_names, read_pairs, vllm_flags
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config import Config

IMAGES, TEXTS, MODEL, BUDGET = "Images", "What to ask", "Model", "Budget"  # groups of options in --help
DATASET, CLUSTER = "Dataset", "Cluster"
NO_MODEL = "--no-model"
NO_TASKS = "none"  # equals config.NO_TASKS, which takes long to import
FLAGS_KEY, AFTER_DASHES = "server.flags", "what stands after --"


@dataclass(frozen=True, slots=True)
class RunOption:
    """An option of the command line that sets a key of the settings; `read` makes the value of what was given."""

    key: str  # `generate.samples` is in a section
    flag: str
    kind: Any
    group: str
    help: str
    metavar: str | None = None
    show_default: str | None = None  # in words; the settings know the defaults
    min: int | None = None
    max: int | None = None
    read: Callable[[Any], Any] = lambda value: value
    is_common: bool = False  # shown by --help

    @property
    def name(self) -> str:
        """The name of the parameter."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def parameter(self) -> inspect.Parameter:
        """The parameter of a command, as Typer reads it."""
        limits: dict[str, Any] = {name: value for name, value in (("min", self.min), ("max", self.max)) if value is not None}
        shown: dict[str, Any] = {
            "metavar": self.metavar,
            "show_default": self.show_default or False,
            "rich_help_panel": self.group,
            "hidden": not self.is_common,
        }
        return _parameter(self.name, Annotated[self.kind | None, Option(self.flag, help=self.help, **limits, **shown)], None)


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _columns(text: str) -> dict[str, str]:
    return read_pairs(text, "--columns")


def _only_source(names: list[str]) -> str:
    """Return the one source that was given. Raise ConfigError for several, of which all but the last would be lost."""
    if len(names) > 1:
        hint = "run once for each, with an --out of its own; or put the images under one folder, or name them in a list"
        raise ConfigError(f"a dataset has one source, and {len(names)} are given: {', '.join(names)}", hint=hint)
    return names[0]


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


OPTIONS = (
    RunOption("source", "--source", list[str], IMAGES, metavar="NAME", read=_only_source,
        is_common=True,
        help="Where the images come from; `synth doctor --sources` lists the names."),
    RunOption("source_split", "--split", str, IMAGES, metavar="SPLIT",
        help="Read this split of the source only: train, validation or test."),
    RunOption("columns", "--columns", str, IMAGES, metavar="ROLE=COLUMN,...", read=_columns,
        help="Roles of columns: image, references, question, answer, pages, split; context=A,B: what prompts may "
             "use as row.A."),
    RunOption("captions", "--captions", list[Path], IMAGES, metavar="FILE", is_common=True,
        help="Human captions or questions about the images of a folder: JSON of COCO or Karpathy, CSV, "
             "JSON lines; may be given several times."),
    RunOption("allow_urls", "--allow-urls", bool, IMAGES,
        help="Fetch images that rows name by URL, from the public network."),
    RunOption("allow_partial", "--allow-partial", bool, IMAGES,
        help="Read a Hub dataset also where the Hub has converted only its first part."),
    RunOption("follow_links", "--follow-links", bool, IMAGES,
        help="Read files outside of the folder that links in it lead to."),
    RunOption("split_list", "--split-list", Path, IMAGES, metavar="FILE",
        help="Karpathy's dataset_flickr30k.json, for a copy that has lost the split."),
    RunOption("exclude", "--exclude", list[str], IMAGES, metavar="SOURCE[#SPLIT]",
        help="Leave out the images of another source, such as flickr30k#test; may be given several times."),
    RunOption("limit", "--limit", int, IMAGES, metavar="N", min=1, show_default="all; scenes: 1000", is_common=True,
        help="Stop after this many images."),
    RunOption("images", "--images", int, IMAGES, metavar="N", min=1, show_default="all that were read",
        help="Read on until N images are kept, and keep no more."),
    RunOption("frame_seconds", "--every", float, IMAGES, metavar="SECONDS", show_default="5",
        help="Seconds between the frames that are read of a video."),
    RunOption("drop_context", "--drop-context", bool, IMAGES,
        help="Keep the columns of context out of the dataset."),
    RunOption("license", "--license", str, IMAGES, metavar="NAME",
        help="The license of your own images, such as cc-by-4.0."),
    RunOption("tasks", "--tasks", str, TEXTS, metavar="TASKS", show_default="caption,qa; decks: deck_qa", read=read_names,
        is_common=True,
        help="What to ask: caption, qa, deck_qa."),
    RunOption("tasks", NO_MODEL, bool, TEXTS, read=_always(NO_TASKS), is_common=True,
        help="Make the dataset of human captions and questions, and ask no model."),
    RunOption("own_tasks", "--task", list[Path], TEXTS, metavar="FILE", is_common=True,
        help="A task of your own, in YAML; may be given several times. Without --tasks, nothing else is asked."),
    RunOption("human_texts", "--keep-human", bool, TEXTS, read=_always("keep"),
        help="Keep human captions and questions in the dataset."),
    RunOption("human_texts", "--only-missing", bool, TEXTS, read=_always("fill"),
        help="The same, and ask only for captions and questions that an image lacks."),
    RunOption("filter.language", "--language", str, TEXTS, metavar="CODE", show_default="en",
        help="The language of the texts; others are rejected; `any` keeps all."),
    RunOption("split.group_by", "--group-by", str, IMAGES, metavar="folder|prefix",
        help="Keep images of one folder, or of one name but for its last number, in one split."),
    RunOption("generate.caption_styles", "--styles", str, TEXTS, metavar="NAME,...", read=read_names, is_common=True,
        show_default="plain,detailed; drawn scenes: brief,detailed",
        help="Styles of captions: plain, detailed, brief, alt, tags, ocr, or those of your own prompts."),
    RunOption("generate.caption_words", "--words", int, TEXTS, metavar="N", show_default="by style",
        help="About how many words a caption should have."),
    RunOption("generate.samples", "--samples", int, TEXTS, metavar="N", min=1, show_default="1",
        help="Ask for N captions of each style, and keep the best."),
    RunOption("select.by", "--select", str, TEXTS, metavar="HOW", show_default="consistency",
        help="Which of --samples is the best: consistency, clip, judge or longest."),
    RunOption("select.pairs", "--pairs", bool, TEXTS,
        help="Keep the worst of --samples next to the best, to learn preferences from."),
    RunOption("verify.checks", "--verify", str, TEXTS, metavar="CHECKS", show_default="nothing", read=read_names,
        is_common=True,
        help="What to check: round_trip, claims, covers, blind, evidence, alignment, references."),
    RunOption("verify.repair", "--repair", bool, TEXTS,
        help="Write captions with false claims again without them (--verify claims)."),
    RunOption("verify.judge", "--judge", str, TEXTS, metavar="MODEL@URL",
        help="Let another model rate each text; the scores are columns."),
    RunOption("seed", "--seed", int, TEXTS, metavar="N", show_default="0",
        help="Draws scenes, samples replies and splits."),
    RunOption("engine", "--engine", str, MODEL, metavar="ENGINE", show_default="auto",
        help="auto, embedded (a model in this process) or vllm (a server)."),
    RunOption("model", "--model", str, MODEL, metavar="MODEL", show_default="by source and engine", is_common=True,
        help="The Hub id or the folder of a vision-language model; tiny: the shipped model of drawn scenes."),
    RunOption("base_url", "--base-url", list[str], MODEL, metavar="URL", is_common=True,
        help="A server that runs already, with the chat protocol of OpenAI; may be given several times."),
    RunOption("server.enforced_schema", "--no-enforced-schema", bool, MODEL, read=_always(False),
        help="Accept a server that does not enforce JSON schemas: check each reply, and ask for bad ones again."),
    RunOption("server.price_in", "--price-in", float, MODEL, metavar="PRICE", min=0,
        help="Price of a million tokens that the model reads."),
    RunOption("server.price_out", "--price-out", float, MODEL, metavar="PRICE", min=0,
        help="Price of a million tokens that the model writes."),
    RunOption("server.judge_price_in", "--judge-price-in", float, MODEL, metavar="PRICE", min=0, show_default="--price-in",
        help="Price of a million tokens that the judge reads."),
    RunOption("server.judge_price_out", "--judge-price-out", float, MODEL, metavar="PRICE", min=0, show_default="--price-out",
        help="Price of a million tokens that the judge writes."),
    RunOption("server.max_requests", "--max-requests", int, BUDGET, metavar="N", min=1,
        help="Stop when all runs in this folder have sent N requests."),
    RunOption("server.max_total_tokens", "--max-tokens", int, BUDGET, metavar="N", min=1,
        help="Stop when the model has read and written N tokens."),
    RunOption("server.max_cost", "--max-cost", float, BUDGET, metavar="PRICE",
        help="Stop when the tokens have cost PRICE."),
    RunOption("server.max_failure_frac", "--max-failures", float, BUDGET, metavar="SHARE", min=0, max=1, show_default="0.9",
        help="Stop when more than this share of 100 replies in a row is unusable; 1: never."),
    RunOption("title", "--title", str, DATASET, metavar="TEXT", show_default="named after the source",
        help="The title of the dataset's card."),
)  # fmt: skip
CONTEXT, CONFIG = (
    _parameter("context", Context),
    _parameter(
        "config",
        Annotated[
            Path | None,
            Option(
                metavar="FILE", help="YAML file with these and more settings; options win over it.", rich_help_panel=DATASET
            ),
        ],
        None,
    ),
)


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The settings of a run, with the file and the options (by config key) that they come from."""

    config: "Config"
    file: Path | None
    options: dict[str, str]  # the option that set a key; keys of sections as `generate.max_tokens`


def read_settings(context: Context, file: Path | None, given: Mapping[RunOption, Any]) -> RunSettings:
    """Return the settings that options, file and defaults come to. Raises ConfigError."""
    from pipeline.config.files import resolve

    settings: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def put(key: str, value: Any, option: str) -> None:
        section, dot, name = key.partition(".")
        if dot:
            settings.setdefault(section, {})[name] = value
        else:
            settings[key] = value
        origins[key] = option

    if flags := vllm_flags(context):
        put(FLAGS_KEY, flags["flags"], AFTER_DASHES)
    for option, value in given.items():
        if value not in (None, "", [], [""]):
            if option.key in origins:
                problem = f"{option.flag} and {origins[option.key]} exclude each other"
                raise ConfigError(problem, hint="pass one of them")
            put(option.key, option.read(value), option.flag)
    return RunSettings(resolve(file, **settings), file, origins)


def _show_all_options(context: Context, value: bool) -> None:
    if value:
        for parameter in context.command.params:
            if isinstance(parameter, TyperOption):
                parameter.hidden = False
        echo(context.get_help())
        raise Exit


HELP_ALL = _parameter(
    "help_all",
    Annotated[bool, Option("--help-all", is_eager=True, callback=_show_all_options, help="Show all options, and exit.")],
    False,
)
Command = Callable[..., None]


def with_run_settings(command: Command) -> Command:
    """Return a command with the options of a run before its own; it receives the merged settings as `settings`."""
    own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "settings"]

    def run(**values: Any) -> None:
        settings = read_settings(values["context"], values["config"], {option: values[option.name] for option in OPTIONS})
        command(settings=settings, **{parameter.name: values[parameter.name] for parameter in own})

    shared = (CONTEXT, *(option.parameter for option in OPTIONS), CONFIG, HELP_ALL)
    parameters = [*shared, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # read by Typer
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run
