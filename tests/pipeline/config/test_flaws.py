"""A wrong value is one clear error."""

from pathlib import Path

import pytest

from pipeline.config.files import read_task, resolve
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            "source: scenes\nlimit: yes\n",
            "bad value for limit: True is not a number, such as 10",
            "docs/settings.md explains limit",
        ),
        ("source: scenes\ngenerate: {max_tokens: on}\n", "generate.max_tokens: True is not a number", ""),
        ("source: scenes\nlimit: 3\nlimit: 4\n", "line 3: the key limit stands twice", ""),
        ("source: scenes\nserver: {headers: {a: b, c: d, a: e}}\n", "line 2: the key a stands twice", ""),
        ("sources: scenes\n", "unknown config key: sources", "did you mean source"),
        ("source: scenes\nfilter: {shortest: 3}\n", "unknown config key: filter.shortest", "known keys: filter."),
        (
            "source: scenes\nsplit: {validation_frac: 0.9, test_frac: 0.9}\n",
            "bad value for split",
            "docs/settings.md explains split",
        ),
        ("source: scenes\nfilter: [a]\n", "keys and values, indented below it", "docs/settings.md explains filter"),
    ],
)
def test_a_slip_in_a_file_of_settings_is_named(text: str, message: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "synth.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path / "synth.yaml")
    assert message in str(caught.value)
    assert hint in caught.value.hint
    assert len(caught.value.hint) < 1000


@pytest.mark.parametrize(
    "server",
    [
        {"key_env": "sk-SECRET-123456"},
        {"key_env": "hf_SECRET123456"},
        {"headers": {"X-Key": "SECRET\nX-Other: b"}},
        {"endpoints": {"http://a/v1": {"key_env": "sk-SECRET-1"}}},
    ],
)
def test_a_key_in_the_place_of_its_name_is_not_shown(server: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"key_env|headers") as caught:
        resolve(source="scenes", base_url=["http://a/v1"], server=server)
    assert "SECRET" not in str(caught.value) + (caught.value.hint or "")


def test_a_rule_about_a_section_does_not_print_the_keys_in_it(tmp_path: Path) -> None:
    text = "source: scenes\nserver: {headers: {Authorization: Bearer sk-secret-01}, concurrency: yes, endpoints: {x: {}}}\n"
    (tmp_path / "synth.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path / "synth.yaml")
    assert "sk-secret" not in f"{caught.value} {caught.value.hint}"


def test_yes_and_no_in_a_task_of_ones_own_want_quotes(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("name: shown\nkind: labels\nlabels: [yes, no]\nprompt: Is it?\n")
    with pytest.raises(ConfigError, match="put a text in quotes") as caught:
        read_task(tmp_path / "task.yaml")
    assert "docs/own-tasks.md" in caught.value.hint


def test_an_address_that_is_none_does_not_show_its_password() -> None:
    with pytest.raises(ConfigError, match="base_url") as caught:
        resolve(source="scenes", base_url=["http://me:SEC RET@h/v1"])
    assert "RET" not in str(caught.value)
