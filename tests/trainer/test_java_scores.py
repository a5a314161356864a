"""Scores that need Java: the programs of pycocoevalcap where Java is, and one clear error where something is missing."""

import json
import shutil
from pathlib import Path

import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from pipeline.errors import TrainError
from trainer import java_scores
from trainer.java_scores import has_java_scores, meteor, ptb_tokens, require_spice, spice

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="these are Java programs")
TEXTS = [
    "A man's T-shirt, 3.5 m (red)!",
    "",
    "Two dogs...  run\nover \u201cgrass\u201d.",
    "don't stop -- it's 5:30 p.m.",
    "caf\u00e9; na\u00efve?",
]


@needs_java
def test_tokens_are_those_of_coco() -> None:
    expected = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(TEXTS)})
    assert [" ".join(tokens) for tokens in ptb_tokens(TEXTS)] == [expected[n][0] for n in range(len(TEXTS))]
    assert ptb_tokens([]) == []


@needs_java
def test_meteor_is_best_for_the_same_words() -> None:
    references = [[["a", "red", "circle", "lies", "on", "a", "table"]], [["two", "dogs", "run", "over", "a", "field"]]]
    stemmed = [["a", "red", "circle", "lying", "on", "tables"], ["two", "dogs"]]
    same, stem, swapped = meteor([[r[0] for r in references], stemmed, [r[0] for r in references[::-1]]], references)
    assert same == pytest.approx(1.0, abs=0.01)
    assert swapped < stem < same


def test_without_java_there_are_no_such_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    has_java_scores.cache_clear()
    try:
        assert not has_java_scores()
        with pytest.raises(TrainError, match="SPICE needs Java"):
            require_spice()
    finally:
        has_java_scores.cache_clear()


def test_spice_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(java_scores, "has_java_scores", lambda: True)
    monkeypatch.setattr(java_scores, "_file", lambda name: tmp_path / name)
    with pytest.raises(TrainError, match="Stanford's parser") as refused:
        spice(["A dog."], [["A dog."]])
    assert "get_stanford_models" in refused.value.hint


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Put a program in place of Java; the parser of SPICE cannot be had without a network."""
    monkeypatch.setattr(java_scores, "has_java_scores", lambda: True)
    monkeypatch.setattr(java_scores, "_file", lambda name: tmp_path / name)
    models = tmp_path / java_scores.SPICE_MODELS
    models.parent.mkdir(parents=True)
    models.touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "java"


def test_spice_is_the_mean_of_what_its_program_writes(program: Path) -> None:
    program.write_text(
        '#!/bin/sh\ncp "$4" "$(dirname "$0")/given.json"\n'
        'echo \'[{"image_id": 0, "scores": {"All": {"f": 0.5}}}, {"image_id": 1, "scores": {"All": {"f": null}}}]\' > "$6"\n'
    )
    program.chmod(0o755)
    assert spice(["A dog.", "A cat."], [["A puppy.", "One dog."], ["A cat."]]) == 0.25
    given = json.loads((program.parent / "given.json").read_text())
    assert given[0] == {"image_id": 0, "test": "A dog.", "refs": ["A puppy.", "One dog."]}


def test_a_program_that_fails_is_one_error(program: Path) -> None:
    program.write_text("#!/bin/sh\necho 'at line 1' >&2\necho 'no memory' >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(TrainError, match="Java failed: no memory"):
        spice(["A dog."], [["A dog."]])
