"""Choose the style or question that a user's text requests, and build the prompt for the decoder.

A prompt consists of a source (human or synthetic) and either a caption style or a question. `prompts` lists
the (source, style) pairs that a captioner has learned. The style of answers is "". Published captioners
contain a copy of this file (trainer/model/transformers_files.py), so it needs only the standard library.
"""

import re
from collections.abc import Callable

ANSWER = "<answer>"
STYLES = ("plain", "detailed", "dense", "brief", "alt", "tags", "ocr", "human")
MAX_CHARACTERS = 2_000  # only the end of a longer text is read
STYLE_LINE = re.compile(r"^Task: caption, (.+)$", re.MULTILINE)
QUESTION_LINE = re.compile(r"^\s*(?:question|q): *([^\n]+)", re.MULTILINE | re.IGNORECASE)
# Words that request a style, in order of precedence.
STYLE_WORDS = {
    "human": r"^what does this image show(?=\W*$)",
    "ocr": r"ocr(?! tokens?)|transcribe|read (all )?the text"
    r"|(text|words) (can be|is|are) (read|seen|visible)",
    "tags": r"(hash)?tags|keywords",
    "alt": r"alt|alternative text|screen ?readers?|blind",
    "plain": r"(one|a single|1)[ -]sentence",
    "brief": r"brief(ly)?|short|concise(ly)?|few words",
    "detailed": r"details?|detailed|thorough(ly)?|in depth|long|paragraphs?|exhaustive|elaborate",
}
QUESTION_START = re.compile(
    r"(what|which|who|whose|where|when|why|how|is|are|does|do|did|can|has|count|name|identify|estimate"
    r"|(please )?tell me (how|if|the|whether))\b"
)
CAPTION_START = re.compile(r"(please )?(describe|caption|summari[sz]e)\b")
CAPTION_WORD = re.compile(r"\b(describe|summari[sz]e|(caption|description) (of|for))\b")
# A question about the whole image, such as "What do you see here?", requests a caption.
VIEW = "see|shown?|shows|depicts?|contains?|represents?|happening|going|image|picture|photo|photograph|scene"
WHOLE_IMAGE = re.compile(
    rf"(?=.*\b({VIEW})\b)(what|what's|can|could)"
    rf"( (what|is|do|does|can|you|please|tell|me|on|here|in|of|about|the|this|{VIEW}))*"
)
SENTENCE_END = re.compile(r"\n+|(?<=[.!?:>])(?<!\bMrs\.)(?<!\b(?:Mr|Ms|Dr|St)\.)\s+")
# Instructions of benchmarks, such as "Answer the question using a single word or phrase."
ANSWER_FORM = re.compile(r"\b(answer|respond|reply)\b")


def find_question(text: str) -> str:
    """Return the question in a text, or "" if the text requests a caption.

    A question is a line `Question: ...`, the last sentence with a question mark, or a first sentence that
    begins like a question.
    """
    text = text[-MAX_CHARACTERS:].replace("\N{FULLWIDTH QUESTION MARK}", "?").replace("?.", "?")
    if lines := QUESTION_LINE.findall(text):
        question = str(lines[-1]).strip()
        return question[: question.rindex("?") + 1] if "?" in question else question
    sentences = [part.strip() for part in SENTENCE_END.split(text.replace("<image>", ""))]
    sentences = [sentence for sentence in sentences if sentence]
    asked = [sentence for sentence in sentences if sentence.endswith("?")]
    is_answer = ANSWER_FORM.search(text.lower())
    if not sentences or not (asked or is_answer or QUESTION_START.match(sentences[0].lower())):
        return ""
    question = asked[-1] if asked else sentences[0]
    words = _normalized(question).rstrip("?.! ")
    is_about_image = CAPTION_WORD.search(words) or WHOLE_IMAGE.fullmatch(words)
    return "" if CAPTION_START.match(words) or (is_about_image and not is_answer) else question


def _normalized(text: str) -> str:
    return " ".join(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").split())


def preferred_style(prompts: list[tuple[str, str]]) -> str | None:
    """Return "brief" or "plain" if learned, otherwise the first learned style or None."""
    styles = [style for _, style in prompts if style]
    return next((style for style in ("brief", "plain") if style in styles), next(iter(styles), None))


def preferred_source(prompts: list[tuple[str, str]], style: str) -> str | None:
    """Return "human" if learned for the style, otherwise the style's first source or None."""
    sources = [source for source, learned in prompts if learned == style]
    return "human" if "human" in sources else next(iter(sources), None)


def choose_prompt(prompts: list[tuple[str, str]], text: str = "") -> tuple[str, str, str]:
    """Return source, style and question for the text of a user: "", a style, a question or a request.

    If the captioner has not learned to answer questions, a question requests a caption. Raises ValueError if
    `text` is the name of a style that was not learned, or if `text` is "" and no style was learned.
    """
    styles = list(dict.fromkeys(style for _, style in prompts if style))
    text, answers = text.strip(), preferred_source(prompts, "")
    named = [name.strip() for name in STYLE_LINE.findall(text)][-1:] or [text]
    style = named[0] if named[0] in styles else None
    if style is None and (named[0] in STYLES or named[0] != text):
        learned = ", ".join(styles) or "questions"
        raise ValueError(f"this captioner was not trained on the style {named[0][:40]}, only on {learned}")
    words = _normalized(text[-MAX_CHARACTERS:].replace("<image>", ""))
    patterns = {**STYLE_WORDS, **{name: re.escape(name) for name in styles if name not in STYLE_WORDS}}
    in_words = (name for name in patterns if name in styles and re.search(rf"\b({patterns[name]})\b", words))
    requested = style or next(in_words, None)
    is_request = style or (requested in ("human", "ocr") and not ANSWER_FORM.search(words))
    question = "" if is_request else find_question(text)
    if answers is not None and (question or (text and not styles)):
        return answers, "", question or text
    style = requested or preferred_style(prompts)
    if style is None:
        raise ValueError("this captioner was trained only on questions. Ask it a question")
    return preferred_source(prompts, style) or "", style, ""


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
