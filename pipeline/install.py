"""Metadata of the installed package: its name, version and extras."""

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from shlex import quote

# `synth` on PyPI is a different project.
DISTRIBUTION = "synth-captioner"
# The top-level packages of this distribution.
PACKAGES = ("pipeline", "trainer", "prompts", "data_cards")
ROOT = Path(__file__).parents[1]


@cache
def installed_version() -> str:
    """Return the version of this package, or "unknown" if it runs from a folder without being installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


def install_command(*extras: str, package: str = "") -> str:
    """Return the command that installs the packages of these extras, or only `package` if they lack it."""
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:  # this package runs from its source folder
        return f"pip install '{ROOT}[{','.join(extras)}]'"
    named = [line for line in lines if any(f'extra == "{extra}"' in line for extra in extras)]
    packages = dict.fromkeys(line.partition(";")[0].strip() for line in named)
    if package and not any(_name_of(line) == package for line in packages):
        return f"pip install {package}"
    return f"pip install {' '.join(map(quote, packages))}"


def needed_packages() -> dict[str, str]:
    """Return the installed versions of the required packages, or {} if this package is not installed."""
    try:
        requirements = [line for line in requires(DISTRIBUTION) or [] if "extra ==" not in line]
        return {name: version(name) for name in map(_name_of, requirements)}
    except PackageNotFoundError:
        return {}


def _name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
