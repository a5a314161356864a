"""Measure training steps, captioning and the feature store on a GPU, or small decoders on a CPU.

    python benchmarks/train_gpu.py [--cpu] [--layers 28] [--states 50] [--rounds 20] [--json FILE]

Needs no network or weight files: models have their real shapes, but random weights. A step consists of
forward, backward, clipping and AdamW for 64 images with 5 captions each. States have the shape of CLIP
ViT-B/32, or of ViT-B/16 with `--states 197`. `packed` means all captions of an image in one row, as in
training, and `apart` means one row per caption with its own copy of the image. `of the floor` is the step
time divided by the time for its (packed) matrix products at the speed of one large product on this machine.
1.0 is optimal, and the inverse is the MFU. With `--cpu`, seconds are CPU time. `kernels` are the operations
of a step that compute something. Kernel launches and synchronizations are counted only on a GPU. With
`--cpu --layers 2`, a Qwen3 of two layers is measured, too, also with the autocast of a GPU. For the feature
store, hidden states of JPEGs (500 x 375 px) are stored and read as in training. The speed of storing is
compared with the encoder alone.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from photos import noise_jpeg
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from train_throughput import encoder_config, vars_of

from pipeline.progress import NullProgress
from trainer.config import Precision
from trainer.data import Example
from trainer.features import store_features
from trainer.model.caption_model import CaptionerConfig, CaptionerModel
from trainer.model.decoding import GREEDY, DecodingConfig
from trainer.model.language_model import PretrainedDecoder
from trainer.runtime.devices import matmul_precision
from trainer.tokenizer import TextBatch

# Captions have this number of tokens: (minimum, maximum).
CAPTIONS, TOKENS = 5, (10, 22)
STATES, WIDTH = 50, 768
VOCABULARY = 8_192
TOWER = {"hidden_size": WIDTH, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
# These are the sizes of Qwen3-0.6B-Base.
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
SCRATCH: dict[str, dict[str, Any]] = {
    "192 x 3": {"vocab_size": 4096, "width": 192, "depth": 3, "heads": 6, "dropout": 0.1},
    "512 x 6": {"vocab_size": VOCABULARY, "width": 512, "depth": 6, "heads": 8, "dropout": 0.1},
}
GEMM_SIDE = {"cuda": 8192, "cpu": 1024}


def now(device: torch.device) -> float:
    """Return seconds of the wall clock, or of CPU time on a CPU."""
    return time.process_time() if device.type == "cpu" else time.monotonic()


def text_batch(images: int) -> TextBatch:
    """Return captions with different lengths and prompts of two tokens."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(*TOKENS, (images * CAPTIONS,), generator=draw)
    ids = torch.randint(2, 4000, (len(lengths), TOKENS[1]), generator=draw)
    of_image = torch.arange(images).repeat_interleave(CAPTIONS)
    return TextBatch(of_image, ids, torch.full_like(lengths, 2), lengths, torch.ones(len(lengths)))


def build(name: str, device: torch.device, *, runs_encoder: bool = False) -> CaptionerModel:
    """Return a captioner with random weights. A language model has adapters, as in its preset."""
    fields: dict[str, Any] = {"prompts": [("human", "brief")], "eos_id": 1, "max_caption_tokens": 20}
    decoder = SCRATCH.get(name) or {"language_model": QWEN3}
    # The encoder is unused if states are given. A small one saves initialization time on a CPU.
    tower = TOWER if runs_encoder or device.type == "cuda" else TOWER | {"num_hidden_layers": 1}
    with torch.device(device):
        captioner = CaptionerModel(
            CaptionerConfig(encoder=vars_of(encoder_config(**tower)), decoder=decoder, **fields)
        )
    if isinstance(captioner.decoder, PretrainedDecoder):
        with torch.no_grad():
            for weights in captioner.decoder.parameters():
                weights.copy_(weights.bfloat16())
        captioner.decoder.add_adapters(32, 0.05)
    return captioner.to(device).train()


