"""`synth init`: write a commented file of settings, the built-in prompts and examples of own tasks, for a user to change."""

from importlib.resources import files
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.storage.files import translate_disk_errors, write_text
from pipeline.tasks import TASKS
from pipeline.tasks.prompts import SYSTEM, template

SETTINGS = "synth.yaml"
PROMPTS = "prompts"
TASK_FILES, EXAMPLES = "tasks", "examples"
PROMPT_DIR, TASK_DIR = "PROMPT_DIR", "TASK_DIR"  # stand for the folders of prompts and of tasks in the file of settings


def write_project(folder: Path) -> list[Path]:
    """Write `synth.yaml`, `prompts/` and `tasks/` to a folder, and return their paths. Raise ConfigError if one exists."""
    for path in (folder / SETTINGS, folder / PROMPTS, folder / TASK_FILES):
        if path.exists():
            raise ConfigError(f"{path} exists", hint="nothing is overwritten: name another folder, as in `synth init DIR`")
    with translate_disk_errors(folder):
        text = (files("pipeline") / SETTINGS).read_text(encoding="utf-8")
        text = text.replace(PROMPT_DIR, str(folder / PROMPTS)).replace(TASK_DIR, str(folder / TASK_FILES))
        write_text(folder / SETTINGS, text)
        for name in (SYSTEM, *(task.prompt for task in TASKS.values())):
            write_text(folder / PROMPTS / f"{name}.j2", template(name))
        for example in sorted((files("prompts") / EXAMPLES).iterdir(), key=lambda path: path.name):
            write_text(folder / TASK_FILES / example.name, example.read_text(encoding="utf-8"))
    return [folder / SETTINGS, folder / PROMPTS, folder / TASK_FILES]
