"""Join distributed training processes and sum their gradients."""

import os

import torch.distributed

MESSAGE_VALUES = 1 << 24  # gradient values per all-reduce


def all_reduce_sum(gradients: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def join_processes() -> tuple[int, int]:
    """Join the process group that torchrun describes; return the rank and the number of processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return torch.distributed.get_rank(), processes
