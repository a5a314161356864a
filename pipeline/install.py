"""Metadata of the installed package: its name, version and extras."""

import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

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


def install_command(extra: str = "") -> str:
    """Return the command that installs this package with an extra, from the source folder if there is one."""
    package = ROOT if (ROOT / "pyproject.toml").exists() else DISTRIBUTION
    return f"pip install '{package}{f'[{extra}]' if extra else ''}'"


def extra_of(package: str) -> str:
    """Return the command that installs a missing package, with the extra that requires it if there is one."""
    try:
        extras = metadata(DISTRIBUTION).get_all("Provides-Extra") or []
        requirements = [line for line in requires(DISTRIBUTION) or [] if _is_for(line, package)]
    except PackageNotFoundError:
        return f"pip install {package}"
    for extra in extras:
        if any(f'extra == "{extra}"' in line for line in requirements):
            return install_command(extra)
    return install_command() if requirements else f"{sys.executable} -m pip install {package}"


def needed_packages() -> dict[str, str]:
    """Return the installed versions of the required packages, or {} if this package is not installed."""
    try:
        requirements = [line for line in requires(DISTRIBUTION) or [] if "extra ==" not in line]
        names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements]
        return {name: version(name) for name in names}
    except PackageNotFoundError:
        return {}


def _is_for(requirement: str, package: str) -> bool:
    """Return whether a requirement is for a package, given by its import name or distribution name."""
    return requirement.lower().replace("-", "_").startswith(package.lower().replace("-", "_"))
