"""Devices, matrix precision, and communication between training processes."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from trainer.config import Precision, Preset

# Processes wait while one of them saves a captioner or stores states. NCCL's default is ten minutes.
MAX_WAIT = timedelta(hours=6)
T = TypeVar("T")


def best_device(rank: int = 0) -> torch.device:
    """Return the GPU for the process with this rank, or the CPU if there is no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", rank % torch.cuda.device_count())
    return torch.device("cpu")


def default_precision(preset: Preset, device: torch.device) -> Precision:
    """Return the fastest precision on a device, except that drawn scenes never use bf16."""
    if device.type == "cpu":
        # Without these instructions, bfloat16 is slower than float32.
        has_bfloat16 = any(map(torch.cpu.get_capabilities().get, ("avx512_bf16", "amx_bf16")))
    else:
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if has_bfloat16 and preset != "scenes":
        return "bf16"
    return "fp32" if device.type == "cpu" else "tf32"


def join_processes() -> tuple[int, int]:
    """Join the process group if torchrun started several processes. Returns (rank, processes)."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        # Exchange numbers between CPUs, because NCCL would wait for the GPU each time.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=MAX_WAIT)
    return torch.distributed.get_rank(), processes


def leave_processes() -> None:
    """Wait for the other processes and leave the process group, if one exists."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def all_reduce_gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """Sum the loss and the gradients over all processes in place. Returns the loss."""
    if not torch.distributed.is_initialized():
        return loss
    torch.distributed.all_reduce(loss)
    learning = [weights for weights in model.parameters() if weights.requires_grad]
    num_gradients = sum_over_processes([weights.grad is not None for weights in learning])
    for weights, count in zip(learning, num_gradients, strict=True):
        # If no process has a gradient for a weight, keep None, so that the weight does not decay.
        if count:
            weights.grad = torch.zeros_like(weights) if weights.grad is None else weights.grad
            torch.distributed.all_reduce(weights.grad)
    return loss


def sum_over_processes(numbers: Sequence[float]) -> list[float]:
    """Return the sum of each number over all processes."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return list(sums.tolist())


def own_slice(*, on_machine: bool = False) -> slice:
    """Return the slice of a list for this process, among all processes or those on its machine."""
    if not torch.distributed.is_initialized():
        return slice(None)
    if on_machine:
        return slice(int(os.environ.get("LOCAL_RANK", 0)), None, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return slice(torch.distributed.get_rank(), None, torch.distributed.get_world_size())


def gather_slices(own: list[T]) -> list[T]:
    """Return the whole list. Each process passes the part in its `own_slice`."""
    if not torch.distributed.is_initialized():
        return own
    slices: list[list[T]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(slices, own)
    longest = max(map(len, slices))
    return [part[index] for index in range(longest) for part in slices if index < len(part)]


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Set the precision of float32 matrix products: full for `fp32`, otherwise TF32 on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context for a forward pass. It is active only for `bf16`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
