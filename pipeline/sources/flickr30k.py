"""Source: Flickr30k, 31,014 photos with five captions each, under the split of Karpathy and Fei-Fei (2015).

The original Hub repository is a script. Its conversion files all rows under `test` and has the true split in a column. A copy
without that column needs a split list: 1,000 of its images are the common test set.
"""

import json
from dataclasses import replace
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import SourceError
from pipeline.sources.base import MAX_METADATA_BYTES, SourceSpec
from pipeline.sources.columns import open_mapped, read_mapping
from pipeline.sources.hub import open_hub
from pipeline.sources.parquet import SPLIT_OF_WORD
from pipeline.storage.untrusted import UnsafeFileError, read_regular
from pipeline.types import FLICKR_TERMS, Source, SourceSlice

REPO = "nlphuji/flickr30k"
KARPATHY_SPLITS = ("train", "validation", "test")


def read_split_list(path: Path) -> dict[str, str]:
    """Return the split of each file name, from Karpathy's JSON: {"images": [{"filename": ..., "split": ...}]}."""
    try:
        images = json.loads(read_regular(path, max_bytes=MAX_METADATA_BYTES))["images"]
        return {image["filename"]: SPLIT_OF_WORD[image["split"]] for image in images}
    except (OSError, ValueError, LookupError, TypeError, RecursionError, UnsafeFileError) as error:
        hint = 'it looks like {"images": [{"filename": ..., "split": ...}]}'
        raise SourceError(f"cannot read the list {path}: {error!r}", hint=hint) from None


def _open(config: Config, repo: str, part: SourceSlice) -> Source:
    """Open photos with their captions and true splits. Raise SourceError if the tables lack the split, and no list has it."""
    tables = replace(open_hub(repo or REPO, allow_partial=config.allow_partial), part=part, license=FLICKR_TERMS)
    split, split_list = config.source_split, config.split_list
    columns = read_mapping(tables.schema, {"split": "filename"} if split_list else {})
    if "split" not in columns and len(tables.files) < len(KARPATHY_SPLITS) and (split != "test" or split not in tables.files):
        files = ", ".join(map(str, tables.files))
        hint = f"use {REPO}, or pass Karpathy's dataset_flickr30k.json: --split-list FILE"
        raise SourceError(f"{tables.name} has lost which images are for testing: all are filed under {files}", hint=hint)
    names = read_split_list(split_list) if split_list else SPLIT_OF_WORD
    return open_mapped(tables, columns, config, config.source.partition("@")[0], names)  # the name of another copy is kept


SPEC = SourceSpec(
    name="flickr30k",
    what="everyday photos with five captions each (Young et al., 2014); another copy: flickr30k:ORG/NAME",
    splits="Karpathy: train 29,000, validation 1,014, test 1,000",
    size="31,014 photos, about 4.4 GB",
    license="Flickr terms: research only, pixels stay here",
    needs="the Hub, a vision-language model",
    example="synth generate --source flickr30k",
    open=_open,
    options=frozenset({"allow_partial", "source_split", "split_list"}),
    usual_split="test",
)
