"""Commands that make a dataset: generate, serve, doctor, sources."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, BadParameter, Context, Option, echo

from pipeline.cli.options import DATASET_PATH, AsJson, read_pairs, vllm_flags
from pipeline.cli.output import print_prediction, print_run_result, show
from pipeline.progress import show_progress
from pipeline.storage.object_store import is_remote


def generate(
    context: Context,
    source: Annotated[str | None, Option(help="Where the images come from; `synth sources` lists the names.")] = None,
    split: Annotated[str | None, Option(help="Which split of the source to read, where it has some.")] = None,
    columns: Annotated[
        str | None, Option(help="Which column is what: image=COLUMN,references=COLUMN,pages=COLUMN,split=COLUMN.")
    ] = None,
    allow_urls: Annotated[
        bool | None, Option("--allow-urls", help="Fetch images that rows name by URL, from the public network.")
    ] = None,
    split_list: Annotated[
        Path | None, Option(help="Karpathy's dataset_flickr30k.json, for a copy that has lost the split.")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        Option(
            metavar="SOURCE[#SPLIT]",
            help="Leave out the images of another source, such as flickr30k#test; may be given several times.",
        ),
    ] = None,
    limit: Annotated[int | None, Option(min=1, help="Stop after this many images.", show_default="all; scenes: 1000")] = None,
    seed: Annotated[int | None, Option(help="Draws scenes, samples replies and splits.", show_default="0")] = None,
    tasks: Annotated[str | None, Option(help="What to ask, with commas.", show_default="caption,qa; of decks deck_qa")] = None,
    language: Annotated[
        str | None, Option(help="The language of the texts: others are rejected; any keeps all.", show_default="en")
    ] = None,
    license_: Annotated[str | None, Option("--license", help="The license of your own images, such as cc-by-4.0.")] = None,
    title: Annotated[str | None, Option(help="The title of the dataset's card.", show_default="named after the source")] = None,
    out: Annotated[
        Path | None,
        Option(
            **DATASET_PATH,
            help="Dataset folder; run again to continue it. On a cluster also s3://BUCKET/NAME or gs://BUCKET/NAME.",
            show_default="data/SOURCE",
        ),
    ] = None,
    from_stage: Annotated[str | None, Option(help="Start at this stage, from what the one before it left.")] = None,
    verify: Annotated[
        str | None,
        Option(help="What to ask again: round_trip, claims, blind, evidence, alignment, with commas.", show_default="nothing"),
    ] = None,
    engine: Annotated[
        str | None, Option(help="auto, embedded (a model in this process) or vllm (a server).", show_default="auto")
    ] = None,
    model: Annotated[
        str | None, Option(help="tiny, a folder, or a Hub id of a Qwen2.5-VL.", show_default="by source and engine")
    ] = None,
    base_url: Annotated[
        list[str] | None, Option(help="A vLLM server that runs already, ending in /v1; may be given several times.")
    ] = None,
    executor: Annotated[
        Literal["local", "ray"], Option(help="local: in this process; ray: on a Ray cluster, in shards.")
    ] = "local",
    ray_address: Annotated[
        str | None, Option(help="The Ray cluster.", show_default="one on this machine, for as long as the command runs")
    ] = None,
    shards: Annotated[
        int | None, Option(min=1, help="On a cluster, cut the data into so many parts.", show_default="16")
    ] = None,
    workers: Annotated[
        int | None, Option(min=1, help="On a cluster, so many ask at once.", show_default="one for each GPU, or CPU but one")
    ] = None,
    config: Annotated[Path | None, Option(help="YAML file with the same settings and more; flags win over it.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Ask about a few images, and say what all of them would take.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn images into a checked, deduplicated and versioned dataset.

    What stands after -- goes to the vLLM server that is started: synth generate --engine vllm -- --max-num-seqs 64
    """
    from pipeline.config import resolve
    from pipeline.dry_run import predict_run
    from pipeline.executors.base import ClusterOptions
    from pipeline.run import generate_dataset

    resolved = resolve(
        config,
        source=source,
        source_split=split,
        columns=read_pairs(columns, "--columns") if columns else None,
        allow_urls=allow_urls,
        split_list=split_list,
        exclude=exclude or None,
        limit=limit,
        seed=seed,
        tasks=tasks.split(",") if tasks else None,
        license=license_,
        title=title,
        verify={"checks": verify.split(",")} if verify else None,
        filter={"language": None if language == "any" else language} if language else None,
        engine=engine,
        model=model,
        base_url=base_url or None,
        server=vllm_flags(context),
    )
    if executor == "local" and (ray_address, shards, workers) != (None, None, None):
        raise BadParameter("--ray-address, --shards and --workers go with --executor ray", param_hint="--executor")
    if executor == "ray" and (from_stage or dry_run):
        raise BadParameter("--from-stage and --dry-run go with --executor local", param_hint="--executor")
    if executor == "local" and out and is_remote(out):
        raise BadParameter(f"{out} goes with --executor ray, and without --dry-run", param_hint="--out")
    if dry_run:
        with show_progress() as progress:
            prediction = predict_run(resolved, out, progress)
        print_prediction(prediction)
        show(prediction, as_json, "hours")
        return
    cluster = ClusterOptions(ray_address, shards, workers) if executor == "ray" else None
    with show_progress() as progress:
        result = generate_dataset(resolved, out, from_stage, progress, cluster)
    print_run_result(result, as_json=as_json)


def serve(
    context: Context,
    model: Annotated[str, Option(help="A folder, a Hub id, or tiny.")] = "Qwen/Qwen2.5-VL-3B-Instruct",
    port: Annotated[int | None, Option(min=1, max=65535, help="Listen here.", show_default="any free one")] = None,
    log: Annotated[Path, Option(help="Where the server's own output goes.")] = Path("vllm.log"),
) -> None:
    """Run a vLLM server on this machine until Ctrl-C, for `synth generate --base-url`.

    It listens on loopback, behind the key in SYNTH_API_KEY, or a random one. What stands after -- goes to vLLM.
    """
    from pipeline.config import ServerConfig
    from pipeline.inference.engines import serve_model

    server = ServerConfig(**(vllm_flags(context) or {}))
    with show_progress() as progress:
        serve_model(model, server, port, log, progress, lambda values: show(values, False, "url"))


def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: what is installed, which engine would be used, and whether memory, disk and access suffice."""
    from pipeline.doctor import examine

    findings = examine()
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
