"""Several processes that train one network: who is who, sums over all, and batch normalisation over the whole batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vggfeat.devices import resolve

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process among `size`, and its device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes files."""
        return self.rank == 0


@contextmanager
def process_group(device: str) -> Iterator[World]:
    """The processes that `torchrun` started, or this one alone where it did not.

    With `cuda` or `auto` each takes the GPU of its local rank, unless `torch.cuda.set_device` chose one other than the
    first or it sees fewer, and they communicate over NCCL, else over gloo. An existing process group is used and kept.

    Raises:
        InputError: a device that is not there.
    """
    started = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not dist.is_available() or not (started or dist.is_initialized()):
        yield World(resolve(device))
        return
    own = not dist.is_initialized()
    if device in ("auto", "cuda") and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        seen = local < torch.cuda.device_count()  # some launchers show each process only its own
        device = f"cuda:{torch.cuda.current_device() or (local if seen else 0)}"
    resolved = resolve(device)
    if resolved.type == "cuda":
        torch.cuda.set_device(resolved)  # before anything is put on the first GPU
    if own:
        if resolved.type == "cuda":
            dist.init_process_group("nccl", device_id=resolved)
        else:
            dist.init_process_group("gloo")
    try:
        yield World(resolved, dist.get_rank(), dist.get_world_size())
        dist.barrier()  # one that leaves while another still works would break the connection
    except BaseException:
        own = own and resolved.type != "cuda"  # leaving NCCL's group waits for others, which may wait for us
        raise
    finally:
        if own:
            dist.destroy_process_group()


def all_reduce_sum(values: Tensor, world: World) -> Tensor:
    """The sum over all processes, in place."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def all_gather_union(values: set[str], world: World) -> set[str]:
    """The union over processes."""
    if world.size == 1:
        return values
    gathered: list[set[str]] = [set() for _ in range(world.size)]
    dist.all_gather_object(gathered, values)
    return set().union(*gathered)


def run_on_main(decide: Callable[[], Result], world: World) -> Result:
    """The first process' result or exception, in all of them."""
    if world.size == 1:
        return decide()
    told: list[Any] = [None]
    if world.is_main:
        try:
            told = [(decide(), None)]
        except Exception as error:  # passed on, so that no process waits for one that has gone
            told = [(None, error)]
    dist.broadcast_object_list(told)
    result, trouble = told[0]
    if trouble is not None:
        raise trouble
    return result  # type: ignore[no-any-return]


class _Sum(torch.autograd.Function):
    """A sum over all processes, whose gradient is the sum of all gradients; torch's own is deprecated."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class _SyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes' images, on any device; torch's own is for GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        wide = x.float()
        count = torch.full((1,), float(x.numel() // x.shape[1]), device=x.device)
        sums = _Sum.apply(torch.cat([wide.sum((0, 2, 3)), count]))  # parts may differ where images were skipped
        total = sums[-1].detach()
        mean = sums[:-1] / total
        away = wide - mean[:, None, None]
        variance = _Sum.apply(away.square().sum((0, 2, 3))) / total
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * total / (total - 1), self.momentum)  # unbiased, as torch has it
        scale = self.weight * (variance + self.eps).rsqrt()
        out: Tensor = away * scale[:, None, None] + self.bias[:, None, None]
        return out.to(x.dtype)


def synchronise(net: nn.Module, world: World) -> None:
    """Have batch normalisation use the whole batch's statistics, as one process with that batch would; in place."""
    for module in net.modules() if world.size > 1 else ():
        if type(module) is nn.BatchNorm2d:
            kind: Any = nn.SyncBatchNorm if world.device.type == "cuda" else _SyncBatchNorm
            module.__class__, module.__dict__["process_group"] = kind, None  # which is all processes


def desynchronise(net: nn.Module) -> None:
    """Undo `synchronise`: the network as it works in one process."""
    for module in net.modules():
        if isinstance(module, nn.SyncBatchNorm | _SyncBatchNorm):
            del module.__dict__["process_group"]
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
