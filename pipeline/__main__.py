"""Run the command line: `python -m pipeline`."""

import sys
from pathlib import Path

if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
    del sys.path[0]  # the working directory: a folder `prompts` there, as `synth init` writes it, is no package of ours

from pipeline.cli import main

main()
