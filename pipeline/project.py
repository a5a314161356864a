"""`synth init`: write a commented file of settings and the built-in prompts, for a user to change."""

from importlib.resources import files
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.storage.files import translate_disk_errors, write_text
from pipeline.tasks import TASKS
from pipeline.tasks.prompts import SYSTEM, template

SETTINGS = "synth.yaml"
PROMPTS = "prompts"
PROMPT_DIR = "PROMPT_DIR"  # stands for the folder of prompts in the file of settings


def write_project(folder: Path) -> list[Path]:
    """Write `synth.yaml` and `prompts/` to a folder, and return their paths. Raise ConfigError if one of them exists."""
    for path in (folder / SETTINGS, folder / PROMPTS):
        if path.exists():
            raise ConfigError(f"{path} exists", hint="nothing is overwritten: name another folder, as in `synth init DIR`")
    with translate_disk_errors(folder):
        text = (files("pipeline") / SETTINGS).read_text(encoding="utf-8")
        write_text(folder / SETTINGS, text.replace(PROMPT_DIR, str(folder / PROMPTS)))
        for name in (SYSTEM, *(task.prompts[-1] for task in TASKS.values())):
            write_text(folder / PROMPTS / f"{name}.j2", template(name))
    return [folder / SETTINGS, folder / PROMPTS]
