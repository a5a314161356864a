"""Train captioners on photographs with human captions, and compare them with transformers and with people.

    python benchmarks/photographs.py DATASET ENCODER OUT [--parts human seeds peer images] [--seeds 0 1 2]

DATASET holds human captions: `synth generate --source folder:DIR --captions FILE --no-model --out DATASET`.
ENCODER is a folder or a Hub id. Each part writes OUT/NAME.json when it ends, and is skipped if that file
exists, so an interrupted run continues. OUT/photographs.json holds all parts.

- human: scores of one human caption of each test image against its other captions.
- seeds: captioners of `synth train --preset photos`, scored greedily and with beams, with CPU minutes.
- peer: VisionEncoderDecoderModel, trained by Seq2SeqTrainer with the same encoder, size of decoder, tokens
  and captions a step, for as many minutes as the first seed took. It reads the stored hidden states.
- images: captioners trained on fewer images in equal steps.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import trainer.training
from pipeline.dataset.version import Version, read_version
from pipeline.progress import NullProgress
from pipeline.storage.files import read_json, write_json
from trainer.config import PRESETS
from trainer.data import Example, batches, choose_examples, examples_in, texts_of
from trainer.evaluate import evaluate
from trainer.features import Features, store_features
from trainer.launch import train
from trainer.metrics import bootstrap, derangement, score, score_each, tokenize
from trainer.model.checkpoint import load_checkpoint
from trainer.model.encoder import load_encoder
from trainer.tokenizer import CaptionTokenizer, scored_prompt, train_tokenizer

CPU = torch.device("cpu")
IMAGES = (1_000, 2_000, 4_000)  # numbers of training images of the part `images`
PRESET = PRESETS["photos"]
TIMED_STEPS = 30  # the first steps of the peer tell how many steps fit into its minutes


@dataclass(frozen=True, slots=True)
class Run:
    """The data and the options of all parts."""

    version: Version
    encoder: str
    out: Path
    settings: dict[str, Any]

    def examples(self, split: str) -> list[Example]:
        """Return the images of a split with their human captions."""
        return examples_in(self.version, split, "human", to_score=split != "train")

    def features(self, examples: list[Example]) -> Features:
        """Return stored hidden states. Missing ones are computed."""
        folder = self.version.dataset_dir / "features"
        return store_features(load_encoder(self.encoder), examples, folder, CPU, NullProgress())

    def train(self, name: str, **settings: Any) -> dict[str, Any]:
        """Train a captioner in OUT/NAME, and return its scores. An interrupted training is resumed."""
        folder, cpu_s = self.out / name, time.process_time()
        options = {"preset": "photos", "text_source": "human", **self.settings, **settings}
        resume = (folder / "resume.pt").exists()
        result = train(
            self.version, None, out=folder, encoder=self.encoder, decoder="scratch", resume=resume, **options
        )
        seconds = [json.loads(line).get("seconds", 0) for line in (folder / "log.jsonl").open()]
        checkpoint, examples = load_checkpoint(folder, CPU), self.examples("test")
        config = checkpoint.captioner.config
        prompt, features = scored_prompt(config.prompts), self.features(examples)
        greedy = evaluate(checkpoint, examples, features, prompt, config.decoding(1), questions=True)
        beams = result.metrics
        return {
            "minutes of training": max(seconds) / 60,
            "CPU minutes of this process": (time.process_time() - cpu_s) / 60,
            "steps": sum("loss" in json.loads(line) for line in (folder / "log.jsonl").open()),
            **{f"{beams['num_beams']} beams": _table(beams), "greedy": _table(greedy)},
        }


def _table(result: dict[str, Any]) -> dict[str, Any]:
    scores = {name: round(value, 4) for name, value in result["scores"].items()}
    interval = [round(end, 3) for end in result["intervals"]["cider_d"]]
    return {**scores, "interval": interval, "shuffled": round(result["shuffled_scores"]["cider_d"], 4)}


def score_captions(captions: list[str], examples: list[Example], skipped: int = 0) -> dict[str, Any]:
    """Score captions against the references of each image, without the first `skipped` references."""
    references = [[tokenize(text) for text in example.references[skipped:]] for example in examples]
    hypotheses = [tokenize(caption) for caption in captions]
    each = score_each(hypotheses, references)
    order = derangement([example.sample_id for example in examples])
    shuffled = [hypotheses[index] for index in order]
    return _table(
        {
            "scores": score(hypotheses, references, each),
            "intervals": bootstrap(each),
            "shuffled_scores": score(shuffled, references, score_each(shuffled, references)),
        }
    )


def score_humans(run: Run) -> dict[str, Any]:
    """Score the first human caption of each test image against the others."""
    examples = [example for example in run.examples("test") if len(example.references) > 1]
    return score_captions([example.references[0] for example in examples], examples, skipped=1)


@contextmanager
def _limited_to(images: int) -> Iterator[None]:
    def choose(*options: Any) -> Any:
        sets, config = choose_examples(*options)
        return {**sets, "train": sets["train"][:images]}, config

    with patch.object(trainer.training, "choose_examples", choose):
        yield


def train_on_fewer(run: Run) -> dict[str, Any]:
    """Train captioners on fewer images in the steps of 4 epochs of all images."""
    results, count = {}, len(run.examples("train"))
    steps = 4 * count // PRESET["batch_size"]
    for images in (*(number for number in IMAGES if number < count), count):
        with _limited_to(images):
            results[f"{images:,} images"] = run.train(f"images-{images}", steps=steps)
    return results


def train_peer(run: Run, minutes: float) -> dict[str, Any]:
    """Train VisionEncoderDecoderModel for some minutes, and score its captions."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedModel,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        VisionEncoderDecoderModel,
        ViTConfig,
    )
    from transformers.modeling_outputs import BaseModelOutput

    train_set, test_set = run.examples("train"), run.examples("test")
    features = run.features([*train_set, *test_set])
    tokenizer = train_tokenizer(texts_of(train_set), PRESET["vocab_size"])

    class StoredStates(PreTrainedModel):
        """An encoder that gets hidden states instead of pixels."""

        config_class, main_input_name = ViTConfig, "pixel_values"

        def forward(self, pixel_values: Any, **_: Any) -> BaseModelOutput:
            return BaseModelOutput(last_hidden_state=pixel_values)

    def build() -> Any:
        torch.manual_seed(0)
        bos_id, eos_id = tokenizer.prompt(train_set[0].texts[0])[-1], tokenizer.eos_id
        decoder = GPT2Config(
            vocab_size=tokenizer.backend.get_vocab_size(), n_positions=128, n_embd=PRESET["decoder_width"],
            n_layer=PRESET["decoder_depth"], n_head=PRESET["decoder_heads"], add_cross_attention=True,
            bos_token_id=bos_id, eos_token_id=eos_id, pad_token_id=0,
        )  # fmt: skip
        encoder = StoredStates(ViTConfig(hidden_size=features.shape[1]))
        model = VisionEncoderDecoderModel(encoder=encoder, decoder=GPT2LMHeadModel(decoder))
        for ids in (model.config, model.generation_config):
            ids.decoder_start_token_id, ids.pad_token_id, ids.eos_token_id = bos_id, 0, eos_id
        return model

    def rows(indices: list[int]) -> list[tuple[Example, int]]:
        return [(train_set[i], number) for i in indices for number in range(len(train_set[i].texts))]

    def collate(rows: list[tuple[Example, int]]) -> dict[str, Tensor]:
        targets = [tokenizer.encode(example.texts[number], 64).target for example, number in rows]
        labels = torch.full((len(rows), max(map(len, targets))), -100)
        for row, target in zip(labels, targets, strict=True):
            row[: len(target)] = torch.tensor(target)
        return {"pixel_values": features([example for example, _ in rows]), "labels": labels}

    def fit(steps: int) -> tuple[Any, float]:
        order, size = batches(len(train_set), PRESET["batch_size"], 0, 0), 5 * PRESET["batch_size"]
        data = [row for _, indices in zip(range(steps), order, strict=False) for row in rows(indices)]
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(run.out / "peer"), max_steps=steps, per_device_train_batch_size=size,
            learning_rate=PRESET["decoder_lr"], lr_scheduler_type="cosine", warmup_steps=round(0.05 * steps),
            weight_decay=0.05, adam_beta2=0.95, save_strategy="no", report_to=[], use_cpu=True,
            bf16=run.settings.get("precision") == "bf16", remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        model = build()
        peer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
        start = time.monotonic()
        peer.train()
        return model, time.monotonic() - start

    _, seconds = fit(TIMED_STEPS)
    steps = int(60 * minutes * TIMED_STEPS / seconds)
    model, seconds = fit(steps)
    model.eval()
    captions: list[str] = []
    for start in range(0, len(test_set), 50):
        states = features(test_set[start : start + 50])
        ids = model.generate(pixel_values=states, num_beams=PRESET["num_beams"], max_new_tokens=64)
        captions += [_text(tokenizer, row[1:].tolist()) for row in ids]
    parameters = sum(weights.numel() for weights in model.parameters())
    scores = score_captions(captions, test_set)
    return {"minutes of training": seconds / 60, "steps": steps, "parameters": parameters, **scores}


