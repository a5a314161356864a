"""Describe reason codes, scores and values of custom tasks in words, for reports, previews and cards."""

from typing import Any

# Descriptions of codes that would be unclear if only split into words.
IN_WORDS = {
    # source
    "duplicate_image": "has the same image as another row",
    "near_duplicate_image": "looks like another image",
    "near_held_out_image": "looks like an image of a held-out split",
    "banned_image": "also in an excluded dataset",
    "extreme_aspect_ratio": "the image is too narrow",
    # parsing of replies, and the validate step
    "not_json": "the reply has no JSON object",
    "not_plain_text": "the reply contains more than the requested text",
    "off_schema": "the reply does not match the schema",
    "condition_false": "not asked: the condition of the task (`when`) is false",
    "condition_without_value": "not asked: a value that the condition of the task (`when`) needs is missing",
    "has_human_text": "not asked: the image has human texts",
    "caption_string_too_short": "the caption is empty",
    "caption_string_too_long": "the caption is far too long",
    "cut_short": "the reply was cut off",
    "repeats_itself": "the reply runs in a loop",
    "caption_string_pattern_mismatch": "the caption has control characters",
    "answer_not_yes_or_no": "the answer to a yes/no question is neither yes nor no",
    "replaced_by_next_model": "the next model of the ladder was asked instead",
    # filter
    "refusal": "the model declined, or saw no image",
    "junk": "markup, code or coordinates in the text",
    "no_description": "an advertisement, a story, a command or another text that does not describe an image",
    "label": "a label, or a remark to the reader, in the text",
    "prompt_echo": "repeats the prompt",
    "unanswerable": "the answer states that the question cannot be answered",
    "personal_answer": "the answer is personal data",
    "too_short": "too few words",
    "too_long": "too many words",
    "keywords": "a list of keywords, or invalid tags",
    "other_language": "in another language, or garbled",
    "cut_off": "ends in the middle of a sentence",
    "too_general": "fits any image or question",
    "unwanted_phrase": "has a phrase that the settings reject",
    "not_visible": "asks about something that an image cannot show",
    "answer_off_type": "the answer does not fit the kind of question",
    "no_single_question": "several questions in one, or a choice between lettered options",
    "speaks_of_elsewhere": "refers to another text or image",
    # verify
    "answer_not_confirmed": "the model gave another answer when asked again",
    "false_claim": "the model refuted a claim of the caption",
    "low_coverage": "the caption answers too few questions about its image",
    "answerable_without_image": "can be answered without the image",
    "evidence_not_sufficient": "the model cannot answer from the evidence pages alone",
    "low_alignment": "fits its image less well than other texts",
    # select
    "same_as_the_best": "equals the best caption of this image and style",
    "not_the_best": "another caption of this image and style is better",
    # dedupe, balance, version
    "duplicate": "duplicate of another text of this image",
    "answer_too_common": "too many similar questions have this answer",
    "no_annotation_left": "all texts of this image were rejected",
}


# Descriptions of the scores in the rows of a version (tables.ADDED).
SCORES_IN_WORDS = {
    "precision": "share of the caption's claims that the model confirmed when asked about the image",
    "coverage": "share of the questions about the image that the caption alone answers correctly",
    "logprob_mean": "mean log-probability of the tokens of the model's reply",
    "relevance": "judge's score, 1 to 5: describes the important parts of the image",
    "grounding": "judge's score, 1 to 5: everything stated is visible",
    "correctness": "judge's score, 1 to 5: objects, numbers, colors, places and actions are correct",
    "form": "judge's score, 1 to 5: clear, complete, well written",
}


def in_words(reason: str) -> str:
    """Return a reason code in words. Unknown codes, such as `dropped_by_TASK`, get spaces instead of `_`."""
    return IN_WORDS.get(reason, reason.replace("_", " "))


def in_short(value: Any) -> str:
    """Return a JSON value in words, such as `view: frontal; findings: (name: opacity; side: left)`."""
    if isinstance(value, dict):
        return "; ".join(f"{name}: {in_short(inner)}" for name, inner in value.items() if inner is not None)
    if isinstance(value, list):
        items = (f"({in_short(item)})" if isinstance(item, dict) else in_short(item) for item in value)
        return ", ".join(items) or "none"
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "unknown"}[value]
    return str(value)
