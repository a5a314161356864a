"""Each rule rejects with its own reason, cleaned texts go to separate columns, and good texts pass."""

import json
import random
import re
from typing import Any

import pyarrow as pa
import pytest

from examples.scenes.questions import ASK
from pipeline.config.sections import FilterConfig, TaskConfig
from pipeline.filtering import filter_annotations, own_prompt_grams
from pipeline.rules import gives_answer_away, says_nothing
from pipeline.scenes.scene import sample_scene
from pipeline.scenes.text import STYLES, caption
from pipeline.tables import STRING, fields
from pipeline.tasks import Tasks
from tests.step_runs import numbered_table

COLUMNS = "annotation_id task style text question answer answer_type record prompt_id"
SCHEMA = pa.schema(fields(STRING, *COLUMNS.split()))
GOOD = "A red kite over a grey harbour."
CATS = "A cat on a mat, a cat in a hat, a cat by a door, a cat on a bed"


def table(*rows: str | tuple[str, str]) -> pa.Table:
    """Return a table of captions (str) and of questions with their answers (tuple)."""
    texts = [
        {"text": row} if isinstance(row, str) else {"question": row[0], "answer": row[1]} for row in rows
    ]
    return numbered_table(SCHEMA, texts)


def records(*values: tuple[str, Any]) -> pa.Table:
    """Return a table of records of custom tasks, given as (task, value) pairs."""
    return numbered_table(SCHEMA, [{"task": task, "record": json.dumps(value)} for task, value in values])


def reasons(*rows: str | tuple[str, str], **settings: Any) -> list[str | None]:
    grams = own_prompt_grams(("caption", "qa"))
    marked: list[str | None] = filter_annotations(table(*rows), FilterConfig(**settings), grams)[
        "reason"
    ].to_pylist()
    return marked


