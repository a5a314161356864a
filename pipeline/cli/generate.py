"""Commands that make a dataset: generate, import, preview, config, init, serve, doctor, sources."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, BadParameter, Context, Option

from pipeline.cli.options import DATASET_PATH, LOCAL_PATH, AsJson, vllm_flags
from pipeline.cli.output import echo, print_prediction, print_preview, print_run_result, say, show
from pipeline.cli.run_options import CLUSTER, DATASET, RunSettings, with_import_settings, with_run_settings
from pipeline.errors import ConfigError
from pipeline.progress import show_progress
from pipeline.storage.object_store import is_remote


@with_run_settings
def generate(
    settings: RunSettings,
    out: Annotated[
        Path | None,
        Option(
            **DATASET_PATH,
            help="Dataset folder; run again to continue it. On a cluster also s3://BUCKET/NAME or gs://BUCKET/NAME.",
            show_default="data/SOURCE",
            rich_help_panel=DATASET,
        ),
    ] = None,
    from_stage: Annotated[
        str | None,
        Option(
            metavar="STAGE",
            help="Start at a stage, from what the one before it left: source, generate, validate, filter, verify, select, "
            "dedupe, balance, trim, split, review, version.",
            rich_help_panel=DATASET,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        Option(
            "--dry-run",
            help="Ask about a few images, and predict hours, tokens, money and kept rows of all.",
            rich_help_panel=DATASET,
        ),
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON to stdout.", rich_help_panel=DATASET)] = False,
    executor: Annotated[
        Literal["local", "ray"],
        Option(help="local: in this process; ray: on a Ray cluster, in shards.", rich_help_panel=CLUSTER),
    ] = "local",
    ray_address: Annotated[
        str | None,
        Option(
            help="The Ray cluster.",
            show_default="one on this machine, for as long as the command runs",
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    shards: Annotated[
        int | None, Option(min=1, help="Cut the data into so many parts.", show_default="16", rich_help_panel=CLUSTER)
    ] = None,
    workers: Annotated[
        int | None,
        Option(min=1, help="So many ask at once.", show_default="one for each GPU, or CPU but one", rich_help_panel=CLUSTER),
    ] = None,
) -> None:
    """Turn images into a checked, deduplicated and versioned dataset.

    What stands after -- goes to the vLLM server that is started: synth generate --engine vllm -- --max-num-seqs 64
    """
    from pipeline.dataset.directory import remember_dataset
    from pipeline.dry_run import predict_run
    from pipeline.executors.base import ClusterOptions
    from pipeline.executors.messages import describe_warnings
    from pipeline.run import STAGES, generate_dataset

    if executor == "local" and (ray_address, shards, workers) != (None, None, None):
        raise BadParameter("--ray-address, --shards and --workers go with --executor ray", param_hint="--executor")
    if executor == "ray" and (from_stage or dry_run):
        raise BadParameter("--from-stage and --dry-run go with --executor local", param_hint="--executor")
    if executor == "local" and out and is_remote(out):
        raise BadParameter(f"{out} goes with --executor ray, and without --dry-run", param_hint="--out")
    if dry_run:
        with show_progress() as progress:
            prediction = predict_run(settings.config, out, progress)
        print_prediction(prediction)
        show(prediction, as_json, "hours")
        return
    cluster = ClusterOptions(ray_address, shards, workers) if executor == "ray" else None
    with show_progress() as progress:
        result = generate_dataset(settings.config, out, from_stage, progress, cluster)
    remember_dataset(out)
    warnings = describe_warnings(STAGES, result.version, result.funnel, settings.config)
    print_run_result(result, warnings, settings.config.server, shown=progress.warnings, as_json=as_json)


@with_import_settings
def import_(
    settings: RunSettings,
    out: Annotated[
        Path | None,
        Option(
            **LOCAL_PATH,
            help="Dataset folder; run again to continue it.",
            show_default="data/SOURCE",
            rich_help_panel=DATASET,
        ),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON to stdout.", rich_help_panel=DATASET)] = False,
) -> None:
    """Turn images and the captions that people wrote into the same kind of dataset, without a model.

    `synth generate --only-missing` then asks a model about the images that have none.
    """
    from pipeline.dataset.directory import remember_dataset
    from pipeline.executors.messages import describe_warnings
    from pipeline.run import STAGES, generate_dataset

    if settings.config.asks_model:
        asked = ", ".join(settings.config.tasks) or "checks"
        raise ConfigError(
            f"`synth import` asks no model, and the settings ask for {asked}", hint="use: synth generate --keep-human"
        )
    with show_progress() as progress:
        result = generate_dataset(settings.config, out, progress=progress)
    remember_dataset(out)
    warnings = describe_warnings(STAGES, result.version, result.funnel, settings.config)
    print_run_result(result, warnings, shown=progress.warnings, as_json=as_json)


@with_run_settings
def preview(
    settings: RunSettings,
    number: Annotated[int, Option("-n", "--number", min=1, max=100, help="Ask about so many images.")] = 4,
    page: Annotated[
        Path | None, Option(**LOCAL_PATH, help="Where the page goes.", show_default="preview.html in data/SOURCE")
    ] = None,
    out: Annotated[
        Path | None,
        Option(**LOCAL_PATH, help="Dataset folder that keeps the replies for `synth generate`.", show_default="data/SOURCE"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask about a few images, and show them with their texts here and on a small page. The replies are kept.

    What stands after -- goes to the vLLM server that is started.
    """
    from pipeline.preview import preview_run, write_preview

    with show_progress() as progress:
        result = preview_run(settings.config, min(number, settings.config.limit or number), out, progress)
    path = write_preview(result, page)
    if as_json:
        echo(json.dumps(result.describe() | {"page": str(path)}))
        return
    print_preview(result)
    echo(path)


