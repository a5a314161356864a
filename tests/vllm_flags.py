"""The flags that `vllm serve` accepts: of an installed vLLM by its own parser, of another one by the sources in its wheel.

The flags of vLLM 0.33.0 lie in `vllm-0.33.0-flags.txt` beside this file; to write such a file again:

    pip download --no-deps --dest . --python-version 3.12 --only-binary :all: --platform manylinux_2_28_x86_64 vllm==0.33.0
    python tests/vllm_flags.py vllm-0.33.0-*.whl > tests/vllm-0.33.0-flags.txt
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

FLAGS_OF_NEWEST = Path(__file__).with_name("vllm-0.33.0-flags.txt")
# The class that adds the arguments stands in the same place in 0.32 and 0.33; the module that it calls has moved.
ASK_PARSER = """
import json
import sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser(prog="vllm")
serve = ServeSubcommand().subparser_init(parser.add_subparsers())
for arguments in json.loads(sys.argv[1]):
    serve.parse_args(arguments)
print("accepted")
"""


def parse_with(python: Path, *commands: list[str]) -> str:
    """Parse the arguments of commands with the parser of an installed vLLM; return `accepted`, or what it says is wrong."""
    command = [str(python), "-c", ASK_PARSER, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, env={"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": ""})
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr.strip()[-500:]


def flags_of_wheel(wheel: Path) -> list[str]:
    """Return the long flags in the sources of a wheel, sorted; nothing of it is imported."""
    with ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("vllm/entrypoints/") and name.endswith("/cli_args.py")]
        sources = [archive.read(name).decode() for name in ("vllm/engine/arg_utils.py", *names)]
    return sorted({flag for source in sources for flag in _flags_in(ast.parse(source))})


def _flags_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="add_argument"), args=arguments):
                constants = [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
                yield from (str(value) for value in constants if str(value).startswith("--"))
            case ast.ClassDef(name="BaseFrontendArgs" | "FrontendArgs", body=body):  # a flag for each field
                fields = [item.target for item in body if isinstance(item, ast.AnnAssign)]
                yield from (f"--{field.id.replace('_', '-')}" for field in fields if isinstance(field, ast.Name))


if __name__ == "__main__":
    print("\n".join(flags_of_wheel(Path(sys.argv[1]))))
