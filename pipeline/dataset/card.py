"""Render cards of datasets and models: README.md with a YAML header and escaped model text."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from math import isfinite
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined, Template, TemplateError

from pipeline.config import NO_MODEL
from pipeline.errors import StoreError
from pipeline.tasks import TASKS
from pipeline.tasks.own import CARD_CATEGORIES
from pipeline.text.escape import Markdown, markdown, markdown_block, markdown_code, on_one_line
from pipeline.text.reasons import SCORES_IN_WORDS, in_short
from pipeline.types import KNOWN_LICENSES, UNKNOWN

CARD_SAMPLES = 5
# Scores of a captioner, with the metric's type on the Hub and its name.
METRICS = {
    "bleu_4": ("bleu", "BLEU-4"),
    "rouge_l": ("rouge", "ROUGE-L"),
    "cider_d": ("cider", "CIDEr-D"),
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
MESSAGES = "messages"  # a column, and the config that reads it
MODEL, PEOPLE, PEOPLE_AND_MODEL = "a model", "people", "people and a model"  # that wrote the texts
_CREATORS = {MODEL: ["machine-generated"], PEOPLE: ["found"], PEOPLE_AND_MODEL: ["found", "machine-generated"]}
PLACEHOLDER = "ORG/NAME"  # for the repository, before a version is pushed to one
_SIZES = (  # the Hub's classes, by the number that is too many for them
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
    (10_000_000_000, "1B<n<10B"),
)


def render_card(manifest: dict[str, Any], samples: list[dict[str, Any]], repo: str = PLACEHOLDER) -> str:
    """Return README.md for a manifest and a few of its rows without pixels."""
    try:
        header, licenses = metadata(manifest), card_licenses(manifest)
    except (TypeError, AttributeError, LookupError) as error:  # a manifest may be a stranger's
        raise _no_card(error) from None
    return _render(
        "dataset.md.j2",
        header,
        manifest=manifest,
        licenses=licenses,
        samples=samples,
        repo=repo,
        scores=SCORES_IN_WORDS,
        writers=_writers(manifest),
        texts=_texts(manifest),
        configs=_configs(manifest),
    )


def render_model_card(about: dict[str, Any], repo: str, dataset: str | None, made_of: Sequence[str] = ()) -> str:
    """Return README.md for a checkpoint (`about`: its config, train, metrics and digest); `dataset` is the data, if known.

    `made_of` are the names of models that it began with, of which those are told that are ids of the Hub.
    """
    data = about["config"]["data"]
    link = None
    if dataset and re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) and re.fullmatch(r"v[\d.]+", data["version"]):
        link = Markdown(f"[{markdown(dataset)}](https://huggingface.co/datasets/{dataset}/tree/{data['version']})")
    answers = any(not style for _, style in about["config"]["prompts"])
    values = about | {"title": repo, "data": data, "dataset": link, "answers": answers}
    language = data.get("language")
    header = {
        **({"language": [language]} if language else {}),
        "license": "other",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["image-captioning", "synthetic", "synth"],
        **({"datasets": [dataset]} if dataset else {}),
        **({"base_model": models} if (models := [*filter(HUB_ID.fullmatch, made_of)]) else {}),
        **_evaluation(about["metrics"], repo, dataset or data["source"]["name"]),
    }
    return _render("model.md.j2", header, **values)


def _evaluation(metrics: dict[str, Any], repo: str, dataset: str) -> dict[str, Any]:
    """Return the scores of a captioner in the form of the Hub's model cards: `metrics` and `model-index`."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    scores = {name: metrics["scores"].get(name) for name in METRICS}
    where = {"task_type": "image-to-text", "dataset_type": dataset, "dataset_name": dataset, "dataset_split": metrics["split"]}
    results = [
        EvalResult(**where, metric_type=METRICS[name][0], metric_name=METRICS[name][1], metric_value=round(float(value), 4))
        for name, value in scores.items()
        if isinstance(value, int | float) and isfinite(value)
    ]
    if not results:
        return {}
    types = [result.metric_type for result in results]
    return {"metrics": types, "model-index": eval_results_to_model_index(repo.rpartition("/")[2], results)}


