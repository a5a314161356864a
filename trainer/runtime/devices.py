"""Devices, matrix precision, and communication between training processes."""

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

# The other processes wait while the first one scores the validation split. NCCL's default is ten minutes.
MAX_WAIT = timedelta(hours=6)
MESSAGE_VALUES = 1 << 24  # gradient values per all-reduce


def best_device(rank: int = 0) -> torch.device:
    """Return the GPU for the process with this rank, or the CPU if there is no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", rank % torch.cuda.device_count())
    return torch.device("cpu")


def join_processes() -> tuple[int, int]:
    """Join the process group if torchrun started several processes. Returns (rank, processes)."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=MAX_WAIT)
    return torch.distributed.get_rank(), processes


def all_reduce_gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """Sum gradients over all processes in place, several per message. Returns the summed loss."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    has_gradient = loss.new_tensor([float(parameter.grad is not None) for parameter in learning])
    message, message_values = [loss, has_gradient], 1 + len(learning)
    for parameter in learning:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if message_values + parameter.numel() > MESSAGE_VALUES:
            _all_reduce_sum(message)
            message, message_values = [], 0
        message.append(parameter.grad)
        message_values += parameter.numel()
    _all_reduce_sum(message)
    with translate_peer_errors():  # on a GPU, a failure is raised only when a value is read
        for parameter, num_gradients in zip(learning, has_gradient.tolist(), strict=True):
            # If no process has a gradient, the optimizer must skip the weight, including weight decay.
            if not num_gradients:
                parameter.grad = None
    return loss


def _all_reduce_sum(tensors: list[Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    with translate_peer_errors():
        torch.distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@contextmanager
def translate_peer_errors() -> Iterator[None]:
    """Translate errors in communication with other processes to TrainError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "CUDA error" in str(error):
            raise
        problem = (
            f"this process lost contact with the other processes of the training run: {one_line(error)[:200]}"
        )
        hint = "read the output of the other processes, then resume from the last saved state with --resume"
        raise TrainError(problem, hint=hint) from error


def max_over_processes(number: int, device: torch.device, processes: int) -> int:
    """Return the maximum over all processes."""
    if processes == 1:
        return number
    value = torch.tensor([number], device=device)
    with translate_peer_errors():
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return int(value.item())


@contextmanager
def matmul_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Set the precision of float32 matrix products within the context.

    On a CPU, `bf16` rounds the factors of a product to bfloat16 and accumulates in float32. Tensors stay
    float32, because casting them would take as long as faster products save. Fused attention is disabled,
    because its products are too small to become faster.
    """
    before, conv_before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        # cuDNN has a separate setting for the convolution that embeds image patches.
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
        if precision == "bf16" and device.type == "cpu":
            torch.set_float32_matmul_precision("medium")
            with sdpa_kernel(SDPBackend.MATH):
                yield
        else:
            torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")  # high: TF32
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = conv_before


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context for a forward pass. It is active only for `bf16` on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" and device.type != "cpu")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 in hardware, like GPUs since Ampere and CPUs with AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def memory_mb() -> float:
    """Return the peak GPU memory of this process in MB, or its peak CPU memory if there is no GPU."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)
