"""Commands that make a dataset: init, doctor, preview, generate, serve."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, BadParameter, Context, Option

from pipeline.cli.options import DATASET_PATH, LOCAL_PATH, AsJson, vllm_flags
from pipeline.cli.output import echo, print_prediction, print_preview, print_run_result, say, show
from pipeline.cli.run_options import CLUSTER, DATASET, NO_MODEL, RunSettings, with_run_settings
from pipeline.errors import ConfigError
from pipeline.progress import show_progress
from pipeline.storage.object_store import is_remote


def _dataset_option(*names: str, **more: Any) -> Any:
    return Option(*names, rich_help_panel=DATASET, **more)


def _cluster_option(**more: Any) -> Any:
    return Option(rich_help_panel=CLUSTER, hidden=True, **more)


@with_run_settings
def generate(
    settings: RunSettings,
    out: Annotated[
        Path | None,
        _dataset_option(
            **DATASET_PATH,
            help="Dataset folder; run again to continue it. With --executor ray also s3://BUCKET/NAME or gs://BUCKET/NAME.",
            show_default="data/SOURCE",
        ),
    ] = None,
    dry_run: Annotated[
        bool, _dataset_option("--dry-run", help="Ask about 32 images, and predict hours, tokens, money and kept rows of all.")
    ] = False,
    print_config: Annotated[
        bool, _dataset_option("--print-config", help="Print all settings and their origins, and exit.", hidden=True)
    ] = False,
    as_json: Annotated[bool, _dataset_option("--json", help="Print JSON to stdout.", hidden=True)] = False,
    executor: Annotated[
        Literal["local", "ray"], _cluster_option(help="local: in this process; ray: on a Ray cluster, in shards.")
    ] = "local",
    ray_address: Annotated[
        str | None, _cluster_option(help="Address of the Ray cluster.", show_default="a cluster on this machine for this run")
    ] = None,
    shards: Annotated[int | None, _cluster_option(min=1, help="Number of shards.", show_default="16")] = None,
    workers: Annotated[
        int | None,
        _cluster_option(min=1, help="Number of shards asked at once.", show_default="one per GPU, else per CPU but one"),
    ] = None,
) -> None:
    """Turn images into a checked, deduplicated and versioned dataset.

    Arguments after -- are passed to the vLLM server that synth starts: synth generate --engine vllm -- --max-num-seqs 64
    """
    if print_config:
        _print_settings(settings, as_json=as_json)
        return
    from pipeline.dataset.directory import remember_dataset
    from pipeline.dry_run import predict_run
    from pipeline.executors.base import ClusterOptions
    from pipeline.executors.messages import describe_warnings
    from pipeline.run import STEPS, generate_dataset

    if executor == "local" and (ray_address, shards, workers) != (None, None, None):
        raise BadParameter("--ray-address, --shards and --workers go with --executor ray", param_hint="--executor")
    if executor == "ray" and dry_run:
        raise BadParameter("--dry-run goes with --executor local", param_hint="--executor")
    if executor == "local" and out and is_remote(out):
        raise BadParameter(f"{out} goes with --executor ray, and without --dry-run", param_hint="--out")
    if NO_MODEL in settings.options.values() and settings.config.asks_model:
        asked = ", ".join((*settings.config.tasks, *settings.config.verify.checks))
        raise ConfigError(f"{NO_MODEL} asks no model, and the settings ask for {asked}", hint="remove one of them")
    if dry_run:
        with show_progress() as progress:
            prediction = predict_run(settings.config, out, progress)
        print_prediction(prediction)
        show(prediction, as_json, "hours")
        return
    cluster = ClusterOptions(ray_address, shards, workers) if executor == "ray" else None
    with show_progress() as progress:
        result = generate_dataset(settings.config, out, progress, cluster)
    remember_dataset(out)
    warnings = describe_warnings(STEPS, result.plan, result.version, result.funnel)
    print_run_result(result, warnings, settings.config.server, shown=progress.warnings, as_json=as_json)


def _print_settings(settings: RunSettings, *, as_json: bool) -> None:
    from pipeline.config.files import as_yaml, describe_settings
    from pipeline.sources import with_source_defaults

    lines = describe_settings(with_source_defaults(settings.config), settings.file, settings.options)
    if as_json:
        echo(json.dumps({key: {"value": value, "from": origin} for key, value, origin in lines}))
        return
    for key, value, origin in lines:
        echo(f"{key}: {as_yaml(value)}  # {origin}")


@with_run_settings
def preview(
    settings: RunSettings,
    number: Annotated[int, Option("-n", "--number", min=1, max=100, help="Ask about this many images.")] = 4,
    page: Annotated[
        Path | None, Option(**LOCAL_PATH, help="Where the page goes.", show_default="preview.html in data/SOURCE")
    ] = None,
    out: Annotated[
        Path | None,
        Option(**LOCAL_PATH, help="Dataset folder that keeps the replies for `synth generate`.", show_default="data/SOURCE"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask about a few images, print their texts, and write a small page with both. The replies are kept.

    Arguments after -- are passed to the vLLM server that synth starts.
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

    It listens on loopback and requires the key in SYNTH_API_KEY, or a random one. Arguments after -- are passed to vLLM.
    """
    from pipeline.config.sections import ServerConfig
    from pipeline.inference.engines import serve_model

    server = ServerConfig(**(vllm_flags(context) or {}))
    with show_progress() as progress:
        serve_model(model, server, port, log, progress, lambda values: show(values, False, "url"))


def doctor(
    model: Annotated[str | None, Option(metavar="MODEL", help="A folder or a Hub id: does it fit here?")] = None,
    list_sources: Annotated[bool, Option("--sources", help="List the sources that `synth generate` reads.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check this machine: installed packages, the engine that would be used, memory, disk and access."""
    if list_sources:
        _print_sources(as_json=as_json)
        return
    from pipeline.doctor import examine

    findings = examine(model)
    if as_json:
        echo(json.dumps([asdict(finding) for finding in findings]))
        return
    for finding in findings:
        echo(f"{'ok  ' if finding.is_ok else 'no  '} {finding.name:<12} {finding.result}")
        if finding.hint:
            echo(f"     {'':<12} {finding.hint}")


def _print_sources(*, as_json: bool) -> None:
    from pipeline.sources import SOURCES

    if as_json:
        echo(json.dumps([source.describe() for source in SOURCES]))
        return
    for source in SOURCES:
        echo(f"{source.name:<14} {source.what}")
        echo(f"{'':<14} {source.example}")
        echo(f"{'':<14} license: {source.license}; needs: {source.needs}")
