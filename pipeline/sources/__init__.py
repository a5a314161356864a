"""Stage: source. Where the images come from, by name; a source yields samples, or rows that it had to reject."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config import DRAWN, Config, resolve
from pipeline.errors import ConfigError
from pipeline.types import ALL, Sample, Source, SourceSlice


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """What a person wants to know of a source before using it."""

    name: str
    what: str
    tasks: str
    splits: str
    size: str
    licence: str
    needs: str
    example: str


SOURCES = (
    SourceSpec(
        "scenes",
        "drawn pictures of one to four objects, with known facts",
        "caption, qa",
        "by hash",
        "endless; --seed and --limit choose them",
        "cc0-1.0",
        "nothing",
        "synth generate --source scenes --limit 500",
    ),
    SourceSpec(
        "scenes-deck",
        "decks of four drawn pages, with known facts, for the tiny teacher or any other model",
        "deck_qa",
        "by hash",
        "endless; --seed and --limit choose them",
        "cc0-1.0",
        "nothing",
        "synth generate --source scenes-deck --limit 200",
    ),
    SourceSpec(
        "folder:PATH",
        "every image under a folder, sorted; captions from NAME.txt, metadata.jsonl or metadata.csv beside them",
        "caption, qa",
        "by hash",
        "yours",
        "unknown: say it in the card",
        "a vision-language model",
        "synth generate --source folder:photos --model Qwen/Qwen2.5-VL-3B-Instruct",
    ),
    SourceSpec(
        "parquet:PATH",
        "the images in a Parquet file, or in all under a folder; also s3://, gs://, hf:// and https://, read in place",
        "caption, qa; deck_qa where pages are mapped",
        "as the file names say, else by hash",
        "yours",
        "unknown: say it in the card",
        "a vision-language model",
        "synth generate --source parquet:rows.parquet --map image=photo,references=alt_text",
    ),
    SourceSpec(
        "hub:ORG/NAME",
        "any data set of the Hub that is Parquet, or that the Hub has converted; @REVISION pins another commit than the newest",
        "caption, qa; deck_qa where pages are mapped",
        "as upstream files them",
        "streamed: --limit downloads little",
        "as its card says",
        "the Hub, a vision-language model",
        "synth generate --source hub:ORG/NAME --split train --limit 1000",
    ),
    SourceSpec(
        "flickr30k",
        "everyday photos with five captions each (Young et al., 2014); another copy: flickr30k:ORG/NAME",
        "caption, qa",
        "Karpathy: train 29,000, validation 1,014, test 1,000",
        "31,014 photos, about 4.4 GB",
        "Flickr terms: research only, pixels stay here",
        "the Hub, a vision-language model",
        "synth generate --source flickr30k",
    ),
    SourceSpec(
        "vqav2",
        "photos of COCO with questions and ten answers each (Goyal et al., 2017); one sample is a photo",
        "caption, qa",
        "validation 214,354 questions, test; the default copy has no train",
        "about 40,000 photos in validation",
        "CC-BY-4.0 words, Flickr terms for the photos: pixels stay here",
        "the Hub, a vision-language model",
        "synth generate --source vqav2 --split validation --limit 1000",
    ),
    SourceSpec(
        "slidevqa",
        "decks of up to 20 slides with questions, evidence pages and arithmetic (Tanaka et al., 2023); one sample is a deck",
        "deck_qa",
        "train 10,617, validation 1,652, test 2,215 questions",
        "2,619 decks, 10.9 GB",
        "NTT's licence for evaluation: pixels stay here",
        "the Hub, access granted there, a vision-language model",
        "synth generate --source slidevqa --split validation --limit 50",
    ),
)


def find_source(name: str) -> SourceSpec:
    """Return what is known of a source, by its name with or without what follows the colon."""
    for about in SOURCES:
        if about.name.partition(":")[0] == name.partition(":")[0]:
            return about
    raise ConfigError(f"unknown source: {name}", hint=f"known sources: {', '.join(about.name for about in SOURCES)}")


def is_divisible(config: Config) -> bool:
    """Whether a source can be read in parts: where a limit counts rows, or rows belong together, they must be read in order."""
    kind = config.source.partition(":")[0]
    return config.source in DRAWN or (config.limit is None and kind not in ("vqav2", "slidevqa"))


def open_source(config: Config, part: SourceSlice = ALL) -> Source:
    """Open the source that a config names, or a part of it, where it `is_divisible`.

    Raises:
        ConfigError: the name is unknown, or an option or a task does not go with it.
        SourceError: the source cannot be read.
    """
    kind, _, argument = config.source.partition(":")
    _refuse_options(config, kind)
    source = _open(config, kind, argument, part)
    if source.decks != ("deck_qa" in config.tasks) or (source.decks and len(config.tasks) > 1):
        wanted = "deck_qa" if source.decks else "caption,qa"
        what = "decks of pages" if source.decks else "single images"
        raise ConfigError(
            f"{config.source} holds {what}, and cannot be asked for {', '.join(config.tasks)}", hint=f"pass --tasks {wanted}"
        )
    return source


def read_images(name: str) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """Yield (sample id, images) of a whole source, to be joined with a version that has no pixels."""
    for row in open_source(resolve(source=name)).rows:
        if isinstance(row, Sample):
            yield row.id, row.images


def _open(config: Config, kind: str, argument: str, part: SourceSlice) -> Source:
    if config.source in DRAWN:
        from pipeline.sources import scenes

        opened = scenes.open_scenes if kind == "scenes" else scenes.open_decks
        return opened(config.seed, config.limit, part)
    if kind == "folder" and argument:
        from pipeline.sources.folder import open_folder

        return open_folder(Path(argument).expanduser(), part)
    if kind == "parquet" and argument:
        from pipeline.sources.columns import open_mapped, open_parquet
        from pipeline.sources.remote import is_remote, open_remote

        local = Path(argument).expanduser()
        tables = replace(open_remote(argument), part=part) if is_remote(argument) else open_parquet(local, part)
        return open_mapped(tables, config.columns, config.source_split, kind, allow_urls=config.allow_urls)
    if kind in ("flickr30k", "vqav2", "slidevqa") or (kind == "hub" and argument):
        return _open_hub(config, kind, argument, part)
    find_source(config.source)
    raise ConfigError(f"unknown source: {config.source}", hint=f"say what to read: {find_source(config.source).example}")


def _open_hub(config: Config, kind: str, repo: str, part: SourceSlice) -> Source:
    from pipeline.sources import columns, flickr30k, slidevqa, vqav2
    from pipeline.sources.hub import open_hub

    split = config.source_split
    named = config.source.partition("@")[0]  # another copy than the usual one is told by its name
    if kind == "flickr30k":
        photos = replace(open_hub(repo or flickr30k.REPO), part=part)
        return replace(flickr30k.open_flickr30k(photos, split, config.split_list), name=named)
    if kind == "vqav2":
        return replace(vqav2.open_vqav2(open_hub(repo or vqav2.REPO), split), name=named)
    if kind == "slidevqa":
        return replace(slidevqa.open_slidevqa(open_hub(repo or slidevqa.REPO), split), name=named)
    name = f"{kind}:{repo.partition('@')[0]}"
    tables = replace(open_hub(repo), part=part)
    return columns.open_mapped(tables, config.columns, split, name, allow_urls=config.allow_urls)


def _refuse_options(config: Config, kind: str) -> None:
    if config.source_split is not None and kind in (*DRAWN, "folder"):
        raise ConfigError(f"source {kind} has no splits, but --split {config.source_split} was given", hint="leave --split out")
    if config.columns and kind not in ("hub", "parquet"):
        raise ConfigError(f"source {kind} knows its columns, but --map was given", hint="leave --map out, or use hub:ORG/NAME")
    if config.allow_urls and kind not in ("hub", "parquet"):
        raise ConfigError(f"source {kind} holds its images, but --allow-urls was given", hint="leave --allow-urls out")
    if config.split_list and kind != "flickr30k":
        raise ConfigError("--split-list goes with --source flickr30k alone", hint="leave --split-list out")
