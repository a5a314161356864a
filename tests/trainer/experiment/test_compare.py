"""Comparison: intervals contain the true value, verdicts are careful, and compared arms differ in one factor."""

import numpy as np
import pytest

from trainer.experiment.compare import Arm, Scores, compare, examples, interval, verdict

RNG = np.random.default_rng(5)


def arm(
    data: str,
    scores_SI: Scores,
    encoder: str = "clip",
    alignment: str = "none",
    caption: str = "a red ring",
    otherwise: str = "",
) -> Arm:
    seeds, images = scores_SI.shape
    metrics = {"scores": {"bleu_4": 0.5, "rouge_l": 0.6}, "words": {"mean": 3.0, "of_references": 4.0}}
    return Arm(
        key=(data, encoder, "scratch", alignment, "0", otherwise),
        seeds=tuple(range(seeds)),
        sample_ids=tuple(f"i{n}" for n in range(images)),
        references=(("a red ring",),) * images,
        captions=((caption,) * images,) * seeds,
        cider_d_SI=scores_SI,
        shuffled_SI=scores_SI / 2,
        matched_SI=scores_SI,
        metrics=(metrics,) * seeds,
        curves=([],) * seeds,
    )


def test_the_interval_of_a_mean_is_that_of_the_textbook_where_seeds_agree() -> None:
    scores_I = RNG.normal(3.0, 1.0, 400)
    low, high = interval(np.stack([scores_I] * 3))
    half = 1.96 * scores_I.std() / np.sqrt(400)
    assert low == pytest.approx(scores_I.mean() - half, abs=0.02)
    assert high == pytest.approx(scores_I.mean() + half, abs=0.02)


def test_a_mean_of_scores_is_never_below_zero() -> None:
    few_SI = np.array([[0.0, 0.0, 0.0, 0.02], [0.03, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    low, high = interval(few_SI)
    assert low == 0.0 < high
    assert interval(few_SI, few_SI + 0.02)[0] < 0  # a difference may be


def test_a_difference_on_the_same_images_is_seen_where_two_means_would_hide_it() -> None:
    hard_I = RNG.normal(3.0, 2.0, 100)  # images differ far more than arms
    higher, lower = np.stack([hard_I + 0.2] * 3), np.stack([hard_I] * 3)
    assert interval(higher)[0] < interval(lower)[1]
    assert verdict(*interval(higher, lower)) == "better" and verdict(*interval(lower, higher)) == "worse"


def test_seeds_that_disagree_widen_the_interval() -> None:
    hard_I = RNG.normal(3.0, 1.0, 100)
    agree, spread = np.stack([hard_I + 0.3] * 3), np.stack([hard_I - 0.6, hard_I + 0.3, hard_I + 1.2])
    assert verdict(*interval(agree, np.stack([hard_I] * 3))) == "better"
    assert verdict(*interval(spread, np.stack([hard_I] * 3))) == "cannot tell at this size"


def test_arms_are_compared_where_they_are_alike_in_all_but_one_factor() -> None:
    flat = np.ones((2, 10))
    arms = [arm(data, flat + offset, encoder) for offset, data in enumerate(("facts", "model")) for encoder in ("clip", "vit")]
    arms += [arm("facts", flat, "clip", "connector"), arm("model", flat, "clip", otherwise="steps 7")]
    arms.append(arm("both", flat + 3, "clip"))
    differences = {(c["factor"], c["arm"], c["than"]): c["difference"] for c in compare(arms)}
    assert differences == {
        ("data", "model, clip, scratch", "facts, clip, scratch"): 1.0,
        ("data", "model, vit, scratch", "facts, vit, scratch"): 1.0,
        ("data", "both, clip, scratch", "facts, clip, scratch"): 3.0,
        ("data", "both, clip, scratch", "model, clip, scratch"): 2.0,
        ("encoder", "facts, vit, scratch", "facts, clip, scratch"): 0.0,
        ("encoder", "model, vit, scratch", "model, clip, scratch"): 0.0,
        ("alignment", "facts, clip, scratch, connector first", "facts, clip, scratch"): 0.0,
    }


def test_one_seed_speaks_for_itself_alone() -> None:
    (comparison,) = compare([arm("facts", np.ones((1, 10))), arm("model", np.ones((3, 10)) * 2)])
    assert (comparison["verdict"], comparison["seeds"]) == ("better with this seed", [3, 1])
    assert verdict(-1.0, 1.0, seeds=1) == "cannot tell at this size"


def test_three_seeds_that_differ_by_chance_seldom_give_a_verdict() -> None:
    """A normal interval over three seeds is too narrow: unless widened, it would call about one pair in five."""
    rng = np.random.default_rng(3)
    flat = np.zeros(200)
    pairs = [[np.stack([flat + rng.normal(0, 1.0) for _ in range(3)]) for _ in range(2)] for _ in range(60)]
    called = sum(verdict(*interval(first, second)) != "cannot tell at this size" for first, second in pairs)
    assert called <= 4


def test_examples_begin_with_what_differs_most() -> None:
    scores = np.ones((1, 20))
    apart = scores.copy()
    apart[0, 13] = 9.0
    chosen = examples([arm("facts", scores), arm("model", apart, caption="a blue ring")], 6)
    assert chosen[0]["sample_id"] == "i13" and len(chosen) == 6 == len({example["sample_id"] for example in chosen})
    assert [entry["caption"] for entry in chosen[0]["said"]] == ["a red ring", "a blue ring"]
    assert len(examples([arm("facts", np.ones((1, 3)))], 6)) == 3
