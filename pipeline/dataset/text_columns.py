"""Names of columns in which tables hold what people wrote about images."""

CAPTION_COLUMNS = ("caption", "captions", "text", "sentences", "alt_text", "original_alt_text", "description")
REFERENCES, QA = "references", "qa"  # more captions, and a list of questions
CAPTIONS = (*CAPTION_COLUMNS, "comment", REFERENCES, "title")  # in a file that a user calls one of captions
REFERENCE_QA = "reference_qa"  # questions with all answers, in a version and in its exports
QUESTION, ANSWERS, ANSWER_TYPE, SPLIT = "question", ("answers", "answer"), "answer_type", "split"
