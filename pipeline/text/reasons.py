"""Plain words for reason codes, scores and values of custom tasks, for reports, previews and cards."""

from typing import Any

IN_WORDS = {
    # source
    "duplicate_image": "the same image as another",
    "near_duplicate_image": "looks like another image",
    "near_held_out_image": "looks like an image of a held-out split",
    "banned_image": "in a dataset that must be left out",
    "unreadable_image": "the image cannot be read",
    "too_many_pixels": "the image has too many pixels",
    # replies, and validate
    "not_json": "the reply is not JSON",
    "off_schema": "the reply has other fields than asked for",
    "cut_short": "the reply was cut off",
    "repeats_itself": "the reply runs in a loop",
    "refused_by_server": "the server refused the request",
    "caption_string_pattern_mismatch": "the caption has control characters",
    "caption_string_too_short": "the caption is empty",
    "caption_string_too_long": "the caption is far too long",
    "question_without_mark": "the question has no question mark",
    "answer_repeats_question": "the answer is the question",
    "answer_not_yes_or_no": "a yes/no question with another answer",
    "answer_not_a_number": "a question for a number with another answer",
    # filter
    "refusal": "the model declined, or saw no image",
    "junk": "markup, code or coordinates in the text",
    "placeholder": "a word in place of a text",
    "label": "a label or a word to the reader in the text",
    "prompt_echo": "repeats the prompt",
    "unanswerable": "the answer says that there is none",
    "personal_answer": "the answer is personal data",
    "too_short": "too few words",
    "too_long": "too many words",
    "repetitive": "says the same again and again",
    "other_language": "in another language",
    "cut_off": "ends in the middle of a sentence",
    "too_general": "would be true of any image",
    "no_single_question": "several questions in one, or a choice by letters",
    "answer_in_question": "the question contains its answer",
    "speaks_of_elsewhere": "speaks of another text or image",
    # verify
    "answer_not_confirmed": "the model answered otherwise when asked again",
    "claims_not_confirmed": "the model did not confirm what the caption claims",
    "low_rating": "another model finds it bad",
    "low_coverage": "the caption answers too few questions about its image",
    "unlike_source_captions": "shares too few words with the captions of the source",
    "answerable_without_image": "can be answered without the image",
    "evidence_not_sufficient": "the named pages are not enough",
    "evidence_not_necessary": "the named pages are not needed",
    "low_alignment": "fits its image less than others do",
    # select
    "same_as_the_best": "the model wrote the best caption of this image and style again",
    "not_the_best": "another caption of this image and style is better",
    # dedupe, balance, trim, version
    "duplicate": "says the same as another text of this image",
    "caption_of_many_images": "says the same of too many images",
    "answer_too_common": "too many such questions have this answer",
    "concepts_too_common": "names only what many captions name",
    "beyond_images": "more images were kept than were asked for",
    "no_annotation_left": "no text of this image was kept",
}


# Scores of the rows of a version (tables.ADDED).
SCORES_IN_WORDS = {
    "precision": "share of the caption's claims that the model confirmed when asked about the image",
    "coverage": "share of the questions about the image that are answered right from the caption alone",
    "shared_words": "share of the caption's content words that a caption of the source has too",
    "relevance": "score of another model, 1 to 5: it is about what matters in the image",
    "grounding": "score of another model, 1 to 5: all of it can be seen",
    "correctness": "score of another model, 1 to 5: things, numbers, colors, places and actions are right",
    "form": "score of another model, 1 to 5: clear, complete, in good language",
}


def in_words(reason: str) -> str:
    """Return a reason in plain words; an unknown code with spaces."""
    return IN_WORDS.get(reason, reason.replace("_", " "))


def in_short(value: Any) -> str:
    """Return a JSON value in words: `view: frontal; findings: (name: opacity; side: left)`."""
    if isinstance(value, dict):
        return "; ".join(f"{name}: {in_short(inner)}" for name, inner in value.items() if inner is not None)
    if isinstance(value, list):
        items = (f"({in_short(item)})" if isinstance(item, dict) else in_short(item) for item in value)
        return ", ".join(items) or "none"
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "unknown"}[value]
    return str(value)
