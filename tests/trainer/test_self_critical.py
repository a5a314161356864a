"""Tests of self-critical training: rewards by CIDEr-D, and their effect on captions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import trainer.self_critical
from pipeline.dataset.version import Version
from tests.trainer import small_trainings
from tests.trainer.tiny_models import save_clip, save_language_model
from trainer.data import examples_in
from trainer.metrics import cider_d, tokenize
from trainer.model.checkpoint import Checkpoint, build_checkpoint
from trainer.runtime.training_state import read_log
from trainer.self_critical import SelfCritic
from trainer.tokenizer import EOS
from trainer.training import train_captioner

SMALL = small_trainings.replace(steps=0, max_caption_tokens=12)
SAMPLES = 4


@pytest.fixture(scope="module", params=["scratch", "llama"])
def checkpoint(
    request: pytest.FixtureRequest, version: Version, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    root = tmp_path_factory.mktemp("models")
    decoder = request.param if request.param == "scratch" else save_language_model(root / "lm", request.param)
    torch.manual_seed(0)
    config = SMALL.model_copy(update={"encoder": save_clip(root / "clip"), "decoder": decoder})
    return build_checkpoint(version, config.with_defaults(40), examples_in(version, "train"))


def test_advantage_is_the_reward_minus_the_mean_of_the_others(
    checkpoint: Checkpoint, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = examples_in(version, "train")[:2]
    monkeypatch.setattr(trainer.self_critical, "cider_d", lambda *_, **__: [1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    states = torch.randn(2, 5, checkpoint.captioner.encoder.width)
    sampled, _ = SelfCritic(checkpoint, examples, 3).sample(states, examples)
    assert sampled.weight_C.tolist() == pytest.approx([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0])


def test_end_of_text_token_counts_as_a_word_in_the_reward(checkpoint: Checkpoint, version: Version) -> None:
    examples = examples_in(version, "train")[:5]
    critic = SelfCritic(checkpoint, examples, SAMPLES)
    captions = [[text.text for text in example.texts if text.style == "brief"] for example in examples]
    expected = [[[*tokenize(text), EOS] for text in texts] for texts in captions]
    assert [critic.references[example.sample_id] for example in examples] == expected
    whole, cut = tokenize(captions[0][0]), tokenize(captions[0][0])[:-1]
    candidates = ([*whole, EOS], whole, [*cut, EOS])
    scores = [cider_d([text], [expected[0]], rarity=critic.rarity)[0] for text in candidates]
    assert scores[0] == max(scores) and scores[0] == pytest.approx(10.0)


def test_step_raises_the_likelihood_of_rewarded_captions(checkpoint: Checkpoint, version: Version) -> None:
    examples = examples_in(version, "train")[:6]
    captioner = checkpoint.captioner
    pixels = captioner.encoder.pixels([example.open() for example in examples])
    with torch.inference_mode():
        states = captioner.encoder(pixels).clone()
    torch.manual_seed(3)
    sampled, rewards = SelfCritic(checkpoint, examples, SAMPLES).sample(states, examples)
    assert len(rewards) == len(sampled.weight_C) == len(examples) * SAMPLES
    assert sampled.image_of_C.tolist() == [image for image in range(len(examples)) for _ in range(SAMPLES)]
    # Random weights earn no rewards.
    texts = replace(sampled, weight_C=torch.randn(len(rewards)))
    captioner.zero_grad()
    before = captioner.loss(states.clone(), texts)
    before.backward()
    with torch.no_grad():
        for weights in captioner.parameters():
            if weights.grad is not None:
                weights.sub_(1e-4 * weights.grad)
        assert captioner.loss(states.clone(), texts) < before
    captioner.zero_grad()


def test_reward_stage_begins_early_when_the_score_stops_improving(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    """When the stage `scst` begins, the count of evaluations without gain restarts at zero."""
    small_trainings.script_scores(monkeypatch, [0.5, 0.4, 0.3, 0.2, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    lengths = {"steps": 40, "scst_frac": 0.5, "scst_samples": 2, "evaluations": 30, "patience": 2}
    config = SMALL.model_copy(update={"encoder": clip, **lengths})
    train_captioner(version, config, tmp_path / "c")
    log = [line for line in read_log(tmp_path / "c/log.jsonl") if "stage" in line]
    steps = [(line["step"], line["stage"]) for line in log]
    # Patience is over after 6 steps of each stage, and annealing the rate takes 2 more.
    assert steps == [*((n, "train") for n in range(1, 9)), *((n, "scst") for n in range(9, 17))]
    assert ["reward" in line for line in log] == [False] * 8 + [True] * 8
