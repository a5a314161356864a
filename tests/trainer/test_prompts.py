"""Tests of the rule that finds the style or the question in a user's text."""

import pytest

from pipeline.dataset.conversation import QUESTIONS
from trainer.prompts import choose_prompt, find_question

PROMPTS = [("synthetic", style) for style in ("plain", "brief", "detailed", "alt", "tags", "ocr")]
PROMPTS += [("human", "human"), ("synthetic", "poem"), ("synthetic", "")]
SHORT = "\nAnswer the question using a single word or phrase."
# The rule was written with these prompts.
CAPTIONS = """
Describe this image.
Caption this.
describe
Write a caption.
What is shown in this image?
What do you see?
What is happening here?
What is happening in this image?
Can you describe this image for me?
Describe what you see.
Describe the image in detail.
What is this picture about?
Explain the image.
A photo of
Provide a one-sentence caption for the provided image.
Provide a one-sentence caption for the provided image.|Reference OCR token: STOP
Beschreibe dieses Bild.
Please describe this image in general. Do not include a prefix like "This image depicts".
How would you describe this picture?
What does this image show?
in one sentence
<image>|Describe the image concisely.
What would be a good caption for this photo?
Could you use a few words to describe what you perceive in the photo?
""".strip().split("\n")
# A question begins at a mark ^ (or with the prompt) and ends at #. The marks are no part of the prompt.
ANSWERS = """
What color is the background?#
What color is the background?#|Answer the question using a single word or phrase.
Is there a dog in the image?#|Answer the question using a single word or phrase.
Is there a dog in the image?# Please answer yes or no.
what color is the car#
how many dogs are there#
What animal is shown in this image?#
What is this?#
Count the dogs.#
What is shown in this image?#|A. dog|B. cat|Answer with the option's letter from the given choices directly.
Can you see a dog?#
Is this Mr. Smith?#
Tell me how many dogs there are#
Tell me the color of the car.#
Which object is larger, the cube or the ball?#
The color of the car is#|Answer the question using a single word or phrase.
Does the image show a train?#
Name the animal in the picture.#
What is the person doing in this image?#
Could you tell me what color the car is?#
What is written on the sign?#
What is the object in the image?#|Please try to answer the question with short words or phrases if possible.
What is on display?#
""".strip().split("\n")
# By what precedes and follows the question in a prompt of a benchmark.
AROUND = """
Question: #
Question: # Short answer:
Q: # A:
<image>|#
Look at the image. #
Given the image, answer the following question with no more than three words. #
Based on the image, respond to this question with a short answer: #. Answer:
Use the provided image to answer the question: # Provide your answer as short as possible:
# A short answer to the question is
These are frames of a video.|#|Please answer the question using a single word or phrase.
#|Options:|A. red|B. blue|Please select the correct answer from the options above.
First think step by step to provide the best answer to the following question:||#
""".strip().split("\n")

