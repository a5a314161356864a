"""The training loop: it overfits four images, resumes to the bit, and records its data in the checkpoint."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as data_replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import AutoModelForCausalLM

import trainer.checkpoint
import trainer.evaluate
import trainer.loop
import trainer.train
import trainer.vqa
from pipeline.dataset.version import Version
from pipeline.errors import TrainError
from pipeline.progress import NullProgress
from tests.notes import Notes
from tests.scene_data import make_version, scene_samples
from tests.trainer.tiny_models import save_clip, save_language_model
from trainer.checkpoint import Log, describe_checkpoint, load_checkpoint, read_log, save_resume
from trainer.config import TrainConfig
from trainer.data import Example, Question, examples_in
from trainer.distributed import all_reduce_gradients
from trainer.evaluate import EvalOptions, evaluate, evaluate_version
from trainer.features import Features, OnlineFeatures
from trainer.loop import Batch, Trainer
from trainer.metrics import derangement
from trainer.model.captioner import CaptionerModel
from trainer.model.language_model import PretrainedDecoder
from trainer.optimizer import build_optimizer, parameter_groups, schedule, set_stage
from trainer.tokenizer import collate
from trainer.train import choose_encoder, read_split_examples, train

SMALL = TrainConfig(
    decoder_width=64, decoder_depth=1, decoder_heads=2, batch_size=8, evaluate_images=4, steps=1, evaluate_every=3
)
CPU = torch.device("cpu")


def replace(**changes: Any) -> TrainConfig:
    return SMALL.model_copy(update=changes)


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    return make_version(tmp_path_factory.mktemp("data"), scene_samples(60))[0]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip"))


def interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def save_and_die(*arguments: Any) -> None:
        save_resume(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.loop, "save_resume", save_and_die)


def train_until_saved(version: Version, config: TrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a training at its first state to resume from."""
    interrupt(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(version, config, folder)
    monkeypatch.undo()


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder / "log.jsonl") if "loss" in line]


