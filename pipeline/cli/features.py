"""Commands about the hidden states that trainings keep: features list, features prune."""

import json
from datetime import UTC, datetime
from typing import Annotated

from typer import Option

from pipeline.cli.options import AsJson, DataDir
from pipeline.cli.output import echo, last_dataset, say


def features_list(data: DataDir = None, as_json: AsJson = False) -> None:
    """List the stores of hidden states of a dataset, the one used last first: encoder, layers, images, size."""
    from pipeline.dataset.directory import find_dataset
    from pipeline.storage.files import translate_disk_errors
    from trainer.feature_store import FEATURES, list_stores

    folder = find_dataset(data or last_dataset()) / FEATURES
    with translate_disk_errors(folder):
        stores = list_stores(folder)
    if as_json:
        rows = [store.about | {"path": str(store.path), "images": store.images, "bytes": store.num_bytes} for store in stores]
        echo(json.dumps(rows))
        return
    for store in stores:
        used = datetime.fromtimestamp(store.last_used_s, UTC).strftime("%Y-%m-%d %H:%M")
        about, layers = store.about, ",".join(map(str, store.about["layers"]))
        echo(f"{used}  {store.num_bytes / 1e6:>10.1f} MB  {store.images:>9,} images  {store.path.name}")
        echo(f"          {about['encoder']['name']}, layer {layers}, {about['states']} states, {about['precision']}")
    if not stores:
        say(f"no hidden states in {folder}: `synth train` keeps those of a frozen encoder there")


def features_prune(
    data: DataDir = None,
    days: Annotated[float, Option(min=0, help="Remove what no training has used for so many days; 0: everything.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Remove stores of hidden states that no training has used for a while; a training that needs one computes it again."""
    from pipeline.dataset.directory import find_dataset, only_made
    from pipeline.storage.files import translate_disk_errors
    from trainer.feature_store import FEATURES, prune_stores

    folder = find_dataset(data or only_made()) / FEATURES
    with translate_disk_errors(folder):
        removed, num_bytes = prune_stores(folder, days)
    if as_json:
        echo(json.dumps({"removed": removed, "bytes": num_bytes}))
        return
    echo(f"removed {removed} stores of {num_bytes / 1e6:.1f} MB from {folder}")
