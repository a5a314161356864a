"""Architecture: imports run from top to bottom, and steps do not import each other."""

import ast
import graphlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| \d+ \| (`.*`) \|$", PAGE, re.MULTILINE)
# A part may import itself and the parts in lower rows of the documented table.
LAYERS = [
    [name if name == "trainer" else f"pipeline.{name}" for name in re.findall("`([^`]+)`", row)]
    for row in ROWS
]
TRAINER_IMPORTS = (
    "config", "dataset", "digests", "errors", "hub.pull", "hub_errors", "images", "install",
    "logs", "progress", "report.html", "sources.join", "storage", "tables", "text", "types",
)  # fmt: skip


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PATHS = [path for package in ("pipeline", "trainer") for path in (ROOT / package).rglob("*.py")]
MODULES = {module_of(path): path for path in PATHS}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Return the modules that a file imports, anywhere or at its top level only."""
    tree = parse(path)
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
    """Yield imports that run upwards, or between two parts of one layer."""
    for module, targets in graph.items():
        for target in sorted(targets - {module, "pipeline", "trainer"}):
            (own_layer, own_part), (layer, part) = layer_of(module), layer_of(target)
            if part != own_part and layer <= own_layer:
                yield module, target


def test_modules_import_only_modules_of_lower_layers() -> None:
    graph = import_graph()
    parts = {module: graph[module] for module in graph.keys() - {"pipeline", "trainer"}}
    assert list(forbidden_imports(parts)) == []


def test_imports_have_no_cycle() -> None:
    graphlib.TopologicalSorter(import_graph()).prepare()


def test_step_imports_no_other_step() -> None:
    for module, targets in import_graph().items():
        if module.startswith("pipeline.steps."):
            step = module.partition("_")[0]
            steps = {target for target in targets if target.startswith("pipeline.steps.")}
            others = {target for target in steps if target.partition("_")[0] != step}
            assert others <= {"pipeline.steps.base", "pipeline.steps.ladder"}, module


def test_trainer_imports_only_listed_parts_of_pipeline() -> None:
    allowed = [f"pipeline.{name}" for name in TRAINER_IMPORTS]
    for module, targets in import_graph().items():
        if is_within(module, "trainer"):
            imported = {target for target in targets if is_within(target, "pipeline")}
            assert not {t for t in imported if not any(is_within(t, part) for part in allowed)}, module


def test_engines_and_clients_do_not_import_config() -> None:
    for name in ("budget", "client", "embedded", "endpoints", "probing", "protocol", "vllm"):
        assert "pipeline.config" not in import_graph()[f"pipeline.inference.{name}"], name


def test_trainer_is_imported_only_inside_cli_functions() -> None:
    for module, path in MODULES.items():
        if is_within(module, "pipeline"):
            names = imports(path, top_only=is_within(module, "pipeline.cli"))
            assert not [name for name in names if is_within(name, "trainer")], module


def test_upward_import_is_detected() -> None:
    graph = {"pipeline.steps.filter": {"pipeline.run"}, "pipeline.run": {"pipeline.steps.filter"}}
    assert list(forbidden_imports(graph)) == [("pipeline.steps.filter", "pipeline.run")]
