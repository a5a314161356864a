"""Prompts: templates in `prompts/<task>/vN.j2`, rendered to a system text and a task text.

The system text is the same for all tasks, and the image stands between the two, so that a server can reuse what it
computed for the system text with every image, and what it computed for an image with each of its tasks.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

SYSTEM = "system/v1"
TASK_PROMPTS = {"caption": "caption/v1", "qa": "qa/v1", "answer": "answer/v1"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """The words around one image. `id` names the templates and their content."""

    id: str
    system: str
    text: str

    def messages(self) -> list[dict[str, Any]]:
        """Return the chat in the form that a chat template of transformers takes, with a place for the image."""
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.text}]}
        return [{"role": "system", "content": self.system}, user] if self.system else [user]


def render(task: str, **values: str) -> Prompt:
    """Render the prompt of a task; `values` are what its template names, such as `style`.

    Raises:
        jinja2.UndefinedError: a value that the template needs is missing.
    """
    name = TASK_PROMPTS[task]
    text = _environment().from_string(template(name)).render(values).strip()
    return Prompt(id=prompt_id(task), system=template(SYSTEM).strip(), text=text)


def prompt_id(task: str) -> str:
    """Return the name of a task's prompt with a digest of all it is rendered from: its template and the system text."""
    name = TASK_PROMPTS[task]
    content = hashlib.sha256(f"{template(SYSTEM)}\0{template(name)}".encode()).hexdigest()
    return f"{name}@{content[:12]}"


@cache
def template(name: str) -> str:
    """Return the source of a template, such as `caption/v1`."""
    return (files("prompts") / f"{name}.j2").read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    # Prompts are plain text for a model: nothing to escape.
    return Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, autoescape=False)  # noqa: S701
