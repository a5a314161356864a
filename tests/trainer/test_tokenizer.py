"""Tokenizer: prompts name source and style, targets end with EOS, and only targets are learned."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipeline.errors import TrainError
from tests.trainer.tiny_models import save_language_model
from trainer.model.language_model import load_decoder
from trainer.tokenizer import PAD_ID, CaptionTokenizer, TargetText, TextBatch, collate, train_tokenizer

TEXTS = [
    TargetText("synthetic", "A red circle.", style="brief"),
    TargetText("human", "A blue ring.", style="brief"),
    TargetText("synthetic", "yes", question="Is there a red circle?"),
]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return train_tokenizer(TEXTS, 400)


def batch_of(tokenizer: CaptionTokenizer, texts: list[list[TargetText]], max_tokens: int) -> TextBatch:
    return collate([[tokenizer.encode(text, max_tokens) for text in of_image] for of_image in texts])


def target_of(tokenizer: CaptionTokenizer, text: TargetText) -> list[int]:
    return tokenizer.encode(text, None).target.tolist()


def test_prompt_names_source_and_style_or_question(tokenizer: CaptionTokenizer) -> None:
    token = tokenizer.backend.token_to_id
    assert tokenizer.prompt(TEXTS[0]) == [token("<synthetic>"), token("<brief>")]
    assert tokenizer.prompt(TEXTS[1]) == [token("<human>"), token("<brief>")]
    prompt = tokenizer.prompt(TEXTS[2])
    assert (prompt[0], prompt[-1]) == (token("<synthetic>"), token("<answer>"))
    assert tokenizer.decode(prompt[1:-1]) == "Is there a red circle?"


@pytest.mark.parametrize("kind", ["scratch", "qwen3"])
def test_target_ends_with_eos_and_decodes_to_its_text(
    kind: str, tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    if kind != "scratch":
        _, tokenizer = load_decoder(save_language_model(tmp_path, kind))
    text = 'A "red" <eos>, <end> and <pad> Kreis é.'
    ids = target_of(tokenizer, TargetText("human", text, style="brief"))
    assert (ids.count(tokenizer.eos_id), ids[-1]) == (1, tokenizer.eos_id)
    assert tokenizer.decode(ids[:-1]) == text


def test_loss_mask_of_a_batch_covers_only_targets_and_each_text_has_its_image(
    tokenizer: CaptionTokenizer,
) -> None:
    batch = batch_of(tokenizer, [[TEXTS[0], TEXTS[2]], [], [TEXTS[1]]], max_tokens=64)
    assert batch.image_of_C.tolist() == [0, 0, 2]
    for c, text in enumerate((TEXTS[0], TEXTS[2], TEXTS[1])):
        learned = batch.ids_CT[c, 1:][batch.learned_CT[c]].tolist()
        assert learned == target_of(tokenizer, text)
    ends = batch.length_C.tolist()
    assert all(batch.ids_CT[c, end:].eq(PAD_ID).all() for c, end in enumerate(ends))


def test_long_text_is_cut_after_the_last_fitting_sentence_and_has_eos(tokenizer: CaptionTokenizer) -> None:
    texts = ["A red circle.", "A red circle. A blue ring!", "A red circle. A blue ring! Mr. X?"]
    sizes = tokenizer.count_tokens([TargetText("human", text, style="brief") for text in texts])
    long = TargetText("human", f"{texts[2]} 3.5 rings", style="brief")
    limits = (sizes[0], sizes[1] - 1, sizes[1], sizes[2])
    for limit, kept in zip(limits, (texts[0], *texts), strict=True):
        target = tokenizer.encode(long, limit).target.tolist()
        assert (target[-1], tokenizer.decode(target[:-1])) == (tokenizer.eos_id, kept)
    whole = tokenizer.encode(long, None).target.tolist()
    assert tokenizer.encode(long, 3).target.tolist() == whole[:3] and tokenizer.eos_id not in whole[:3]
    assert whole == tokenizer.encode(long, len(whole)).target.tolist()


def test_default_text_limit_fits_99_percent_of_the_longest_style(tokenizer: CaptionTokenizer) -> None:
    detailed = [TargetText("synthetic", "ring " * n, style="detailed") for n in (*[20] * 99, 70)]
    answers = [TargetText("synthetic", "yes", question="?")] * 9_000
    longest = tokenizer.count_tokens(detailed[:1])[0]
    assert 16 < longest <= 96
    assert tokenizer.choose_max_tokens(detailed + answers) == -(-longest // 16) * 16
    assert tokenizer.choose_max_tokens([TargetText("human", "ring " * 999, style="brief")]) == 256


def test_only_special_tokens_may_exceed_the_vocabulary_of_the_decoder(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path, "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    decoder, loaded = load_decoder(folder)
    assert max(loaded.backend.get_vocab().values()) == decoder.settings["vocab_size"]
    target = target_of(loaded, TargetText("human", "an <image> here", style="brief"))
    assert max(target) < decoder.settings["vocab_size"]
    tokenizer.add_tokens(["kite"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(TrainError, match="the tokenizer has 260 tokens, but the decoder has 258"):
        load_decoder(folder)
