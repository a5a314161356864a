"""Render dataset and model cards: README.md with a YAML header and escaped model text."""

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, Template, TemplateError

from pipeline.config import NO_MODEL
from pipeline.dataset.audit import audit_in_words
from pipeline.dataset.calibration import checks_in_words
from pipeline.dataset.price import price_in_words
from pipeline.dataset.statistics import percent
from pipeline.digests import digest
from pipeline.errors import StoreError
from pipeline.tasks import TASKS
from pipeline.tasks.custom import CARD_CATEGORIES
from pipeline.text.escape import Markdown, markdown, markdown_block, markdown_code, on_one_line
from pipeline.text.reasons import SCORES_IN_WORDS, in_short
from pipeline.types import KNOWN_LICENSES, UNKNOWN

CARD_SAMPLES = 5
MESSAGES = "messages"
MODEL, HUMANS, HUMANS_AND_MODEL = "a model", "humans", "humans and a model"
INVALID = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, TemplateError)
PLACEHOLDER = "ORG/NAME"


def render_card(manifest: dict[str, Any], samples: list[dict[str, Any]], repo: str = PLACEHOLDER) -> str:
    """Return README.md for a manifest and some of its rows. Raises StoreError if the manifest is invalid."""
    try:
        header, licenses = metadata(manifest), card_licenses(manifest)
    except INVALID as error:
        raise _manifest_error(error) from None
    return _render(
        "dataset.md.j2",
        header,
        manifest=manifest,
        licenses=licenses,
        samples=samples,
        repo=repo,
        scores=SCORES_IN_WORDS,
        audit_in_words=audit_in_words,
        checks_in_words=checks_in_words,
        price_in_words=price_in_words,
        writers=_writers(manifest),
        configs=_configs(manifest),
    )


def render_model_card(
    about: dict[str, Any], repo: str, dataset: str | None, base_models: Sequence[str] = ()
) -> str:
    """Return README.md for a checkpoint. `about` has its config, train, metrics and digest.

    `dataset` is the repository of the training data, if known. `base_models` are Hub ids.
    """
    data = about["config"]["data"]
    link = None
    if dataset and re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) and re.fullmatch(r"v[\d.]+", data["version"]):
        url = f"https://huggingface.co/datasets/{dataset}/tree/{data['version']}"
        link = Markdown(f"[{markdown(dataset)}]({url})")
    answers = any(not style for _, style in about["config"]["prompts"])
    header = {
        **({"language": [data["language"]]} if data.get("language") else {}),
        "license": "other",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["image-captioning", "synthetic", "synth"],
        **({"datasets": [dataset]} if dataset else {}),
        **({"base_model": [*base_models]} if base_models else {}),
    }
    values = about | {"title": repo, "data": data, "dataset": link, "answers": answers}
    values["train"] = about["train"] | about["metrics"].get("settings", {})
    trained = list_training_data(data)
    texts = {part.get("texts") for part in trained}
    values |= {"earlier": trained[1:], "texts": texts.pop() if len(texts) == 1 else "mixed"}
    values["sources"] = len({json.dumps(part.get("source"), sort_keys=True) for part in trained})
    return _render("model.md.j2", header, **values)


def list_training_data(data: Any) -> list[dict[str, Any]]:
    """Return the training data of a captioner, and of the captioners that it continued (`init`)."""
    found = []
    while isinstance(data, dict):
        found.append(data)
        init = data.get("init")
        data = init.get("data") if isinstance(init, dict) else None
    return found


@cache
def _template(name: str) -> Template:
    """Return a compiled template from `data_cards/`, with all values escaped for Markdown."""
    jinja = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701  # autoescape is for HTML; `finalize` escapes for Markdown
        finalize=markdown,
    )
    jinja.filters |= {
        "code": markdown_code,
        "block": markdown_block,
        "as_json": lambda value: markdown_block(json.dumps(value, indent=1, ensure_ascii=False)),
        "in_short": in_short,
        "percent": percent,
    }
    return jinja.from_string((files("data_cards") / name).read_text(encoding="utf-8"))


def _render(template: str, header: dict[str, Any], **values: Any) -> str:
    """Return a card: a YAML header and a rendered template from `data_cards/`."""
    try:
        body = _template(template).render(values)
    except INVALID as error:
        raise _manifest_error(error) from None
    header_yaml = yaml.safe_dump(_without_line_breaks(header), sort_keys=False, allow_unicode=True)
    return f"---\n{header_yaml}---\n\n{body.strip()}\n".encode(errors="replace").decode()


