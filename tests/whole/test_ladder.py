"""Model ladders: a larger model is asked for the texts that a smaller one failed to write."""

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.chat.server import Act, ChatServer, answer, running_chat, task_name, uuid_of
from tests.commands import SYNTH, read_result, require_success, run_process, run_synth
from tests.whole.conftest import load_rows, read_failure, read_manifest, save_photos
from tests.whole.test_checks import COUNT, Model, caption_of, truth_of

LARGE_WRONG = {number for number in range(COUNT) if number % 8 == 1}
SMALL_WRONG = {number for number in range(COUNT) if number % 2}


class Writer(Model):
    """A model that knows the truth, but writes a wrong detail in the captions of some images."""

    def __init__(self, ids: dict[str, int], wrong: set[int]) -> None:
        super().__init__(ids)
        self.wrong = wrong
        self.logprobs: Callable[[int], list[float]] | None = None
        self.on_caption: Callable[[], None] = lambda: None

    def __call__(self, times: int, body: dict[str, Any]) -> Act:
        if task_name(body) != "caption":
            return super().__call__(times, body)
        self.requests["caption"] += 1
        self.on_caption()
        number = self.ids[uuid_of(body)]
        color, thing, place = caption_of(number) if number in self.wrong else truth_of(number)
        text = f"A {color} {thing} stands {place} all day long."
        if self.logprobs is None or "logprobs" not in body:
            return Act(text)
        value = answer(text)
        value["choices"][0]["logprobs"] = {"content": [{"logprob": one} for one in self.logprobs(number)]}
        return Act(raw=json.dumps(value).encode())


