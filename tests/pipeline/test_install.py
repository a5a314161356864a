"""Hints name the command that installs a missing package."""

import ast
import re
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from pipeline import install
from pipeline.cli import EXTRAS
from pipeline.images.rendering import PACKAGES
from pipeline.install import ROOT, install_command
from tests.commands import run_python
from tests.test_architecture import MODULES, PATHS, imports, parse

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TRAIN = ("trainer.launch", "trainer.captioner", "trainer.evaluate")
# For each install hint: its extras, the modules that the command imports first, and further packages.
NEEDS = [
    (("embedded",), ("pipeline.inference.embedded",), ["torchvision"]),
    (("train",), TRAIN, []),
    (("train",), (), ["torch", "safetensors", "transformers"]),  # pipeline/images/clip.py
    (EXTRAS["serve-captioner"], ("trainer.server",), []),
    (("timm",), (), ["timm"]),
    (("ray",), (), ["ray"]),
    (("s3",), (), ["s3fs", "aiobotocore"]),
    *(((extra,), (), [package]) for extra, package in PACKAGES.items()),
]


def distribution_names(requirements: Sequence[str]) -> set[str]:
    return {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for line in requirements}


def packages_loaded_by(modules: Sequence[str]) -> set[str]:
    """Return the packages that these modules import at their start, directly or through our modules."""
    waiting, seen = [*modules], set[str]()
    while waiting:
        if (module := waiting.pop()) not in seen:
            seen.add(module)
            waiting += imports(MODULES[module], top_only=True) if module in MODULES else ()
    roots = {module.partition(".")[0] for module in seen - MODULES.keys()}
    return roots - sys.stdlib_module_names - {*install.PACKAGES}


@pytest.mark.parametrize(("extras", "modules", "packages"), NEEDS, ids=lambda value: "+".join(value))
def test_extras_in_an_install_hint_provide_the_packages_of_the_command(
    extras: tuple[str, ...], modules: tuple[str, ...], packages: list[str]
) -> None:
    lines = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    provided = distribution_names([*PROJECT["dependencies"], *lines])
    loaded = packages_loaded_by(modules) - packages_loaded_by(["pipeline.run"])
    for package in {*packages, *loaded}:
        names = {name.lower() for name in packages_distributions()[package]}
        assert names & provided, f"{package} is not in {extras}"


def test_extras_of_every_install_hint_are_tested() -> None:
    hints: set[tuple[str, ...]] = {EXTRAS["serve-captioner"]}
    for path in PATHS:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "install_command":
                arguments = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                hints |= {tuple(map(str, arguments))} if arguments else set()
    assert ("embedded",) in hints
    assert hints <= {extras for extras, _, _ in NEEDS}


def test_install_command_of_an_extra_lists_its_packages() -> None:
    extras = PROJECT["optional-dependencies"]
    command = install_command("train", "serve", package="torch")
    assert command.split()[:2] == ["pip", "install"]
    assert command.split()[2:] == [f"'{line}'" for line in extras["train"] + extras["serve"]]


def test_package_without_extra_is_installed_by_name() -> None:
    assert install_command("train", package="rich") == "pip install rich"


def test_uninstalled_source_folder_is_installed_with_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "DISTRIBUTION", "not-installed")
    assert install_command("train") == f"pip install '{ROOT}[train]'"


def test_module_runs_next_to_a_folder_named_prompts(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    done = run_python("-m", "pipeline", "--version", cwd=tmp_path)
    assert done.stdout == f"synth {install.installed_version()}\n"