def _manifest_error(error: Exception) -> StoreError:
    return StoreError(
        f"cannot write the card: the manifest is invalid: {error}",
        hint="check it with `synth check`, or use another version",
    )


def _without_line_breaks(value: Any) -> Any:
    """Remove line breaks from all strings, for readers that find the header's end without parsing YAML."""
    if isinstance(value, dict):
        return {_without_line_breaks(key): _without_line_breaks(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return list(map(_without_line_breaks, value))
    return on_one_line(value) if isinstance(value, str) else value


def metadata(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the YAML header of a dataset card, with keys from the Hub's specification."""
    splits = [split for split, count in manifest["rows"].items() if count]
    configs, writers, language = _configs(manifest), _writers(manifest), language_of(manifest)
    data_files = [{"split": split, "path": f"{split}-*.parquet"} for split in splits]
    # `datasets` caches a local folder by its name and this header. The digest tells apart folders with the
    # same name.
    description = f"files {digest(manifest['files'])[:16]}"
    return {
        "pretty_name": manifest.get("title") or f"synth {manifest['source']['name']} {manifest['version']}",
        **_license_fields(card_licenses(manifest), manifest.get("license_link")),
        **({"language": [language]} if language else {}),
        "task_categories": _categories(manifest),
        "tags": [*(["synthetic"] if writers != HUMANS else []), "synth"],
        "configs": [
            {"config_name": name, "description": description, "data_files": data_files, **columns}
            for name, columns in configs.items()
        ],
    }


def _configs(manifest: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Return the configs of a dataset by name. All read the same files, but may read different columns."""
    if MESSAGES not in manifest.get("reader_columns", []):
        return {"default": {}}
    columns = [name for name in manifest["features"] if name != MESSAGES]
    return {"default": {"columns": columns}, MESSAGES: {"columns": ["image", MESSAGES]}}


def _writers(manifest: dict[str, Any]) -> str:
    if manifest["model"]["name"] == NO_MODEL:
        return HUMANS
    has_human = any(manifest["measured"].get(name) for name in ("human_captions", "human_questions"))
    return HUMANS_AND_MODEL if has_human else MODEL


def _categories(manifest: dict[str, Any]) -> list[str]:
    settings, measured = manifest["config"], manifest["measured"]
    tasks = [*settings["tasks"]]
    if measured.get("human_captions"):
        tasks.append("caption")
    if measured.get("human_questions"):
        tasks.append("deck_qa" if "pages" in manifest["columns"] else "qa")
    built_in = [TASKS[name].card_category for name in tasks if name in TASKS]
    own = [CARD_CATEGORIES.get(str(task.get("kind"))) for task in settings.get("custom_tasks", [])]
    return list(dict.fromkeys(category for category in [*built_in, *own] if category))


def card_licenses(manifest: dict[str, Any]) -> list[str]:
    """Return the licenses of the images, with unknown licenses replaced by the one that the user stated."""
    stated = (manifest.get("license") or UNKNOWN).lower()
    return sorted({stated if name.lower() in (UNKNOWN, stated) else name for name in manifest["licenses"]})


def has_unknown_license(manifest: dict[str, Any]) -> bool:
    """Return whether any image license is unknown, or stated under a name that the Hub does not know."""
    stated = (manifest.get("license") or UNKNOWN).lower()
    doubtful = {UNKNOWN} if stated in KNOWN_LICENSES else {UNKNOWN, stated}
    return not doubtful.isdisjoint(card_licenses(manifest))


def language_of(manifest: dict[str, Any]) -> str | None:
    """Return the ISO 639 code for the language of the texts, or None if unknown."""
    settings = manifest["config"].get("filter", {"language": "en"})
    language: str | None = manifest.get("language") or settings["language"]
    return language


def _license_fields(licenses: list[str], link: str | None) -> dict[str, str]:
    """Return the license if there is only one and the Hub knows it, else `other` with all names."""
    if len(licenses) == 1 and licenses[0] in KNOWN_LICENSES:
        return {"license": licenses[0]}
    name = "-and-".join(re.sub(r"[^a-z0-9.]+", "-", license_name.lower()) for license_name in licenses)
    return {"license": "other", "license_name": name, **({"license_link": link} if link else {})}
