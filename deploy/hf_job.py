# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["synth-captioner[gpu]"]
# ///
r"""Caption images of the Hub on a GPU of Hugging Face Jobs, and push the dataset.

    hf jobs uv run --flavor a10g-large --secrets HF_TOKEN --timeout 6h \
        deploy/hf_job.py hub:ORG/IMAGES ORG/CAPTIONS --limit 1000

Further options go to `synth generate`. A job that ends early loses its results: try a small --limit first.
"""

import subprocess
import sys
from pathlib import Path

OUT = Path("data") / "job"


def main(source: str, repo: str, *options: str) -> None:
    """Generate a version, and push it to a private repository."""
    synth = [Path(sys.executable).with_name("synth")]
    subprocess.run([*synth, "generate", "--source", source, "--out", str(OUT), *options], check=True)
    subprocess.run([*synth, "push", str(OUT), "--repo", repo, "--private"], check=True)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