def step_of(
    captioner: CaptionerModel, images: int, precision: Precision, *, packed: bool, states: int = STATES
) -> Callable[[], float]:
    """Return a function that runs one training step and returns the seconds it waited for the device."""
    device = next(captioner.connector.parameters()).device
    texts, states_BNV = text_batch(images), torch.randn(images, states, WIDTH)
    if not packed:
        states_BNV = states_BNV.repeat_interleave(CAPTIONS, 0)
        numbers = torch.arange(images * CAPTIONS)
        texts = TextBatch(numbers, texts.ids_CT, texts.prompt_C, texts.length_C, texts.weight_C)
    tokens = int(texts.learned_CT.sum())
    learned = [
        weights
        for part in (captioner.connector, captioner.decoder)
        for weights in part.parameters()
        if weights.requires_grad
    ]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        with matmul_precision(precision):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = captioner.loss(states_BNV.to(device, non_blocking=True), texts) / tokens
            loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        issued = now(device)
        loss.item()
        return now(device) - issued

    return step


@cache
def gemm_flops(device: torch.device, precision: Precision) -> float:
    """Measure the FLOP/s of one large matrix product."""
    side, is_cast = GEMM_SIDE[device.type], precision == "bf16"
    one = torch.randn(side, side, device=device, dtype=torch.bfloat16 if is_cast else torch.float32)
    seconds = []
    with matmul_precision(precision):
        for _ in range(6):
            started = now(device)
            for _ in range(5):
                one @ one
            _wait(device)
            seconds.append((now(device) - started) / 5)
    return 2 * side**3 / statistics.median(seconds[1:])  # skip the first step, which compiles kernels


