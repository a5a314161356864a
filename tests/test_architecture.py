"""Architecture: imports run one way, and no step imports another."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From top to bottom: a part may import itself and the parts in lines below it, and nothing else of the project.
LAYERS = (
    ("pipeline.__main__",),
    ("pipeline.cli",),
    (
        "pipeline.check",
        "pipeline.estimate",
        "pipeline.doctor",
        "pipeline.api",
        "pipeline.preview",
        "pipeline.project",
        "pipeline.reviewing",
        "trainer",
    ),
    ("pipeline.run",),
    ("pipeline.executors",),
    ("pipeline.steps",),
    ("pipeline.plan",),
    ("pipeline.inference",),
    ("pipeline.sources", "pipeline.hub", "pipeline.report", "pipeline.formats", "pipeline.filtering"),
    ("pipeline.dataset",),
    ("pipeline.scenes",),
    ("pipeline.tasks",),
    ("pipeline.images", "pipeline.rules", "pipeline.storage"),
    ("pipeline.digests",),
    ("pipeline.config", "pipeline.tables"),
    ("pipeline.progress", "pipeline.logs"),
    ("pipeline.text", "pipeline.types", "pipeline.install", "pipeline.hub_errors"),
    ("pipeline.errors",),
)
TRAINER_IMPORTS = (
    "dataset",
    "digests",
    "errors",
    "hub.package",
    "hub.pull",
    "hub_errors",
    "images",
    "install",
    "logs",
    "progress",
    "report.html",
    "sources.join",
    "storage",
    "tables",
    "text",
    "types",
    "config",
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for package in ("pipeline", "trainer") for path in (ROOT / package).rglob("*.py")}


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Return the modules that a file imports; with `top_only`, only those of its top-level imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules: set[str] = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


@cache
def import_graph() -> dict[str, set[str]]:
    return {module: imports(path) & MODULES.keys() for module, path in MODULES.items()}


def is_within(module: str, part: str) -> bool:
    return module == part or module.startswith(f"{part}.")


def layer_of(module: str) -> tuple[int, str]:
    return next((n, part) for n, layer in enumerate(LAYERS) for part in layer if is_within(module, part))


def forbidden_imports(graph: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Yield imports that run upwards, or between two parts of the same layer."""
    for module, targets in graph.items():
        for target in sorted(targets - {module, "pipeline", "trainer"}):
            (own_layer, own_part), (layer, part) = layer_of(module), layer_of(target)
            if part != own_part and layer <= own_layer:
                yield module, target


def import_cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return sets of modules that import each other, directly or indirectly."""
    reached: dict[str, set[str]] = {}
    for module in graph:
        waiting, visited = list(graph[module]), set[str]()
        while waiting:
            target = waiting.pop()
            if target not in visited:
                visited.add(target)
                waiting += graph.get(target, ())
        reached[module] = visited
    groups = [frozenset(peer for peer in reached[m] if m in reached.get(peer, ())) for m in graph if m in reached[m]]
    return [set(group) for group in set(groups) if len(group) > 1]


def test_imports_run_from_top_to_bottom() -> None:
    parts = {module: targets for module, targets in import_graph().items() if module not in ("pipeline", "trainer")}
    assert list(forbidden_imports(parts)) == []


def test_the_page_shows_the_layers_that_are_checked() -> None:
    rows = re.findall(r"^\| \d+ \| (`.*`) \|$", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    shown = [tuple(re.findall("`([^`]+)`", row)) for row in rows]
    assert shown == [tuple(part.removeprefix("pipeline.") for part in layer) for layer in LAYERS]


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert import_cycles(import_graph()) == []


def test_no_step_imports_another_step() -> None:
    """The module `base` is not a step."""
    for module, targets in import_graph().items():
        if module.startswith("pipeline.steps."):
            step = module.partition("_")[0]
            others = {target for target in targets if target.startswith("pipeline.steps.") and target.partition("_")[0] != step}
            assert others <= {"pipeline.steps.base"}, module


def test_the_trainer_imports_only_what_data_is_read_with() -> None:
    allowed = [f"pipeline.{name}" for name in TRAINER_IMPORTS]
    for module, targets in import_graph().items():
        if is_within(module, "trainer"):
            foreign = [t for t in targets if is_within(t, "pipeline") and not any(is_within(t, part) for part in allowed)]
            assert not foreign, module


def test_engines_and_clients_take_settings_and_no_config() -> None:
    for name in ("budget", "client", "embedded", "endpoints", "probing", "protocol", "vllm"):
        assert "pipeline.config" not in import_graph()[f"pipeline.inference.{name}"], name


def test_only_commands_import_the_trainer_and_when_they_run() -> None:
    for module, path in MODULES.items():
        if is_within(module, "pipeline"):
            names = imports(path, top_only=is_within(module, "pipeline.cli"))
            assert not [name for name in names if is_within(name, "trainer")], module


def test_an_upward_import_and_a_circle_are_found() -> None:
    graph = {"pipeline.steps.filter": {"pipeline.run"}, "pipeline.run": {"pipeline.steps.filter"}}
    assert list(forbidden_imports(graph)) == [("pipeline.steps.filter", "pipeline.run")]
    assert import_cycles(graph) == [{"pipeline.steps.filter", "pipeline.run"}]


@pytest.mark.parametrize("module", ["pipeline.cli", "pipeline.run", "pipeline.hub.push", "pipeline.report.build"])
def test_no_heavy_package_is_loaded_before_it_is_needed(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'datasets', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_test_that_has_a_long_form_is_in_the_long_run() -> None:
    (named,) = re.findall(r"^LONG := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    paths = [ROOT / name for name in named.replace("\\\n", " ").split()]
    files = [path for path in (ROOT / "tests").rglob("*.py") if re.search(r"\bimport .*\bLONG\b", path.read_text())]
    assert len(files) >= 10 and all(path.exists() for path in paths)
    assert not [path for path in files if not any(path.is_relative_to(name) for name in paths)]