@cache
def _template(name: str) -> Template:
    """Return a compiled template of `data_cards/`, in which every value is escaped."""
    jinja = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701  # that is for HTML: `finalize` escapes every value for Markdown
        finalize=markdown,
    )
    jinja.filters |= {"code": markdown_code, "block": markdown_block, "as_json": _as_json, "in_short": in_short}
    return jinja.from_string((files("data_cards") / name).read_text(encoding="utf-8"))


def _render(template: str, header: dict[str, Any], **values: Any) -> str:
    """Return a card: a YAML header, and a rendered template of `data_cards/`."""
    try:
        body = _template(template).render(values)
    except (TypeError, AttributeError, LookupError, TemplateError) as error:
        raise _no_card(error) from None
    card = f"---\n{yaml.safe_dump(_on_one_line(header), sort_keys=False, allow_unicode=True)}---\n\n{body.strip()}\n"
    return card.encode(errors="replace").decode()


def _no_card(error: Exception) -> StoreError:
    return StoreError(f"no card can be made of the manifest: {error}", hint="do not use it")


def _on_one_line(value: Any) -> Any:
    """Return a header whose texts have no line breaks: not every reader of a card parses YAML to find its end."""
    if isinstance(value, dict):
        return {_on_one_line(key): _on_one_line(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return list(map(_on_one_line, value))
    return on_one_line(value) if isinstance(value, str) else value


def _as_json(value: Any) -> Markdown:
    return markdown_block(json.dumps(value, indent=1, ensure_ascii=False))


def metadata(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the YAML header of the card, as the Hub's dataset card specification names its keys."""
    total = sum(manifest["rows"].values())
    splits = [split for split, count in manifest["rows"].items() if count]
    configs, writers = _configs(manifest), _writers(manifest)
    sizes = {split: _sizes(manifest, split) for split in splits}
    data_files = [{"split": split, "path": f"{split}-*.parquet"} for split in splits]
    by_reviewer = ["expert-generated"] if manifest.get("review", {}).get("edited") else []
    # The source is a repository of the Hub.
    upstream = re.search(r"([^:/\s]+/[^:/\s]+)(:[^:/\s]+)?$", manifest["source"]["name"])
    return {
        "pretty_name": manifest.get("title") or f"synth {manifest['source']['name']} {manifest['version']}",
        **_license_fields(card_licenses(manifest), manifest.get("license_link")),
        **({"language": [language]} if (language := language_of(manifest)) else {}),
        "task_categories": _categories(manifest),
        "size_categories": [next(name for bound, name in _SIZES if total < bound)],
        "annotations_creators": [*_CREATORS[writers], *by_reviewer],
        "language_creators": [*_CREATORS[writers], *by_reviewer],
        "source_datasets": [upstream[1] if upstream else "original"],
        "tags": [*(["synthetic"] if writers != PEOPLE else []), "synth"],
        "configs": [
            *({"config_name": name, "data_files": data_files, **columns} for name, columns in configs.items()),
            *_export_configs(manifest, splits),
        ],
        "dataset_info": _one_or_list(
            {
                **({"config_name": name} if len(configs) > 1 else {}),
                "features": [
                    {"name": column, **_feature(kind)}
                    for column, kind in manifest["features"].items()
                    if column in columns.get("columns", manifest["features"])
                ],
                "splits": [
                    {"name": split, "num_bytes": sizes[split], "num_examples": manifest["rows"][split]} for split in splits
                ],
                "download_size": sum(sizes.values()),
                "dataset_size": sum(sizes.values()),
            }
            for name, columns in configs.items()
        ),
    }


def _configs(manifest: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Return the configs of a dataset by name, with the columns that each reads of the same files; none: all of them."""
    more = manifest.get("reader_columns", [])
    if MESSAGES not in more:
        return {"default": {}}
    default = {"default": {"columns": [name for name in manifest["features"] if name != MESSAGES]}}
    if manifest["measured"].get("rows_without_text"):  # a conversation needs a turn
        return default
    return default | {MESSAGES: {"columns": ["image", MESSAGES]}}


def _export_configs(manifest: dict[str, Any], splits: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a config for each export that is Parquet, as `datasets` reads it."""
    for name, entries in manifest.get("exports", {}).items():
        found = [split for split in splits if any(re.fullmatch(rf"{split}-\d+\.parquet", file) for file in entries)]
        if found:
            data_files = [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in found]
            yield {"config_name": name, "data_files": data_files}


def _one_or_list(values: Iterable[Any]) -> Any:
    """Return the only value, or a list of several, as the Hub's dataset card has them."""
    listed = list(values)
    return listed[0] if len(listed) == 1 else listed


def _writers(manifest: dict[str, Any]) -> str:
    """Return who wrote the texts of a version: a model, people, or both."""
    if manifest["model"]["name"] == NO_MODEL:
        return PEOPLE
    has_human = any(manifest["measured"].get(name) for name in ("human_captions", "human_questions"))
    return PEOPLE_AND_MODEL if has_human else MODEL


def _texts(manifest: dict[str, Any]) -> str:
    """Return what texts a version holds: captions and questions, or else the columns of own tasks."""
    measured, own = manifest["measured"], manifest.get("own_columns", {})
    has_usual = any(measured.get(name) for name in ("captions", "answers", "human_captions", "human_questions"))
    return "captions and questions" if has_usual or not own else ", ".join(own)


def _categories(manifest: dict[str, Any]) -> list[str]:
    """Return the task categories of a dataset, each once."""
    settings, measured = manifest["config"], manifest["measured"]
    questions = "deck_qa" if "pages" in manifest["columns"] else "qa"
    by_people = [name for name, count in (("caption", "human_captions"), (questions, "human_questions")) if measured.get(count)]
    built_in = [TASKS[name].card_category for name in [*settings["tasks"], *by_people] if name in TASKS]
    own = [CARD_CATEGORIES.get(str(task.get("kind"))) for task in settings.get("own_tasks", [])]
    return list(dict.fromkeys(category for category in [*built_in, *own] if category))


def card_licenses(manifest: dict[str, Any]) -> list[str]:
    """Return the licenses that a card names: those of the images, and for images of no known one what the user has stated."""
    stated = (manifest.get("license") or UNKNOWN).lower()
    return sorted({stated if name.lower() in (UNKNOWN, stated) else name for name in manifest["licenses"]})


def has_unknown_license(manifest: dict[str, Any]) -> bool:
    """Return whether there is an image of which nobody has stated a license, or one by a name that the Hub does not know."""
    stated = (manifest.get("license") or UNKNOWN).lower()
    doubtful = {UNKNOWN} if stated in KNOWN_LICENSES else {UNKNOWN, stated}
    return not doubtful.isdisjoint(card_licenses(manifest))


def language_of(manifest: dict[str, Any]) -> str | None:
    """Return the language of the texts, in ISO 639; None if it is not known."""
    language: str | None = manifest.get("language") or manifest["config"].get("filter", {"language": "en"})["language"]
    return language


def _license_fields(licenses: list[str], link: str | None) -> dict[str, str]:
    """Return the license fields of a card: a single license that the Hub knows, else the names of all, and where they are."""
    if len(licenses) == 1 and re.fullmatch(r"[a-z0-9.-]+", licenses[0]) and licenses[0] in KNOWN_LICENSES:
        return {"license": licenses[0]}
    name = "-and-".join(re.sub(r"[^a-z0-9.]+", "-", one.lower()) for one in licenses)
    return {"license": "other", "license_name": name, **({"license_link": link} if link else {})}


def _sizes(manifest: dict[str, Any], split: str) -> int:
    return sum(entry["bytes"] for name, entry in manifest["files"].items() if name.startswith(f"{split}-"))


def _feature(kind: Any) -> dict[str, Any]:
    """Convert an entry of tables.features to the form of a card's YAML."""
    if "_type" not in kind:  # a struct: its fields by name
        return {"struct": [{"name": name, **_feature(inner)} for name, inner in kind.items()]}
    if kind["_type"] == "List":
        inner = _feature(kind["feature"])
        return {"list": inner.get("struct") or inner.get("dtype") or [inner]}
    return {"dtype": "image" if kind["_type"] == "Image" else kind["dtype"]}
