"""PII: personal data is replaced by its kind, and other numbers stay."""

import pytest

from pipeline.text.pii import redact


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Write to jane.doe+news@mail.example.org now", "Write to [email] now"),
        ("See https://example.org/a?b=c.", "See [url]."),
        ("See www.example.org, please", "See [url], please"), ("Call +49 30 1234 5678!", "Call [phone]!"),
        ("Call (555) 123-4567", "Call [phone]"), ("Call 555-123-4567.", "Call [phone]."),
        ("Call 0151 23456789", "Call [phone]"), ("Call +4915112345678", "Call [phone]"),
        ("IBAN DE89 3704 0044 0532 0130 00 is shown", "IBAN [iban] is shown"),
        ("Card 4111 1111 1111 1111.", "Card [card]."),
    ],
)  # fmt: skip
def test_personal_data_is_replaced_by_its_kind(text: str, clean: str) -> None:
    assert redact(text) == (clean, 1)


@pytest.mark.parametrize(
    "text",
    [
        "Bus 11 leaves at 12:30", "The year 2015 to 2019", "Revenue of 1,234,567.89 in 2020",
        "On 12.05.2019 it rained", "Number 4111 1111 1111 1112 is no card", "12 - 7",
        "Values 123 456 789 and 1000 1500 2000", "2015 2016 2017 and 10 20 30 40 50",
        "IBAN GB00 WEST 1234 5698 7654 33 is none", "Prices: 10.50 20.75 30.25", "@home & at work",
        "3 x 4 grid of 250 000 houses",
    ],
)  # fmt: skip
def test_numbers_that_are_not_personal_data_are_kept(text: str) -> None:
    assert redact(text) == (text, 0)
