"""The installed package: its name and version, its extras, and whether its modules are really its own."""

import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import ConfigError

DISTRIBUTION = "synth-captioner"  # the name `synth` on PyPI is somebody else's
PACKAGES = {  # the top-level packages that this distribution installs, by how their __init__.py begins
    "pipeline": "From images to a checked, versioned and published vision-language dataset.",
    "trainer": "From a dataset version to a trained and scored captioner.",
    "prompts": "Prompt templates as package data",
    "data_cards": "Templates of the cards",
}
ROOT = Path(__file__).parents[1]


@cache
def installed_version() -> str:
    """Return the version of this package; `unknown` where it runs from a folder without being installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


def check_packages() -> None:
    """Raise ConfigError if one of our top-level packages is somebody else's: others install the same names."""
    for name, beginning in PACKAGES.items():
        spec = find_spec(name)
        file = Path(spec.origin) if spec and spec.origin else None
        if file is not None and not file.is_file():
            continue  # within a zip file
        if file is None or not file.read_text(encoding="utf-8", errors="replace").startswith(f'"""{beginning}'):
            where = f"in {file.parent} is another package of that name" if file else "is not installed"
            hint = f"install synth into an environment of its own: {install_command()}"
            raise ConfigError(f"the package `{name}` {where}", hint=hint)


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
