"""Artifacts: markup, labels, placeholders, repetitions and unfinished ends. Good texts may resemble them."""

import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.text import WORDS, expression
from pipeline.text.artifacts import (
    echoes_prompt,
    has_caption_label,
    has_label,
    has_markup,
    has_run,
    is_chat,
    is_cut_off,
    is_placeholder,
    is_too_general,
    prompt_grams,
    stutters,
    without_afterthoughts,
)
from pipeline.text.language import unquoted
from pipeline.text.normalize import words_of
from pipeline.text.phrases import PHRASES

MARKUP = (
    "A kite.</s>", "A kite <image> flies", "[INST] Describe [/INST] A kite",
    "USER: What? ASSISTANT: A kite", "A kite addCriterion flies", "<|im_start|>user", "A \ufffd kite",
    "assistant A kite flies", "**A kite**", "_A kite_", "- A kite", "1. A kite 2. A harbour", "# A kite",
    "| kite | red |", '{"caption": "A kite"}', "['a kite']", 'A kite", "answer": "kite', "A kite\\nflies",
    "A \\u00e9 kite", "A kite (531,516),(581,596) flies", "A kite [12, 14, 300, 400]",
    "a kite at coordinates (120, 45)", "bbox_2d: 1 2 3 4 a kite",
    "A `kite` flies", "A kite \U0001fa81", "A kite #red #sea", "IMG_2034 of a kite", "kite.jpg of a kite",
    "A [color] kite", "A kite (0.5, 0.31)", "A kite (12%, 40%)", "A kite at x=12",
    "A caf\u00c3\u00a9 by the sea", "A kite flies. / A kite at sea.", "A kite OR a bird", "print('A kite')",
    "A ___ flies over a bay", "A XXX kite", "\u00a9 2019 A kite", "A kite. @kites",
    "\u2581A\u2581kite\u2581flies", "A kite, 4, 2,, 1,,,", "A (1) red (2) kite (3) flies",
    "A kite --ar 16:9", "Searching... a kite", "A (color) kite", "A kite flies.over the bay",
)  # fmt: skip
NO_MARKUP = (
    "# 8 for Iowa State looks up.", "A man's hat - red and blue - on a table.", "Two (2) dogs & a cat.",
    "A sign that says \"NO\", 'STOP'.", "It costs $5 (about 10%).", "A room with 1.5 l bottles",
    "A ratio of 3:2", "A user of a computer", "Kites (red, blue) fly.", "A café au lait, 5 °C",
    "An assistant helps.", "A crowd (2,000 people)", "A mail to [email]", "Shirt #7",
    "A kite (left) and a T.V.",
    'A sign: "A_B [1]" in red',
)  # fmt: skip
LABELS = (
    "Caption: A kite flies.", "Output: A kite", "Image caption: a kite", "Q: What is it? A: A kite.",
    "A kite flies. Question 1: What?", "Sure! A kite flies.", "Certainly, a kite flies.",
    "Here is a caption for the image: A kite", "The image: a kite", "A kite. Caption: a kite",
    'alt="A kite"', "Headline: A kite", "The tags for this picture are kite, sea",
)  # fmt: skip
ENDS = (
    "A man next to a", "A kite and the", "A kite flies over the.", "A kite in a box of", "A kite ...",
    "A kite or an", "Boys and their", "A kite and", "A kite or", "A boy whose", "A cat and its",
    "Higher than", "It flies because", "A kite next to", "A kite\u2026", "A kite that is",
    "A sign that says", "A kite over the wat", "A boy holds a large",
    "A sign with the words:", f"{'A kite flies high. ' * 10}It has a red tail",
)  # fmt: skip
CAPTION_LABELS = (
    "Weather: a kite flies.", "A kite. Subject: a kite. Action: it flies.", "Describe the kite in the image.",
    "Please write a caption for a kite.", "Okay, a kite flies.", "First, I see a kite.", "Yes, a kite flies.",
    "To summarize, a kite flies.", "(a) a kite over a bay", "B. A kite flies",
    "As you can see, a kite flies.",
    "Same as before, a kite", "Look at this kite!", "Perfect for children, this kite flies.",
    "I think it is a kite.",
    "Region caption a kite", "Detected a kite and a bay.", "2x kite, 1x boat", "kite 0.98, boat 0.95",
    "What flies over the bay?", "A kite flies. Which color should I name?", "It is unclear what flies.",
    "2. A kite flies.", "Image may contain: kite, sea", "Photo by John Smith", "A kite flies. Words: 3",
)  # fmt: skip
CHATS = (
    "A kite flies. I hope this helps!", "A kite. Let me know if you like it.", "A kite. Feel free to ask.",
    "A kite. Is there anything else?", "A kite. Would you like me to go on?",
    "I\u2019m not sure, but a kite flies.", "You are a helpful assistant. A kite flies.",
    "Reply as JSON: a kite", "A kite in 20 words.",
    "A kite. Confidence 0.92", "A kite, with 95% confident", "The best caption is a kite", "A kite (3 words)",
    "A kite as instructed.", "A kite. Hmm, what else?", "A kite; alternatively, a bird",
    "This headline highlights a kite", "A kite, I mean a bird", "A kite, courtesy of NASA",
    "An AI-generated kite",
    "A kite. It is important to wear gloves.", "A kite of 72 dpi",
    "A kite. Subscribe to our page",
    "Alt text for a kite", "A kite. Buy now!", "In conclusion, a kite flies.", "Internal Server Error",
    "A kite, a bird and so on", "A kite. Most likely label is kite", "A kite, no wait, a bird",
    "A kite. I'll say that it is red.", "A kite. Let me count them.",
)  # fmt: skip
NO_CHATS = (
    "You can see a kite.", "A man asks you to look.", "Two words on a kite.",
    "A shop with kites now and here.", 'A sign with "Buy now" on it, in red letters',
    "The instructions of a kite", "A kite is described in a class.", "A sure hand holds a kite.",
    "A dog barks as if to say let me out", "Many kites are in stock.",
)  # fmt: skip
NO_CAPTION_LABELS = (
    "First base at a ball game", "Noticeboards hang on a wall.", "No one sits on the bench.",
    "In one hand, a man holds a kite.", "In short sleeves, a man runs.",
    "A I love kites sign", "Our dog sleeps under a kite.", "No. 7 bus parked on a street",
    "Ideal kite weather at sea", 'A boy asks "who flies it?" of a man',
)  # fmt: skip
NO_LABELS = (
    "Great show of skill by a skater.", "A clock that says 10:30.", "A sign with the text: STOP",
    "Here a kite flies.", "A certain kite flies, surely.", "Men at work: two dig, one looks on.",
    "A text message on a phone.", "Ok sign made by a hand",
)  # fmt: skip