# These prompts were written after the rule.
OTHER_CAPTIONS = """
Write one sentence about this photo.
Describe the scene.
describe this picture briefly
Give me a short caption for this.
Caption:
caption this image please
Please write a detailed description of the photo.
I need a caption for my post
Make a caption for Instagram
What is in this image?
what's going on here?
What do you notice in this picture?
What can you see?
Tell me what you see in this picture.
Summarize the picture in a few words
I want you to describe the attached image.
Can you tell me what this image shows?
Could you summarise this photo?
Would you please give a caption for the image?
Let's describe this image
OK, describe it now.
Write alt text for this picture.
Write alternative text for a screen reader.
Generate tags for this image
List keywords for the photo
Transcribe all text in the image.
Décris cette image.
Describe la imagen.
Опиши изображение.
描述这张图片。
Describe this image as if I were blind.
You are a helpful assistant. Describe the image.
Give a long and exhaustive description of everything in view.
<image>|Write a caption for this image.
<image>|What is happening in this photograph?
Image caption:
a picture of
Describe the image in English:
Write a description of the image in at most 20 words.
Create a one-sentence caption.
Please provide a caption for the image below.
Analyze this picture.
What does this photo depict?
What does the picture show?
What is the image about?
Explain what is happening in the picture.
Show me what this is: describe the photo.
Narrate the scene.
Photo description, please.
Generate an accurate caption for this picture. Do not mention colors.
""".strip().split("\n")
OTHER_ANSWERS = """
Is the cat black or white?#
is the door open#
Are the two balls of the same size?#
How old is the child?#
how much does it cost#
What number is on the jersey?#
what's the man holding?#
Who is wearing a hat?#
Whose car is this?#
When was this taken?#
Where are they?#
Which fruit is it?#
Why are they laughing?#
Does he wear glasses?#
Did it rain?#
Has the train left?#
Have they finished?#
Would you eat this?#
Can this plane land on water?#
Isn't it raining?#
What kind of image is this?#
What is the largest object in the picture?#
What text is on the shirt?#
What time is shown on the clock?#
What color is the thing in the middle of the photo?#
In which room was this photo taken?#
In what city is this?#
Please tell me how many chairs there are.#
Identify the breed of the dog.#
Estimate the number of people.#
Hello, is there a bicycle?#
And what is behind the tree?#
Is a person visible in this image?#|Reply with yes or no.
Is the snowboard in the picture red?# Answer with yes or no.
How many apples are there?#|Answer with a single number.
What is the capital of the highlighted country?#|A. Oslo|B. Rome|C. Paris|Answer with the letter only.
Which of these is true?#|(A) It is day.|(B) It is night.
What is the name of the shop?#|Answer with one word.
Which side is the truck on?#|Do not explain.
The picture was taken in a kitchen. ^What is on the stove?#
Consider the image carefully. ^Is the man older than the woman?#
You are an expert. ^How many buttons does the coat have?#
I took this yesterday. ^What bird is it?#
¿De qué color es el coche?#
Welche Farbe hat das Auto?#
Combien de chiens y a-t-il ?#
""".strip().split("\n")


def as_prompts(lines: list[str]) -> list[tuple[str, str]]:
    """Return pairs of a prompt and the question that it asks, which is "" for a caption."""
    texts = [line.replace("|", "\n") for line in lines]
    questions = [text.partition("#")[0].rpartition("^")[2] if "#" in text else "" for text in texts]
    prompts = [text.replace("#", "").replace("^", "") for text in texts]
    return list(zip(prompts, questions, strict=True))


def wrong(prompts: list[tuple[str, str]]) -> list[str]:
    """Return the prompts that would get the wrong kind of reply, or a reply to another question."""
    return [prompt for prompt, question in prompts if find_question(prompt) != question]


def test_prompts_that_the_rule_was_written_with_get_the_right_kind_of_reply() -> None:
    assert wrong(as_prompts(CAPTIONS + ANSWERS)) == []
    question = "How many cups are there?"
    assert wrong([(around.replace("|", "\n").replace("#", question), question) for around in AROUND]) == []


def test_98_of_100_other_prompts_get_the_right_kind_of_reply() -> None:
    prompts = as_prompts(OTHER_CAPTIONS + OTHER_ANSWERS)
    # How benchmarks ask the same questions.
    prompts += [(prompt + SHORT, question) for prompt, question in prompts if question and "\n" not in prompt]
    mistakes = wrong(prompts)
    assert len(prompts) >= 130 and len(mistakes) <= 0.02 * len(prompts), mistakes


@pytest.mark.parametrize(
    ("text", "question"),
    [
        *as_prompts(ANSWERS),
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
def test_question_for_a_style_in_conversations_requests_that_style(style: str) -> None:
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
        ("OCR this image.", "ocr"),
        ("Describe it briefly.\nReference OCR token: STOP", "brief"),
        ("Caption this.", "brief"),
    ],
)
def test_words_for_captions_select_a_learned_style(text: str, style: str) -> None:
    assert choose_prompt(PROMPTS, text)[1:] == (style, "")
    without = [("human", "brief"), ("human", "")]
    if text not in (" detailed ",) and "Task:" not in text:
        assert choose_prompt(without, text) == ("human", "brief", "")


def test_captioner_without_answers_captions_and_one_without_captions_answers() -> None:
    assert choose_prompt([("human", "plain")], "What color is it?") == ("human", "plain", "")
    assert choose_prompt([("human", "")], "Describe this image.") == ("human", "", "Describe this image.")
    with pytest.raises(ValueError, match="only on questions"):
        choose_prompt([("human", "")])


@pytest.mark.parametrize("text", ["tags", "Task: caption, tags", "Task: caption, verse"])
def test_style_name_that_was_not_learned_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="was not trained on the style"):
        choose_prompt([("human", "plain"), ("human", "")], text)
