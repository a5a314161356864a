"""Every regular expression of the package takes linear time on long untrusted texts."""

import ast
import functools
import importlib
import pkgutil
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pipeline
import trainer
from pipeline.text.normalize import tidy
from tests.hostile import LONG

METHODS = ("match", "fullmatch", "search", "findall", "finditer", "sub", "split")
SIZES = (10_000, 100_000, *([1_000_000] if LONG else []))
# These modules read texts of at most 20,000 characters, which are on one line (see `tidy`).
TEXT_SIZES, TEXT_MODULES = (
    (2_000, 20_000),
    ("pipeline.text", "pipeline.rules", "pipeline.scenes", "pipeline.tasks"),
)
MAX_S_PER_MB = {SIZES: 2.0, TEXT_SIZES: 25.0}  # CPU time


def patterns_in(value: Any, depth: int = 0) -> Iterator[re.Pattern[Any]]:
    if isinstance(value, re.Pattern):
        yield value
    elif depth < 4 and isinstance(value, dict):
        yield from patterns_in([*value, *value.values()], depth)
    elif depth < 4 and isinstance(value, list | tuple | set | frozenset):
        for item in value:
            if not isinstance(item, str):  # skip strings, because word lists are long
                yield from patterns_in(item, depth + 1)


def named_patterns() -> dict[re.Pattern[Any], str]:
    """Map the compiled patterns of the package to the names of their variables."""
    names: dict[re.Pattern[Any], str] = {}
    for package in (pipeline, trainer):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.rpartition(".")[2] != "__main__":
                for name, value in vars(importlib.import_module(module.name)).items():
                    for pattern in patterns_in(value):
                        names.setdefault(pattern, f"{module.name}.{name}")
    return names


@functools.cache
def methods_by_name() -> dict[str, set[str]]:
    """Return the methods that the code calls on each name."""
    methods: dict[str, set[str]] = {}
    for file in (file for package in ("pipeline", "trainer") for file in Path(package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in METHODS and isinstance(node.value, ast.Name):
                methods.setdefault(node.value.id, set()).add(node.attr)
    return methods


def example(tree: Any) -> str:
    """Return a short text that a parsed pattern matches in most cases."""
    parts = []
    for kind, argument in tree:
        match str(kind):
            case "LITERAL":
                parts.append(chr(argument))
            case "IN":
                items = {str(name): value for name, value in argument}
                char = chr(items["LITERAL"]) if "LITERAL" in items else "a"
                char = chr(items["RANGE"][0]) if "RANGE" in items else char
                category = {"CATEGORY_DIGIT": "1", "CATEGORY_SPACE": " "}.get(str(items.get("CATEGORY")))
                parts.append("x" if "NEGATE" in items else category or char)
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                parts.append(example(argument[2]) * max(1, min(argument[0], 3)))
            case "SUBPATTERN":
                parts.append(example(argument[3]))
            case "BRANCH":
                parts.append(example(argument[1][0]))
            case "ATOMIC_GROUP":
                parts.append(example(argument))
            case "ANY" | "NOT_LITERAL":
                parts.append("x")
    return "".join(parts)


def repeated_parts(tree: Any, start: str = "") -> Iterator[tuple[str, str]]:
    """Yield (text before, repeated text) for each part of a parsed pattern that may repeat."""
    for kind, argument in tree:
        match str(kind):
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                if argument[1] > 50:
                    yield start, example(argument[2])
                yield from repeated_parts(argument[2], start)
            case "SUBPATTERN":
                yield from repeated_parts(argument[3], start)
            case "BRANCH":
                yield from (one for branch in argument[1] for one in repeated_parts(branch, start))
            case "ATOMIC_GROUP":
                yield from repeated_parts(argument, start)
        start += example([(kind, argument)])


def attacks(pattern: re.Pattern[Any]) -> set[tuple[str, str]]:
    is_text = isinstance(pattern.pattern, str)
    tree: Any = re._parser.parse(pattern.pattern, pattern.flags & ~(0 if is_text else re.UNICODE))  # type: ignore[attr-defined]
    parts = {*repeated_parts(tree)}
    repeats = {repeat for _, repeat in parts} | {start + repeat for start, repeat in parts} | {example(tree)}
    return {
        (start, repeat)
        for start, repeat in parts | {("", one) for one in {*repeats, *" a1,", "? "}}
        if repeat
    }


def calls(name: str, pattern: re.Pattern[Any]) -> Iterator[Callable[[Any], Any]]:
    for method in methods_by_name().get(name.rpartition(".")[2], {"search"}):
        if method == "sub":
            yield functools.partial(pattern.sub, "" if isinstance(pattern.pattern, str) else b"")
        elif method == "finditer":
            yield lambda text: sum(1 for _ in pattern.finditer(text))
        else:
            yield getattr(pattern, method)


def find_slow_attack(name: str, pattern: re.Pattern[Any]) -> tuple[str, str, int, float] | None:
    """Return an attack that takes too long: start, repeated part, characters and CPU seconds."""
    sizes = TEXT_SIZES if name.startswith(TEXT_MODULES) else SIZES
    for call in calls(name, pattern):
        for start, repeat in sorted(attacks(pattern)):
            for size in sizes:
                text = start + repeat * (size // len(repeat)) + "\0"
                text = tidy(text) if sizes is TEXT_SIZES else text
                began = time.process_time()
                call(text if isinstance(pattern.pattern, str) else text.encode("latin-1", "replace"))
                seconds = time.process_time() - began
                if seconds >= MAX_S_PER_MB[sizes] * size / 1e6 + 0.1:
                    return start, repeat, size, seconds
    return None


def test_regular_expressions_run_in_linear_time() -> None:
    patterns = named_patterns()
    assert len(patterns) > 50
    slow = {(name, pattern): find_slow_attack(name, pattern) for pattern, name in patterns.items()}
    assert {key: attack for key, attack in slow.items() if attack} == {}
