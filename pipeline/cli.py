"""The `synth` command. Parse, call one function, print; nothing is decided here.

Heavy imports wait until a command needs them: `synth --help` must not load torch, transformers or datasets.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.errors import ConfigError, SynthError
from pipeline.objects import here, is_object, place

if TYPE_CHECKING:
    from pipeline.generate.ask import Counts
    from pipeline.outgoing import Package
    from pipeline.push import Pushed
    from pipeline.run import Result
    from pipeline.store import Version

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
review = typer.Typer(no_args_is_help=True, help="What people say of the texts: mark them in a report, then apply the marks.")
app.add_typer(review, name="review")

DataDir = Annotated[
    Path | None,
    typer.Argument(
        parser=place, metavar="PATH", help="Dataset folder, or one of its versions.", show_default="the last one made"
    ),
]
Checkpoint = Annotated[Path, typer.Argument(parser=here, metavar="PATH", help="Checkpoint folder.")]
VLLM_FLAGS = {"allow_extra_args": True, "ignore_unknown_options": False}  # what stands after --
INTERRUPTED = 130  # how typer ends on Ctrl-C
DataName = Annotated[
    str | None, typer.Option(help="Dataset folder, version, or ORG/NAME@VERSION on the Hub.", show_default="the last one made")
]
Images = Annotated[
    str | None,
    typer.Option(help="Where the images are, for a version without pixels: a folder of files, a dataset folder, or a source."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")]


@app.callback()
def synth() -> None:
    """Make a vision-language dataset, publish it, train on it."""


@app.command(context_settings=VLLM_FLAGS)
def generate(
    context: typer.Context,
    source: Annotated[str | None, typer.Option(help="Where the images come from; `synth sources` lists the names.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split of the source to read, where it has some.")] = None,
    columns: Annotated[
        str | None,
        typer.Option("--map", help="Which column is what: image=COLUMN,references=COLUMN,pages=COLUMN,split=COLUMN."),
    ] = None,
    allow_urls: Annotated[
        bool | None, typer.Option("--allow-urls", help="Fetch images that rows name by URL, from the public network.")
    ] = None,
    split_list: Annotated[
        Path | None, typer.Option(help="Karpathy's dataset_flickr30k.json, for a copy that has lost the split.")
    ] = None,
    never: Annotated[
        list[str] | None,
        typer.Option(help="Leave out the images of another source, such as flickr30k#test; may be given several times."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many images.", show_default="all; scenes: 1000")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Draws scenes, samples replies and splits.", show_default="0")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="What to ask, with commas.", show_default="caption,qa; of decks deck_qa")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=place,
            metavar="PATH",
            help="Dataset folder; run again to continue it. On a cluster also s3://BUCKET/NAME or gs://BUCKET/NAME.",
            show_default="data/SOURCE",
        ),
    ] = None,
    from_stage: Annotated[str | None, typer.Option(help="Start at this stage, from what the one before it left.")] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            help="What to ask again: round_trip, claims, blind, evidence, alignment, with commas.", show_default="nothing"
        ),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="auto, embedded (a model in this process) or vllm (a server).", show_default="auto")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="tiny, a folder, or a Hub id of a Qwen2.5-VL.", show_default="by source and engine")
    ] = None,
    base_url: Annotated[
        list[str] | None, typer.Option(help="A vLLM server that runs already, ending in /v1; may be given several times.")
    ] = None,
    executor: Annotated[
        Literal["local", "ray"], typer.Option(help="local: in this process; ray: on a Ray cluster, in shards.")
    ] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="The Ray cluster.", show_default="one on this machine, for as long as the command runs")
    ] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="On a cluster, cut the data into so many parts.", show_default="16")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="On a cluster, so many ask at once.", show_default="one for each GPU, or CPU but one"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the same settings and more; flags win over it.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Ask about a few images, and say what all of them would take.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn images into a checked, deduplicated and versioned dataset.

    What stands after -- goes to the vLLM server that is started: synth generate --engine vllm -- --max-num-seqs 64
    """
    from pipeline.config import resolve
    from pipeline.estimate import estimate_run
    from pipeline.progress import progress
    from pipeline.run import generate_version

    resolved = resolve(
        config,
        source=source,
        source_split=split,
        columns=read_pairs(columns, "--map") if columns else None,
        allow_urls=allow_urls,
        split_list=split_list,
        never=never or None,
        limit=limit,
        seed=seed,
        tasks=tasks.split(",") if tasks else None,
        verify={"checks": verify.split(",")} if verify else None,
        engine=engine,
        model=model,
        base_url=base_url or None,
        server=vllm_flags(context),
    )
    if executor == "local" and (ray_address, shards, workers) != (None, None, None):
        raise typer.BadParameter("--ray-address, --shards and --workers go with --executor ray", param_hint="--executor")
    if executor == "ray" and (from_stage or dry_run):
        raise typer.BadParameter("--from-stage and --dry-run go with --executor local", param_hint="--executor")
    if executor == "local" and out and is_object(out):
        raise typer.BadParameter(f"{out} goes with --executor ray, and without --dry-run", param_hint="--out")
    if dry_run:
        with progress() as talk:
            estimate = estimate_run(resolved, out, talk)
        say_estimate(estimate)
        show(estimate, as_json, "hours")
        return
    with progress() as talk:
        if executor == "ray":
            from pipeline.cluster.run import Size, generate_on_cluster

            result = generate_on_cluster(resolved, out, Size(ray_address, shards, workers), talk)
        else:
            result = generate_version(resolved, out, from_stage, talk)
    show_version(result, as_json=as_json)


