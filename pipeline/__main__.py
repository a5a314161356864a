"""Run the command line: `python -m pipeline`."""

import sys
from pathlib import Path

if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
    # The working directory may hold the user's own folder `prompts`, which would shadow our package.
    del sys.path[0]

from pipeline.cli import main

main()
