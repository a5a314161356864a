"""The card of a version: README.md with YAML that a dumper wrote and text in which model output can break nothing."""

import html
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from pipeline.generate.prompt import template

TASK_CATEGORIES = {"caption": "image-to-text", "qa": "visual-question-answering", "deck_qa": "document-question-answering"}
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def render_card(manifest: dict[str, Any], samples: list[dict[str, Any]], prompts: Path | None = None) -> str:
    """Return README.md for a manifest and a few of its rows (without pixels); `prompts` holds templates of the user's own."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)  # noqa: S701
    environment.filters["line"] = one_line
    names = ["system/v1", *(name.split("@")[0] for name in manifest["prompts"])]
    body = environment.from_string(_template()).render(
        manifest=manifest,
        samples=samples,
        prompts={name: template(name, prompts).strip() for name in names},
    )
    return f"---\n{yaml.safe_dump(metadata(manifest), sort_keys=False, allow_unicode=True)}---\n\n{body.strip()}\n"


def metadata(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the YAML header of the card, as the Hub's dataset card specification names its keys."""
    total = sum(manifest["rows"].values())
    licences = manifest["licences"]
    splits = [split for split, count in manifest["rows"].items() if count]
    return {
        "pretty_name": f"synth {manifest['source']['name']} {manifest['version']}",
        "license": licences[0] if len(licences) == 1 and licences[0] != "unknown" else "other",
        "language": ["en"],
        "task_categories": [TASK_CATEGORIES[task] for task in manifest["config"]["tasks"]],
        "size_categories": [next((name for bound, name in _SIZES if total < bound), "1M<n<10M")],
        "annotations_creators": ["machine-generated"],
        "source_datasets": ["original"],
        "tags": ["synthetic", "synth"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"{split}-*.parquet"} for split in splits],
            }
        ],
    }


def one_line(text: str) -> str:
    """Make model text harmless within a line of Markdown: no markup, no control characters, no line break."""
    flat = re.sub(r"[\x00-\x1f\x7f\u200b-\u200f\u2028-\u202e\u2066-\u2069]+", " ", text)
    return re.sub(r"([\\`*_{}\[\]()#+!|~-])", r"\\\1", html.escape(flat, quote=False))


@cache
def _template() -> str:
    return (files("data_cards") / "dataset.md.j2").read_text(encoding="utf-8")
