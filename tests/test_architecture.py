"""The direction of dependencies, as a test: cli -> run -> stages -> store, config -> schema, tables -> types -> errors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = (
    "source",
    "generate",
    "validate",
    "filter",
    "verify",
    "dedupe",
    "balance",
    "split",
    "review",
    "version",
    "push",
    "report",
)
# What each part may import of `pipeline`, beside what lies under itself.
BASE = {"errors": set(), "types": {"errors"}}
LOWER = {
    **BASE,
    "objects": {"errors"},
    "fingerprint": {"errors", "tables"},
    "image": {"errors"},
    "page": {"image"},
    "answers": set(),
    "licence": set(),
    "arithmetic": set(),
    "schema": {"errors", "arithmetic"},
    "tables": {"errors"},
    "config": {"errors"},
    "wordnet": set(),
    "texts": {"wordnet"},
    "privacy": set(),
    "claims": {"answers"},
    "alignment": {"errors"},
    "likeness": {"tables"},
    "leakage": {"likeness", "tables", "texts", "types"},
    "card": set(),
    "ledger": {"fingerprint", "tables"},
    "marks": {"errors", "fingerprint", "schema", "tables"},
    "measure": {"scenes"},
    "shards": {"tables"},
    "copies": {"tables", "types"},
    "outgoing": {"card", "errors", "fingerprint", "licence", "store", "tables"},
    "diff": {"errors", "fingerprint", "store", "tables"},
    "pull": {"errors", "fingerprint", "objects", "store"},
    "join": {"errors", "fingerprint", "image", "shards", "store", "tables", "types"},
    "progress": set(),
    "store": {"errors", "objects", "tables"},
    "scenes": {"errors", "schema", "generate.prompt"},
}
STAGE_MAY = {"answers", "card", "config", "errors", "fingerprint", "image", "licence", "outgoing", "scenes", "schema", "shards"}
STAGE_MAY |= {"claims", "marks", "page", "privacy", "store", "tables", "texts", "types", "wordnet"}
TRAINER_MAY = {
    "alignment",
    "answers",
    "errors",
    "types",
    "schema",
    "tables",
    "store",
    "image",
    "page",
    "fingerprint",
    "wordnet",
}


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """All modules that a file imports; with `top_only`, those it imports when it is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_only else list(ast.walk(tree))
    from_modules = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    return from_modules | {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}


def files_of(part: str) -> list[Path]:
    path = ROOT / "pipeline" / part
    found = [f for f in [path.with_suffix(".py"), *path.rglob("*.py")] if f.exists()]
    assert found, f"{part} has moved: keep this test in step"
    return found


def foreign(path: Path, part: str, allowed: set[str]) -> set[str]:
    inner = {name.removeprefix("pipeline.") for name in imports(path) if name.startswith("pipeline.")}
    return {name for name in inner if not any(name == a or name.startswith(f"{a}.") for a in {part, *allowed})}


@pytest.mark.parametrize("part", LOWER)
def test_what_lies_below_imports_nothing_from_above(part: str) -> None:
    for path in files_of(part):
        assert not foreign(path, part, LOWER[part]), path


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_other_stage(stage: str) -> None:
    for path in files_of(stage):
        assert not foreign(path, stage, STAGE_MAY), path


def test_the_trainer_imports_only_what_data_is_read_with() -> None:
    for path in (ROOT / "trainer").rglob("*.py"):
        assert not foreign(path, "", TRAINER_MAY), path


def test_the_pipeline_imports_the_trainer_only_within_a_command() -> None:
    for path in (ROOT / "pipeline").rglob("*.py"):
        names = imports(path, top_only=path.name == "cli.py")
        assert not {name for name in names if name.split(".")[0] == "trainer"}, path


def test_the_test_fails_on_an_import_from_above(tmp_path: Path) -> None:
    bad = tmp_path / "dedupe.py"
    bad.write_text("from pipeline.validate import validate_annotations\n", encoding="utf-8")
    assert foreign(bad, "dedupe", STAGE_MAY) == {"validate"}


@pytest.mark.parametrize("module", ["pipeline.cli", "pipeline.run", "pipeline.push", "pipeline.report"])
def test_no_heavy_package_is_loaded_before_it_is_needed(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'datasets', 'vllm') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