@dataclass
class Servers:
    """The folder with the photos, and two servers: the small one errs more often."""

    folder: Path
    small: Writer
    large: Writer
    addresses: dict[str, str]

    def write(self, task_models: dict[str, Any], **settings: Any) -> None:
        models = {
            name: {"model": name, "base_url": [url], "price_in": price, "price_out": price}
            for (name, url), price in zip(self.addresses.items(), (1, 10), strict=True)
        }
        values = {
            "source": "folder:photos", "tasks": ["caption"], "generate": {"caption_styles": ["plain"]},
            "verify": {"checks": ["claims"], "calibration": 0}, "models": models, "model": "large",
            "task_models": task_models,
        }  # fmt: skip
        (self.folder / "synth.yaml").write_text(yaml.safe_dump(values | settings))

    def generate(self, out: str, *options: str, command: str = "generate") -> dict[str, Any]:
        """Run a command with the written settings, and return the printed result."""
        arguments = ("--config", "synth.yaml", "--out", out, "--json", *options)
        return read_result(run_synth(command, *arguments, cwd=self.folder))

    def requests(self) -> tuple[int, int]:
        """Return the requests for captions that the small and the large model got since the last call."""
        return self.small.requests.pop("caption", 0), self.large.requests.pop("caption", 0)

    def manifest(self, out: str) -> Any:
        return read_manifest(self.folder / out)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    paths = sorted((save_photos(tmp_path, COUNT) / "photos").iterdir())
    ids = {hashlib.sha256(path.read_bytes()).hexdigest(): number for number, path in enumerate(paths)}
    writers = {"small": Writer(ids, SMALL_WRONG), "large": Writer(ids, LARGE_WRONG)}
    with ExitStack() as stack:
        addresses = {
            name: stack.enter_context(running_chat(ChatServer(writer, name))).url
            for name, writer in writers.items()
        }
        yield Servers(tmp_path, writers["small"], writers["large"], addresses)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_ladder_keeps_as_many_texts_as_the_large_model_with_half_of_its_requests(servers: Servers) -> None:
    kept, sent, priced = {}, {}, {}
    for name, models in (("small", "small"), ("large", "large"), ("ladder", ["small", "large"])):
        servers.write({"caption": models})
        result = servers.generate(name)
        kept[name] = result["steps"]["verify"]["kept"]
        sent[name] = servers.requests()
        assert result["requests"]["total"] == result["requests"]["asked"]
        priced[name] = {entry["texts"]: entry for entry in servers.manifest(name)["price"]}
    assert kept == {"small": COUNT // 2, "large": COUNT - 3, "ladder": COUNT - 3}
    assert sent == {"small": (COUNT, 0), "large": (0, COUNT), "ladder": (COUNT, COUNT // 2)}
    # The price of a ladder omits checks, because checks of replaced texts are not counted.
    assert priced["large"].keys() == {"captions", ""} and priced["ladder"].keys() == {"captions"}
    costs = {name: entries["captions"]["cost"] * 1e6 for name, entries in priced.items()}
    assert costs == pytest.approx({"small": 24 * 52, "large": 240 * 52, "ladder": (24 + 120) * 52})

    rows = load_rows(servers.folder / "ladder")
    ids = servers.small.ids
    written_by = {ids[row["sample_id"]]: one["model"] for row in rows for one in row["captions"]}
    assert written_by == {
        number: "large" if number in SMALL_WRONG else "small"
        for number in range(COUNT)
        if number not in LARGE_WRONG
    }
    manifest = servers.manifest("ladder")
    names = {name: model["name"] for name, model in manifest["models"].items()}
    assert names == {"small": "small", "large": "large"}
    assert servers.addresses["small"] not in json.dumps(manifest)
    tokens = {"prompt_tokens": 40, "reply_tokens": 12}
    assert manifest["ladder"] == [
        {
            "task": "caption", "model": model, "requests": count, "texts": count, "kept": passed,
            "cost": pytest.approx(count * 52 * price / 1e6), **{key: count * n for key, n in tokens.items()},
        }
        for model, count, passed, price in (("small", 24, 12, 1), ("large", 12, 9, 10))
    ]  # fmt: skip
    rejected = pq.read_table(servers.folder / "ladder/steps/validate/rejected.parquet").to_pylist()
    assert {row["reason"] for row in rejected} == {"replaced_by_next_model"} and len(rejected) == COUNT // 2
    failed = pq.read_table(servers.folder / "ladder/steps/verify/rejected.parquet").to_pylist()
    assert {(ids[row["sample_id"]], row["model"]) for row in failed} == {(n, "large") for n in LARGE_WRONG}
    assert not servers.generate("ladder")["is_new"] and servers.requests() == (0, 0)
    # A damaged list of the texts for the larger model is written again.
    (servers.folder / "ladder/ladder.parquet").write_bytes(b"PAR1")
    assert not servers.generate("ladder")["is_new"] and servers.requests() == (0, 0)


def test_model_that_repairs_captions_is_recorded_with_them_and_cannot_be_the_judge(servers: Servers) -> None:
    models, verify = {"caption": "small", "repair": "large"}, {"checks": ["claims"], "repair": True}
    servers.write(models, verify=verify | {"judge": "large"})
    done = run_synth("generate", "--config", "synth.yaml", "--out", "d", cwd=servers.folder)
    assert "the judge large also writes the texts" in read_failure(done)[0]
    servers.write(models, verify=verify | {"calibration": 0})
    servers.generate("d")
    captions = [one for row in load_rows(servers.folder / "d") for one in row["captions"]]
    written_by = {(one["prompt_id"].partition("/")[0], one["model"]) for one in captions}
    assert written_by == {("caption", "small"), ("repair", "large")}
    assert servers.manifest("d")["model"]["name"] == "small"
    assert servers.manifest("d")["checks"][0]["judges_itself"]


def test_estimate_states_requests_and_cost_of_each_model_and_of_the_ladder(servers: Servers) -> None:
    servers.write({"caption": ["small", "large"]})
    estimate = servers.generate("d", command="estimate")
    assert estimate["lost_by"] == {"verify: false_claim": 3, "write: no_annotation_left": 3}
    assert estimate["lost_share"][0] < 3 / COUNT
    assert estimate["requests"] + estimate["verify_requests"] == estimate["asked"]
    (ladder,) = estimate["ladders"]
    assert [(choice["models"], choice["requests"]) for choice in ladder["choices"]] == [
        ("small", 24),
        ("large", 24),
        ("small, large", 36),
    ]
    costs = [choice["cost"] for choice in ladder["choices"]]
    assert costs == [pytest.approx(price * 24 * 52 / 1e6) for price in (1, 10, 6)]
    low, high = ladder["rungs"][0]["interval"]
    assert low < 0.5 < high


def test_run_killed_while_the_second_model_writes_resumes_to_equal_files(servers: Servers) -> None:
    servers.write({"caption": ["small", "large"]})
    servers.generate("whole")
    servers.requests()
    command = [str(SYNTH), "generate", "--config", "synth.yaml", "--out", "killed"]
    with subprocess.Popen(command, cwd=servers.folder, stderr=subprocess.DEVNULL) as process:

        def kill() -> None:
            if servers.large.requests["caption"] == 5:
                os.kill(process.pid, signal.SIGKILL)

        servers.large.on_caption = kill
        assert process.wait(300) == -signal.SIGKILL
    servers.large.on_caption = lambda: None
    assert servers.requests()[0] == COUNT
    servers.generate("killed")
    assert servers.requests()[0] == 0  # the small model is not asked again
    whole, killed = (files_of(servers.folder / out / "versions/v1.0.0") for out in ("whole", "killed"))
    assert whole == killed


def test_ladder_on_a_cluster_gives_the_same_requests_and_version_as_on_one_machine(servers: Servers) -> None:
    servers.write({"caption": ["small", "large"]})
    servers.generate("one")
    sent = servers.requests()
    command = ("generate", "--config", "synth.yaml", "--out", "many", "--executor", "ray")
    require_success(run_process(*command, "--shards", "3", "--workers", "2", cwd=servers.folder))
    assert servers.requests() == sent
    one, many = servers.manifest("one"), servers.manifest("many")
    assert (one["digest"], one["ladder"], one["funnel"]) == (many["digest"], many["ladder"], many["funnel"])


def test_uncertain_texts_are_rewritten_by_the_next_model(servers: Servers) -> None:
    uncertain = {0, 2, 4}
    servers.small.wrong = set()
    servers.small.logprobs = lambda number: [-3.0, -2.0] if number in uncertain else [-0.25, -0.5]
    generate = {"caption_styles": ["plain"], "min_logprob": -1.0, "logprobs": True}
    servers.write({"caption": ["small", "large"]}, generate=generate)
    servers.generate("d")
    assert servers.requests() == (COUNT, len(uncertain))
    rows = load_rows(servers.folder / "d")
    captions = {servers.small.ids[row["sample_id"]]: row["captions"][0] for row in rows}
    assert {number: caption["logprob_mean"] for number, caption in captions.items()} == {
        number: None if number in uncertain else -0.375 for number in range(COUNT)
    }
    annotations = pq.read_table(servers.folder / "d/steps/ask/kept.parquet").to_pylist()
    assert {row["logprob_min"] for row in annotations} == {-3.0, -0.5, None}