@with_run_settings
def config(
    settings: RunSettings,
    show_all: Annotated[bool, Option("--all", help="Show the defaults, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show which settings a run would have, and where each comes from."""
    from pipeline.config.files import as_yaml, describe_settings
    from pipeline.sources import with_source_defaults

    lines = describe_settings(with_source_defaults(settings.config), settings.file, settings.options)
    if as_json:
        echo(json.dumps({key: {"value": value, "from": origin} for key, value, origin in lines}))
        return
    for key, value, origin in lines:
        if show_all or origin != "default":
            echo(f"{key}: {as_yaml(value)}  # {origin}")


def init(
    folder: Annotated[Path | None, Argument(**LOCAL_PATH, help="Folder to write to.", show_default="this one")] = None,
) -> None:
    """Write a commented synth.yaml, a folder of prompts to change, and one of examples for tasks of your own."""
    from pipeline.project import write_project

    settings, *folders = write_project(folder or Path())
    for path in (settings, *folders):
        echo(path)
    say(f"next: edit them, then run: synth preview --config {settings}")


def serve(
    context: Context,
    model: Annotated[str, Option(help="A folder, a Hub id, or tiny.")] = "Qwen/Qwen2.5-VL-3B-Instruct",
    port: Annotated[int | None, Option(min=1, max=65535, help="Listen here.", show_default="any free one")] = None,
    log: Annotated[Path, Option(help="Where the server's own output goes.")] = Path("vllm.log"),
) -> None:
    """Run a vLLM server on this machine until Ctrl-C, for `synth generate --base-url`.

    It listens on loopback, behind the key in SYNTH_API_KEY, or a random one. What stands after -- goes to vLLM.
    """
    from pipeline.config.sections import ServerConfig
    from pipeline.inference.engines import serve_model

    server = ServerConfig(**(vllm_flags(context) or {}))
    with show_progress() as progress:
        serve_model(model, server, port, log, progress, lambda values: show(values, False, "url"))


def doctor(
    model: Annotated[str | None, Option(metavar="MODEL", help="A folder or a Hub id: does it fit here?")] = None,
    as_json: AsJson = False,
) -> None:
    """Look at this machine: what is installed, which engine would be used, and whether memory, disk and access suffice."""
    from pipeline.doctor import examine

    findings = examine(model)
    if as_json:
        echo(json.dumps([asdict(finding) for finding in findings]))
        return
    for finding in findings:
        echo(f"{'ok  ' if finding.ok else 'no  '} {finding.what:<12} {finding.found}")
        if finding.hint:
            echo(f"     {'':<12} {finding.hint}")


def sources(
    name: Annotated[str | None, Argument(help="Show all about this one.", show_default="list all")] = None,
    as_json: AsJson = False,
) -> None:
    """List the sources that `synth generate` can read, or show one of them."""
    from pipeline.sources import SOURCES, find_source

    if as_json:
        descriptions = [spec.describe() for spec in ([find_source(name)] if name else SOURCES)]
        echo(json.dumps(descriptions[0] if name else descriptions))
    elif name:
        for field, value in find_source(name).describe().items():
            echo(f"{field:<8} {value}")
    else:
        for source in SOURCES:
            echo(f"{source.name:<14} {source.what}")