@app.command(context_settings=VLLM_FLAGS)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A folder, a Hub id, or tiny.")] = "Qwen/Qwen2.5-VL-3B-Instruct",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Listen here.", show_default="any free one")] = None,
    log: Annotated[Path, typer.Option(help="Where the server's own output goes.")] = Path("vllm.log"),
) -> None:
    """Run a vLLM server on this machine until Ctrl-C, for `synth generate --base-url`.

    It listens on loopback, behind the key in SYNTH_API_KEY, or a random one. What stands after -- goes to vLLM.
    """
    from pipeline.config import ServerConfig
    from pipeline.generate.engine import serve_model
    from pipeline.progress import progress

    server = ServerConfig(**(vllm_flags(context) or {}))
    with progress() as talk:
        serve_model(model, server, port, log, talk, lambda values: show(values, False, "url"))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: what is installed, which engine would be used, and whether memory, disk and access suffice."""
    from pipeline.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings]))
    for finding in findings if not as_json else []:
        typer.echo(f"{'ok  ' if finding.ok else 'no  '} {finding.what:<12} {finding.found}")
        if finding.hint:
            typer.echo(f"     {'':<12} {finding.hint}")


@app.command()
def sources(
    name: Annotated[str | None, typer.Argument(help="Show all about this one.", show_default="list all")] = None,
    as_json: AsJson = False,
) -> None:
    """List the sources that `synth generate` can read, or show one of them."""
    from pipeline.source import SOURCES, find_source

    if as_json:
        found = [asdict(about) for about in ([find_source(name)] if name else SOURCES)]
        typer.echo(json.dumps(found[0] if name else found))
    elif name:
        for field, value in asdict(find_source(name)).items():
            typer.echo(f"{field:<8} {value}")
    else:
        for about in SOURCES:
            typer.echo(f"{about.name:<14} {about.what}")


@app.command()
def versions(data: DataDir = None, as_json: AsJson = False) -> None:
    """List the versions of a dataset, oldest first: rows, size, parent, date, digest, and where each was pushed."""
    from pipeline.store import Folder, disk_errors, last_made

    folder = Folder(data or last_made())
    with disk_errors(folder.path):
        found = folder.versions() or [folder.version()]  # which says what is wrong
        rows, pushed = [version.summary() for version in found], folder.pushed()
    for row in rows:
        row["pushed"] = [f"{push['repo']}@{push['commit']}" for push in pushed if push["version"] == row["version"]]
    if as_json:
        typer.echo(json.dumps(rows))
    for row in rows if not as_json else []:
        counts = ", ".join(f"{count} {split}" for split, count in row["rows"].items())
        counts += f"  (from {row['parent'] or 'nothing'})"
        typer.echo(f"{row['version']:<9} {row['date']}  {row['digest'][:12]}  {row['bytes'] / 1e6:>8.1f} MB  {counts}")
        for repo in row["pushed"]:
            typer.echo(f"          pushed to {repo}")


@app.command()
def diff(
    names: Annotated[list[str], typer.Argument(metavar="[DIR] V1 V2", help="Versions here, or ORG/NAME@VERSION on the Hub.")],
    rows: Annotated[int, typer.Option(min=0, help="Show so many of the rows that differ.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Say what changed from one version to another, field by field, and why."""
    from pipeline.diff import diff_versions
    from pipeline.pull import names_hub, open_place, pull_version
    from pipeline.store import last_made

    folder = place(names.pop(0)) if len(names) == 3 else None
    if len(names) != 2:
        raise typer.BadParameter("name two versions: [DIR] V1 V2", param_hint="V1 V2")

    def opened(name: str) -> "Version":
        if names_hub(name):
            return pull_version(name)
        if is_object(place(name)) or Path(name).is_dir():
            return open_place(place(name))
        return open_place(folder or last_made(), name)

    found = diff_versions(*map(opened, names))
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"counts": found.counts(), "reasons": found.reasons()}))
    else:
        for line in found.lines(rows):
            typer.echo(line)


