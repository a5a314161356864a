"""Render docs/settings.md and pipeline/synth.yaml from docstrings of the settings, for `make docs`."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic import BaseModel

from pipeline.cli import app
from pipeline.cli.run_options import OPTIONS
from pipeline.config import Config
from pipeline.config.files import resolve
from pipeline.project import PROMPT_DIR, SETTINGS, TASK_DIR
from pipeline.sources import with_source_defaults
from trainer.config import PRESETS, TrainConfig

ROOT = Path(__file__).parents[1]
PAGE, FILE = ROOT / "docs/settings.md", ROOT / "pipeline" / SETTINGS
PHOTOS = with_source_defaults(resolve(source="folder:photos"))

HEADER = """# Settings

All settings of `synth generate` and `synth train` with their defaults for photographs. `make docs`
writes this page from `pipeline/config` and `trainer/config.py`. An unknown key or an invalid value is an
error that names the key.

Options override the file of `--config`, and the file overrides the defaults. A file needs only the keys
that differ:

```yaml
source: folder:photos
tasks: [caption]
generate: {caption_styles: [brief, alt], max_pixels: 1000000}
filter: {language: de}
verify: {checks: [alignment]}
```

`synth init` writes a `synth.yaml` with all settings of `generate`. `config` in the manifest of a version
has its settings. `synth train --config CHECKPOINT/train.json` uses the settings of a captioner.

## `synth generate`
"""
BUDGET_NOTE = """
A server that does not count tokens is charged 1,500 tokens per prompt, and a quarter of the characters
of its reply. Limits apply to one process, not to `--executor ray`. With a higher limit, the same command
resumes.
"""
TRAIN_NOTE = """
Presets:

| preset | for | values |
|---|---|---|
| `scenes` | drawn scenes | the defaults above |
"""
PRESET_USES = {
    "photos": "photographs, a decoder from scratch",
    "photos-large": "20,000 photographs or more, a decoder from scratch, a GPU",
    "photos-lm": "photographs, a language model as decoder",
}
FOOTER = """
The presets `scenes` and `photos` were chosen by [measurements](measurements.md#photographs) on a CPU. The
other presets follow published recipes, and were not measured.

## Environment variables

| variable | meaning |
|---|---|
| `SYNTH_API_KEY` | key of the servers of `--base-url`, of `synth serve`, and of `synth serve-captioner` |
| `SYNTH_<NAME>_API_KEY` | key of the servers of a model in `models`; `SYNTH_JUDGE_API_KEY` for `--judge` |
| `OPENAI_API_KEY` | key for openai.com if `SYNTH_API_KEY` is not set |
| `SYNTH_VLLM_PYTHON` | Python interpreter with vLLM, if it is in another environment |
| `HF_TOKEN` | token of the Hub |
| `HF_HUB_OFFLINE` | whether to use only the Hub's cache; a dataset is then named `ORG/NAME@VERSION` |
| `TMPDIR` | folder for temporary files, such as the shards of a dataset in an object store |
| `RAY_ADDRESS`, `RAY_AUTH_MODE` | the Ray cluster, and `token` if it requires a token |
"""


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """Return the docstring below each field of a section, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(value=ast.Constant(str(text))):
                texts[name] = inspect.cleandoc(text).replace("\n", " ")
    return texts


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def written(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def table(
    section: type[BaseModel], values: BaseModel, flags: dict[str, str], prefix: str = ""
) -> Iterator[str]:
    """Yield the lines of a table with the settings of a section."""
    yield from ("| setting | option | default | meaning |", "|---|---|---|---|")
    texts, defaults = descriptions(section), values.model_dump(mode="json")
    for name, field in section.model_fields.items():
        if not is_section(field.annotation):
            key = prefix + name
            default = "required" if field.is_required() else f"`{written(defaults[name])}`"
            flag = f"`{flags[key]}`" if key in flags else ""
            yield f"| `{key}` | {flag} | {default} | {texts[name]} |".replace("|  |", "| |")


def run_flags() -> dict[str, str]:
    """Map each key to its option of `synth generate`. Keys without an option are left out."""
    flags: dict[str, list[str]] = {}
    for option in OPTIONS:
        flags.setdefault(option.key, []).append(option.flag)
    return {key: "`, `".join(names) for key, names in flags.items()}


def train_flags() -> dict[str, str]:
    """Map each training setting to its option of `synth train`."""
    command = typer.main.get_group(app).commands["train"]
    flags = {option.name or "": option.opts[0] for option in command.params}
    return flags | {"connector_lr": "--lr", "decoder_lr": "--lr"}


def sections() -> Iterator[tuple[str, type[BaseModel], BaseModel]]:
    """Yield (name, class, values for photographs) of the sections of Config."""
    for name, field in Config.model_fields.items():
        if is_section(field.annotation):
            yield name, field.annotation, getattr(PHOTOS, name)  # type: ignore[misc]


def purpose(section: type[BaseModel]) -> str:
    """Return the docstring of a section on one line."""
    return inspect.cleandoc(section.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def render_page() -> str:
    flags = run_flags()
    lines = [HEADER, *table(Config, PHOTOS, flags)]
    for name, section, values in sections():
        lines += ["", f"### `{name}`", "", purpose(section), "", *table(section, values, flags, f"{name}.")]
        lines += [BUDGET_NOTE.rstrip()] if name == "server" else []
    lines += [
        "",
        "## `synth train`",
        "",
        *table(TrainConfig, TrainConfig(), train_flags()),
        TRAIN_NOTE.rstrip(),
    ]
    for name, use in PRESET_USES.items():
        values_of = ", ".join(f"{key}: {written(value)}" for key, value in PRESETS[name].items())
        lines.append(f"| `{name}` | {use} | `{values_of}` |")
    return "\n".join(lines) + "\n" + FOOTER


def first_sentence(text: str) -> str:
    return text.partition(". ")[0].removesuffix(".").replace("`", "")


def settings_lines(section: type[BaseModel], values: BaseModel, indent: str) -> Iterator[str]:
    """Yield one commented line for each setting of a section, with its default for photographs."""
    texts, defaults = descriptions(section), values.model_dump(mode="json")
    for name, field in section.model_fields.items():
        if not is_section(field.annotation) and not field.is_required():
            yield f"# {indent}{name}: {written(defaults[name])}  # {first_sentence(texts[name])}"


def render_file() -> str:
    """Return the text of pipeline/synth.yaml. Uncommenting its lines changes nothing for photographs."""
    lines = [
        "# Settings of `synth generate --config synth.yaml`. Options of the command override them.",
        "# Each commented line shows the default for photographs. docs/settings.md explains all settings.",
        f"# {PROMPT_DIR} contains the built-in prompts. To change them, set generate.prompt_dir to it.",
        f"# {TASK_DIR} contains examples of custom tasks. To use them, list their files in custom_tasks.",
        "",
        "source: folder:photos",
        *settings_lines(Config, PHOTOS, ""),
    ]
    for name, section, values in sections():
        lines += ["", f"# {purpose(section)}", f"# {name}:", *settings_lines(section, values, "  ")]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
    FILE.write_text(render_file(), encoding="utf-8")