KEPT: tuple[str | tuple[str, str], ...] = (
    ("What is over the harbour?", "a kite"), ("Is the kite red or blue?", "red"), ("Is it a cat?", "no"),
    "Four people in life jackets sit in a raft on a river.", "Loading dock with two trucks and pallets.",
    "A slide titled analysis of sales with a bar chart.", "An oven dial that is set to 350 degrees.",
    "A skateboarder failed to land the trick on the ramp.", ("What is the man eating?", "orange"),
    ("Which cat is asleep?", "on the left"), ("What does the sign say to do?", "stop"),
    "The image is black and white, with a kite.", ("Which brand is on the kite?", "rojo"),
    ("How many kites are there?", "a lot"), ("How many kites are there?", "two kites"),
    ("How much rope is there?", "a lot"), ("What does the sign say?", "no"),
    ("What is shown in the window?", "a kite"), "A kite and the text above them in white.",
    ("How many kites are not visible?", "2"), ("What does the sign say?", "出口"),
    ("What does the sign say?", "Sorry, we are closed"), ("What does the text above the door say?", "open"),
    "A cat sits on the table below the window.", ("What letter is on a sign?", "A"),
    "A kite flies above the picture frame of a harbour",
    ("What is on the sign, according to the text on it?", "a price"),
    "There are no pictures on the white wall of the bedroom.",
    "A man uses his phone to send a picture to a friend.",
    "People hold signs to protest against immigration policies in a street.",
    "In the image the face of the woman cannot be seen.",
    ("Why can the dog not wear the coat?", "too small"), ("How many people are in the stand?", "~50"),
    'A page on a screen says "Home | About | Contact" in small letters.',
    'A yellow sign says "Betreten der Baustelle verboten, Eltern haften".',
    "A man stands at an airport next to gate A.", ("What does the sign 'Who?' say?", "a name"),
    ("Is the kite big? or small?", "big"), ("It is red and what other color?", "green"),
    "A red cat on a mat, a cat in a hat, a dog by a door, a cow on a bed, a pig at a bar, a hen.",
    "A man holds a sign that says '出口' in red.", "A room that is too dark for a plant.",
    "A sign with ten words hangs over the door.", "A volunteer is happy to help a farmer with the kites.",
    "A boy asks if you can see the moon over the harbour.",
    "People at a stock photo studio hold a red kite.", "A man pours a glass of chai",
    "In this photo 20 kites fly over a harbour.", ("What does the sign say?", "Age unknown"),
    ("What does the sign say?", "not available"), ("What is the number of the bus?", "X7"),
    ("How many kites are there?", "a couple"), ("How many percent of the kites are red?", "45%"),
    ("How many million dollars is the kite?", "$2.5 million"), ("How many kites are there?", "1,200"),
    ("Is there a kite or a bird?", "yes"), ("Was it taken in the morning or evening?", "no"),
    ("Is he wearing a hat or cap?", "yes"), ("What time of day is it?", "in the morning"),
    ("What app is open on the phone?", "weather"), ("Is the kite for military or private use?", "private"),
    ("Is the flag a British flag?", "yes"), ("What does the sign say?", "who?"),
    ("Why does the kite fly?", "because of the wind"), ("What time does the clock show?", "10:10"),
    ("What is the capital of the company?", "$5 million"),
    ("When was the kite invented according to the slide?", "in 1876"),
    ("Who earns the most in the chart?", "Anna"), ("How many days are in a sprint?", "7"),
    ("Which site is a favorite in the browser?", "news"), "A plate of dulce de leche on a table.",
    "Sign in the snow that warns of an avalanche.", "A man who is known to the police waits in a cell.",
    "A couple of pans that you would use for an omelet.", "Stop sign at the end of a muddy road.",
    ("What color is the floor?", "wood"), ("When was the photo taken?", "06/05/2009"),
    ("Where is the sun?", "behind a cloud"), ("How old is the bridge?", "very old"),
    ("What number is on the jersey?", "7"), ("What shape is the toy?", "ring"),
    ("Who is on the bench?", "no one"), ("Which way does the arrow point?", "left or right"),
    # texts that the image shows
    'A screen with the words "Image not available" in red.',
    'A slide with the prompt "You are an AI" on it.',
    "A man's shirt says 'I don't see any image' in red.", "A card with the character 出 in red ink.",
    'A meme of a cat with the caption "Monday again?" in white.', "A book explains the tags <h1> and <p>.",
    "A window shows a syntax error and a button to download a file.", "A screen shows a JSON file in blue.",
    "A receipt lists a coffee for 8.50 EUR.", "A mockup of a page with a box of lorem ipsum.",
    "A collage of a beach and a city. The first photo has a boat in it.",
    ("What does the dialog say?", "Sorry, please retry."), ("What does the cell show?", "#DIV/0!"),
    ("What message is on the screen?", "Image not available"), ("What does the cap say?", "</sleep>"),
    ("Which value is in the last cell?", "N/A"), ("What does it say?", "Lorem ipsum"),
    ("What is the first sentence on the sheet?", "The cat is ____ the mat."),
    ("Which part of the sentence can be seen?", "Here lies the body of"),
    ("What does the tag say?", "as described above"), ("What does the screen say?", "An error occurred."),
    # answers that are short sentences, parts of a group, or fractions
    ("What is new?", "The wall has been painted yellow."), ("Are all kites red?", "Only the one on the left"),
    ("How many pies are left?", "One and a half"), ("How many pies are left?", "1 1/2"),
    ("What color is the seam on the white sail?", "white"), ("Which way does the left kite fly?", "left"),
    ("How did the kite get there?", "a boy put it there"), ("Where is the hour hand?", "4"),
    ("Which brand of soap is it?", "409"), ("Are the cups in front of anything?", "mirror"),
    ("How many people are there?", "None, all the seats are empty."), ("What is at 9?", "a kite"),
    ("What time does the shop open?", "closed"), ("Why is it dark?", "night"), ("What is the time?", "9:41"),
    ("What color is the shirt?", "he isn't wearing one"), ("What is the cook doing?", "The man is frying."),
    ("Where are the white kites?", "no white kites"), ("If the sun were visible, where would it be?", "left"),
    # texts that forms, programs and chats show
    ("What status does the app show?", "Not visible"), ("What is entered on the report?", "Unknown"),
    ("Which value does the variable have?", "null"), ("What is the first line of the JSON?", '{"name": 1,'),
    ("Which emoji was sent?", "\U0001f44d"), ("What does the banner ask?", "Who will win?"),
    ("Which option is marked on the quiz screen?", "C"), ("What does the plate read?", "UNKNOWN"),
    ("Which train leaves first?", "the 9:15"), ("How many kites are red?", "all but one"),
    ("Which answer is ticked on the worksheet?", "All of the above"), ("Which symbol is on it?", "!"),
    ("What is the caption of the meme?", "When you see it"), ("What watermark is on it?", "Stock photo"),
    "A terminal shows a traceback that ends with \"No module named 'kites'.\"",
    "A screenshot of a chat in which the user asks for a kite.", "A wall on which x = 4 is painted.",
    'A page of "Lorem ipsum dolor sit amet" text lies on a table.', "A file named 'kite.jpg' on a screen.",
    ("What does it say?", 'The sign says "STOP".'), ("What does it display?", "The screen displays 42"),
    ("Is there any text on the shirt?", "no text"), ("What does the sign mean?", "It means stop in English"),
    ("What is the text on the left page?", "Left: menu"), ("What does the receipt say?", "** PAID"),
    ("What's on the screen?", "Fehler beim Laden der Datei"), ("What is the screen showing?", "x_1 = {}"),
    ("What is the last option of the menu?", "Datei speichern unter"), ("What is on the menu?", "coq au vin"),
    ("What button is at the bottom?", "Abbrechen und beenden"), ("What does the last column show?", "N/A"),
    ("Where does the sign say to turn?", "left"), ("What is the text in the JSON?", '{"name": "kite"}'),
    'A sign reads "Sorry, we are closed. Please call again tomorrow for help."',
    "A page says »I cannot see any image« in black letters.", 'A sign says "Photo not available".',
    "A page says \u300cI cannot see any image\u300d in black letters.",
    'A boy writes "I fly no kite. I fly no kite. I fly no kite. I fly no kite. I fly no kite." on a board.',
)  # fmt: skip
REJECTED: dict[str, tuple[str | tuple[str, str], ...]] = {
    "refusal": (
        "I'm sorry, I cannot see any image here.", ("What is over the harbour?", "Unable to determine"),
        "The image is too blurry to be described.",
        "The provided image does not contain any visual content.",
        "I'd rather not describe the person in it.",
        "Unfortunately the picture is too blurry for me to describe.",
        'Here is it: "I\'m sorry, but I cannot describe this image."',
        'The reply I give is "I\'m sorry, but I cannot help."',
        'A man holds a 5" pipe. I cannot help with this image, sorry. A 7" pipe lies next to it.',
        'A dog on a sofa "which looks comfortable. Please provide the image again" in the room.',
        'A sign says "Stop" here. I\'m sorry, I cannot describe the rest. A second sign says "Go" there.',
        "The sign says »Stop« today. I'm sorry, I cannot describe the rest. A second sign says »Go« here.",
    ),
    "other_language": (
        "A kite flies over a harbour\u3002", ("What color is the kite?", "rojo"),
        "Ein roter Drache fliegt über dem grauen Hafen der Stadt.", ("What color is the kite?", "棕色"),
        "A kite over a harbour 一个男人在骑自行车", "A man con un sombrero rides una bicicleta por la playa.",
        "The kite of the is in a with the of a harbour.",
        ("What is next to the cell phone?", "une tasse bleue sur la table"),
        ("What is next to the screen?", "une tasse bleue sur la table"), ("What is by the button?", "rojo"),
        ("What is the boy on the poster wearing?", "une chemise bleue"),
        "A blorp with frunty dringles zints the vassock.", "A woman in a reddressisstandingnextto a car.",
    ),
    "keywords": ("kite, harbour, red kite, grey sky, boats",),
    "count_not_a_number": (
        ("How many kites are there?", "several"), ("How many kites are there?", "3-4"),
        ("What is the number of buses?", "X7"), ("How many kites are there?", "-1"),
    ),
    "answer_off_type": (
        ("What flies over the harbour?", "yes"), ("Is the kite red or blue?", "yes"),
        ("What time is on the clock?", "in the tower"), ("Is the red kite red?", "yes"),
        ("What color is the kite?", "flying"), ("Who flies the kite?", "on the beach"),
        ("Where is the kite?", "red"), ("Which kite is higher?", "Yes, it is."), ("Who flies it?", "4"),
        ("Is the kite wet?", "green"), ("What color is the kite?", "large"), ("When is it?", "a boat"),
        ("What is the mast made of?", "round"), ("What shape is the sail?", "blue"),
        ("How tall is the mast?", "gray"), ("Where is the boat?", "in the picture"),
        ("What kind of kite is it?", "the kind of the kite"), ("What is above the bay?", "a kite or a bird"),
        ("What number is on the boat?", "white"), ("What is the boy holding?", "on the beach"),
        ("What color is the sign?", "flying"),
        ("Was the photo taken indoors or outdoors?", "no"), ("Is a kite higher or lower?", "Yes, it is."),
        ("Where is the cat sitting?", "At 3 o'clock in the afternoon"), ("What does he chew on?", "Tuesday"),
        ("Who pushes the cart?", "Late in the evening"), ("At what time was it taken?", "a wooden fence"),
        ("Why is the man sitting?", "Four"), ("What color is the bus?", "Two"), ("What is his job?", "blue"),
        ("How many children are sitting on it?", "3.75"), ("What is in the bay?", "Because it is old."),
        ("What is the cat looking at?", "The fridge has two doors."), ("Is the cup full or empty?", "blue"),
        ("What is he wearing on his head?", "three"), ("What number is on the boat?", "running"),
        ("What time does the clock show?", "The tower is tall"), ("Which fruit lies there?", "four"),
        ("Which word is on the van?", "A man leans against it."), ("Is the button red?", "blue"),
        ("What does the sign say?", "There is some text on it."), ("Where is the menu?", "red"),
        ("What number is printed on it?", "The shirt shows a number."), ("Is the sign printed?", "blue"),
    ),
    "no_description": (
        "and a kite that lies on the beach.",
        "Our kites are made of silk and fly for hours.", "Fishermen said on Monday that a kite fell.",
        "No assumptions are made about the kite.", "Sign up for a course at the harbour.",
        "What a kite over the old harbour!", "Kites are native to islands in the south.",
        "Something went wrong while the kite was loaded.", "A kite, f/2.8, 50 mm, over the harbour.",
        "There is no kite. There is no boat.", "Once there lived a boy who loved his kite.",
        "Subscribe on the page to get a kite.", "To fly a kite, hold the string.",
        "Answering requires no text.", "If you look up, a kite is in the sky.",
        "A lens was used by annotators of the kite.", "SALE KITES 50% BOATS TODAY 9 EUR",
        "The kite was designed by a man in Rome.",
    ),
    "not_visible": (
        ("What is the man thinking about?", "the sea"), ("What will happen next?", "rain"),
        ("What is the name of the dog?", "Rex"), ("What is the capital of France?", "Paris"),
        ("When was the kite invented?", "in 1876"), ("How much does the man earn?", "$100"),
        ("How many days are in a week?", "7"), ("What is the boy's favorite kite?", "red"),
        ("What do you think the man's name is?", "Rex"), ("Who took this photo?", "a sailor"),
        ("What was the boy doing before the photo was taken?", "resting"), ("What is out of frame?", "a bay"),
        ("What does the boy dream of?", "wind"), ("Where will the kite land?", "in the sea"),
        ("What sound does the kite make?", "a hum"), ("What is the message of the photo?", "freedom"),
        ("What advice would you give the boy?", "rest"), ("How many legs does a crab have?", "10"),
        ("What is the sexual orientation of the man?", "gay"), ("What tune does he whistle?", "a song"),
        ("Which party does the man in the photo vote for?", "the left"),
        ("Where would the kite land if it were heavy?", "in the sea"), ("Why do kites usually fly?", "wind"),
        ("Imagine it rains: what is wet?", "the kite"), ("What will the girl become?", "a doctor"),
        ("Why do birds migrate in winter?", "food"), ("Who was the first king of Spain?", "Carlos"),
        ("If you could add a kite, where would it be?", "there"),
        ("What is 4 times 6?", "24"), ("Where was the boy born?", "Rome"), ("What is on my kite?", "a star"),
    ),
    "too_general": (
        ("What is shown in the image?", "a kite"), "The image shows a photo of several objects and things.",
        ("What flies over the harbour?", "something"), ("What does the man do?", "action"),
        ("Is this a picture?", "yes"), ("How does he climb?", "in a certain way"),
        ("When is it?", "At some point in time, when the picture was taken."),
    ),
    "speaks_of_elsewhere": (
        ("In the second image, what flies?", "a kite"), ("Which option is correct?", "a kite"),
        ("What is shown in the image above?", "a kite"),
        "The kite that was mentioned above flies over a harbour.",
        ("What is said according to the text?", "a price"), "A kite is shown in image 7 of the series.",
        ("What flies over the harbour?", "see image"), ("Why does it fly?", "Option B"),
        ("Where is the kite?", "All of the above."),
    ),
    "too_long": (
        ("Who flies the kite?", "It is flown by a man in a hat."), "a red kite over a grey harbour " * 30,
        ("What is over the harbour?", "it is a kite that flies over the harbour in winds"),
        ("Where is the dog?", "the dog is running on a wet beach"),
    ),
    "unanswerable": (
        ("Who flies the kite?", "age unknown"), ("How many kites are there?", "Unknown."),
        ("What does the sign say?", "text unknown"), ("Is the kite red?", "possibly"),
        ("What does the sign say?", "N/A"), ("What is behind the bay?", "which bay?"),
        ("What is next to the cell phone?", "unknown"), ("What is the man with the cell phone doing?", "n/a"),
        ("What does the sign say?", "The words are too small to be read."),
        ("What does the sign say?", "Its text cannot be made out."),
    ),
    "junk": (
        "A kite <|im_end|> over the grey harbour", ("Where is the kite?", '{"bbox_2d": [1, 2, 3, 4]}'),
        ("What is the man on the screen doing?", '{"answer": "running"}'),
        ("What does the sign say?", "**STOP**"), ("What does the screen show?", '{"answer": "4"}'),
        "A kite \u202eflies over the grey harbour.",
    ),
    "too_short": ("A kite", ("Kite there?", "yes")),
    "repetitive": (
        "A kite over a harbour, a kite over a harbour, a kite over a harbour.",
        "A kite kite kite kite kite over a bay.",
        "A kite flies over a bay. It is a red one. A kite flies over a bay.",
        f"{CATS}, a cat in a car, a cat at a bar.",
        " ".join(f"The cat is {word}." for word in ("big", "red", "wet", "old", "shy", "sad")),
        ("What animals are there?", "dog, dog"), "A kite over a bay, a kite over a bay",
        "A bag with a cup, a fork, a cup, a fork, a cup, a fork.",
        "Here two kites, six kites, ten kites, five kites, nine kites, old kites, some kites",
    ),
    "answer_in_question": (
        ("What color is the red kite?", "red"), ("Where is the kite?", "The kite is in a place."),
        ("Why is he holding a kite?", "Because he is holding a kite."),
        ("What is the tower?", "It is a tower."),
    ),
    "label": (
        "5 + 7 = 12, so there are twelve kites.", "The task is to describe a kite over a bay.",
        "Caption: A kite flies over a harbour.", "The user wants a caption. A kite flies over a harbour.",
        "A kite flies over a harbour. Possible prompt: what flies?",
        ("What color is the kite?", "the answer is red"), ("What does it say?", "Answer: STOP"),
        ("What color is the kite?", "red, because of the paint"), ("What flies over the bay?", "(B)"),
        ("What flies?", "(insert short answer here)"), "A kite flies. Follow these steps to fold it.",
        ("What flies over the bay?", "Good question! A kite"), ("What flies?", "a kite (short answer)"),
    ),
    "placeholder": ("Your caption here", ("question?", "answer")),
    "prompt_echo": ("A sentence that names what matters most.",),
    "personal_answer": (("Which number does one call?", "617-497-4111"),),
    "cut_off": (
        "A kite flies over the grey harbour and the", ("What does the boy hold?", "a bag that is full of"),
    ),
    "no_single_question": (
        ("What flies? Is it red?", "a kite"), ("What color is it? (A) brown (B) black", "brown"),
        ("What color is the dog? And the cat?", "brown"), ("What is on the table, and why?", "a kite"),
        ("Generate a question. What flies?", "a kite"), ("The kite is red, right?", "yes"),
        ("Tell me the color of the kite?", "red"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason"),
    [*((row, None) for row in KEPT), *((row, reason) for reason, rows in REJECTED.items() for row in rows)],
)
def test_text_is_kept_or_rejected_with_reason(row: str | tuple[str, str], reason: str | None) -> None:
    assert reasons(GOOD, row) == [None, reason]


STYLED = (
    ("alt", "A red kite", None), ("alt", "Image of a red kite over a bay", None),
    ("alt", f"A red kite {'over a wonderful harbour ' * 5}".strip(), "too_long"),
    ("brief", "A red kite", "too_short"), ("plain", "a long red kite over some harbour " * 28, "too_long"),
    ("detailed", " ".join(f"A kite{n} flies over bay{n} by shop{n}." for n in range(40)), None),
    ("dense", "A red kite flies over a grey harbour.", "too_short"),
    ("tags", "kite, red kite, harbour", None), ("tags", "kite, kite, kite, harbour", "keywords"),
    ("tags", "kite [0.98], harbour [0.5]", "junk"), ("tags", "kite (0.98), harbour (0.5)", "keywords"),
    ("tags", "kite, 海滩, harbour", "keywords"), ("tags", "kite harbour sand running dog", "keywords"),
    ("tags", "kite, a harbour with many boats in it", "keywords"), ("tags", "none, none", "keywords"),
    ("tags", "kite, no people, harbour", "keywords"), ("tags", "kite, no parking, harbour", None),
    ("tags", "kite = toy, harbour = place", "keywords"),
    ("tags", "the kite is red, the sea is blue", "keywords"), ("ocr", "Sorry, we're closed", None),
    ("ocr", "STOP (partially visible)", "unanswerable"), ("ocr", "Top left: STOP", "unanswerable"),
    ("ocr", "The sign says STOP", "unanswerable"), ("ocr", "The text of this agreement is binding.", None),
    ("ocr", "STOP (120, 40, 300, 90)", "junk"), ("ocr", "EXIT", None), ("ocr", "**STOP**", "junk"),
    ("ocr", "SALE | 50% | *today* SALE | 50% | *today*", None), ("ocr", "| Kite | 1 | | --- | --- |", "junk"),
    ("ocr", "Liberté, égalité, 出口", None),
    ("ocr", "There is text, but it is too small to be read.", "unanswerable"),
    ("ocr", "Lost in Translation", None), ("ocr", "MENU in English", None),
    ("ocr", "No text messages while driving", None), ("ocr", "TEST", None),
    ("ocr", "No text is visible", "unanswerable"), ("ocr", "Sortie (in English: exit)", "unanswerable"),
    ("human", "Three men drink tea at a cafe \u2615", None),
    ("human", "Three \u2615 men drink tea at a cafe", "junk"),
    ("human", "My cat sleeps on our sofa.", None), ("plain", "My cat sleeps on our sofa.", "no_description"),
    ("tags", "poster, warranty, cat", None),
    ("plain", "Three men drink tea at a cafe \u2615", "junk"), ("ocr", "exit exit " * 40, "repetitive"),
    ("ocr", " ".join(map(str, range(3000))), None),
)  # fmt: skip


@pytest.mark.parametrize(("style", "text", "reason"), STYLED)
def test_bounds_and_rules_depend_on_the_caption_style(style: str, text: str, reason: str | None) -> None:
    rows = numbered_table(SCHEMA, [{"style": style, "text": text}])
    assert filter_annotations(rows, FilterConfig())["reason"].to_pylist() == [reason]


@pytest.mark.parametrize(
    ("style", "words", "kept"),
    [("dense", 20, (10, 600)), ("alt", 12, (3, 30)), ("plain", 100, (5, 200)), ("plain", 6, (3, 150))],
)
def test_bounds_of_each_style_make_room_for_the_requested_words(
    style: str, words: int, kept: tuple[int, int]
) -> None:
    lengths = (kept[0] - 1, *kept, kept[1] + 1)
    filler = [f"{chr(97 + number % 26)}{number // 26}" for number in range(700)]
    rows = numbered_table(SCHEMA, [{"style": style, "text": " ".join(filler[:n]) + "."} for n in lengths])
    marked = filter_annotations(rows, FilterConfig(language=None), caption_words=words)["reason"].to_pylist()
    assert [reason in ("too_short", "too_long") for reason in marked] == [True, False, False, True]


OWN = TaskConfig(name="own", kind="question", prompt="Ask something.")
SENTENCE = {"task": "qa", "question": "Who flies the kite?", "answer": "It is flown by a man in a hat."}
KNOWLEDGE = {"task": "qa", "question": "What is the capital of France?", "answer": "Paris"}
NUMBER = {"task": "qa", "question": "Which count is on the kite?", "answer_type": "number"}
GERMAN = {"question": "Welche Zahl ist auf dem Drachen?", "answer": "zwei"}


@pytest.mark.parametrize(
    ("row", "settings", "reason"),
    [
        (SENTENCE, {}, "too_long"), (SENTENCE, {"max_answer_words": 12}, None),
        (SENTENCE | {"prompt_id": "human"}, {}, None), (SENTENCE | {"task": "own"}, {}, None),
        (KNOWLEDGE, {}, "not_visible"), (KNOWLEDGE | {"prompt_id": "human"}, {}, None),
        (NUMBER | {"answer": "two"}, {}, None), (NUMBER | {"answer": "a couple"}, {}, None),
        (NUMBER | {"answer": "forty"}, {}, None), (NUMBER | {"answer": "city"}, {}, "answer_not_a_number"),
        (NUMBER | {"answer": "red"}, {}, "answer_not_a_number"), (NUMBER | GERMAN, {"language": "de"}, None),
        ({"task": "qa", "question": "Was hält er?", "answer": "einen Ball"}, {"language": "de"}, None),
        ({"task": "qa", "question": "Is de deur open?", "answer": "nee"}, {"language": "nl"}, None),
    ],
)  # fmt: skip
def test_bounds_of_answers_depend_on_their_type_origin_and_language(
    row: dict[str, str], settings: dict[str, Any], reason: str | None
) -> None:
    rows = numbered_table(SCHEMA, [row])
    marked = filter_annotations(rows, FilterConfig(**settings), tasks=Tasks(custom=[OWN]))
    assert marked["reason"].to_pylist() == [reason]


def test_markup_is_rejected_in_custom_texts_unless_they_are_read_from_the_image() -> None:
    tasks = [
        TaskConfig(name="headline", kind="text", prompt="Write a headline with words for the text below."),
        TaskConfig(name="sign", kind="text", prompt="Copy all text in it."),
    ]
    texts = ("**Kites**", "Headline: kites", "Sale: 50%", "The the kite is is red")
    rows = records(*((task, text) for task in ("headline", "sign") for text in texts))
    marked = filter_annotations(rows, FilterConfig(), tasks=Tasks(custom=tasks))
    assert marked["reason"].to_pylist() == ["junk", "label", None, "repetitive", None, None, None, None]


def test_clean_columns_omit_stock_openings_and_personal_data() -> None:
    text = "The image shows a sign that says mail@example.org in red."
    marked = filter_annotations(table(text, ("Which address is shown?", "mail@example.org")), FilterConfig())
    assert marked["text"].to_pylist() == [text, None]
    assert marked["clean_text"].to_pylist() == ["A sign that says [email] in red.", None]
    assert marked["clean_answer"].to_pylist() == [None, "[email]"]
    assert marked["redaction_count"].to_pylist() == [1, 1]


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        # The detector is unsure.
        ("Zwarte kat slaapt op de bank", {}, "other_language"),
        ("Seekor anjing berlari di pantai", {}, "other_language"),
        ("Tom Brady throws a football to Gronkowski at Foxborough", {}, None),
        ("A margherita pizza, bruschetta, prosciutto, mozzarella, focaccia.", {}, None),
        ("Musta kissa nukkuu sohvalla", {"language": "fi"}, None),
        ("Musta kissa nukkuu sohvalla", {"language": "fi", "min_caption_words": 5}, "too_short"),
        ("Musta kissa nukkuu sohvalla", {"language": None}, "too_short"),
        ("Black cat on sofa", {}, "too_short"),
        # The detector reports Swedish.
        ("Et barn på en cykel", {"language": "da"}, None),
        ("A black cat sleeps on a red sofa in the kitchen", {"language": "da"}, "other_language"),
        ("Ein roter Drache fliegt über dem grauen Hafen der Stadt.", {"language": None}, None),
        ("Ein roter Drache fliegt über dem grauen Hafen der Stadt.", {"language": "de"}, None),
        ("No hay coches en la calle mojada de la ciudad.", {"language": "es"}, None),
        ("Красный змей летит над серой гаванью города.", {"language": "ru"}, None),
        ("一只黑猫睡在红色的沙发上。", {"language": "zh"}, None),
        ("A kite flies over harbours.", {}, None),
        ("A kite flies over harbours.", {"min_caption_words": 6}, "too_short"),
    ],
)
def test_caption_is_checked_against_the_settings(
    text: str, settings: dict[str, Any], reason: str | None
) -> None:
    assert reasons(text, **settings) == [reason]


