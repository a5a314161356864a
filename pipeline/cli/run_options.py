"""The options of a run, defined once: `generate`, `preview` and `config` take all of them."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Option

from pipeline.cli.options import read_names, read_pairs, vllm_flags

if TYPE_CHECKING:
    from pipeline.config import Config

IMAGES, TEXTS, MODEL, BUDGET = "Images", "What to ask", "Model", "Budget"  # groups of options in --help
DATASET, CLUSTER = "Dataset", "Cluster"
NO_TASKS = "none"
IMPORT_OPTIONS = (
    "context", "source", "split", "columns", "captions", "allow_urls", "allow_partial", "follow_links", "split_list", "exclude",
    "limit", "rows", "every", "license_", "language", "group_by", "seed", "title", "config",
)  # fmt: skip

SECTION_OPTIONS = {  # by key of `server`, `generate` or `verify`
    "flags": "what stands after --",
    "price_in": "--price-in",
    "price_out": "--price-out",
    "max_requests": "--max-requests",
    "max_total_tokens": "--max-tokens",
    "max_cost": "--max-cost",
    "max_failure_frac": "--max-failures",
    "enforced_schema": "--no-enforced-schema",
    "caption_styles": "--styles",
    "caption_words": "--words",
    "samples": "--samples",
    "by": "--select",
    "pairs": "--pairs",
    "repair": "--repair",
    "judge": "--judge",
}


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The settings of a run, with the file and the options (by config key) that they come from."""

    config: "Config"
    file: Path | None
    options: dict[str, str]  # the option that set a key; keys of sections as `generate.max_tokens`


