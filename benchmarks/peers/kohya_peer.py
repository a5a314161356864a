"""Reads an export with the dataset classes in kohya's sd-scripts, as its LoRA trainers do.

The TOML settings name the image folders and the suffix of the text files.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace


def read(folder: Path, side_px: int) -> dict[str, int]:
    """Return the number of images, of text files, and of text files whose caption was read."""
    import torch
    from library import config_util, strategy_base

    class Words(strategy_base.TokenizeStrategy):
        """Replaces the tokenizers, because captions are only read here."""

        def tokenize(self, text: str | list[str]) -> list[torch.Tensor]:
            texts = [text] if isinstance(text, str) else text
            return [torch.tensor([len(one) for one in texts])]

    strategy_base.TokenizeStrategy.set_strategy(Words())
    sanitizer = config_util.ConfigSanitizer(True, False, False, True)
    subset = {"image_dir": str(folder), "caption_extension": ".txt", "num_repeats": 1}
    written = {
        "datasets": [{"resolution": side_px, "batch_size": 8, "enable_bucket": True, "subsets": [subset]}]
    }
    unset = SimpleNamespace(prior_loss_weight=1.0, debug_dataset=False)
    blueprint = config_util.BlueprintGenerator(sanitizer).generate(written, unset)
    group, _ = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
    group.set_current_strategies()
    num_images, captions = 0, []
    for index in range(len(group)):
        batch = group[index]
        num_images += len(batch["images"])
        captions += batch["captions"]
    beside = [path.read_text().strip() for path in folder.glob("*.txt")]
    return {"images": num_images, "captions": len(beside), "read": sum(text in captions for text in beside)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side-px", type=int, default=256)
    options = parser.parse_args()
    print(json.dumps(read(options.folder, options.side_px)))
