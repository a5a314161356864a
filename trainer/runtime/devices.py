"""The device of a process, the precision of its products, and the processes that train together."""

import os
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.errors import TrainError, one_line
from trainer.config import Precision

WAIT = timedelta(hours=6)  # for the first process, which scores all of validation; NCCL's own limit is ten minutes
MESSAGE_VALUES = 1 << 24  # gradient values per all-reduce


def best_device(rank: int = 0) -> torch.device:
    """Return the GPU for a process rank, or the CPU if there is no GPU."""
    return torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")


def all_reduce_gradients(model: nn.Module, loss: float, device: torch.device) -> float:
    """Sum gradients and loss over all processes; small gradients share a message, since each message has a latency."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss_tensor = torch.tensor([loss], device=device)
    has_gradient = torch.tensor([float(parameter.grad is not None) for parameter in learning], device=device)
    gradients, pending = [loss_tensor, has_gradient], 1 + len(learning)
    for parameter in learning:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if pending + parameter.numel() > MESSAGE_VALUES:
            _all_reduce_sum(gradients)
            gradients, pending = [], 0
        gradients.append(parameter.grad)
        pending += parameter.numel()
    _all_reduce_sum(gradients)
    with translate_peer_errors():  # on a GPU a failure shows when a value is asked for
        for parameter, processes in zip(learning, has_gradient.tolist(), strict=True):
            if not processes:  # as in one process: the optimizer leaves what has none as it is
                parameter.grad = None
        return loss_tensor.item()


def _all_reduce_sum(tensors: list[Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    with translate_peer_errors():
        torch.distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@contextmanager
def translate_peer_errors() -> Iterator[None]:
    """Raise TrainError where what all processes do together fails, but for faults of this one's GPU."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "CUDA error" in str(error):
            raise
        problem = f"the processes of this training cannot go on, likely since one of them has ended: {one_line(error)[:200]}"
        hint = "look at what the others printed; with --resume the same command goes on from the last state that was saved"
        raise TrainError(problem, hint=hint) from error


def max_over_processes(number: int, device: torch.device, processes: int) -> int:
    """Return the largest of the numbers of all processes, in each of them."""
    if processes == 1:
        return number
    value = torch.tensor([number], device=device)
    with translate_peer_errors():
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return int(value.item())


def from_first_process(flag: bool, device: torch.device, processes: int) -> bool:  # noqa: FBT001  # a value
    """Return the flag of the first process, in each of them."""
    if processes == 1:
        return flag
    value = torch.tensor([flag], dtype=torch.uint8, device=device)
    with translate_peer_errors():
        torch.distributed.broadcast(value, 0)
        return bool(value.item())


def join_processes() -> tuple[int, int]:
    """Join the process group that torchrun describes; return the rank and the number of processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=WAIT)
    return torch.distributed.get_rank(), processes


@contextmanager
def products_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in a precision until the context ends, in the whole process.

    For `bf16` a CPU rounds the factors of a product to bfloat16 and adds in float32: all else stays float32, since casts of
    weights and states, as on a GPU, would take what that gains. Its fused attention is left out: its products are too small.
    """
    before, convolved_before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = precision != "fp32"  # of the convolution that cuts an image into patches
        if precision == "bf16" and device.type == "cpu":
            torch.set_float32_matmul_precision("medium")
            with sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")  # high: TF32
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolved_before


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward pass: for `bf16` on a GPU, most operations take and return bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" and device.type != "cpu")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has units for products of bfloat16 matrices: a GPU from Ampere on, or a CPU with AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def memory_mb() -> float:
    """Return the peak memory of this process so far: of the GPU, if there is one."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)
