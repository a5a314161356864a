"""Commands that make a dataset: init, doctor, preview, estimate, generate, serve."""

import json
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, BadParameter, Context, Option

from pipeline.cli.options import DATASET_PATH, LOCAL_PATH, AsJson, option, path_option, vllm_flags
from pipeline.cli.output import echo, print_estimate, print_preview, print_run_result, say, show
from pipeline.cli.run_options import CLUSTER, DATASET, with_run_settings
from pipeline.errors import EngineError
from pipeline.progress import show_progress

if TYPE_CHECKING:
    from pipeline.config import Config


def _cluster_option(text: str, default: str | bool = True, **more: Any) -> Any:
    return option(text, default, rich_help_panel=CLUSTER, hidden=True, **more)


OUT = option(
    "Dataset folder. To resume, repeat the command. --executor ray accepts s3://BUCKET/NAME and gs:// too.",
    "data/SOURCE",
    **DATASET_PATH,
    rich_help_panel=DATASET,
)
SAME_OUT = path_option("Dataset folder, as for `generate`.", "data/SOURCE")


@with_run_settings
def generate(
    config: "Config",
    out: Annotated[Path | None, OUT] = None,
    as_json: AsJson = False,
    executor: Annotated[
        Literal["local", "ray"],
        _cluster_option(
            "Executor: local (this process), or ray (on the Ray cluster at RAY_ADDRESS, or on this machine)."
        ),
    ] = "local",
    shards: Annotated[int | None, _cluster_option("Number of shards.", "16", min=1)] = None,
    workers: Annotated[
        int | None, _cluster_option("Number of parallel workers.", "one per GPU, node or CPU", min=1)
    ] = None,
) -> None:
    """Turn images into a checked, deduplicated and versioned dataset.

    Arguments after -- go to the vLLM server: synth generate --engine vllm -- --max-num-seqs 64
    """
    from pipeline.executors.ray.cluster import ClusterOptions
    from pipeline.plan import Plan

    if executor == "local" and (shards or workers):
        raise BadParameter("--shards and --workers need --executor ray", param_hint="--executor")
    cluster = ClusterOptions(shards=shards, workers=workers) if executor == "ray" else None
    with show_progress() as progress:
        plan = Plan.open(config, out, progress, in_cluster=cluster is not None)
        # The steps import DuckDB, so import them only after invalid settings have been reported.
        from pipeline.executors.messages import describe_warnings
        from pipeline.run import STEPS, run_plan

        result = run_plan(plan, progress, cluster)
    warnings = describe_warnings(STEPS, plan.config.split, result.version, result.funnel)
    print_run_result(result, warnings, config.servers, shown=progress.warnings, as_json=as_json)


@with_run_settings
def preview(
    config: "Config",
    number: Annotated[int, Option("-n", "--number", min=1, max=100, help="Number of images to show.")] = 4,
    out: Annotated[Path | None, SAME_OUT] = None,
    as_json: AsJson = False,
) -> None:
    """Run all steps on a few images, print prompts and texts, and write a report page.

    A later run reuses the replies. Arguments after -- go to the vLLM server.
    """
    from pipeline.plan import Plan

    with show_progress() as progress:
        plan = Plan.open(config, out, progress, is_trial=True)
        from pipeline.preview import preview_run

        result = preview_run(plan, min(number, config.limit or number), progress)
    print_preview(result)
    values = {"images": result.images, "prompts": result.prompts, "page": str(result.page or "")}
    show(values, as_json, "page")


@with_run_settings
def estimate(config: "Config", out: Annotated[Path | None, SAME_OUT] = None, as_json: AsJson = False) -> None:
    """Run all steps on a sample of the images, and estimate time, cost and yield of the whole run.

    `generate` reuses the replies. Arguments after -- go to the vLLM server.
    """
    from pipeline.plan import Plan

    with show_progress() as progress:
        plan = Plan.open(config, out, progress, is_trial=True)
        from pipeline.estimate import estimate_run

        values = estimate_run(plan, progress)
    print_estimate(values, as_json=as_json)


def init(
    folder: Annotated[Path | None, Argument(**LOCAL_PATH, help="Target folder.", show_default=".")] = None,
) -> None:
    """Write a commented synth.yaml, copies of the built-in prompts, and example custom tasks."""
    from pipeline.project import write_project

    settings, *folders = write_project(folder or Path())
    for path in (settings, *folders):
        echo(path)
    say(f"next: edit the files, then run: synth preview --config {settings}")


def serve(
    context: Context,
    model: Annotated[
        str | None,
        option("Model to serve: a folder, a Hub id, or tiny.", "--config, else Qwen2.5-VL-3B-Instruct"),
    ] = None,
    port: Annotated[int, option("Port.", "8000", min=1, max=65535)] = 8000,
    config: Annotated[
        Path | None,
        option("YAML file with the settings `model` and `server.flags`, as for `generate`.", False),
    ] = None,
) -> None:
    """Run a vLLM server on this machine, for `synth generate --base-url`, until Ctrl-C.

    It listens on loopback, and uses one GPU, or a group of GPUs. The API key is SYNTH_API_KEY, or a random
    key. Arguments after -- go to vLLM.
    """
    from pipeline.config import LARGE
    from pipeline.config.files import resolve
    from pipeline.inference.engines import plan_server
    from pipeline.inference.vllm import cannot_run

    flags = vllm_flags(context, "--model")
    # The settings need a source, but this command does not read it.
    settings = resolve(config, model=model, source="folder:.")
    settings = settings.of_model(settings.default_model)
    server = settings.server.model_copy(update={"flags": (*settings.server.flags, *flags)})
    with show_progress() as progress:
        command = plan_server(settings.model or LARGE, server, progress)
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        problem = f"port {port} cannot be used: {os.strerror(error.errno or 0)}"
        raise EngineError(problem, hint="choose another port: --port") from None
    say(f"use the server with:\n  export SYNTH_API_KEY={command.api_key}")
    say(f"  synth generate --base-url http://127.0.0.1:{port}/v1 --source ...")
    arguments = [command.python, *command.arguments, "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | command.environment | {"VLLM_API_KEY": command.api_key}
    try:
        os.execvpe(command.python, arguments, environment)  # noqa: S606
    except OSError as error:
        raise cannot_run(command.python, error) from None


def doctor(
    list_sources: Annotated[bool, Option("--sources", help="List the sources of `synth generate`.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check packages, engines, memory, disk and network of this machine."""
    if list_sources:
        from pipeline.sources import SOURCES

        if as_json:
            echo(json.dumps([source.describe() for source in SOURCES]))
            return
        for source in SOURCES:
            echo(f"{source.name:<14} {source.what}")
            echo(f"{'':<14} {source.example}")
            echo(f"{'':<14} license: {source.license}; needs: {source.needs}")
        return
    from pipeline.doctor import examine

    findings = examine()
    if as_json:
        echo(json.dumps([asdict(finding) for finding in findings]))
        return
    for finding in findings:
        echo(f"{'ok' if finding.is_ok else 'no':<4} {finding.name:<12} {finding.result}")
        if finding.hint:
            echo(f"     {'':<12} {finding.hint}")