def run_settings(
    context: Context,
    source: Annotated[
        str | None,
        Option(metavar="NAME", help="Where the images come from; `synth sources` lists the names.", rich_help_panel=IMAGES),
    ] = None,
    split: Annotated[
        str | None,
        Option(metavar="SPLIT", help="Read this split of the source only: train, validation or test.", rich_help_panel=IMAGES),
    ] = None,
    columns: Annotated[
        str | None,
        Option(
            metavar="ROLE=COLUMN,...",
            help="Which column is what: image, references, question, answer, pages, split; context=A,B: what prompts may use "
            "as row.A.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    captions: Annotated[
        list[Path] | None,
        Option(
            metavar="FILE",
            help="Captions or questions that people wrote about the images of a folder: JSON of COCO or Karpathy, CSV, JSON "
            "lines; may be given several times.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    allow_urls: Annotated[
        bool | None,
        Option("--allow-urls", help="Fetch images that rows name by URL, from the public network.", rich_help_panel=IMAGES),
    ] = None,
    allow_partial: Annotated[
        bool | None,
        Option(
            "--allow-partial",
            help="Read a Hub dataset also where the Hub has converted only its first part.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    follow_links: Annotated[
        bool | None,
        Option("--follow-links", help="Read files outside of the folder that links in it lead to.", rich_help_panel=IMAGES),
    ] = None,
    split_list: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Karpathy's dataset_flickr30k.json, for a copy that has lost the split.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        Option(
            metavar="SOURCE[#SPLIT]",
            help="Leave out the images of another source, such as flickr30k#test; may be given several times.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        Option(
            metavar="N", min=1, help="Stop after this many images.", show_default="all; scenes: 1000", rich_help_panel=IMAGES
        ),
    ] = None,
    rows: Annotated[
        int | None,
        Option(
            metavar="N",
            min=1,
            help="Read on until N images are kept, and keep no more.",
            show_default="all that were read",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    every: Annotated[
        float | None,
        Option(
            metavar="SECONDS",
            help="Read a frame of a video every so many seconds.",
            show_default="5",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    drop_context: Annotated[
        bool | None,
        Option("--drop-context", help="Keep the columns of context out of the dataset.", rich_help_panel=IMAGES),
    ] = None,
    license_: Annotated[
        str | None,
        Option("--license", metavar="NAME", help="The license of your own images, such as cc-by-4.0.", rich_help_panel=IMAGES),
    ] = None,
    tasks: Annotated[
        str | None,
        Option(
            metavar="TASKS",
            help="What to ask: caption, qa, deck_qa; none: keep what people wrote, and ask no model.",
            show_default="caption,qa; decks: deck_qa",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    task: Annotated[
        list[Path] | None,
        Option(
            metavar="FILE",
            help="A task of your own, in YAML; may be given several times. Without --tasks, nothing else is asked.",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    keep_human: Annotated[
        bool | None,
        Option("--keep-human", help="Take captions and questions that people wrote into the dataset.", rich_help_panel=TEXTS),
    ] = None,
    only_missing: Annotated[
        bool | None,
        Option(
            "--only-missing",
            help="The same, and ask only for what an image has none of.",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    language: Annotated[
        str | None,
        Option(
            metavar="CODE",
            help="The language of the texts; others are rejected; `any` keeps all.",
            show_default="en",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    group_by: Annotated[
        str | None,
        Option(
            metavar="folder|prefix",
            help="Keep images of one folder, or of one name but for its last number, in one split.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    styles: Annotated[
        str | None,
        Option(
            metavar="NAME,...",
            help="Styles of captions: plain, detailed, brief, alt, tags, ocr, or those of your own prompts.",
            show_default="plain,detailed; drawn scenes: brief,detailed",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    words: Annotated[
        int | None,
        Option(metavar="N", help="About how many words a caption should have.", show_default="by style", rich_help_panel=TEXTS),
    ] = None,
    samples: Annotated[
        int | None,
        Option(
            metavar="N",
            min=1,
            help="Ask for N captions of each style, and keep the best.",
            show_default="1",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    select: Annotated[
        str | None,
        Option(
            metavar="HOW",
            help="Which of --samples is the best: consistency, clip, judge or longest.",
            show_default="consistency",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    pairs: Annotated[
        bool | None,
        Option(
            "--pairs", help="Keep the worst of --samples beside the best, to learn preferences from.", rich_help_panel=TEXTS
        ),
    ] = None,
    verify: Annotated[
        str | None,
        Option(
            metavar="CHECKS",
            help="What to check: round_trip, claims, covers, blind, evidence, alignment, references.",
            show_default="nothing",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    repair: Annotated[
        bool | None,
        Option(
            "--repair", help="Write captions with false claims again without them (--verify claims).", rich_help_panel=TEXTS
        ),
    ] = None,
    judge: Annotated[
        str | None,
        Option(metavar="MODEL@URL", help="Have another model rate each text, as columns.", rich_help_panel=TEXTS),
    ] = None,
    seed: Annotated[
        int | None,
        Option(metavar="N", help="Draws scenes, samples replies and splits.", show_default="0", rich_help_panel=TEXTS),
    ] = None,
    engine: Annotated[
        str | None,
        Option(
            metavar="ENGINE",
            help="auto, embedded (a model in this process) or vllm (a server).",
            show_default="auto",
            rich_help_panel=MODEL,
        ),
    ] = None,
    model: Annotated[
        str | None,
        Option(
            metavar="MODEL",
            help="tiny, a folder, or the Hub id of a vision-language model; `synth models` lists some.",
            show_default="by source and engine",
            rich_help_panel=MODEL,
        ),
    ] = None,
    base_url: Annotated[
        list[str] | None,
        Option(
            metavar="URL",
            help="A server that runs already, with the chat protocol of OpenAI; may be given several times.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    no_enforced_schema: Annotated[
        bool | None,
        Option(
            "--no-enforced-schema",
            help="Take a server that does not enforce JSON schemas: check each reply, and ask for bad ones again.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    price_in: Annotated[
        float | None,
        Option(metavar="PRICE", min=0, help="Price of a million tokens that the model reads.", rich_help_panel=MODEL),
    ] = None,
    price_out: Annotated[
        float | None,
        Option(metavar="PRICE", min=0, help="Price of a million tokens that the model writes.", rich_help_panel=MODEL),
    ] = None,
    max_requests: Annotated[
        int | None,
        Option(
            metavar="N", min=1, help="Stop when all runs in this folder have sent so many requests.", rich_help_panel=BUDGET
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        Option(metavar="N", min=1, help="Stop when the model has read and written so many tokens.", rich_help_panel=BUDGET),
    ] = None,
    max_cost: Annotated[
        float | None,
        Option(metavar="PRICE", min=0, help="Stop when the tokens have cost so much, by their prices.", rich_help_panel=BUDGET),
    ] = None,
    max_failures: Annotated[
        float | None,
        Option(
            metavar="SHARE",
            min=0,
            max=1,
            help="Stop when more than this share of 100 replies in a row is unusable; 1: never.",
            show_default="0.9",
            rich_help_panel=BUDGET,
        ),
    ] = None,
    title: Annotated[
        str | None,
        Option(
            metavar="TEXT",
            help="The title of the dataset's card.",
            show_default="named after the source",
            rich_help_panel=DATASET,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        Option(metavar="FILE", help="YAML file with these and more settings; options win over it.", rich_help_panel=DATASET),
    ] = None,
) -> RunSettings:
    """Return the settings that options, file and defaults come to. Raises ConfigError."""
    from pipeline.config import resolve

    server = (vllm_flags(context) or {}) | {
        "price_in": price_in,
        "price_out": price_out,
        "max_requests": max_requests,
        "max_total_tokens": max_tokens,
        "max_cost": max_cost,
        "max_failure_frac": max_failures,
        "enforced_schema": False if no_enforced_schema else None,
    }
    server = {name: value for name, value in server.items() if value is not None}
    generate = {"caption_styles": read_names(styles), "caption_words": words, "samples": samples}
    generate = {name: value for name, value in generate.items() if value is not None}
    checks = {"checks": read_names(verify), "repair": repair, "judge": judge}
    checks = {name: value for name, value in checks.items() if value is not None}
    best = {name: value for name, value in {"by": select, "pairs": pairs}.items() if value is not None}
    human_texts = ("--only-missing", "fill") if only_missing else ("--keep-human", "keep" if keep_human else None)
    given: dict[str, tuple[str, Any]] = {  # config key -> (option, value)
        "source": ("--source", source),
        "source_split": ("--split", split),
        "columns": ("--columns", read_pairs(columns, "--columns") if columns else None),
        "captions": ("--captions", captions or None),
        "drop_context": ("--drop-context", drop_context),
        "allow_urls": ("--allow-urls", allow_urls),
        "allow_partial": ("--allow-partial", allow_partial),
        "follow_links": ("--follow-links", follow_links),
        "split_list": ("--split-list", split_list),
        "exclude": ("--exclude", exclude or None),
        "limit": ("--limit", limit),
        "rows": ("--rows", rows),
        "frame_seconds": ("--every", every),
        "license": ("--license", license_),
        "human_texts": human_texts,
        "tasks": ("--tasks", read_names(tasks)),
        "own_tasks": ("--task", task or None),
        "filter": ("--language", {"language": None if language == "any" else language} if language else None),
        "generate": ("", generate or None),
        "split": ("--group-by", {"group_by": group_by} if group_by else None),
        "verify": ("--verify", checks or None),
        "select": ("", best or None),
        "seed": ("--seed", seed),
        "engine": ("--engine", engine),
        "model": ("--model", model),
        "base_url": ("--base-url", base_url or None),
        "server": ("", server or None),
        "title": ("--title", title),
    }
    options = {
        f"{key}.{name}" if isinstance(value, dict) and key != "columns" else key: SECTION_OPTIONS.get(name, option)
        for key, (option, value) in given.items()
        if value is not None
        for name in (value if isinstance(value, dict) else ("",))
    }
    return RunSettings(resolve(config, **{key: value for key, (_, value) in given.items()}), config, options)


Command = Callable[..., None]


def with_run_settings(command: Command) -> Command:
    """Return a command with the options of `run_settings` before its own; it receives what they come to as `settings`."""
    return _with_settings(command, tuple(inspect.signature(run_settings).parameters), {})


def with_import_settings(command: Command) -> Command:
    """Return a command with the options of `run_settings` that concern no model, in the same way; it asks for no task."""
    return _with_settings(command, IMPORT_OPTIONS, {"tasks": NO_TASKS})


def _with_settings(command: Command, names: Collection[str], fixed: dict[str, Any]) -> Command:
    parameters = inspect.signature(run_settings).parameters
    shared = {name: value for name, value in parameters.items() if name in names}
    own = {name: value for name, value in inspect.signature(command).parameters.items() if name != "settings"}
    unset = {name: None for name in parameters if name not in shared}

    def run(**values: Any) -> None:
        settings = run_settings(**(unset | {name: values[name] for name in shared} | fixed))
        command(settings=settings, **{name: values[name] for name in own})

    taken = [value.replace(kind=inspect.Parameter.KEYWORD_ONLY) for value in (*shared.values(), *own.values())]
    run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]  # read by Typer
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run
