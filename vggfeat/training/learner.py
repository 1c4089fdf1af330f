"""One step of training: gradients of a batch's parts, then the optimizer; on CUDA captured as a graph and replayed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vggfeat.cuda_graphs import captured, supports_capture
from vggfeat.devices import triton_kernels
from vggfeat.network import VGG
from vggfeat.training.components import build_optimizer, redundant_biases
from vggfeat.training.config import TrainConfig
from vggfeat.training.distributed import World, desynchronise, synchronise

WARMUP_STEPS = 3  # steps before one is captured: in the first, libraries tune and optimizers create state


class Learner:
    """A network with its optimizer and gradient scaler.

    Args:
        net: on the device of `world`; its redundant biases get no gradient until `close`.
        config: the settings.
        world: the processes.
        dtype: that convolutions are computed in.

    Attributes:
        model: the network as called: compiled, with fused kernels, distributed.
        optimizer: of its parameters.
        scaler: of losses in float16.
    """

    def __init__(self, net: VGG, config: TrainConfig, world: World, dtype: torch.dtype) -> None:
        self.net, self.config, self.world, self.dtype = net, config, world, dtype
        self.redundant = redundant_biases(net)
        for bias in self.redundant:
            bias.requires_grad_(False)
        synchronise(net, world)
        self.model: nn.Module = net
        if config.compile:
            self.model = torch.compile(self.model)  # type: ignore[assignment]
        elif world.size == 1 and not config.checkpointing and triton_kernels(world.device, dtype):
            from vggfeat.training.fused import Fused  # needs Triton

            self.model = Fused(net)
        if world.size > 1:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = build_optimizer(net, config)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16)
        self.whole_step = self._whole_step
        # kernel by kernel, a step on a GPU takes longer to launch than to run: after a few it is captured, and replayed
        whole = world.size == config.accumulate == 1 and not config.checkpointing and not self.scaler.is_enabled()
        self.warming = WARMUP_STEPS if whole and supports_capture(world.device) else -1
        # where a captured optimizer reads its learning rates
        self.rates = [torch.zeros((), device=world.device) for _ in self.optimizer.param_groups if self.warming > 0]

    def step(self, images: Tensor, labels: Tensor, targets: Tensor, last: bool) -> tuple[Tensor, ...]:
        """One part of a batch: its mean loss, and how many were right; then the optimizer steps, if it is the last.

        Args:
            images: (n,3,H,W), normalised.
            labels: (n,).
            targets: the labels, or shares (n,classes) where images are mixed.
            last: whether it is the batch's last part.
        """
        if not last:
            return self._forward_backward(images, labels, targets, waits=True)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=False):
            rate.fill_(group["lr"])
        if self.warming == 0:
            torch.cuda.empty_cache()  # a graph has memory of its own
            self.whole_step = captured(self.whole_step, images, labels, targets)
            self.optimizer.zero_grad()  # where a capture failed halfway, its gradients have no values
        self.warming -= 1
        return self.whole_step(images, labels, targets)

    def _whole_step(self, images: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """The last part, and the optimizer's step."""
        results = self._forward_backward(images, labels, targets)
        self.scaler.unscale_(self.optimizer)
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip)
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self.rates or rates, strict=True):
                group["lr"] = rate
            self.scaler.step(self.optimizer)
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        self.scaler.update()
        self.optimizer.zero_grad()
        return results

    def _forward_backward(
        self, images: Tensor, labels: Tensor, targets: Tensor, waits: bool = False
    ) -> tuple[Tensor, ...]:
        """Gradients of a part of a batch, reduced over processes unless that waits for a later part."""
        with self.model.no_sync() if waits and self.world.size > 1 else nullcontext():  # type: ignore[operator]
            with torch.autocast(self.world.device.type, self.dtype, enabled=self.dtype != torch.float32):
                scores = self.model(images)
            loss = F.cross_entropy(scores.float(), targets, label_smoothing=self.config.label_smoothing)
            self.scaler.scale(loss / self.config.accumulate).backward()
        return loss.detach(), (scores.argmax(1) == labels).sum()

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict`, without the network's own."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state.

        Raises:
            ValueError: it is of other parameters.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            if "capturable" in group:  # as on the device here, not where the run was begun
                group["capturable"] = self.world.device.type == "cuda"
        self.scaler.load_state_dict(state["scaler"])

    def close(self) -> None:
        """Free what it holds, and undo its changes to the network."""
        self.whole_step = self._whole_step  # a graph holds on to the memory of a whole step
        self.model = self.net
        desynchronise(self.net)
        for bias in self.redundant:
            bias.requires_grad_(True)