@cache
def flops_of_step(name: str, images: int, states: int, device: torch.device) -> int:
    """Return the FLOPs of all matrix products in a packed step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step_of(build(name, device), images, "fp32", packed=True, states=states)()
    return int(counter.get_total_flops())


def cell(
    name: str,
    precision: Precision,
    images: int,
    states: int,
    rounds: int,
    device: torch.device,
    *,
    packed: bool,
) -> dict[str, Any]:
    """Measure one kind of step."""
    torch.manual_seed(0)
    captioner = build(name, device)
    if precision == "bf16":
        captioner.reduce_frozen()
    step = step_of(captioner, images, precision, packed=packed, states=states)
    for _ in range(2):
        step()
    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, waited = [], []
    for _ in range(rounds):
        started = now(device)
        waited.append(step())
        seconds.append(now(device) - started)
    median = statistics.median(seconds)
    floor = flops_of_step(name, images, states, device) / gemm_flops(device, precision)
    row: dict[str, Any] = {
        "decoder": name,
        "precision": precision,
        "texts": "packed" if packed else "apart",
        "steps_per_s": 1 / median,
        "captions_per_s": images * CAPTIONS / median,
        "of_the_floor": median / floor,
        # This is near 0 if Python is the bottleneck.
        "waited_frac": statistics.median(waited) / median,
        "kernels": count_kernels(step),
        "weights_gb": sum(weights.nbytes for weights in captioner.parameters()) / 1e9,
    }
    if device.type == "cuda":
        row |= {"memory_gb": torch.cuda.max_memory_allocated() / 1e9, **_launches_and_syncs(step)}
    return row


class _Kernels(TorchDispatchMode):
    """Counts operations, except views and allocations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        self.count += not (func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view")))
        return func(*args, **(kwargs or {}))


def count_kernels(step: Callable[[], float]) -> int:
    """Return the number of operations in a step, except views and allocations."""
    kernels = _Kernels()  # type: ignore[no-untyped-call]
    with kernels:
        step()
    return kernels.count


def _launches_and_syncs(step: Callable[[], float]) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
    launches = sum(event.count for event in profiled.key_averages() if "LaunchKernel" in event.key)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return {"launches": launches, "syncs": len(noted)}


@torch.no_grad()
def captions_per_s(
    name: str, images: int, states: int, rounds: int, decoding: DecodingConfig, device: torch.device
) -> tuple[float, float]:
    """Return the number of 20-token captions per second, and the ratio of their time to the floor."""
    captioner = build(name, device).eval()
    states_BNV = torch.randn(images, states, WIDTH, device=device)
    prompt_BT = torch.full((images, 2), 2, device=device)

    def write() -> None:
        captioner.generate(states_BNV, prompt_BT, decoding)
        _wait(device)

    seconds = []
    for _ in range(min(rounds, 3) + 1):
        started = now(device)
        write()
        seconds.append(now(device) - started)
    with FlopCounterMode(display=False) as counter:
        write()
    return images / min(seconds), min(seconds) * gemm_flops(device, "fp32") / counter.get_total_flops()


@torch.inference_mode()
def encoder_images_per_s(images: int, device: torch.device) -> float:
    """Return the throughput of the bare encoder in images per second."""
    captioner = build("192 x 3", device, runs_encoder=True).eval()
    pixels: Tensor = torch.randn(images, 3, 224, 224, device=device)
    seconds = []
    for _ in range(3):
        started = now(device)
        captioner.encoder(pixels)
        _wait(device)
        seconds.append(now(device) - started)
    return images / min(seconds)


def stored_images_per_s(images: int, device: torch.device) -> tuple[float, float]:
    """Return images per second for storing states from JPEGs, and for loading stored states."""
    encoder = build("192 x 3", device, runs_encoder=True).encoder
    encoder.config.made_from["name"] = "random"
    examples = [Example(str(number), noise_jpeg(number), (), ()) for number in range(images)]
    with TemporaryDirectory() as first, TemporaryDirectory() as second:
        store_features(encoder, examples[:1], Path(first), device, NullProgress())
        started = now(device)
        features = store_features(encoder, examples, Path(second), device, NullProgress())
        stored = now(device)
        for _ in range(10):
            features.states(features.load(examples), device)
        _wait(device)
        read = now(device)
    return images / (stored - started), 10 * images / (read - stored)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="A training step, captions and states on this device.")
    parser.add_argument("--cpu", action="store_true", help="Measure two small decoders on the CPU.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--images", type=int, help="Images per step; default: 64 on a GPU, 8 on a CPU.")
    parser.add_argument(
        "--states", type=int, default=STATES, help="States per image: 50 for CLIP ViT-B/32, 197 for ViT-B/16."
    )
    parser.add_argument("--layers", type=int, help="Layers of Qwen3-0.6B; default: 28, or 0 on a CPU.")
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    arguments = parser.parse_args()
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error("there is no GPU here: --cpu measures a little on the CPU")
    device = torch.device("cpu" if arguments.cpu else "cuda")
    images = arguments.images or (8 if arguments.cpu else 64)
    layers = (0 if arguments.cpu else 28) if arguments.layers is None else arguments.layers
    QWEN3["num_hidden_layers"] = layers
    names = [*SCRATCH, *([f"Qwen3-0.6B x {layers}, LoRA 32"] if layers else [])]
    print(
        f"{'CPU' if arguments.cpu else torch.cuda.get_device_name()}, torch {torch.__version__}, {images} "
        "images a step"
    )
    rows = []
    for name in names:
        precisions: tuple[Precision, ...] = ("fp32", "tf32", "bf16")
        if arguments.cpu:
            precisions = ("fp32",) if name in SCRATCH else ("fp32", "bf16")
        for precision in precisions:
            for packed in (True, False):
                row = cell(name, precision, images, arguments.states, arguments.rounds, device, packed=packed)
                rows.append(row)
                figures = "  ".join(
                    f"{key} {value:,.3g}" for key, value in row.items() if not isinstance(value, str)
                )
                print(f"{name:<27} {precision:<13} {row['texts']:<7} {figures}", flush=True)
    written = {
        f"{name}, {decoding.num_beams} beams": captions_per_s(
            name, images, arguments.states, arguments.rounds, decoding, device
        )
        for name in names
        for decoding in (GREEDY, DecodingConfig(num_beams=3))
    }
    for name, (value, of_the_floor) in written.items():
        print(f"captions/s, {name}: {value:,.1f}, {of_the_floor:.1f} times the floor")
    encoded = encoder_images_per_s(images, device)
    stored, read = stored_images_per_s(images, device)
    print(
        f"images/s of the bare encoder (CLIP ViT-B/32): {encoded:,.1f}; from JPEGs to stored states: "
        f"{stored:,.1f}"
    )
    print(f"images/s of stored states that are read: {read:,.1f}")
    measured = {
        "steps": rows,
        "captions_per_s": written,
        "encoder_images_per_s": encoded,
        "stored_images_per_s": stored,
        "read_images_per_s": read,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
