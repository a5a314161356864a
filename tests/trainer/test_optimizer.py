"""Rates: each part has its own, which warms up and falls in each stage."""

import math

import pytest
import torch

from pipeline.dataset.version import Version
from tests.trainer.small_trainings import replace
from trainer.build import build_checkpoint
from trainer.config import TrainConfig
from trainer.data import examples_in
from trainer.optimizer import build_optimizer, parameter_groups, schedule, set_stage
from trainer.sets import read_split_examples


def test_each_part_has_its_own_rate_and_what_has_none_does_not_learn(version: Version, clip: str) -> None:
    config = TrainConfig(
        encoder=clip, align_steps=5, steps=5, align_lr=1.0, connector_lr=0.1, decoder_lr=0.01, warmup_frac=0
    ).with_defaults(9)
    captioner = build_checkpoint(version, config, examples_in(version, "train")).captioner
    optimizer = torch.optim.AdamW(parameter_groups(captioner, config))
    for step, stage, rates in ((0, "align", (0.0, 1.0, 0.0)), (5, "train", (0.0, 0.1, 0.01))):
        assert set_stage(optimizer, config, step) == stage
        rate_of_part = {group["part"]: group["lr"] for group in optimizer.param_groups}
        assert tuple(rate_of_part[part] for part in ("encoder", "connector", "decoder")) == pytest.approx(rates)
        for part, rate in rate_of_part.items():
            assert all(p.requires_grad == (rate > 0) for p in getattr(captioner, part).parameters())


def test_a_rate_warms_up_and_falls_to_a_tenth_in_each_stage() -> None:
    config = TrainConfig(steps=100, align_steps=50, warmup_frac=0.1)
    shares = [schedule(config, step) for step in range(151)]
    for first, steps in ((0, 50), (50, 100)):
        stage = shares[first : first + steps]
        assert stage[0] == pytest.approx(10 / steps)
        assert max(stage) == 1.0
        assert stage[-1] < 0.11
    assert all(math.isfinite(share) for share in shares)


def test_a_part_that_learns_slowly_learns_no_faster_from_rewards(version: Version, clip: str) -> None:
    config = replace(encoder=clip, steps=2, scst_steps=2, encoder_lr=1e-6, decoder_lr=1e-3, scst_lr=5e-5).with_defaults(4)
    captioner = build_checkpoint(version, config, read_split_examples(version, "train", config)).captioner
    optimizer = build_optimizer(captioner, config)
    assert set_stage(optimizer, config, 2) == "scst"
    rates = {group["part"]: group["lr"] / schedule(config, 2) for group in optimizer.param_groups}
    assert rates == {"encoder": 1e-6, "connector": 5e-5, "decoder": 5e-5}
