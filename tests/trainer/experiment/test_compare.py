"""Comparison: intervals contain the true value, verdicts are careful, compared arms differ in one factor."""

import numpy as np
import pytest

from trainer.experiment.compare import Arm, Scores, compare, examples, interval, verdict

RNG = np.random.default_rng(5)


def arm(data: str, scores_SI: Scores, encoder: str = "clip", images: str = "0") -> Arm:
    seeds, num_images = scores_SI.shape
    metrics = {"scores": {"bleu_4": 0.5, "rouge_l": 0.6}, "words": {"mean": 3.0, "of_references": 4.0}}
    return Arm(
        key=(data, encoder, "scratch", images),
        seeds=tuple(range(seeds)),
        sample_ids=tuple(f"i{n}" for n in range(num_images)),
        references=(("a red ring",),) * num_images,
        captions=((f"a {data} ring",) * num_images,) * seeds,
        cider_d_SI=scores_SI,
        shuffled_SI=scores_SI / 2,
        metrics=(metrics,) * seeds,
        curves=([],) * seeds,
    )


def test_interval_from_identical_seeds_equals_the_normal_interval() -> None:
    scores_I = RNG.normal(3.0, 1.0, 400)
    low, high = interval(np.stack([scores_I] * 3))
    half = 1.96 * scores_I.std() / np.sqrt(400)
    assert low == pytest.approx(scores_I.mean() - half, abs=0.02)
    assert high == pytest.approx(scores_I.mean() + half, abs=0.02)


def test_score_interval_is_never_below_zero() -> None:
    few_SI = np.array([[0.0, 0.0, 0.0, 0.02], [0.03, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    low, high = interval(few_SI)
    assert low == 0.0 < high
    assert interval(few_SI, few_SI + 0.02)[0] < 0


def test_paired_difference_is_found_although_the_intervals_of_the_arms_overlap() -> None:
    # Images differ far more than arms.
    hard_I = RNG.normal(3.0, 2.0, 100)
    higher, lower = np.stack([hard_I + 0.2] * 3), np.stack([hard_I] * 3)
    assert interval(higher)[0] < interval(lower)[1]
    assert verdict(*interval(higher, lower)) == "better" and verdict(*interval(lower, higher)) == "worse"


def test_different_seeds_widen_the_interval() -> None:
    hard_I = RNG.normal(3.0, 1.0, 100)
    agree, spread = np.stack([hard_I + 0.3] * 3), np.stack([hard_I - 0.6, hard_I + 0.3, hard_I + 1.2])
    assert verdict(*interval(agree, np.stack([hard_I] * 3))) == "better"
    assert verdict(*interval(spread, np.stack([hard_I] * 3))) == "cannot tell at this size"


def test_only_arms_that_differ_in_one_factor_are_compared() -> None:
    flat = np.ones((2, 10))
    arms = [arm("facts", flat, encoder) for encoder in ("clip", "vit")]
    arms += [arm("model", flat + 1, encoder) for encoder in ("clip", "vit")]
    arms += [arm("facts", flat, "clip", "40"), arm("model", flat, "vit", "40")]
    arms.append(arm("both", flat + 3, "clip"))
    differences = {(c["factor"], c["arm"], c["than"]): c["difference"] for c in compare(arms)}
    assert differences == {
        ("data", "model, clip, scratch", "facts, clip, scratch"): 1.0,
        ("data", "model, vit, scratch", "facts, vit, scratch"): 1.0,
        ("data", "both, clip, scratch", "facts, clip, scratch"): 3.0,
        ("data", "both, clip, scratch", "model, clip, scratch"): 2.0,
        ("encoder", "facts, vit, scratch", "facts, clip, scratch"): 0.0,
        ("encoder", "model, vit, scratch", "model, clip, scratch"): 0.0,
        ("train_images", "facts, clip, scratch, 40 images", "facts, clip, scratch"): 0.0,
        ("train_images", "model, vit, scratch, 40 images", "model, vit, scratch"): -1.0,
    }


def test_verdict_from_one_seed_says_that_it_holds_for_this_seed_only() -> None:
    (comparison,) = compare([arm("facts", np.ones((1, 10))), arm("model", np.ones((3, 10)) * 2)])
    assert (comparison["verdict"], comparison["seeds"]) == ("better with this seed", [3, 1])
    assert verdict(-1.0, 1.0, seeds=1) == "cannot tell at this size"


def test_random_differences_between_arms_with_three_seeds_rarely_give_a_verdict() -> None:
    """A normal interval over three seeds would be too narrow, and decide about one pair in five."""
    rng = np.random.default_rng(3)
    flat = np.zeros(200)
    pairs = [[np.stack([flat + rng.normal(0, 1.0) for _ in range(3)]) for _ in range(2)] for _ in range(60)]
    decided = sum(verdict(*interval(first, second)) != "cannot tell at this size" for first, second in pairs)
    assert decided <= 4


def test_examples_begin_with_the_largest_difference() -> None:
    scores = np.ones((1, 20))
    apart = scores.copy()
    apart[0, 13] = 9.0
    chosen = examples([arm("facts", scores), arm("model", apart)], 6)
    assert chosen[0]["sample_id"] == "i13" and len(chosen) == 6 == len(
        {example["sample_id"] for example in chosen}
    )
    assert [entry["caption"] for entry in chosen[0]["captions"]] == ["a facts ring", "a model ring"]
    assert len(examples([arm("facts", np.ones((1, 3)))], 6)) == 3