def test_texts_of_drawn_scenes_pass_all_rules() -> None:
    rows: list[str | tuple[str, str]] = []
    for number in range(300):
        rng = random.Random(f"clean:{number}")
        scene = sample_scene(rng)
        rows += [caption(scene, style) for style in STYLES]
        rows += [(pair.question, pair.answer) for pair in (ask(scene, rng) for ask in ASK.values())]
    assert set(reasons(*rows)) == {None}


def test_allowed_label_of_custom_task_is_not_a_prompt_echo() -> None:
    label = "a sign with words across the grass"
    prompt = f"Choose the labels that are true of this picture, such as {label}."
    tasks = [
        TaskConfig(name="tags", kind="labels", prompt=prompt, labels=(label, "none")),
        TaskConfig(name="note", kind="text", prompt=prompt),
    ]
    echo = "Choose the labels that are true of this picture"
    rows = records(("tags", [label]), ("note", echo), ("note", label))
    marked = filter_annotations(rows, FilterConfig(), tasks=Tasks(custom=tasks))
    assert marked["reason"].to_pylist() == [None, "prompt_echo", "prompt_echo"]


def test_personal_data_within_a_record_is_redacted() -> None:
    record = {"phones": ["+49 30 1234567"], "who": {"mail": "a.b@example.org", "age": 7}}
    output = {"type": "object", "properties": {"n": {"type": "integer"}}}
    task = TaskConfig.model_validate({"name": "t", "kind": "record", "prompt": "Look.", "output": output})
    marked = filter_annotations(records(("t", record)), FilterConfig(), tasks=Tasks(custom=[task]))
    clean = {"phones": ["[phone]"], "who": {"mail": "[email]", "age": 7}}
    assert json.loads(marked["clean_record"][0].as_py()) == clean
    assert marked["redaction_count"].to_pylist() == [2] and marked["reason"].to_pylist() == [None]