@app.command()
def push(
    data: Annotated[
        Path | None,
        typer.Argument(
            parser=place,
            metavar="PATH",
            help="Dataset folder, one of its versions, or a checkpoint.",
            show_default="the last dataset made",
        ),
    ] = None,
    repo: Annotated[str, typer.Option(help="Where to: ORG/NAME.")] = ...,  # type: ignore[assignment]
    version: Annotated[str | None, typer.Option(help="Which version.", show_default="the newest")] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository private.")] = False,
    images: Annotated[
        bool | None,
        typer.Option(
            "--with-images/--no-images", help="Push pixels, or ids and texts only.", show_default="what may be passed on"
        ),
    ] = None,
    acknowledge: Annotated[
        list[str] | None, typer.Option(help="A licence under which you hold the right to pass pixels on; the card says so.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Push a version of a dataset, or a trained captioner, to the Hugging Face Hub: one commit, one tag that never moves."""
    from pipeline.licence import staying_home
    from pipeline.outgoing import outgoing, outgoing_checkpoint
    from pipeline.pull import open_place
    from pipeline.store import Folder, disk_errors

    if data and not is_object(data) and (data / "train.json").exists():
        send(outgoing_checkpoint(data, repo), repo, private=private, dry_run=dry_run, as_json=as_json)
        return
    chosen = open_place(data, version)
    held = staying_home(chosen.manifest["licences"])
    with outgoing(chosen, repo, images=images, acknowledged=acknowledge or ()) as package:
        say(f"licence of the images: {', '.join(chosen.manifest['licences'])}")
        if package.manifest.get("acknowledged"):
            say(f"note: pixels under {', '.join(held)} are pushed, and the card says that you acknowledged their terms")
        elif held and images is None:
            say(f"note: pixels under {', '.join(held)} may not be passed on; ids and texts are pushed without them")
        pushed = send(package, repo, private=private, dry_run=dry_run, as_json=as_json)
    if pushed:
        noted_in = data if data and is_object(data) and data.parent.name != "versions" else chosen.dataset
        with disk_errors(noted_in):
            Folder(noted_in).note_push(chosen.name, pushed.repo, pushed.commit)
        say("load it with:\n  from datasets import load_dataset")
        say(f'  dataset = load_dataset("{pushed.repo}", revision="{pushed.tag}")')


@app.command()
def train(
    data: DataName = None,
    images: Images = None,
    encoder: Annotated[
        str, typer.Option(help="auto, vit, clip, metaclip, tiny-clip, tiny-vit, a folder, or an id of the Hub.")
    ] = "auto",
    layer: Annotated[int | None, typer.Option(help="Whose hidden states: -1 the last.", show_default="-1")] = None,
    decoder: Annotated[str, typer.Option(help="auto, scratch, qwen3, smollm2, a folder, or an id of the Hub.")] = "auto",
    texts: Annotated[
        str | None, typer.Option(help="Whose texts to learn: synthetic, human or mixed.", show_default="synthetic")
    ] = None,
    align_steps: Annotated[
        int | None, typer.Option(min=0, help="First train the connector alone, so many steps.", show_default="0")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="How many steps.", show_default="16 epochs")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides weights, dropout and the order of the data.", show_default="0")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML or train.json with the same settings and more; flags win over it.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=here,
            metavar="PATH",
            help="Checkpoint folder.",
            show_default="DATASET/checkpoints/VERSION-ENCODER-DECODER",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write the curves for TensorBoard, too, into the checkpoint folder.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a captioner on a version, and score it on the test split."""
    from pipeline.progress import progress
    from pipeline.store import disk_errors, safe_name
    from trainer.config import is_of_other_settings, resolve
    from trainer.loop import choose_encoder
    from trainer.loop import train as train_captioner

    version = open_data(data, images)
    flags = {"encoder": encoder, "layer": layer, "decoder": decoder, "texts": texts, "align_steps": align_steps}
    settings = resolve(config, **flags, steps=steps, seed=seed)
    if encoder == "auto" and "encoder" not in settings.model_fields_set:
        settings = settings.model_copy(update={"encoder": choose_encoder(say)})
    say(f"training on {version.path}: encoder {settings.encoder}, decoder {settings.decoder}")
    name = safe_name(f"{version.name}-{Path(settings.encoder).name}-{Path(settings.decoder).name}")
    folder = out or version.dataset / "checkpoints" / name
    if not resume and is_of_other_settings(folder, settings):
        raise ConfigError(f"{folder} holds a captioner of other settings", hint="say where this one goes: --out DIR")
    with progress() as talk, disk_errors(folder):
        metrics = train_captioner(version, settings, folder, resume=resume, tensorboard=tensorboard, talk=talk)
    if metrics:  # of several processes one speaks
        say_scores(metrics)
        show(metrics | {"path": str(folder)}, as_json, "path")


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    data: DataName = None,
    images: Images = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    style: Annotated[str | None, typer.Option(help="Which style to write.", show_default="brief")] = None,
    beams: Annotated[int, typer.Option(min=1, help="Candidates of the search; 1 is greedy.")] = 1,
    clip_score: Annotated[
        str | None, typer.Option(help="Score the fit too, by this CLIP: clip, metaclip, tiny-clip, a folder, or an id.")
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="Write what it says of each image, with the scores, to this file as JSON lines.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a captioner, on its images and on shuffled ones."""
    from pipeline.tables import SPLITS
    from trainer.checkpoint import load_checkpoint, write_captions
    from trainer.evaluate import evaluate_version

    if split not in SPLITS:
        raise typer.BadParameter(f"{split} is none of {', '.join(SPLITS)}", param_hint="--split")
    loaded = load_checkpoint(checkpoint)
    version = open_data(data, images)
    if version.manifest["digest"] != loaded.captioner.config.data.get("digest"):
        say(f"note: this captioner was trained on other data than {version.path}; the split may hold images it has seen")
    metrics = evaluate_version(loaded, version, split, style, beams, clip_score)
    each = metrics.pop("each")
    if captions:
        write_captions(captions, each)
    say_scores(metrics)
    show(metrics, as_json, "scores")


@app.command()
def caption(
    checkpoint: Checkpoint,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    style: Annotated[str | None, typer.Option(help="Which style to write.", show_default="brief")] = None,
    question: Annotated[str, typer.Option(help="Answer this about each image instead.")] = "",
    beams: Annotated[int, typer.Option(min=1, help="Candidates of the search; 1 is greedy.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Write a caption for each image, or the answer to a question about it."""
    from trainer.checkpoint import load_checkpoint
    from trainer.evaluate import describe_files
    from trainer.model.search import Search

    written = describe_files(load_checkpoint(checkpoint), images, style, question, Search(beams=beams))
    what = "answer" if question else "caption"
    for path, text in zip(images, written, strict=True):
        typer.echo(json.dumps({"image": str(path), what: text}) if as_json else f"{path}: {text}")


@app.command()
def experiment(
    file: Annotated[Path, typer.Argument(help="A YAML file; docs/experiment.yaml is one.")],
    out: Annotated[
        Path | None,
        typer.Option(
            parser=here, metavar="PATH", help="Folder of the experiment.", show_default="experiments/NAME OF THE FILE"
        ),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Cells at once.", show_default="GPUs, or cores")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a grid of captioners, and say which data, encoder, decoder or alignment makes the better one."""
    from pipeline.errors import TrainError
    from pipeline.progress import progress
    from pipeline.store import Folder, disk_errors
    from trainer.experiment.cells import default_jobs, plan, run_cells
    from trainer.experiment.grid import cells_of, read_experiment
    from trainer.experiment.result import markdown, write_result

    asked = read_experiment(file)
    folder = out or Path("experiments") / file.stem
    with disk_errors(folder), Folder(folder).lock():
        runs = plan(asked, cells_of(asked), open_data, folder)
        say(f"{len(runs)} cells, of which {sum(run.is_done for run in runs)} are done; in {folder}")
        with progress() as talk:
            failed = run_cells(runs, jobs or default_jobs(), talk)
        finished = [run for run in runs if run.is_done]
        result = write_result(finished, folder) if finished else None
    if result:
        say(markdown(result))
        show(result | {"path": str(folder / "experiment.html")}, as_json, "path")
    if failed:
        for each in failed:
            say(f"failed: {each}")
        hint = "the others are in the result; mend it, and the same command trains what is missing"
        raise TrainError(f"{len(failed)} of {len(runs)} cells failed", hint=hint)


@app.command()
def report(
    data: DataDir = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(parser=here, metavar="PATH", help="Show this training.", show_default="the last one of the dataset"),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Show so many images; of more, some are drawn by lot.")] = 10_000,
) -> None:
    """Write a page that shows a dataset and how a captioner learned from it; above 500 images, a folder.

    Texts can be marked there as good, bad or edited; `synth review apply` takes the marks.
    """
    from pipeline.pull import open_place
    from pipeline.report.write import newest_checkpoint, write_report
    from pipeline.store import disk_errors

    version = open_place(data)
    folder = version.dataset
    with disk_errors(folder):
        typer.echo(write_report(version, folder, checkpoint or newest_checkpoint(folder), rows))


@review.command("apply")
def review_apply(
    marks: Annotated[list[Path], typer.Argument(help="Files of marks that a report exported; later ones win.")],
    data: Annotated[
        Path | None,
        typer.Option(
            parser=place, metavar="PATH", help="Dataset folder that the report was made of.", show_default="the last one made"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take bad texts out, put edited ones in, and make the version that follows. Later runs of generate keep the marks."""
    from pipeline.progress import progress
    from pipeline.run import apply_marks
    from pipeline.store import Folder, last_made

    with progress() as talk:
        result = apply_marks(Folder(data or last_made()), marks, talk)
    show_version(result, as_json=as_json)


def send(package: "Package", repo: str, *, private: bool, dry_run: bool, as_json: bool) -> "Pushed | None":
    """Push a package and print where it is, or with `dry_run` only what would be sent."""
    from pipeline.progress import progress
    from pipeline.push import push_package

    sizes = package.bytes()
    say(f"{package.name}: {len(sizes)} files, {sum(sizes.values()):,} bytes")
    if dry_run:
        show({"files": sizes, "repo": repo, "version": package.name}, as_json, "repo")
        return None
    with progress() as talk:
        pushed = push_package(package, repo, private=private, talk=talk)
    say(f"pushed {pushed.tag} as {pushed.commit}" if pushed.is_new else f"nothing to do: {pushed.tag} is there already")
    show({"url": pushed.url, "repo": pushed.repo, "tag": pushed.tag, "commit": pushed.commit}, as_json, "url")
    return pushed


def open_data(name: str | None, images: str | None) -> "Version":
    """Open what `--data` names, with pixels: from this machine or the Hub, joined from `--images` where it has none."""
    from pipeline.join import images_of_dataset, images_of_files, join_pixels, joined_before, lacks_pixels
    from pipeline.pull import names_hub, open_place, pull_version
    from pipeline.store import Folder, disk_errors

    version = pull_version(name) if name and names_hub(name) else open_place(place(name) if name else None)
    if not lacks_pixels(version):
        return version
    home = Folder(version.dataset / "joined")
    with disk_errors(home.path), home.lock(wait=True):  # of several processes one joins
        if found := joined_before(version, home.path):
            return found
        if images is None:
            raise ConfigError(f"{name or version.path} holds no pixels", hint="say where the images are: --images FOLDER")
        folder = Path(images)
        if not folder.is_dir():
            from pipeline.run import images_of_source

            return join_pixels(version, images_of_source(images), home.path)
        is_dataset = (folder / "versions").is_dir() or (folder / "manifest.json").exists()
        return join_pixels(version, images_of_dataset(folder) if is_dataset else images_of_files(folder), home.path)


def vllm_flags(context: typer.Context) -> dict[str, Any] | None:
    """Return what stands after `--` as settings; anything else that is left over is a mistake."""
    if not context.args:
        return None
    if "--" not in sys.argv:
        raise typer.BadParameter(f"unexpected argument: {context.args[0]}; flags for vLLM come after --")
    return {"flags": context.args}


def read_pairs(text: str, option: str) -> dict[str, str]:
    """Read NAME=VALUE,NAME=VALUE."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name and equals and value for name, equals, value in pairs):
        raise typer.BadParameter(f"{text} does not look like NAME=VALUE,NAME=VALUE", param_hint=option)
    return {name: value for name, _, value in pairs}


def say_counts(counts: "Counts") -> None:
    """Talk about requests: how many were sent, how many attempts they took, and what was wrong with replies."""
    say(f"asked the model {counts.asked} times for {counts.total} replies; the rest was in the journal")
    if set(counts.attempts) - {1}:
        say("attempts: " + ", ".join(f"{count} took {attempt}" for attempt, count in sorted(counts.attempts.items())))
    if counts.flaws:
        say("not usable: " + ", ".join(f"{count} {flaw}" for flaw, count in counts.flaws.most_common()))


def say_estimate(estimate: dict[str, Any]) -> None:
    """Talk about what a whole run would take."""
    from pipeline.progress import duration

    low, high = estimate["invalid_share"]
    say(f"{estimate['sampled_images']} images took {estimate['sampled_seconds']:.1f} s, {estimate['asked']} requests sent")
    say(f"all {estimate['images']} images: {estimate['requests']} requests, {duration(3600 * estimate['hours'])}")
    say(f"tokens: {estimate['prompt_tokens']:,} read, {estimate['reply_tokens']:,} written")
    say(f"dataset: about {estimate['bytes']:,} bytes")
    say(f"annotations that would be rejected: {low:.1%} to {high:.1%} (95 % interval)")


def say_scores(metrics: dict[str, Any]) -> None:
    """Talk about scores: own images beside shuffled ones."""
    say(f"{metrics['split']}: {metrics['images']} images, {metrics['style']} captions, against {metrics['against']}")
    for name, value in metrics["scores"].items():
        low, high = metrics["intervals"].get(name, (None, None))
        interval = f"  [{low:.3f}, {high:.3f}]" if low is not None else ""
        say(f"  {name:<8} {value:6.3f}   with shuffled images {metrics['shuffled_scores'][name]:6.3f}{interval}")
    for kind, found in metrics.get("questions", {}).items():
        say(
            f"  {kind:<8} {found['accuracy']:6.3f}   with shuffled images {found['shuffled']:6.3f}"
            f"   most frequent answer {found['majority']:6.3f}   ({found['count']} questions)"
        )


def say(text: str) -> None:
    """Talk to the person: stderr."""
    print(text, file=sys.stderr)


def show_version(result: "Result", *, as_json: bool) -> None:
    """Say what each stage did, and print the version that came out."""
    for step in result.funnel:
        lost = ", ".join(f"{count} {reason}" for reason, count in step.rejected.items())
        say(f"{step.stage}: {step.kept} of {step.input} {step.unit} kept{f' (rejected: {lost})' if lost else ''}")
    say_counts(result.counts)
    name = result.version.name
    say(f"made {name}" if result.is_new else f"nothing new: {name} already holds exactly these rows")
    show({"version": name, "path": str(result.version.path), "digest": result.version.manifest["digest"]}, as_json, "path")


def show(values: dict[str, Any], as_json: bool, key: str) -> None:
    """Print data to stdout: all of it as JSON, or the one value that a script would want."""
    typer.echo(json.dumps(values) if as_json else str(values[key]))


def main() -> None:
    """Run the command; a known error is one line and a hint, an unknown one is a traceback."""
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
    except SystemExit as done:
        if done.code == INTERRUPTED:
            say("interrupted: what was done is kept; run the same command to go on (train: with --resume)")
        raise


if __name__ == "__main__":
    main()
