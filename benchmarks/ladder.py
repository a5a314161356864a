"""Simulate a small model, a large model and a ladder of both, whose texts pass a check that errs.

The price of a text is that of its requests: one for each text of a model, and one for each check. Run:
`python -m benchmarks.ladder`.
"""

import random
from dataclasses import dataclass

from pipeline.dataset.statistics import wilson_interval

IMAGES = 20_000
SEED = 0


@dataclass(frozen=True)
class Setting:
    """The shares of wrong texts of both models, the errors of the check, and the prices of a request."""

    name: str
    small_wrong: float
    large_wrong: float
    missed: float = 0.1  # share of wrong texts that pass the check
    false_alarms: float = 0.05  # share of true texts that the check rejects
    small_price: float = 1.0
    large_price: float = 10.0
    check_price: float = 2.0


@dataclass
class Outcome:
    """The texts that passed the check, and what all requests cost."""

    kept: int = 0
    wrong: int = 0
    price: float = 0.0

    def ask(self, setting: Setting, wrong_share: float, price: float, rng: random.Random) -> bool:
        """Write and check one text. Return whether it passed."""
        is_wrong = rng.random() < wrong_share
        passes = rng.random() < (setting.missed if is_wrong else 1 - setting.false_alarms)
        self.price += price + setting.check_price
        self.kept += passes
        self.wrong += passes and is_wrong
        return passes


SETTINGS = (
    Setting("small model errs often", small_wrong=0.5, large_wrong=0.1),
    Setting("small model errs rarely", small_wrong=0.2, large_wrong=0.1),
    Setting("check errs often", small_wrong=0.3, large_wrong=0.1, missed=0.4, false_alarms=0.2),
)


def simulate(setting: Setting, *, small: bool, large: bool) -> Outcome:
    """Return the outcome for IMAGES images, with one of the models or the ladder of both."""
    rng, outcome = random.Random(SEED), Outcome()
    for _ in range(IMAGES):
        passed = small and outcome.ask(setting, setting.small_wrong, setting.small_price, rng)
        if large and not passed:
            outcome.ask(setting, setting.large_wrong, setting.large_price, rng)
    return outcome


def main() -> None:
    """Print a table for each setting."""
    print("| setting | models | kept | wrong, 95 % interval | price of a right text |")
    print("|---|---|---|---|---|")
    for setting in SETTINGS:
        for name, small, large in (("small", True, False), ("large", False, True), ("ladder", True, True)):
            outcome = simulate(setting, small=small, large=large)
            low, high = wilson_interval(outcome.wrong, outcome.kept)
            price = outcome.price / (outcome.kept - outcome.wrong)
            print(
                f"| {setting.name} | {name} | {outcome.kept / IMAGES:.1%} | {low:.1%} to {high:.1%} "
                f"| {price:.2f} |"
            )


if __name__ == "__main__":
    main()