PLACEHOLDERS = (
    "...", "", " - ", "caption", "Your caption here", "null", "N/A", "question?", "Your question?",
    "A question?",
)  # fmt: skip
OPEN_ENDS = ('A book titled "The', "A kite (red.")
WHOLE_ENDS = (
    'A book titled "The Kite"', 'A 12" pizza on a table', 'Platform "3" at noon', "A window is open :(",
    "The seat that he stands in front of.", *(f"{text} boy puts a hat on." for text in ENDS),
)  # fmt: skip
NO_STUTTERS = (
    "A kite that that boy flies", "A very very very long kite",
    'A card says "ho ho ho" in red over it',
)  # fmt: skip
GENERAL = (
    "An image.", "A photo of something",
    "The image is a photograph of a scene with several objects and people.",
)  # fmt: skip
RUNS = ("A sign: 000000000000000000", "hahahahahahahahaha", "ABC12ABC12ABC12ABC12")


def of_text(detects: Callable[[str, list[str]], bool]) -> Callable[[str], bool]:
    return lambda text: detects(unquoted(text), words_of(unquoted(text)))


def of_words(detects: Callable[[list[str]], bool]) -> Callable[[str], bool]:
    return lambda text: detects(words_of(text))


@pytest.mark.parametrize(
    ("detects", "bad", "good"),
    [
        (has_markup, MARKUP, NO_MARKUP),
        (has_label, LABELS, NO_LABELS),
        (has_caption_label, CAPTION_LABELS, (*NO_LABELS, *NO_CAPTION_LABELS)),
        (of_text(is_chat), CHATS, NO_CHATS),
        (of_words(is_placeholder), PLACEHOLDERS, ("A caption is on a wall", "7", "red", "No")),
        (has_run, RUNS, ("A very looooong kite", "1-800-555-0000000")),
        (lambda text: is_cut_off(text, words_of(text)), (*ENDS, *OPEN_ENDS), WHOLE_ENDS),
        (lambda text: stutters(words_of(unquoted(text))), ("The the kite is is red",), NO_STUTTERS),
        (of_words(is_too_general), GENERAL, ("A photo of a kite", "Two people", "")),
    ],
)
def test_bad_texts_are_detected_and_similar_good_texts_are_not(
    detects: Callable[[str], bool], bad: tuple[str, ...], good: tuple[str, ...]
) -> None:
    assert [text for text in bad if not detects(text)] == []
    assert [text for text in good if detects(text)] == []


