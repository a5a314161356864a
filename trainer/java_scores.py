"""Scores that need Java: tokens as on COCO, METEOR and SPICE, by the programs in the package pycocoevalcap."""

import importlib.util
import json
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from pipeline.errors import TrainError
from pipeline.install import install_command
from trainer.metrics import Tokens

TOKENIZER = "tokenizer/stanford-corenlp-3.4.1.jar"
SPICE, SPICE_MODELS = "spice/spice-1.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar"
MAX_SHOWN = 200  # characters of an error of Java
SPICE_MEMORY = "-Xmx8G"  # as its authors set it


@cache
def has_java_scores() -> bool:
    """Return whether the package pycocoevalcap is here, and a Java that runs."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return False
    try:
        _java(["-version"])
    except TrainError:
        return False
    return True


def ptb_tokens(texts: Sequence[str]) -> list[list[str]]:
    """Return the tokens of texts by Stanford's PTB tokenizer, lower case and without punctuation, as COCO's scores take them.

    Takes a second to start. Raises TrainError if the program fails.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    arguments = ["-cp", str(_file(TOKENIZER)), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = _java(arguments, "".join(" ".join(text.split()) + "\n" for text in texts)).split("\n")[: len(texts)]
    if len(lines) != len(texts):
        raise TrainError(f"the tokenizer returned {len(lines)} of {len(texts)} texts", hint="please report this bug")
    return [[token for token in line.split() if token not in PUNCTUATIONS] for line in lines]


def meteor(corpora: Sequence[Sequence[Tokens]], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """Return METEOR (Denkowski and Lavie, 2014) of several sets of hypotheses for the same images; takes seconds to start.

    Raises TrainError if the program fails.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    texts_of = {index: [" ".join(reference) for reference in of_image] for index, of_image in enumerate(references)}
    try:
        program = Meteor()
        return [
            float(program.compute_score(texts_of, {index: [" ".join(text)] for index, text in enumerate(hypotheses)})[0])
            for hypotheses in corpora
        ]
    except (OSError, ValueError, AssertionError) as error:
        raise TrainError(f"METEOR failed: {error}", hint="java -version says whether Java works") from None


def require_spice() -> None:
    """Raise TrainError if SPICE cannot be run here."""
    if not has_java_scores():
        hint = f"install Java, and {install_command('scores')}"
        raise TrainError("SPICE needs Java and the package pycocoevalcap", hint=hint)
    if not _file(SPICE_MODELS).exists():
        hint = "python -m pycocoevalcap.spice.get_stanford_models fetches it, about 400 MB from nlp.stanford.edu"
        raise TrainError("SPICE needs Stanford's parser", hint=hint)


def spice(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return SPICE (Anderson et al., 2016), the F-score of objects, attributes and relations, on average over images.

    Parses all texts, which takes minutes. Raises TrainError if it cannot be run.
    """
    require_spice()
    pairs = enumerate(zip(hypotheses, references, strict=True))
    items = [{"image_id": index, "test": text, "refs": [*refs]} for index, (text, refs) in pairs]
    with TemporaryDirectory() as folder:
        given, result = Path(folder) / "texts.json", Path(folder) / "scores.json"
        given.write_text(json.dumps(items), encoding="utf-8")
        _java([SPICE_MEMORY, "-jar", str(_file(SPICE)), str(given), "-out", str(result), "-subset", "-silent"])
        scores = [float(item["scores"]["All"]["f"] or 0.0) for item in json.loads(result.read_text(encoding="utf-8"))]
    return sum(scores) / len(scores)


def _file(name: str) -> Path:
    """Return the path of a file of pycocoevalcap."""
    spec = importlib.util.find_spec("pycocoevalcap")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / name


def _java(arguments: Sequence[str], text: str = "") -> str:
    try:
        done = subprocess.run(["java", *arguments], input=text.encode(), capture_output=True, check=True)  # noqa: S603, S607
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or b"").decode("utf-8", "replace").strip().splitlines() or [str(error)]
        raise TrainError(f"Java failed: {lines[-1][:MAX_SHOWN]}", hint="java -version says whether it works") from None
    return done.stdout.decode("utf-8", "replace")
