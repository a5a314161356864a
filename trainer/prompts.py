"""Choose the style or question that a user's text requests, and build the prompt for the decoder.

A prompt consists of a source (human or synthetic) and either a caption style or a question. `prompts` lists
the (source, style) pairs that a captioner has learned. The style of answers is "". Published captioners
contain a copy of this file (trainer/publish/transformers_files.py), so it needs only the standard library.
"""

import re
from collections.abc import Callable

ANSWER = "<answer>"  # last token of a question prompt
STYLES = ("plain", "detailed", "dense", "brief", "alt", "tags", "ocr", "human")
MAX_CHARACTERS = 2_000  # of a longer text, only the end is read
STYLE_LINE = re.compile(r"^Task: caption, (.+)$", re.MULTILINE)
QUESTION_LINE = re.compile(r"^\s*(?:question|q): *([^\n]+)", re.MULTILINE | re.IGNORECASE)
# Words that request a style, in order of precedence. Other styles are requested by their names.
STYLE_WORDS = {
    "human": r"^what does this image show(?=\W*$)",
    "ocr": r"ocr(?! tokens?)|transcribe"
    r"|(what|which|all|any|the) (text|words)\b.*\b(read|written|seen|visible|image)",
    "tags": r"(hash)?tags|keywords",
    "alt": r"alt|alternative text|screen ?readers?|blind|visually impaired",
    "plain": r"(one|a single|1)[ -]sentence",
    "brief": r"brief(ly)?|short|concise(ly)?|succinct(ly)?|terse|compact|few words|one line",
    "detailed": r"details?|detailed|thorough(ly)?|comprehensive(ly)?|in depth|long|paragraphs?|everything"
    r"|elaborate|exhaustive(ly)?|extensive(ly)?|as much as",
}
# Questions that request the style `human` or `ocr` instead of an answer.
STYLE_QUESTION = re.compile(
    r"(what does this image show|(what|which) (text|words) (can be|is|are) (read|written|seen|visible|shown)"
    r" (in|on) (the|this) (image|picture|photo))\W*"
)
QUESTION_START = re.compile(
    r"(what|which|who|whose|whom|where|when|why|how|is|are|am|was|were|do|does|did|can|could|has|have|had|will"
    r"|would|should|isn't|aren't|doesn't|count|name|identify|guess|estimate|in (what|which))\b|what's|who's"
    r"|tell me (if|whether|the (color|colour|number|name|time|type|kind))\b"
)
CAPTION_START = re.compile(
    r"(describe|description|caption|summari[sz]e|write|give|provide|generate|create|compose|narrate|depict"
    r"|elaborate|walk me|tell me about|talk about|share|offer|explain (the|this|that|my))\b"
)
POLITE = re.compile(
    r"((please|kindly|hi|hello|hey|ok|okay|now|so|(can|could|would|will) (you|i|we)"
    r"|how (can|could|would|do) you|i (want|need|would like) (you )?to|i'd like (you )?to|help me( to)?"
    r"|let's|briefly|shortly"
    r"|((tell|show) me|explain|describe|say)( to me)?(?= (what|how|which|who|where)))\b[ ,!.:]*)+"
)
# A question that begins with "what" and has only these words, one of them in VIEWED, requests a caption.
VIEWED = (
    "see|seen|shows?|shown|showing|depicts?|depicted|visible|happening|happens|going|here"
    "|images?|pictures?|photos?|photographs?|scene|screenshot|snapshot|frame|drawing|painting|illustration"
    "|pic|figure|observe|perceive|notice"
)
GENERIC = re.compile(
    rf"what('?s)?( ({VIEWED}|what|is|are|was|be|being|do|does|can|could|would|you|i|we|think|tell|me|on|in"
    "|inside|within|of|at|from|by|to|the|this|that|an?|it|there|all|about|for|and|please|contains?|contents?"
    "|present|presented|represents?|represented|captured|your|my|given|provided|attached|above|following|key"
    "|main|displays?|displayed|elements|features|details|exactly|currently|overall))*"
)
DESCRIPTION = re.compile(
    r"\b((caption|description) (of|for)|describe (what you|(this|the) (image|photo|picture|scene)))\b"
)
ANSWER_FORM = re.compile(
    r"\b(answer|respond|reply)\b.*\b(words?|phrases?|yes|letter|option|number|directly|concisely|question)\b"
    r"|^\(?a[.):] ",
    re.MULTILINE,
)