def _text(tokenizer: CaptionTokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids)


def main() -> None:
    """Run the parts that have no result yet, and print all results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("encoder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", nargs="+", default=["human", "seeds", "peer", "images"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--settings", type=json.loads, default={}, help="training settings as JSON")
    options = parser.parse_args()
    version = read_version(max((options.dataset / "versions").iterdir()))
    run = Run(version, options.encoder, options.out, options.settings)
    options.out.mkdir(parents=True, exist_ok=True)

    def result(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = options.out / f"{name}.json"
        if not path.exists():
            write_json(path, measure())
        found: dict[str, Any] = read_json(path)
        print(name, json.dumps(found, indent=1), flush=True)
        return found

    results = {}
    if "human" in options.parts:
        results["human"] = result("human", lambda: score_humans(run))
    for seed in options.seeds if "seeds" in options.parts else ():
        name = f"seed-{seed}"
        results[name] = result(name, lambda name=name, seed=seed: run.train(name, seed=seed))  # type: ignore[misc]
    if "peer" in options.parts:
        minutes = read_json(options.out / f"seed-{options.seeds[0]}.json")["minutes of training"]
        results["peer"] = result("peer", lambda: train_peer(run, minutes))
    if "images" in options.parts:
        results["images"] = result("images", lambda: train_on_fewer(run))
    write_json(options.out / "photographs.json", results)


if __name__ == "__main__":
    main()
