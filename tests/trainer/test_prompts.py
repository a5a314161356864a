"""Tests of the rule that finds the style or the question in a user's text."""

import pytest

from pipeline.dataset.conversation import QUESTIONS
from trainer.prompts import choose_prompt, find_question

PROMPTS = [("synthetic", style) for style in ("plain", "brief", "detailed", "alt", "tags", "ocr")]
PROMPTS += [("human", "human"), ("synthetic", "poem"), ("synthetic", "")]
SHORT = "\nAnswer the question using a single word or phrase."
CAPTIONS = """
Describe this image.
What is shown in this image?
Can you describe this image for me?
A photo of
Provide a one-sentence caption for the provided image.|Reference OCR token: STOP
How would you describe this picture?
<image>|Describe the image concisely.
What would be a good caption for this photo?
Can you tell me what this image shows?
what's going on here?
Tell me what you see in this picture.
Could you summarise this photo?
Describe the scene. Respond in one sentence.
What does this photo depict?
""".strip().split("\n")
# A question begins at ^ or at the start, and ends at #. These marks are removed.
ANSWERS = """
Is there a dog in the image?# Please answer yes or no.
what color is the car#
What animal is shown in this image?#
What is this?#
Count the dogs.#
What is shown in this image?#|A. dog|B. cat|Answer with the option's letter from the given choices directly.
Can you see a dog?#
Tell me how many dogs there are#
The color of the car is#|Answer the question using a single word or phrase.
Does the image show a train?#
What is the person doing in this image?#
What is the object in the image?#|Please try to answer the question with short words or phrases if possible.
What text is on the shirt?#
The picture was taken in a kitchen. ^What is on the stove?#
Combien de chiens y a-t-il ?#
Whose car is this?#
In which room was this photo taken?#
Please tell me how many chairs there are.#
Does Mr. Fox meet Mrs. Smith at St. Paul?#
What is the job description?#
How would you describe the mood?#|Answer the question using a single word or phrase.
Consider the image carefully. ^Is the man older than the woman?#
""".strip().split("\n")
# Texts of benchmarks around the question.
AROUND = """
Question: # Short answer:
Q: # A:
<image>|#
Given the image, answer the following question with no more than three words. #
Based on the image, respond to this question with a short answer: #. Answer:
# A short answer to the question is
#|Options:|A. red|B. blue|Please select the correct answer from the options above.
First think step by step to provide the best answer to the following question:||#
""".strip().split("\n")


def as_prompts(lines: list[str]) -> list[tuple[str, str]]:
    """Return pairs of a prompt and the question that it asks, which is "" for a caption."""
    texts = [line.replace("|", "\n") for line in lines]
    questions = [text.partition("#")[0].rpartition("^")[2] if "#" in text else "" for text in texts]
    prompts = [text.replace("#", "").replace("^", "") for text in texts]
    return list(zip(prompts, questions, strict=True))


@pytest.mark.parametrize(("prompt", "question"), as_prompts(CAPTIONS + ANSWERS))
def test_question_in_a_prompt_is_found_and_empty_for_a_caption_request(prompt: str, question: str) -> None:
    assert find_question(prompt) == question


@pytest.mark.parametrize("around", AROUND)
def test_question_is_found_in_prompts_of_benchmarks(around: str) -> None:
    question = "How many cups are there?"
    assert find_question(around.replace("|", "\n").replace("#", question)) == question


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("What text is written on the sign?", "What text is written on the sign?"),
        ("Question: What does this image show?", "What does this image show?"),
        ("What text can be read in this image?" + SHORT, "What text can be read in this image?"),
        ("What does this image show on the left?", "What does this image show on the left?"),
        ("What brand is it?\nReference OCR token: STOP", "What brand is it?"),
    ],
)
def test_question_gets_an_answer_if_all_styles_and_answers_are_learned(text: str, question: str) -> None:
    assert choose_prompt(PROMPTS, text) == ("synthetic", "", question)


@pytest.mark.parametrize("style", QUESTIONS)
def test_question_used_for_a_style_in_exports_selects_that_style(style: str) -> None:
    for text in (QUESTIONS[style], f"<image>\n{QUESTIONS[style]}"):
        assert choose_prompt(PROMPTS, text)[1:] == (style, "")


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("", "brief"),
        (" detailed ", "detailed"),
        ("Write one sentence.\nTask: caption, detailed", "detailed"),
        ("Describe this image thoroughly.", "detailed"),
        ("Write a caption of this image in the style poem.", "poem"),
        ("List keywords for the photo", "tags"),
        ("Provide a one-sentence caption for the provided image.", "plain"),
        ("Describe it for blind people.", "alt"),
        ("Transcribe the sign.", "ocr"),
        ("Read all the text in the image.", "ocr"),
        ("Which words are visible in this image?", "ocr"),
        ("Give an exhaustive description of everything in view.", "detailed"),
        ("Describe it briefly.\nReference OCR token: STOP", "brief"),
        ("Caption this.", "brief"),
    ],
)
def test_wording_of_a_caption_request_selects_a_learned_style(text: str, style: str) -> None:
    assert choose_prompt(PROMPTS, text)[1:] == (style, "")
    without = [("human", "brief"), ("human", "")]
    if text != " detailed " and "Task:" not in text and not find_question(text):
        assert choose_prompt(without, text) == ("human", "brief", "")


def test_captioner_that_learned_only_captions_or_only_answers_writes_only_those() -> None:
    assert choose_prompt([("human", "plain")], "What color is it?") == ("human", "plain", "")
    assert choose_prompt([("human", "")], "Describe this image.") == ("human", "", "Describe this image.")
    with pytest.raises(ValueError, match="only on questions"):
        choose_prompt([("human", "")])


@pytest.mark.parametrize("text", ["tags", "Task: caption, tags", "Task: caption, verse"])
def test_style_name_that_was_not_learned_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="was not trained on the style"):
        choose_prompt([("human", "plain"), ("human", "")], text)
