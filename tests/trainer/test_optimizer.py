"""Weight updates: parameter groups and schedule."""

from math import isfinite

import pytest

from pipeline.dataset.version import Version
from trainer.config import TrainConfig
from trainer.data import examples_in
from trainer.model.checkpoint import build_checkpoint
from trainer.optimizer import Schedule, build_optimizer


def test_each_model_part_has_a_learning_rate_and_is_frozen_at_rate_0(version: Version, clip: str) -> None:
    rates = {"align_lr": 1.0, "connector_lr": 0.1, "decoder_lr": 0.01, "scst_lr": 0.02, "lr_floor_frac": 1}
    stages = {"steps": 5, "align_frac": 1.0, "scst_frac": 1.0, "warmup_frac": 0}
    config = TrainConfig.model_validate({"encoder": clip, **rates, **stages}).with_defaults(9)
    captioner = build_checkpoint(version, config, examples_in(version, "train")).captioner
    optimizer = build_optimizer(captioner, config)
    for step, stage, expected in (
        (0, "align", (0.0, 1.0, 0.0)),
        (5, "train", (0.0, 0.1, 0.01)),
        (10, "scst", (0.0, 0.02, 0.01)),
    ):
        assert Schedule(config).apply(optimizer, step) == stage
        rate_of_part = {"encoder": 0.0} | {group["part"]: group["lr"] for group in optimizer.param_groups}
        found = tuple(rate_of_part[part] for part in ("encoder", "connector", "decoder"))
        assert found == pytest.approx(expected)
        for part, rate in rate_of_part.items():
            assert all(p.requires_grad == (rate > 0) for p in getattr(captioner, part).parameters())


def test_learning_rate_warms_up_and_decays_to_a_tenth_in_each_stage() -> None:
    config = TrainConfig(steps=100, align_frac=0.5, warmup_frac=0.1)
    shares = [Schedule(config).factor(step) for step in range(150)]
    for first, steps in ((0, 50), (50, 100)):
        stage = shares[first : first + steps]
        assert stage[0] == pytest.approx(10 / steps)
        assert max(stage) == 1.0
        assert stage[-1] < 0.11
    assert all(isfinite(share) for share in shares)


def test_stage_that_ends_early_anneals_the_learning_rate_in_its_last_15_percent() -> None:
    config = TrainConfig(steps=200, align_frac=0.1, scst_frac=0.15, warmup_frac=0.1, lr_floor_frac=0.02)
    planned, schedule = Schedule(config), Schedule(config)
    assert schedule.end_early(20 + 85) == 20 + 100
    assert (schedule.ends, schedule.total_steps) == ([20, 120, 150], 150)
    factors = [schedule.factor(step) for step in range(150)]
    assert factors[:105] == [planned.factor(step) for step in range(105)]
    assert factors[105] == planned.factor(105) > 0.6
    steps = [factors[n] - factors[n + 1] for n in range(105, 119)]
    assert steps == pytest.approx([(factors[105] - 0.02) / 15] * 14)
    assert factors[120:] == [planned.factor(step) for step in range(220, 250)]
    # Later evaluations without gain change nothing until the next stage.
    assert schedule.end_early(110) == 120 and schedule.total_steps == 150
    assert schedule.end_early(120 + 17) == 120 + 20
    restored = Schedule(config, dict(schedule.lengths), schedule.anneal_from)
    assert [restored.factor(n) for n in range(140)] == [schedule.factor(n) for n in range(140)]
