"""The prompts of a captioner: which of those that it has learned is chosen, and of what a prompt is made.

A prompt names a source, human or synthetic, and a style of captions or a question. `prompts` are the pairs of source and style
that a captioner has learned; the style of answers is "". What a published captioner does without this package is copied from
here (trainer/publish/files.py).
"""

from collections.abc import Callable

from pipeline.errors import TrainError

ANSWER = "<answer>"  # the token behind a question
STYLES = ("plain", "detailed", "brief", "alt", "tags", "ocr", "human")  # usual ones, whose names are no questions
Prompts = list[tuple[str, str]]


def preferred_style(prompts: list[tuple[str, str]]) -> str | None:
    """Return the usual style of captions: brief, else plain, else the first; None if only answers were learned."""
    styles = [style for _, style in prompts if style]
    return next((usual for usual in ("brief", "plain") if usual in styles), next(iter(styles), None))


def preferred_source(prompts: list[tuple[str, str]], style: str) -> str | None:
    """Return the source to name with a style: human if it was learned with it; None if the style was not learned."""
    sources = [source for source, learned in prompts if learned == style]
    return "human" if "human" in sources else next(iter(sources), None)


def choose_prompt(prompts: list[tuple[str, str]], text: str = "") -> tuple[str, str, str]:
    """Return the source, style and question of a prompt for nothing (the usual style), the name of a style, or a question.

    Raises ValueError for what was not learned.
    """
    styles = list(dict.fromkeys(style for _, style in prompts if style))
    if text in STYLES and text not in styles:
        raise ValueError(f"this captioner knows no style {text}; it was trained on {', '.join(styles) or 'answers alone'}")
    question = text if text and text not in styles else ""
    style = "" if question else text or preferred_style(prompts)
    source = None if style is None else preferred_source(prompts, style)
    if style is None:
        raise ValueError("this captioner has learned answers alone: ask it a question")
    if source is None:
        raise ValueError(f"this captioner answers no questions; it knows the styles {', '.join(styles)}")
    return source, style, question


def prompt_parts(kind: str, source: str, style: str, question: str) -> list[tuple[str, bool]]:
    """Return the parts of a prompt in order, each with whether it is the name of a token, and not a text.

    `kind` is "pretrained" for a language model, which reads words, and "scratch" for a decoder with tokens of its own.
    """
    if kind == "pretrained":
        return [(f" Question: {question} Answer:" if question else f" A {style} caption ({source}):", False)]
    if question:
        return [(f"<{source}>", True), (question, False), (ANSWER, True)]
    return [(f"<{source}>", True), (f"<{style}>", True)]


def prompt_ids(parts: list[tuple[str, bool]], token_id: Callable[[str], int], ids_of: Callable[[str], list[int]]) -> list[int]:
    """Return the token ids of the parts of a prompt, by the id of a token's name and the ids of a text."""
    return [token for part, is_token in parts for token in ([token_id(part)] if is_token else ids_of(part))]


def scored_prompt(prompts: Prompts, style: str | None = None) -> tuple[str, str]:
    """Return the (source, style) to prompt with: `style` or the usual one, human if learned.

    Raises TrainError if it is not learned.
    """
    chosen = style or preferred_style(prompts)
    source = preferred_source(prompts, chosen) if chosen else None
    if chosen is None or source is None:
        styles = dict.fromkeys(learned for _, learned in prompts if learned)
        problem = f"the captioner knows no style {chosen}" if styles else "the captioner has learned answers alone"
        raise TrainError(problem, hint=f"it was trained on: {', '.join(styles)}" if styles else "ask it something: --question")
    return source, chosen


def answering_prompt(prompts: Prompts) -> tuple[str, str]:
    """Return the source of answers, with an empty style. Raises TrainError if no answers were learned."""
    source = preferred_source(prompts, "")
    if source is None:
        raise TrainError("the captioner has learned no answers", hint="train on a version with questions")
    return source, ""