EMPTY = """
... | I don't know | not sure | Unsure | unclear from here | Not visible in the image | cannot be determined
N/A | There is no clock | too blurry to tell | The text is illegible | It's hard to say | Unreadable. | null
no idea | none of the above | Can't tell
"""
MEANINGFUL = "no | nothing | none | 2 | no one | not a dog | cannon | clear | Not yet begun | null island"


@pytest.mark.parametrize("is_empty", [True, False])
def test_answers_without_content_are_detected_and_short_meaningful_answers_are_not(*, is_empty: bool) -> None:
    answers = re.split(r" \| |\n", EMPTY.strip()) if is_empty else MEANINGFUL.split(" | ")
    assert {answer: says_nothing(answer) for answer in answers} == dict.fromkeys(answers, is_empty)


@pytest.mark.parametrize(
    ("question", "answer", "gives_away"),
    [
        ("What animal is the cat?", "cat", True), ("What animal is the cat?", "a cat", True),
        ("What is on the table with the pizzas?", "pizza", True),
        ("What is the wooden table made of?", "wood", True),
        ("What does the woman in the red dress wear?", "a red dress", True),
        ("What does the woman in the red dress wear?", "dress that is red", True),
        ("Is it red or blue?", "red", False), ("How many of the 3 dogs sleep?", "3", False),
        ("How many sheep?", "many", False), ("Is the dog big?", "yes", False),
        ("What is in the glass?", "gas", False), ("How deep would the water be?", "deep", False),
        ("What color is the white wall?", "white in color", True),
        ("Is it a laptop or something else, a laptop?", "laptop", True), ("What is it?", "", False),
    ],
)  # fmt: skip
def test_answer_in_question_is_detected(question: str, answer: str, *, gives_away: bool) -> None:
    assert gives_answer_away(question, answer) == gives_away


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("A kite that appears to be red flies over a harbour.", "hedge"),
        ("A kite flies over a harbour, possibly in Spain.", "hedge"),
        ("A kite over a harbour adds a sense of calm.", "mood"),
        ("A kite flies over a harbour, adding a touch of color.", "mood"),
        ("A kite over a harbour creates a calm and joyful scene.", "mood"),
        ("A kite flies over a harbour where there are no boats.", "absence"),
        ("A kite whose string isn't visible flies over a harbour.", "absence"),
        ("A kite whose string isn\u2019t visible flies over a harbour.", "absence"),
        ("A kite could be seen over a harbour.", None),
        ("A kite flies on the left of the image.", "image"),
        ("A woman appears in a mirror near a red kite.", None),
        ("A man with a good sense of direction holds a kite.", None),
        ("A man without a hat holds a photo of a kite.", None),
    ],
)
def test_phrase_is_rejected_only_if_its_kind_is_listed(text: str, kind: str | None) -> None:
    kinds = ("hedge", "mood", "absence", "image")
    assert reasons(text) == reasons(text, reject_phrases=[k for k in kinds if k != kind]) == [None]
    assert reasons(text, reject_phrases=kinds) == ["unwanted_phrase" if kind else None]
