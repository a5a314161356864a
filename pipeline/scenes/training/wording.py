"""Random words around the task line, so that the tiny teacher learns to read the task line alone.

Rewording a prompt later must not require retraining: in training, all text but the last line is dropped, truncated,
shuffled, mixed with other sentences, or replaced by random letters.
"""

import random
import re

from pipeline.tasks import TASKS
from pipeline.tasks.prompts import SYSTEM, template

MAX_WORDS = 200  # the longest of our prompts has 160

_TEXT = """
Please look closely before you reply. You are a careful assistant that writes short texts about pictures. Use plain English
and the present tense. Do not guess; leave out what cannot be made out. Return valid JSON without any explanation. The output
is parsed by a program, so keep to the format. Mention colors, sizes and positions where they matter. Several people will read
this text later and compare it with the photo. Keep it factual, neutral and concise. Count with care: every item matters.
Never repeat yourself and never add a greeting. Here is one more page from the collection. Describe the scene for someone who
cannot see it. Think about what stands in the foreground and what lies behind it. Avoid words such as maybe, probably or
appears to be. A good question has exactly one correct answer. Each reply is checked against a schema by machine. If there is
text in the figure, ignore it unless told otherwise. Your description should be between five and sixty words long. Follow the
task on the last line. The user will upload many such files, one after another. Numbers are written as digits and answers stay
short. Let the tone be calm, like a catalogue of a museum. What would a child point at first?
"""
SENTENCES = tuple(re.split(r"(?<=[.?]) ", " ".join(_TEXT.split())))


def sample_wording(rng: random.Random) -> tuple[str, str]:
    """Return a system text and the words before a task line; either may be empty."""
    return _wording(rng), _wording(rng)


def _wording(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.3:
        return ""
    if draw < 0.4:
        return " ".join(_nonsense(rng) for _ in range(rng.randint(1, 12)))
    prompt_lines = template(rng.choice((SYSTEM, *(task.prompts[0] for task in TASKS.values())))).split("\n")
    prompt_lines = [line for line in prompt_lines if line and not line.startswith(("{%", "}", "Task:", "Question:"))]
    words = " ".join(rng.sample((*SENTENCES, *prompt_lines), rng.randint(1, 4))).split()
    if draw < 0.8:  # a few words of it
        first = rng.randrange(len(words))
        words = words[first : first + rng.randint(1, 16)]
    words = [word for word in words if rng.random() > 0.1]
    if rng.random() < 0.2:
        rng.shuffle(words)
    return " ".join(words[:MAX_WORDS])


def _nonsense(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 8)))
