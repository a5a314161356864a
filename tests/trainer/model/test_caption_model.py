"""CaptionerModel with both decoders: loss, packing of texts that share an image, and generation."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.errors import TrainError
from tests.trainer.tiny_models import save_clip, save_language_model, save_vit
from trainer.model.caption_model import CaptionerModel, build_captioner
from trainer.model.decoder import DecoderConfig
from trainer.model.decoding import GREEDY, DecodingConfig
from trainer.model.encoder import load_encoder
from trainer.model.language_model import load_decoder
from trainer.tokenizer import TextBatch

WORDS, V, N, EOS = 30, 32, 5, 1
KINDS = ("scratch", "qwen3")
Build = Callable[[str], CaptionerModel]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    root = tmp_path_factory.mktemp("models")
    encoders = {"scratch": save_vit(root / "vit"), "qwen3": save_clip(root / "clip")}

    def built(kind: str) -> CaptionerModel:
        torch.manual_seed(0)
        decoder: Any = DecoderConfig(vocab_size=WORDS, width=32, depth=2, heads=4)
        eos = EOS
        if kind != "scratch":
            if not (root / kind).exists():
                save_language_model(root / kind, kind)
            decoder, tokenizer = load_decoder(str(root / kind))
            eos = tokenizer.eos_id
        options: Any = {"prompts": [("synthetic", "brief")], "eos_id": eos, "max_caption_tokens": 8}
        return build_captioner(load_encoder(encoders[kind]), decoder, **options).eval()

    return built


def texts(rows: list[list[int]], prompts: list[int], images: list[int]) -> TextBatch:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return TextBatch(torch.tensor(images), ids, torch.tensor(prompts), lengths, torch.ones(len(rows)))


ROWS = [[2, 3, 7, 8, EOS], [2, 3, 9, EOS], [2, 5, 6, 4, 11, 12, EOS]]
PROMPTS, IMAGES = [2, 2, 4], [0, 0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_sum_of_the_weighted_losses_of_separate_texts(build: Build, kind: str) -> None:
    captioner, states, weights = build(kind), torch.randn(2, N, V), [0.5, 0.0, 3.0]
    batch = replace(texts(ROWS, PROMPTS, IMAGES), weight_C=torch.tensor(weights))
    together = captioner.loss(states, batch)
    together.backward()
    gradients = {name: p.grad.clone() for name, p in captioner.named_parameters() if p.grad is not None}
    captioner.zero_grad()
    apart = torch.zeros(())
    for weight, row, prompt, image in zip(weights, ROWS, PROMPTS, IMAGES, strict=True):
        apart = apart + weight * captioner.loss(states[[image]], texts([row], [prompt], [0]))
    apart.backward()
    torch.testing.assert_close(together, apart)
    assert gradients.keys() >= {"connector.1.weight"}
    for name, parameter in captioner.named_parameters():
        if name in gradients:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_loss_is_the_negative_log_likelihood_of_next_tokens(build: Build) -> None:
    """The expected loss is computed token by token, which would reveal labels that are shifted twice."""
    captioner, states, row = build("scratch"), torch.randn(1, N, V), [2, 3, 7, 8, 9, EOS]
    memory = captioner.connector(states)
    expected = torch.zeros(())
    for position in range(2, len(row)):
        before = torch.tensor([row[:position]])
        scores = captioner.decoder(before, memory, torch.ones_like(before))[:, -1]
        expected = expected - scores.log_softmax(-1)[0, row[position]]
    torch.testing.assert_close(captioner.loss(states, texts([row], [2], [0])), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_chooses_the_tokens_of_lowest_loss(build: Build, kind: str) -> None:
    captioner, states = build(kind), torch.randn(2, N, V)
    prompt = torch.tensor([[2, 3]] * 2)
    written = captioner.generate(states, prompt, GREEDY)
    for row in range(2):
        so_far = [2, 3]
        for token in [*written[row], captioner.config.eos_id]:
            losses = [
                captioner.loss(states[[row]], texts([[*so_far, candidate]], [len(so_far)], [0])).item()
                for candidate in ([token] if token == captioner.config.eos_id else range(WORDS))
            ]
            if token != captioner.config.eos_id and token < WORDS:
                assert losses[token] <= min(losses) + 1e-4
            so_far.append(token)


@pytest.mark.parametrize("kind", KINDS)
def test_lack_of_gpu_memory_gives_a_hint(build: Build, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def exceed(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    captioner = build(kind)
    monkeypatch.setattr("trainer.model.transformers_model.SynthCaptioner.generate", exceed)
    with pytest.raises(TrainError, match="do not fit in GPU memory") as raised:
        captioner.generate(torch.zeros(1, 5, captioner.encoder.width), torch.tensor([[3]]), GREEDY)
    assert "num_beams" in raised.value.hint


def test_text_ends_at_the_last_position(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = build("qwen3")
    monkeypatch.setattr(captioner.decoder, "max_positions", N + 1 + 3)
    decoding = DecodingConfig(min_new_tokens=8)
    (written,) = captioner.generate(torch.zeros(1, N, V), torch.tensor([[3]]), decoding)
    assert len(written) == 3
    with pytest.raises(TrainError, match="the prompt leaves no position for a text"):
        captioner.generate(torch.zeros(1, N, V), torch.tensor([[3] * 4]), decoding)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_may_draw_every_token(build: Build, kind: str) -> None:
    """By default, transformers samples one of the 50 likeliest tokens."""
    captioner, states = build(kind), torch.zeros(1, N, V).expand(400, -1, -1)
    vocabulary = WORDS if kind == "scratch" else 258
    texts = captioner.generate(states, torch.tensor([[2, 3]] * 400), DecodingConfig(temperature=1.0))
    assert len({text[0] for text in texts if text}) > 0.6 * vocabulary


def test_decoding_options_change_score_and_length(build: Build, recwarn: pytest.WarningsRecorder) -> None:
    captioner, states, prompt = build("scratch"), torch.randn(40, N, V), torch.tensor([[2, 3]] * 40)
    for layer in captioner.decoder.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.normal_(layer.weight, std=0.3)  # with small weights, all texts repeat one token

    def generate(**options: Any) -> list[list[int]]:
        return captioner.generate(states, prompt, DecodingConfig(**options))

    def score(rows: list[list[int]]) -> float:
        """Return the sum of mean log-probabilities."""
        rows = [row if len(row) == 8 else [*row, captioner.config.eos_id] for row in rows]
        batches = [(states[[i]], texts([[2, 3, *row]], [2], [0]), len(row)) for i, row in enumerate(rows)]
        return -sum(captioner.loss(state, batch).item() / length for state, batch, length in batches)

    greedy = generate()
    assert score(generate(num_beams=4)) > score(greedy)
    short, long = (generate(num_beams=4, length_penalty=penalty) for penalty in (0.0, 9.0))
    assert sum(map(len, short)) < sum(map(len, long))
    assert generate(length_penalty=9.0) == greedy
    assert generate(temperature=1.0) != greedy
    assert {len(text) for text in generate(min_new_tokens=20)} == {8}
    assert not recwarn.list


def test_later_generations_reuse_the_model_of_the_first_generation(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner, states, prompt = build("scratch"), torch.randn(2, N, V), torch.tensor([[2, 3]] * 2)
    texts = captioner.generate(states, prompt, GREEDY)
    monkeypatch.setattr("trainer.model.caption_model.no_init_weights", None)
    assert captioner.generate(states, prompt, GREEDY) == texts
