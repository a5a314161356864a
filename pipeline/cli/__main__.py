"""Run the command line: `python -m pipeline.cli`."""

from pipeline.cli import main

main()