def test_four_images_are_learned_by_heart(version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes some seconds: only overfitting shows that images, texts and gradients are connected."""
    four = examples_in(version, "train")[:4]
    monkeypatch.setattr(trainer.train, "examples_in", lambda version, split, mixture, **how: four)
    rates = {"connector_lr": 2e-3, "decoder_lr": 2e-3, "encoder_lr": 2e-3}
    metrics = train(version, replace(steps=150, evaluate_every=150, dropout=0.0, **rates), tmp_path)
    loaded = load_checkpoint(tmp_path)
    evaluation = evaluate(loaded, four, EvalOptions(("synthetic", "brief")), OnlineFeatures(loaded.captioner.encoder, CPU))
    expected = {e.sample_id: next(t.text for t in e.texts if t.style == "brief") for e in four}
    assert {entry["sample_id"]: entry["caption"] for entry in evaluation["shown"]} == expected
    assert metrics["scores"]["cider_d"] > 2 * metrics["shuffled_scores"]["cider_d"]
    assert evaluation["scores"] == metrics["scores"]


def test_the_panel_shows_the_loss_and_after_an_evaluation_the_scores(version: Version, tmp_path: Path) -> None:
    shown: list[dict[str, str]] = []

    class Panel(NullProgress):
        def __call__(self, stage: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None) -> None:
            shown.append(dict(metrics or {})) if stage == "train" else None

    train(version, replace(steps=3, evaluate_every=2), tmp_path, progress=Panel())
    assert [list(metrics) for metrics in shown] == [["loss"], *[["loss", "validation loss", "CIDEr-D"]] * 2]
    assert shown[0]["loss"] == f"{losses(tmp_path)[0]:.3f}"
    assert "with shuffled images" in shown[2]["CIDEr-D"]


@pytest.mark.parametrize("align_steps", [0, 3])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str, align_steps: int
) -> None:
    config = replace(encoder=clip, steps=6, align_steps=align_steps, dropout=0.2)
    whole = train(version, config, tmp_path / "whole")
    train_until_saved(version, config, tmp_path / "cut", monkeypatch)
    torch.manual_seed(99)  # a new process has another random state
    assert train(version, config, tmp_path / "cut", resume=True) == whole
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_tensorboard_shows_the_curves_of_the_log_also_after_an_interruption(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    config, out = replace(encoder=clip, steps=4, align_steps=2), tmp_path / "out"
    interrupt(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(version, config, out, tensorboard=True)
    monkeypatch.undo()
    train(version, config, out, tensorboard=True, resume=True)
    curves = EventAccumulator(str(out / "tensorboard")).Reload()
    points = [(point.step, point.value) for stage in ("align", "train") for point in curves.Scalars(f"{stage}/loss")]
    assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in points] == pytest.approx(losses(out))
    evaluated = [line for line in read_log(out / "log.jsonl") if "validation_cider_d" in line]
    recorded = curves.Scalars("validation/validation_cider_d")
    assert [point.step for point in recorded] == [line["step"] for line in evaluated]


def test_curves_for_tensorboard_without_it_are_one_error(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainError, match="TensorBoard is not installed"):
        train(version, replace(encoder=clip), tmp_path / "out", tensorboard=True)
    assert not (tmp_path / "out").exists()  # nothing was written or removed


def test_a_step_in_parts_is_the_step_as_a_whole(version: Version, tmp_path: Path, clip: str) -> None:
    """The loss is averaged over all tokens of the step, so parts with more words weigh more."""
    for parts in (1, 3):
        train(version, replace(encoder=clip, steps=4, dropout=0.0, gradient_accumulation_steps=parts), tmp_path / str(parts))
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "3"), rel=1e-4)


def test_aligning_moves_the_connector_alone(version: Version, tmp_path: Path, clip: str) -> None:
    model = save_language_model(tmp_path / "llama", "llama")
    config = replace(encoder=clip, decoder=model, align_steps=2, steps=1, decoder_lr=0.0, connector_lr=1e-3, evaluate_every=9)
    train(version, config, tmp_path / "out")
    captioner = load_checkpoint(tmp_path / "out").captioner
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert isinstance(captioner.decoder, PretrainedDecoder)
    after = captioner.decoder.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    stages = [line["stage"] for line in read_log(tmp_path / "out" / "log.jsonl") if "stage" in line]
    assert stages == ["align", "align", "train"]
    assert losses(tmp_path / "out")[2] < losses(tmp_path / "out")[0]


def test_each_part_has_its_own_rate_and_what_has_none_does_not_learn(version: Version, clip: str) -> None:
    config = TrainConfig(
        encoder=clip, align_steps=5, steps=5, align_lr=1.0, connector_lr=0.1, decoder_lr=0.01, warmup_frac=0
    ).with_defaults(9)
    captioner = trainer.train._build(version, config, examples_in(version, "train")).captioner
    optimizer = torch.optim.AdamW(parameter_groups(captioner, config))
    for step, stage, rates in ((0, "align", (0.0, 1.0, 0.0)), (5, "train", (0.0, 0.1, 0.01))):
        assert set_stage(optimizer, config, step) == stage
        rate_of_part = {group["part"]: group["lr"] for group in optimizer.param_groups}
        assert tuple(rate_of_part[part] for part in ("encoder", "connector", "decoder")) == pytest.approx(rates)
        for part, rate in rate_of_part.items():
            assert all(p.requires_grad == (rate > 0) for p in getattr(captioner, part).parameters())


def test_a_run_in_which_nothing_would_learn_is_an_error(version: Version, tmp_path: Path, clip: str) -> None:
    with pytest.raises(TrainError, match="nothing would learn"):
        train(version, replace(encoder=clip, decoder_lr=0.0, connector_lr=0.0), tmp_path)


def test_each_test_image_gets_a_line_and_only_the_named_images_are_used(version: Version, tmp_path: Path, clip: str) -> None:
    ids = {split: version.read(split, ["sample_id"])["sample_id"].to_pylist() for split in ("train", "validation", "test")}
    only = {*ids["train"][:12], *ids["validation"], *ids["test"][1:]}
    metrics = train(version, replace(encoder=clip, steps=2), tmp_path / "out", only=only)
    rows = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [row["sample_id"] for row in rows] == sorted(set(ids["test"]) & only)
    assert metrics["images"] == len(rows) and "each" not in metrics
    assert sum(row["cider_d"] for row in rows) / len(rows) == pytest.approx(metrics["scores"]["cider_d"], abs=1e-3)
    assert sum(row["rouge_l"] for row in rows) / len(rows) == pytest.approx(metrics["scores"]["rouge_l"], abs=1e-3)


def test_a_style_that_a_limit_left_out_is_not_asked_of_the_validation_split(
    version: Version, tmp_path: Path, clip: str
) -> None:
    train(version, replace(encoder=clip, caption_word_budget=1), tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").captioner.config.prompts == [("synthetic", "brief")]
    (evaluated,) = [line for line in read_log(tmp_path / "out" / "log.jsonl") if "validation_loss" in line]
    assert math.isfinite(evaluated["validation_loss"]) and evaluated["validation_loss"] > 0


def test_a_checkpoint_names_the_data_it_comes_from(version: Version, tmp_path: Path) -> None:
    train(version, SMALL, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["data"]["digest"] == version.manifest["digest"]
    assert not (tmp_path / "resume.pt").exists()


def test_scores_that_are_all_but_zero_do_not_end_a_training_whose_loss_falls(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first a caption shares a word with its references by chance: 4e-9 is no score to keep."""
    scores, losses = iter([1e-12, 4e-9, 0.0, 0.0, 1e-10, 0.0]), iter([6.0, 5.9, 5.8, 5.7, 5.6, 5.5])

    def scored(*_: Any) -> dict[str, Any]:
        return {"images": 4, "scores": {"cider_d": next(scores)}, "shuffled_scores": {"cider_d": 0.0}}

    monkeypatch.setattr(trainer.loop, "evaluate", scored)
    monkeypatch.setattr(Trainer, "validation_loss", lambda _: next(losses))
    monkeypatch.setattr(trainer.train, "_test", lambda *_: {})
    train(version, replace(steps=6, evaluate_every=1, patience=2), tmp_path / "c")
    assert [line["step"] for line in read_log(tmp_path / "c/log.jsonl") if "validation_loss" in line] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "c/last").exists()  # the last is the best


def test_a_captioner_of_human_captions_is_scored_on_captions_of_a_model(version: Version, tmp_path: Path) -> None:
    """As a teacher's are: nothing is learned from them."""
    train(version, replace(steps=1), tmp_path / "c")
    config = json.loads((tmp_path / "c/config.json").read_text())
    config["data"]["texts"] = "human"
    (tmp_path / "c/config.json").write_text(json.dumps(config))
    scored = evaluate_version(load_checkpoint(tmp_path / "c"), version, "test")
    assert scored["images"] > 0


def test_resuming_with_other_settings_is_an_error(version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(version, replace(steps=2), tmp_path)
    with pytest.raises(TrainError, match=r"was trained with other settings \(steps 2, now 3\)"):
        train(version, replace(steps=3), tmp_path, resume=True)
    others = make_version(tmp_path / "others", scene_samples(50))[0]
    with pytest.raises(TrainError, match="was trained with other data"):
        train(others, replace(steps=2), tmp_path, resume=True)
    (tmp_path / "train.json").write_text("{}?")
    with pytest.raises(TrainError, match="was trained with other settings or data"):
        train(version, replace(steps=3), tmp_path, resume=True)


def test_resuming_nothing_is_an_error_and_a_finished_run_stays_as_it_is(version: Version, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="nothing to resume"):
        train(version, SMALL, tmp_path / "new", resume=True)
    train(version, SMALL, tmp_path / "done")
    before = {path.name: path.read_bytes() for path in (tmp_path / "done").iterdir()}
    with pytest.raises(TrainError, match="nothing to resume"):
        train(version, replace(seed=1), tmp_path / "done", resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "done").iterdir()} == before


