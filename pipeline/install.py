"""The installed package: its name, its version and its extras."""

import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

DISTRIBUTION = "synth-captioner"  # the name `synth` on PyPI is somebody else's
PACKAGES = ("pipeline", "trainer", "prompts", "data_cards")  # top-level packages of this distribution
ROOT = Path(__file__).parents[1]


@cache
def installed_version() -> str:
    """Return the version of this package; `unknown` where it runs from a folder without being installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


def install_command(extra: str = "") -> str:
    """Return the command that installs this package with an extra: from its folder where it runs from one, else by name."""
    extras = f"[{extra}]" if extra else ""
    if (ROOT / "pyproject.toml").exists():
        return f"pip install '{ROOT}{extras}'"
    return f"pip install '{DISTRIBUTION}{extras}'"


def extra_of(package: str) -> str:
    """Return the command that installs a missing package: by the extra that brings it, where one does."""
    try:
        extras = metadata(DISTRIBUTION).get_all("Provides-Extra") or []
        requirements = [line for line in requires(DISTRIBUTION) or [] if _names(line, package)]
    except PackageNotFoundError:
        return f"pip install {package}"
    for extra in extras:
        if any(f'extra == "{extra}"' in line for line in requirements):
            return install_command(extra)
    return install_command() if requirements else f"{sys.executable} -m pip install {package}"


def needed_packages() -> dict[str, str]:
    """Return the version of each package that this one cannot do without; nothing where it is not installed itself."""
    try:
        requirements = [line for line in requires(DISTRIBUTION) or [] if "extra ==" not in line]
        names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements]
        return {name: version(name) for name in names}
    except PackageNotFoundError:
        return {}


def _names(requirement: str, package: str) -> bool:
    """Return whether a requirement is of a package, by the name under which it is imported or distributed."""
    start = requirement.lower().replace("-", "_")
    return start.startswith(package.lower().replace("-", "_"))
