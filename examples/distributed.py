"""One training on several processes, as torchrun starts them, each with its share of every batch."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["ALONE", "CPU", "World"]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """The processes ("ranks") that train one model together, as one of them sees it."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @classmethod
    def from_environment(cls) -> World:
        """Join the processes that torchrun has started; a process that it did not start is alone."""
        cuda = torch.cuda.is_available()
        if not distributed.is_torchelastic_launched():
            return cls(device=torch.device("cuda") if cuda else CPU)
        local, device = int(os.environ["LOCAL_RANK"]), CPU
        if cuda:
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"torchrun has started {os.environ['LOCAL_WORLD_SIZE']} processes on a machine of "
                    f"{torch.cuda.device_count()} GPUs; start it with --nproc-per-node {torch.cuda.device_count()}."
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if cuda else "gloo")
        return cls(distributed.get_rank(), distributed.get_world_size(), device)

    def close(self) -> None:
        """Leave the other processes, at the end."""
        if distributed.is_initialized():
            # Gloo's threads may still have to free the tensors of the last collective, for which they need the GIL:
            # torch 2.4 waits for them holding it, for ever; an interpreter that ends meanwhile aborts.
            distributed.barrier()
            distributed.destroy_process_group()

    def share(self, start: int, stop: int) -> slice:
        """This rank's part of the batch from ``start`` to ``stop``."""
        return slice(start + self.rank, stop, self.size)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model as all ranks train it together: gradients are averaged over them, buffers follow rank 0's."""
        return DistributedDataParallel(model) if self.size > 1 else model

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            distributed.all_reduce(value)
        return value

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Give every rank rank 0's buffers: each had collected BatchNorm statistics of its own images."""
        if self.size > 1:
            for buffer in model.buffers():
                dense = buffer.contiguous()  # channels_last is not
                distributed.broadcast(dense, 0)
                buffer.copy_(dense)


ALONE = World()
"""A process without others."""