def _draw_match(tree: Any, draw: random.Random) -> str:
    """Return a random text that matches a parsed pattern, ignoring its anchors and lookarounds."""
    text = ""
    for kind, argument in tree:
        match str(kind):
            case "LITERAL":
                text += chr(argument)
            case "IN":
                text += draw.choice([chr(code) if str(name) == "LITERAL" else " " for name, code in argument])
            case "MAX_REPEAT":
                least, most, part = argument
                times = draw.randint(least, min(most, least + 2))
                text += "".join(_draw_match(part, draw) for _ in range(times))
            case "SUBPATTERN":
                text += _draw_match(argument[3], draw)
            case "BRANCH":
                text += _draw_match(draw.choice(argument[1]), draw)
            case "ANY" | "NOT_LITERAL":
                text += " "
    return text


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (PHRASES["hedge"].pattern, "hedging"), (expression("chat"), "chat"),
        *((expression(name), name) for name in WORDS if name.startswith("other_")),
        (expression("refusal_start"), "refusing"), (expression("elsewhere"), "referring"),
        # "The image is a plain" begins good captions.
        (expression("refusal").replace("|plain|", "|"), "refusing"),
    ],
)  # fmt: skip
def test_fast_word_lookup_finds_every_text_that_a_pattern_matches(pattern: str, words: str) -> None:
    tree, draw = re._parser.parse(pattern), random.Random(0)  # type: ignore[attr-defined]
    matches, hints = [_draw_match(tree, draw) for _ in range(3000)], {*WORDS[words].split()}
    assert [text for text in matches if hints.isdisjoint(words_of(text))] == []


@pytest.mark.parametrize(
    ("name", "detects"),
    [
        ("cut_off", lambda text: is_cut_off(f"A man and {text}", words_of(text))),
        ("markup", lambda text: has_markup(text) or not re.search(expression("markup"), text)),
    ],
)
def test_fast_character_lookup_finds_every_text_that_a_pattern_matches(
    name: str, detects: Callable[[str], bool]
) -> None:
    tree, draw = re._parser.parse(expression(name)), random.Random(0)  # type: ignore[attr-defined]
    assert [text for text in (_draw_match(tree, draw) for _ in range(2000)) if not detects(text)] == []


def test_five_consecutive_words_of_the_prompt_are_an_echo() -> None:
    grams = prompt_grams(["Write one sentence that names the main things in view."])
    assert echoes_prompt(words_of("It names the main things in view."), grams)
    assert not echoes_prompt(words_of("It names the main kites."), grams)
    assert not echoes_prompt(words_of("The main things in"), grams)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A kite flies.\nIt is red.", "A kite flies.\nIt is red."),
        ("A kite flies.\n\nQuestion 1: What flies?\n\nAnswer: A kite.", "A kite flies."),
        ("A red kite over the harbour.\n\nThe image: a red kite.", "A red kite over the harbour."),
        ("A red kite flies high. Big.\n\nAgain: A red kite flies high.", "A red kite flies high. Big."),
        # The filter step judges the first paragraph.
        ("Caption: A kite.\nA kite.", "Caption: A kite.\nA kite."),
        ("\n\nA kite.\n", "\n\nA kite.\n"),
    ],
)
def test_paragraphs_after_the_answer_are_removed(text: str, kept: str) -> None:
    assert without_afterthoughts(text) == kept