def test_a_loss_that_explodes_stops_the_run(version: Version, tmp_path: Path) -> None:
    rates = {"connector_lr": 1e18, "decoder_lr": 1e18, "encoder_lr": 1e18}
    with pytest.raises(TrainError, match="the loss "):
        train(version, replace(steps=40, max_grad_norm=1e18, **rates), tmp_path)


def test_a_spike_is_left_out_and_the_run_goes_on(version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, judged = Trainer.should_step, list[bool]()

    def judge_and_spoil(self: Any, loss: float, norm: float) -> bool:
        judged.append(judge(self, loss, norm * 1e6 if len(judged) == 20 else norm))
        return judged[-1]

    monkeypatch.setattr(Trainer, "should_step", judge_and_spoil)
    train(version, replace(steps=24, evaluate_every=24), tmp_path)
    assert judged == [True] * 20 + [False] + [True] * 3


def enlarge_norms(monkeypatch: pytest.MonkeyPatch, after_steps: int) -> list[bool]:
    """Multiply the norms of all gradients by 1000 after so many steps; return a list that gets whether each step is applied."""
    judge, judged = Trainer.should_step, list[bool]()

    def judge_larger(self: Any, loss: float, norm: float) -> bool:
        judged.append(judge(self, loss, norm * 1000 if len(judged) >= after_steps else norm))
        return judged[-1]

    monkeypatch.setattr(Trainer, "should_step", judge_larger)
    return judged


def test_gradients_that_stay_larger_are_the_new_usual(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captioner that knows its texts by heart has small gradients; once it is thrown off, larger ones bring it back."""
    judged = enlarge_norms(monkeypatch, after_steps=20)
    train(version, replace(steps=40, evaluate_every=40), tmp_path)
    assert judged == [True] * 20 + [False] * 3 + [True] * 17


def test_what_is_usual_begins_anew_with_the_second_stage(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    """Gradients of a whole language model are many times those of a connector, which is not a spike."""
    judged = enlarge_norms(monkeypatch, after_steps=20)
    train(version, replace(encoder=clip, align_steps=20, steps=12, evaluate_every=32), tmp_path)
    assert judged == [True] * 32


def test_with_a_contrast_images_and_captions_find_each_other_better(version: Version, tmp_path: Path, clip: str) -> None:
    config = replace(encoder=clip, steps=40, contrastive_weight=1.0, dropout=0.0, evaluate_every=40)
    train(version, config, tmp_path)
    checkpoint, examples = load_checkpoint(tmp_path), examples_in(version, "train")[:8]
    texts = collate([[checkpoint.tokenizer.encode(text, 64) for text in example.texts] for example in examples])
    states = OnlineFeatures(checkpoint.captioner.encoder, CPU)(examples)
    with torch.inference_mode():
        learned = checkpoint.captioner.contrast_loss(states, texts).item()
    assert learned < math.log(8) * 0.95  # log 8 is the loss of guessing


def test_half_precision_learns_too(version: Version, tmp_path: Path, clip: str) -> None:
    train(version, replace(encoder=clip, steps=30, precision="bf16", dropout=0.0, evaluate_every=30), tmp_path)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] * 0.8


def test_half_precision_is_for_the_steps_alone(
    version: Version, tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[tuple[str, bool]]] = {"loss": set(), "generate": set()}

    def noting(name: str) -> Callable[..., Any]:
        method = getattr(CaptionerModel, name)

        def noted(*arguments: Any, **named: Any) -> Any:
            seen[name].add((torch.get_float32_matmul_precision(), torch.is_grad_enabled()))
            return method(*arguments, **named)

        return noted

    for name in seen:
        monkeypatch.setattr(CaptionerModel, name, noting(name))
    train(version, replace(encoder=clip, steps=1, precision="bf16"), tmp_path)
    assert seen["loss"] == {("medium", True), ("high", False)}  # of steps, and of the validation split
    assert {setting for setting, _ in seen["generate"]} == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"


PROCESS = """
import sys
from pathlib import Path
import torch
from pipeline.dataset.version import read_version
from trainer.config import resolve
from trainer.train import train
torch.set_num_threads(1)
train(read_version(Path(sys.argv[1])), resolve(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def test_two_processes_learn_what_one_learns(version: Version, tmp_path: Path, clip: str) -> None:
    config = replace(encoder=clip, steps=6, dropout=0.0, evaluate_every=9)
    train(version, config, tmp_path / "one")
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "process.py").write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "process.py"]
    arguments = [str(version.path), "config.json", "two"]
    done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


SIGNALLED = """
import os, signal
rank = int(os.environ["RANK"])
if rank == 1:
    import trainer.loop
    step = trainer.loop.Trainer.train_step
    def stepping(self, optimizer, number, batch):
        if number == 2:
            os.kill(os.getpid(), getattr(signal, sys.argv[4]))
        return step(self, optimizer, number, batch)
    trainer.loop.Trainer.train_step = stepping
try:
    train(read_version(Path(sys.argv[1])), resolve(Path(sys.argv[2])), Path(sys.argv[3]))
except BaseException as error:
    Path(f"ended-{rank}").write_text(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_signal_to_one_of_several_processes_ends_all_and_what_can_be_is_saved(
    version: Version, tmp_path: Path, clip: str, name: str
) -> None:
    config = replace(encoder=clip, steps=60, evaluate_every=100)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "process.py").write_text(PROCESS.replace("train(read_version", "0 and train(read_version") + SIGNALLED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "process.py"]
    arguments = [str(version.path), "config.json", "cut", name]
    subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if name == "SIGTERM":
        assert [(tmp_path / f"ended-{rank}").read_text() for rank in (0, 1)] == ["KeyboardInterrupt: "] * 2
        assert torch.load(tmp_path / "cut" / "resume.pt", weights_only=True)["step"] == 3
    else:
        assert (tmp_path / "ended-0").read_text().startswith("TrainError: the processes of this training cannot go on")


def test_the_last_evaluation_is_what_is_shown_at_the_end(version: Version, clip: str, tmp_path: Path) -> None:
    shown: list[Mapping[str, str]] = []

    class Shown(NullProgress):
        def __call__(self, stage: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None) -> None:
            shown.extend([metrics] if stage == "train" and metrics else [])

    train(version, replace(encoder=clip, steps=4, evaluate_every=2), tmp_path, progress=Shown())
    scored = [line for line in read_log(tmp_path / "log.jsonl") if "validation_loss" in line]
    assert shown[-1]["validation loss"] == f"{scored[-1]['validation_loss']:.3f}" != shown[1]["validation loss"]


def test_a_rate_warms_up_and_falls_to_a_tenth_in_each_stage() -> None:
    config = TrainConfig(steps=100, align_steps=50, warmup_frac=0.1)
    shares = [schedule(config, step) for step in range(151)]
    for first, steps in ((0, 50), (50, 100)):
        stage = shares[first : first + steps]
        assert stage[0] == pytest.approx(10 / steps)
        assert max(stage) == 1.0
        assert stage[-1] < 0.11
    assert all(math.isfinite(share) for share in shares)


@pytest.mark.parametrize(("storage", "kind"), [("bf16", Features), ("int8", OnlineFeatures), ("none", OnlineFeatures)])
def test_the_test_is_of_states_that_a_captioner_computes(
    version: Version, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, kind: type
) -> None:
    """Those of eight bits are for learning alone: nobody has them who loads the captioner."""
    used: list[object] = []

    def note(checkpoint: Any, examples: Any, options: Any, features: Any) -> dict[str, Any]:
        used.append(features)
        return evaluate(checkpoint, examples, options, features)

    monkeypatch.setattr("trainer.train.evaluate", note)
    train(version, replace(encoder=clip, feature_storage=storage), tmp_path)
    assert [type(features) for features in used] == [kind]


@pytest.mark.parametrize("storage", ["bf16", "none"])
def test_epochs_show_views_in_turn_which_are_kept_like_images(
    version: Version, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    config = replace(encoder=clip, augment_views=2, steps=0, epochs=6, feature_storage=storage, batch_size=8)
    shown: Counter[tuple[int, int]] = Counter()
    show = Trainer.example

    def note(self: Trainer, index: int, epoch: int) -> Example:
        example = show(self, index, epoch)
        shown[index, example.view] += epoch < config.epochs  # the last batch may begin another one
        return example

    monkeypatch.setattr(Trainer, "example", note)
    metrics = train(version, config, tmp_path / "views")
    images = {index for index, _ in shown}
    assert len(images) > 20 and shown == {(index, view): 2 for index in images for view in range(3)}
    monkeypatch.undo()
    assert weights(tmp_path / "views") != weights(train_to(tmp_path / "plain", version, config, augment_views=0))
    train_until_saved(version, config, tmp_path / "cut", monkeypatch)
    assert train(version, config, tmp_path / "cut", resume=True) == metrics
    assert weights(tmp_path / "cut") == weights(tmp_path / "views")


def train_to(folder: Path, version: Version, config: TrainConfig, **changes: Any) -> Path:
    train(version, config.model_copy(update=changes), folder)
    return folder


def test_a_decoder_from_scratch_may_read_states_as_a_prefix(version: Version, clip: str, tmp_path: Path) -> None:
    config = replace(encoder=clip, decoder="prefix", encoder_states="2x2", steps=6, evaluate_every=3, decoder_width=48)
    metrics = train(version, config, tmp_path / "whole")
    loaded = load_checkpoint(tmp_path / "whole").captioner
    assert isinstance(loaded.decoder, PretrainedDecoder)
    sizes = loaded.config.decoder["language_model"]
    assert (sizes["model_type"], sizes["hidden_size"], sizes["num_hidden_layers"]) == ("qwen3", 48, 1)
    assert metrics["parameters"] < 200_000 and "best_validation" in metrics

    class Stop(NullProgress):
        def __call__(self, stage: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None) -> None:
            if (stage, done) == ("train", 4):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(version, config, tmp_path / "cut", progress=Stop())
    assert train(version, config, tmp_path / "cut", resume=True) == metrics
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_saves_its_state(number: int, version: Version, clip: str, tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"encoder": clip, "steps": 6, "evaluate_every": 100})
    whole = train(version, config, tmp_path / "whole")

    class Stop(NullProgress):
        def __call__(self, stage: str, done: int, total: int | None, metrics: Mapping[str, str] | None = None) -> None:
            if stage == "train" and done == 3:
                for each in (number, {signal.SIGINT: signal.SIGTERM, signal.SIGTERM: signal.SIGINT}[signal.Signals(number)]):
                    os.kill(os.getpid(), each)  # the second as by a parent that was interrupted as well

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(version, config, tmp_path / "cut", progress=Stop())
    assert signal.getsignal(number) is before
    assert [line["step"] for line in read_log(tmp_path / "cut/log.jsonl")] == [0, 1, 2, 3]  # 0: the forecast
    assert train(version, config, tmp_path / "cut", resume=True) == whole
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_the_state_is_saved_from_time_to_time(
    version: Version, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(trainer.loop, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(trainer.loop, "save_resume", lambda folder, state: saved.append(state["step"]))
    train(version, SMALL.model_copy(update={"encoder": clip, "steps": 3, "evaluate_every": 100}), tmp_path)
    assert saved == [1, 2, 3]


def test_texts_that_lose_their_end_are_told(version: Version, clip: str, tmp_path: Path) -> None:
    warnings: list[str] = []

    class Note(NullProgress):
        def warn(self, text: str) -> None:
            warnings.append(text)

    config = SMALL.model_copy(update={"encoder": clip, "steps": 1, "max_caption_tokens": 3})
    train(version, config, tmp_path, progress=Note())
    assert len(warnings) == 1 and "texts are longer than 3 tokens: their end is not learned" in warnings[0]


def test_photographs_are_not_given_to_an_encoder_of_drawn_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(trainer.train, "snapshot_download", refuse)
    said: list[str] = []
    assert choose_encoder(said.append, is_drawn=True) == "tiny-clip" and len(said) == 1
    with pytest.raises(TrainError, match="cannot be had here, and these images need an encoder of photographs"):
        choose_encoder(said.append, is_drawn=False)


def test_an_evaluation_encodes_each_image_once_whatever_is_asked_about_it(
    version: Version, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(version, replace(encoder=clip), tmp_path)
    loaded = load_checkpoint(tmp_path)
    loaded.captioner.config.prompts.append(("synthetic", ""))
    examples = [
        data_replace(
            example, questions=(Question(f"Is it {n}?", ("yes",), "yes/no"), Question(f"How many {n}?", ("2",), "number"))
        )
        for n, example in enumerate(examples_in(version, "train"))
    ]
    encoded: list[str] = []

    @dataclass(frozen=True)
    class Counting:
        features: OnlineFeatures

        def __call__(self, asked: Sequence[Example]) -> torch.Tensor:
            encoded.extend(example.sample_id for example in asked)
            return self.features(asked)

    answered: list[tuple[str, str]] = []

    def answer(checkpoint: Any, features: Any, pairs: Sequence[tuple[Example, str]], source: str) -> list[str]:
        answered.extend((example.sample_id, question) for example, question in pairs)
        return [example.sample_id for example, _ in pairs]

    monkeypatch.setattr(trainer.evaluate, "HELD_IMAGES", 7)
    monkeypatch.setattr(trainer.vqa, "answer_questions", answer)
    features: Any = Counting(OnlineFeatures(loaded.captioner.encoder, CPU))
    scored = evaluate(loaded, examples, EvalOptions(("synthetic", "brief"), questions=True), features)
    assert sorted(encoded) == sorted(example.sample_id for example in examples)
    own = {(example.sample_id, question.question) for example in examples for question in example.questions}
    others = {
        (examples[image].sample_id, question.question)
        for example, image in zip(examples, derangement([one.sample_id for one in examples]), strict=True)
        for question in example.questions
    }
    assert {*answered} == own | others and len(answered) == len(own) + len(others)
    for row in scored["each"]:
        assert [item["said"] for item in row["questions"]] == [row["sample_id"]] * 2
    assert {kind: found["count"] for kind, found in scored["questions"].items()} == dict.fromkeys(
        ("yes/no", "number"), len(examples)
    )


def test_a_checkpoint_folder_is_described_after_all_of_it_was_read(version: Version, clip: str, tmp_path: Path) -> None:
    out = tmp_path / "c"
    train(version, replace(encoder=clip, steps=2), out)
    assert "2 steps logged, scored" in describe_checkpoint(out) and "a captioner of " in describe_checkpoint(out)
    (out / "metrics.json").unlink()
    assert "not scored yet" in describe_checkpoint(out)
    (out / "resume.pt").write_bytes(b"half")
    with pytest.raises(TrainError, match=r"resume\.pt is damaged"):
        describe_checkpoint(out)
    (out / "resume.pt").unlink()
    weights = load_file(out / "model.safetensors")
    name = next(name for name, tensor in weights.items() if name.startswith("connector") and tensor.is_floating_point())
    save_file(weights | {name: torch.full_like(weights[name], float("nan"))}, out / "model.safetensors")
    with pytest.raises(TrainError, match="weights that are not numbers"):
        describe_checkpoint(out)
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(TrainError, match="no captioner in"):
        describe_checkpoint(out)


def test_a_training_without_a_captioner_is_described(tmp_path: Path) -> None:
    assert describe_checkpoint(tmp_path) == "a training that has saved nothing so far"
    save_resume(tmp_path, {"run": "r", "step": 1200})
    assert describe_checkpoint(tmp_path) == "an unfinished training at step 1,200, without a captioner so far"


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_language_model(tmp_path_factory.mktemp("lm"), "qwen3")


LORA: dict[str, Any] = {"lora_rank": 2, "checkpoint_blocks": True, "average_decay": 0.9, "steps": 4, "max_caption_tokens": 12}


def test_adapters_are_merged_into_the_captioner_that_is_saved(
    version: Version, tmp_path: Path, clip: str, language_model: str
) -> None:
    """What is saved loads without peft, and has no more weights than the language model brought."""
    train(version, replace(encoder=clip, decoder=language_model, decoder_lr=0.01, **LORA), tmp_path)
    loaded = load_checkpoint(tmp_path).captioner
    before = AutoModelForCausalLM.from_pretrained(language_model).state_dict()
    after = loaded.decoder.state_dict()
    assert after.keys() == {f"model.{name}" for name in before}
    changed = {name for name, weights in before.items() if not torch.equal(weights, after[f"model.{name}"])}
    assert changed and all(name.endswith("proj.weight") for name in changed)
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))


def test_adapters_and_averages_go_on_to_the_same_bits(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str, language_model: str
) -> None:
    config = replace(encoder=clip, decoder=language_model, dropout=0.2, align_steps=2, label_smoothing=0.1, **LORA)
    whole = train(version, config, tmp_path / "whole")
    train_until_saved(version, config, tmp_path / "cut", monkeypatch)
    saved = torch.load(tmp_path / "cut/resume.pt", weights_only=True)
    assert not [name for name in saved["captioner"] if name.startswith("encoder.") or "base_layer" in name]
    assert train(version, config, tmp_path / "cut", resume=True) == whole
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")


def test_a_run_goes_on_with_its_own_pretrained_weights_only(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str, language_model: str
) -> None:
    folder = Path(shutil.copytree(language_model, tmp_path / "lm"))
    config = replace(encoder=clip, decoder=str(folder), **LORA)
    train_until_saved(version, config, tmp_path / "cut", monkeypatch)
    changed = load_file(folder / "model.safetensors")
    save_file({name: weights * 1.01 for name, weights in changed.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainError, match="cut began with other pretrained weights"):
        train(version, config, tmp_path / "cut", resume=True)


def test_a_state_of_the_release_before_goes_on(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    """It holds all weights, and does not say how many processes there were."""
    config = replace(encoder=clip, steps=6)
    whole = train(version, config, tmp_path / "whole")
    train_until_saved(version, config, tmp_path / "cut", monkeypatch)
    state = torch.load(tmp_path / "cut/resume.pt", weights_only=True)
    encoder = load_checkpoint(tmp_path / "whole").captioner.encoder.state_dict()
    state["captioner"] |= {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    old = {name: state[name] for name in ("captioner", "optimizer", "step", "best", "norms", "run")}
    torch.save(old, tmp_path / "cut/resume.pt")
    assert train(version, config, tmp_path / "cut", resume=True) == whole


def test_a_run_of_two_processes_goes_on_in_one(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    config = replace(encoder=clip, steps=6, dropout=0.0)
    asked: list[int] = []

    def digest_of(values: list[Any]) -> str:
        asked.append(values[2])
        return f"run of {values[2]}"

    monkeypatch.setattr(trainer.train, "digest", digest_of)
    interrupt(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(version, config, tmp_path / "cut")
    state = torch.load(tmp_path / "cut/resume.pt", weights_only=True)
    torch.save(state | {"processes": 2, "run": "run of 2"}, tmp_path / "cut/resume.pt")
    monkeypatch.setattr(trainer.loop, "save_resume", save_resume)
    assert train(version, config, tmp_path / "cut", resume=True)["best_validation"] >= state["best"]
    assert 2 in asked


def test_training_ends_where_the_score_no_longer_improves(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    """The best is kept, and beside it the captioner of the last step; a run that is over stays over when it is resumed."""
    scores = iter([0.1, 0.5, 0.4, 0.45, 0.3])

    def scored(*_: Any) -> dict[str, Any]:
        return {"images": 2, "scores": {"cider_d": next(scores)}, "shuffled_scores": {"cider_d": 0.0}}

    config = replace(encoder=clip, steps=60, evaluate_every=2, patience=2)
    monkeypatch.setattr(trainer.loop, "evaluate", scored)
    monkeypatch.setattr(trainer.train, "_test", lambda *_: {"tested": True})
    assert train(version, config, tmp_path) == {"tested": True}
    log = read_log(tmp_path / "log.jsonl")
    assert log[-1]["step"] == 8
    assert [line["validation_cider_d"] for line in log if "validation_loss" in line] == [0.1, 0.5, 0.4, 0.45]
    assert weights(tmp_path) != weights(tmp_path / "last")
    assert load_checkpoint(tmp_path / "last").captioner.config == load_checkpoint(tmp_path).captioner.config
    assert train(version, config, tmp_path, resume=True) == {"tested": True}
    assert len(read_log(tmp_path / "log.jsonl")) == len(log)


def test_of_equal_scores_the_one_with_the_smaller_loss_is_better(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    """At first no caption has a word in common with others: that is no reason to end, or to keep the first weights."""
    monkeypatch.setattr(
        trainer.loop, "evaluate", lambda *_: {"images": 2, "scores": {"cider_d": 0.0}, "shuffled_scores": {"cider_d": 0.0}}
    )
    values = iter([3.0, 2.0, 2.5, 1.0, 1.5, 1.6])
    monkeypatch.setattr(Trainer, "validation_loss", lambda _: next(values))
    saved: list[int] = []
    monkeypatch.setattr(trainer.checkpoint.Checkpoint, "save", lambda *_: saved.append(1))
    monkeypatch.setattr(trainer.train, "_test", lambda *_: {})
    train(version, replace(encoder=clip, steps=60, evaluate_every=2, patience=2), tmp_path)
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 12
    assert len(saved) == 3 + 1  # and `last`


def test_the_average_is_what_is_scored_and_saved(version: Version, tmp_path: Path, clip: str) -> None:
    plain, averaged = (replace(encoder=clip, steps=9, evaluate_every=9, average_decay=decay) for decay in (0.0, 0.99))
    train(version, plain, tmp_path / "plain")
    train(version, averaged, tmp_path / "averaged")
    assert losses(tmp_path / "plain") == losses(tmp_path / "averaged")  # it changes nothing in the training
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "averaged"))
    assert not torch.equal(one["connector.1.weight"], other["connector.1.weight"])
    assert torch.equal(
        one["encoder.tower.encoder.layers.0.mlp.fc1.weight"], other["encoder.tower.encoder.layers.0.mlp.fc1.weight"]
    )


def test_smoothed_labels_are_for_training_alone(version: Version, tmp_path: Path, clip: str) -> None:
    plain, smooth = (replace(encoder=clip, steps=1, dropout=0.0, label_smoothing=share) for share in (0.0, 0.3))
    for name, config in (("plain", plain), ("smooth", smooth)):
        train(version, config, tmp_path / name)
    assert losses(tmp_path / "plain") != losses(tmp_path / "smooth")
    (one,), (other,) = (
        [line["validation_loss"] for line in read_log(tmp_path / name / "log.jsonl") if "validation_loss" in line]
        for name in ("plain", "smooth")
    )
    assert one == pytest.approx(other, abs=0.02)


def test_batches_are_loaded_ahead_in_their_order(version: Version, clip: str) -> None:
    config = replace(encoder=clip).with_defaults(40)
    examples = examples_in(version, "train")
    checkpoint = trainer.train._build(version, config, examples)
    trained = Trainer(checkpoint, config, examples, [], OnlineFeatures(checkpoint.captioner.encoder, CPU), CPU)
    order = [[0, 1], [5, 2], [7]]
    ahead = list(trained.load_ahead([[(index, 0) for index in indices] for indices in order]))
    for indices, batch in zip(order, ahead, strict=True):
        (own,) = trained.load([examples[index] for index in indices]).micro_batches
        assert torch.equal(batch.micro_batches[0][0], own[0])
        assert torch.equal(batch.micro_batches[0][1].ids_CT, own[1].ids_CT)
        assert (batch.num_images, batch.num_tokens) == (len(indices), int(own[1].learned_CT.sum()))
    with pytest.raises(IndexError):
        list(trained.load_ahead([[(0, 0)], [(9999, 0)]]))


def test_a_loss_that_is_no_number_ends_the_training_before_it_is_saved(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "validation_loss", lambda _: float("nan"))
    with pytest.raises(TrainError, match="the loss of the validation split is nan") as ended:
        train(version, replace(steps=2, evaluate_every=2), tmp_path)
    assert "--lr" in ended.value.hint and not (tmp_path / "metrics.json").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_may_be_read_by_those_who_may_read_the_rest_and_a_full_disk_is_one_error(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(version, replace(steps=1, evaluate_every=1), tmp_path / "a")
    modes = {name: (tmp_path / "a" / name).stat().st_mode for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert len(set(modes.values())) == 1, modes

    def fill_disk(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("trainer.model.captioner.CaptionerModel.save_pretrained", fill_disk)
    with pytest.raises(TrainError, match=r"cannot write the weights to .*No space left on device"):
        train(version, replace(steps=1, evaluate_every=1), tmp_path / "b")


@pytest.mark.parametrize("refused", ["nothing to resume", "no held-out image has a reference or a brief caption"])
def test_what_can_be_refused_is_refused_before_any_states_are_computed(
    refused: str, version: Version, tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_texts(version: Version, split: str, mixture: Any, **how: Any) -> list[Example]:
        examples = examples_in(version, split, mixture, **how)
        return [data_replace(one, texts=(), references=()) for one in examples] if split == "test" else examples

    monkeypatch.setattr(trainer.train, "store_features", lambda *_: pytest.fail("states were computed"))
    if refused.startswith("no held-out"):
        monkeypatch.setattr(trainer.train, "examples_in", without_texts)
    with pytest.raises(TrainError, match=refused):
        train(version, replace(encoder=clip), tmp_path, resume=refused == "nothing to resume")


def test_steps_that_were_skipped_before_an_interruption_still_count(version: Version, tmp_path: Path, clip: str) -> None:
    """At most three gradients in a row are taken for spikes, also where a training was interrupted between them."""
    config = replace(encoder=clip).with_defaults(40)
    examples = examples_in(version, "train")
    checkpoint = trainer.train._build(version, config, examples)
    features = OnlineFeatures(checkpoint.captioner.encoder, CPU)
    before, after = (Trainer(checkpoint, config, examples, examples[:3], features, CPU) for _ in range(2))
    optimizer = build_optimizer(checkpoint.captioner, config)
    before.gradient_norms = [1.0] * 32
    assert [before.should_step(1.0, 100.0) for _ in range(3)] == [False] * 3
    after.restore(optimizer, before.state(optimizer, 5), tmp_path / "resume.pt")
    assert after.should_step(1.0, 100.0)


def test_things_are_counted_in_english_captions_alone(version: Version, tmp_path: Path, clip: str) -> None:
    train(version, replace(encoder=clip), tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert "things" in evaluate_version(loaded, version, "test")
    loaded.captioner.config.data["language"] = "de"
    assert "things" not in evaluate_version(loaded, version, "test")


def test_a_finished_training_is_shown_and_one_of_other_steps_begins(
    version: Version, tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that nobody names follow from the data, and are compared as well."""
    first = train(version, replace(encoder=clip), tmp_path)
    with monkeypatch.context() as context:
        context.setattr(trainer.train, "store_features", lambda *_: pytest.fail("it is trained already"))
        for resume in (False, True):  # as a script may say each time
            assert train(version, replace(encoder=clip), tmp_path, resume=resume) == json.loads(json.dumps(first))
    assert len(losses(tmp_path)) == 1
    train(version, replace(encoder=clip, steps=2), tmp_path)
    assert len(losses(tmp_path)) == 2


def test_a_mixture_of_one_kind_is_told(version: Version, tmp_path: Path, clip: str) -> None:
    def without_references(version: Version, split: str, mixture: Any, **how: Any) -> list[Example]:
        examples = examples_in(version, split, mixture, **how)
        return [data_replace(one, texts=tuple(text for text in one.texts if text.source == "synthetic")) for one in examples]

    notes = Notes()
    with pytest.MonkeyPatch.context() as context:
        context.setattr(trainer.train, "examples_in", without_references)
        train(version, replace(encoder=clip, text_source="mixed"), tmp_path, progress=notes)
    assert [text for text in notes.texts if "all texts that are learned are synthetic" in text]


def test_without_texts_to_validate_on_the_later_of_equal_captioners_is_kept(
    version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    monkeypatch.setattr(
        trainer.loop, "evaluate", lambda *_: {"images": 2, "scores": {"cider_d": 0.0}, "shuffled_scores": {"cider_d": 0.0}}
    )
    monkeypatch.setattr(Trainer, "validation_loss", lambda _: None)
    saved: list[int] = []
    monkeypatch.setattr(trainer.checkpoint.Checkpoint, "save", lambda *_: saved.append(1))
    monkeypatch.setattr(trainer.train, "_test", lambda *_: {})
    train(version, replace(encoder=clip, steps=6, evaluate_every=2), tmp_path)
    assert len(saved) == 3
    assert not any("validation_loss" in line for line in read_log(tmp_path / "log.jsonl"))


def test_a_part_that_learns_slowly_learns_no_faster_from_rewards(version: Version, clip: str) -> None:
    config = replace(encoder=clip, steps=2, scst_steps=2, encoder_lr=1e-6, decoder_lr=1e-3, scst_lr=5e-5).with_defaults(4)
    captioner = trainer.train._build(version, config, read_split_examples(version, "train", config)).captioner
    optimizer = build_optimizer(captioner, config)
    assert set_stage(optimizer, config, 2) == "scst"
    rates = {group["part"]: group["lr"] / schedule(config, 2) for group in optimizer.param_groups}
    assert rates == {"encoder": 1e-6, "connector": 5e-5, "decoder": 5e-5}


def test_weights_without_a_gradient_in_any_process_have_none_after_the_sum(tmp_path: Path) -> None:
    """The optimizer would change them by their decay, as it does not in one process."""
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model["used"](torch.ones(1, 2)).sum().backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert all_reduce_gradients(model, 1.5, torch.device("cpu")) == 1.5
    finally:
        torch.distributed.destroy_process_group()
    assert [weights.grad is None for weights in model.parameters()] == [False, False, True, True]


def test_a_step_whose_loss_is_no_number_is_a_line_of_json(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", 0)
    log.write(step=1, loss=float("nan"), norm=float("inf"), rate=0.5)

    def refuse(constant: str) -> None:
        pytest.fail(constant)

    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "loss": None, "norm": None, "rate": 0.5}


def test_settings_that_have_no_effect_are_told(version: Version, tmp_path: Path, clip: str) -> None:
    notes = Notes()
    given = replace(encoder=clip, decoder="prefix", dropout=0.3, steps=1, epochs=7, precision="tf32", evaluate_every=0)
    train(version, given, tmp_path, progress=notes)
    told = "dropout (of --decoder scratch alone), epochs (steps is given), precision (tf32 is of GPUs)"
    assert f"warning: settings without an effect here: {told}" in notes.texts


def test_the_seconds_of_a_log_go_on_after_an_interruption(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl", 0)
    assert log.seconds == 0.0
    for step, seconds in ((1, 10.0), (2, 20.0), (3, 30.0)):
        log.write(step=step, seconds=seconds)
    log.write(step=2, validation_cider_d=1.0)
    again = Log(tmp_path / "log.jsonl", 2)
    pace = trainer.loop.Pace(again.seconds)
    assert again.seconds == 20.0
    assert pace.after(Batch([], 9, 1, 4), 0)["seconds"] > 20.0


def test_an_evaluation_has_the_images_in_the_order_of_the_test(version: Version, tmp_path: Path, clip: str) -> None:
    """Intervals are drawn by place: in another order they would be others."""
    train(version, replace(encoder=clip, steps=1), tmp_path)
    tested = [json.loads(line)["sample_id"] for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    evaluated = evaluate_version(load_checkpoint(tmp_path), version, "test")["each"]
    assert [row["sample_id"] for row in evaluated] == tested == sorted(tested)


def test_texts_that_are_too_long_for_a_language_model_are_refused_before_the_first_step(
    version: Version, tmp_path: Path, clip: str
) -> None:
    save_language_model(tmp_path / "lm", "llama")
    settings = json.loads((tmp_path / "lm/config.json").read_text())
    (tmp_path / "lm/config.json").write_text(json.dumps(settings | {"max_position_embeddings": 70}))
    config = replace(encoder=clip, decoder=str(tmp_path / "lm"), steps=2, max_caption_tokens=64)
    with pytest.raises(TrainError, match="positions, and the language model has 70") as refused:
        train(version, config, tmp_path / "c")
    assert "--encoder-states" in refused.value.hint
    assert not (tmp_path / "c").exists()


def test_steps_without_a_gradient_make_no_spikes_of_the_others(version: Version, clip: str) -> None:
    """As where all rewards of a step are equal."""
    config = replace(encoder=clip).with_defaults(40)
    examples = examples_in(version, "train")
    checkpoint = trainer.train._build(version, config, examples)
    features = OnlineFeatures(checkpoint.captioner.encoder, CPU)
    judge = Trainer(checkpoint, config, examples, examples[:3], features, CPU)
    assert all(judge.should_step(1.0, float(step % 4 == 0)) for step in range(200))
    assert not judge.should_step(1.0, 1e6)


def test_the_best_score_of_a_single_image_is_none(version: Version, tmp_path: Path, clip: str) -> None:
    metrics = train(version, replace(encoder=clip, steps=1, evaluate_images=1), tmp_path / "one")
    assert metrics["best_validation"] is None  # CIDEr-D is 0 there, and the loss decides
    several = train(version, replace(encoder=clip, steps=1, evaluate_images=3), tmp_path / "three")
    assert several["best_validation"] >= 0


def test_a_signal_during_the_last_save_is_no_end_without_a_word(
    version: Version, tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.checkpoint import save_resume as save

    def save_and_interrupt(folder: Path, state: dict[str, Any]) -> None:
        save(folder, state)
        if state["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer.loop, "save_resume", save_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(version, replace(encoder=clip, steps=2, evaluate_every=2), tmp_path / "c")
    monkeypatch.setattr(trainer.loop, "save_resume", save)
    assert train(version, replace(encoder=clip, steps=2, evaluate_every=2), tmp_path / "c", resume=True)["scores"]
