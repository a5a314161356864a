"""`synth init`: write a commented settings file, the built-in prompts, and example custom tasks."""

from importlib.resources import files
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.storage.files import translate_disk_errors, write_text
from pipeline.tasks import TASKS
from pipeline.tasks.prompts import SYSTEM, TEXT_SYSTEM, template

SETTINGS, PROMPTS, TASK_FILES = "synth.yaml", "prompts", "tasks"
# Placeholders in the template of the settings file.
PROMPT_DIR, TASK_DIR = "PROMPT_DIR", "TASK_DIR"


def write_project(folder: Path) -> list[Path]:
    """Write `synth.yaml`, `prompts/` and `tasks/` to a folder. Raises ConfigError if one of them exists."""
    settings, prompts, tasks = paths = [folder / name for name in (SETTINGS, PROMPTS, TASK_FILES)]
    for path in paths:
        if path.exists():
            hint = "nothing was overwritten; pass another folder: `synth init DIR`"
            raise ConfigError(f"{path} already exists", hint=hint)
    with translate_disk_errors(folder):
        text = (files("pipeline") / SETTINGS).read_text(encoding="utf-8")
        write_text(settings, text.replace(PROMPT_DIR, str(prompts)).replace(TASK_DIR, str(tasks)))
        for name in (SYSTEM, TEXT_SYSTEM, *(task.prompt for task in TASKS.values())):
            write_text(prompts / f"{name}.j2", template(name))
        for example in (files("prompts") / "examples").iterdir():
            write_text(tasks / example.name, example.read_text(encoding="utf-8"))
    return paths
