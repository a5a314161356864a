"""Stage: split. Every sample goes to train, validation or test as a whole: as its source says, else by a hash of its id.

The hash knows nothing of the other images, so an image stays in its split when images are added or removed. Images that look
alike share the hash of the first of them, and so their split.
"""

import pyarrow as pa

from pipeline.config import SplitConfig
from pipeline.fingerprint import unit_interval
from pipeline.tables import SPLIT_RANK, require, with_reason


def split_of(group: str, config: SplitConfig, seed: int) -> str:
    """Return the split of one image, or group of images."""
    at = unit_interval("split", seed, group)
    if at < config.test_frac:
        return "test"
    return "validation" if at < config.test_frac + config.validation_frac else "train"


def split_annotations(table: pa.Table, config: SplitConfig, seed: int) -> pa.Table:
    """Return the same rows with a `split`: the one that the source says, else by a hash of `image_group`; none is rejected."""
    require(table, "image_group", "source_split")
    groups, stated = table["image_group"].to_pylist(), table["source_split"].to_pylist()
    # Where the source says it of some, the others of a group go with the most held-out one.
    ranked = sorted(zip(groups, stated, strict=True), key=lambda row: SPLIT_RANK[row[1]])
    of_group = {group: given for group, given in ranked if given}
    rows = zip(groups, stated, strict=True)
    splits = [given or of_group.get(group) or split_of(group, config, seed) for group, given in rows]
    table = table.append_column("split", pa.array(splits, pa.string()))
    return with_reason(table, [None] * table.num_rows)