def find_question(text: str) -> str:
    """Return the question in a text, or "" if the text requests a caption.

    A question is a line `Question: ...`, or the last sentence that ends in a question mark, or else a first
    sentence that begins like a question. Instructions about the form of the answer are left out.
    """
    text = text[-MAX_CHARACTERS:].replace("\N{FULLWIDTH QUESTION MARK}", "?")
    text = text.replace("<image>", "").replace("?.", "?").strip()
    if lines := QUESTION_LINE.findall(text):
        question = str(lines[-1]).strip()
        return question[: question.rindex("?") + 1] if "?" in question else question
    parts = [part.strip(" \t\"'*") for part in re.split(r"\n+|(?<=[.!?:])[\"')]*\s+", text)]
    sentences = [part for part in parts if part]
    asked = [number for number, part in enumerate(sentences) if part.endswith("?")]
    is_answer = ANSWER_FORM.search(text.lower())
    if not sentences or not (asked or is_answer or _kind(sentences[0]) == "question"):
        return ""
    last = asked[-1] if asked else 0
    question, kind, before = sentences[last], _kind(sentences[last]), sentences[last - 1]
    # "Is this Mr. Smith?" is one sentence.
    if last and not kind and before.endswith(".") and _kind(before) == "question":
        question = f"{before} {question}"
    is_request = kind == "caption" or (
        not is_answer and (_is_generic(question) or DESCRIPTION.search(question))
    )
    return "" if is_request else question


def _kind(sentence: str) -> str:
    """Return "caption" or "question" if a sentence begins as such a request, else ""."""
    request = _without_address(sentence)
    if CAPTION_START.match(request):
        return "caption"
    return "question" if QUESTION_START.match(request) else ""


def _is_generic(question: str) -> bool:
    words = " ".join(re.findall(r"[\w']+", _without_address(question)))
    return bool(GENERIC.fullmatch(words) and re.search(rf"\b({VIEWED})\b", words))


def _without_address(sentence: str) -> str:
    """Return a sentence in lower case without words that address the model, such as "Please" or "Can you"."""
    sentence = _normalized(sentence)
    address = POLITE.match(sentence)
    return sentence[address.end() :] if address else sentence


def _normalized(text: str) -> str:
    return " ".join(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split())


def preferred_style(prompts: list[tuple[str, str]]) -> str | None:
    """Return "brief" or "plain" if learned, otherwise the first learned style, or None if there is none."""
    styles = [style for _, style in prompts if style]
    return next((style for style in ("brief", "plain") if style in styles), next(iter(styles), None))


def preferred_source(prompts: list[tuple[str, str]], style: str) -> str | None:
    """Return the source for a style's prompt, preferably human, or None if the style was not learned."""
    sources = [source for source, learned in prompts if learned == style]
    return "human" if "human" in sources else next(iter(sources), None)


def choose_prompt(prompts: list[tuple[str, str]], text: str = "") -> tuple[str, str, str]:
    """Return source, style and question for the text of a user: "" or a style, a question or a request.

    A captioner that has not learned answers writes a caption for a question. Raises ValueError if `text` is
    the name of a style that was not learned, or "" and no style was learned.
    """
    styles = list(dict.fromkeys(style for _, style in prompts if style))
    text, answers = text.strip(), preferred_source(prompts, "")
    named = [name.strip() for name in STYLE_LINE.findall(text)][-1:] or [text]
    style = named[0] if named[0] in styles else None
    if style is None and (named[0] in STYLES or named[0] != text):
        learned = ", ".join(styles) or "questions"
        raise ValueError(f"this captioner was not trained on the style {named[0][:40]}, only on {learned}")
    words = _normalized(text[-MAX_CHARACTERS:].replace("<image>", ""))
    requested = style or _requested_style(styles, words)
    is_request = style or (requested in ("human", "ocr") and STYLE_QUESTION.fullmatch(words))
    question = "" if is_request else find_question(text)
    if answers is not None and (question or (text and not styles)):
        return answers, "", question or text
    style = requested or preferred_style(prompts)
    if style is None:
        raise ValueError("this captioner was trained only on questions. Ask it a question")
    return preferred_source(prompts, style) or "", style, ""


def _requested_style(styles: list[str], words: str) -> str | None:
    patterns = {**STYLE_WORDS, **{style: re.escape(style) for style in styles if style not in STYLE_WORDS}}
    return next(
        (s for s, words_of in patterns.items() if s in styles and re.search(rf"\b({words_of})\b", words)),
        None,
    )


def prompt_parts(kind: str, source: str, style: str, question: str) -> list[tuple[str, bool]]:
    """Return the parts of a prompt as (part, is_token) pairs. Parts that are not tokens are plain text.

    `kind` is "pretrained" for a language model, or "scratch" for a decoder with tokens for sources and
    styles.
    """
    if kind == "pretrained":
        return [(f" Question: {question} Answer:" if question else f" A {style} caption ({source}):", False)]
    if question:
        return [(f"<{source}>", True), (question, False), (ANSWER, True)]
    return [(f"<{source}>", True), (f"<{style}>", True)]


def prompt_ids(
    parts: list[tuple[str, bool]], token_id: Callable[[str], int], ids_of: Callable[[str], list[int]]
) -> list[int]:
    """Encode the parts of a prompt: `token_id` encodes special tokens, and `ids_of` encodes plain text."""
    return [token for part, is_token in parts for token in ([token_id(part)] if is_token else ids_of(part))]
