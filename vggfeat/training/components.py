"""A run's components from its settings: the network, the optimizer, the learning rate schedule, mixing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from vggfeat.arch import Arch, channels_at, parse
from vggfeat.devices import autocast_dtype, emulates
from vggfeat.errors import WeightsError
from vggfeat.network import VGG
from vggfeat.training.batches import transforms
from vggfeat.training.config import ARCH, TrainConfig
from vggfeat.training.muon import Muon
from vggfeat.weights import load, load_weights


def build_network(config: TrainConfig, num_classes: int, resumed: Arch | None = None) -> VGG:
    """The network that a configuration begins with; of a run that is resumed its kind alone, without the weights.

    Raises:
        InputError: a layer to freeze that it lacks.
        WeightsError: weights of another network, or with another number of classes and no `new_head`.
    """
    if config.weights is None:
        arch = parse(config.arch or ARCH)
        arch = Arch(arch.config, arch.batch_norm, channels_at(config.width), config.head, num_classes)
        return VGG(arch, config.dropout, config.init)
    net = _pretrained(config, num_classes) if resumed is None else VGG(resumed, config.dropout, config.init)
    if config.freeze is not None:
        net.arch.layer(config.freeze)
        for layer in net.arch.until([config.freeze]):
            net.features[layer.index].requires_grad_(False)
    return net


def _pretrained(config: TrainConfig, num_classes: int) -> VGG:
    weights = load(config.weights, config.arch)
    theirs = weights.arch
    net = VGG(replace(theirs, head=config.head, num_classes=num_classes), config.dropout, config.init)
    head = theirs.head is not None and not config.new_head
    if head and (theirs.head, theirs.num_classes) != (config.head, num_classes):
        raise WeightsError(
            f"weights {weights.label} have a {theirs.head} head for {theirs.num_classes} classes, the run wants a "
            f"{config.head} head for {num_classes}: start a new one with new_head=True (--new-head)"
        )
    return load_weights(net, weights, head=head)


def redundant_biases(net: VGG) -> list[Tensor]:
    """Biases of convolutions directly in front of a batch normalisation that learns, which cancels them.

    Their true gradient is 0, and computing its rounding noise takes a tenth of a step on a GPU.
    """
    biases: list[Tensor] = []
    for convolution, norm in itertools.pairwise(net.features):
        if isinstance(norm, nn.BatchNorm2d) and norm.weight.requires_grad:
            assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
            if convolution.bias.requires_grad:
                biases.append(convolution.bias)
    return biases


def build_optimizer(net: VGG, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer, with two learning rates; biases and batch normalisation do not decay unless asked for."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, value in net.named_parameters():
        if value.requires_grad:
            rate = config.lr * (config.features_lr if name.startswith("features.") else 1.0)
            decay = config.weight_decay if value.ndim > 1 or config.decay_all else 0.0
            groups.setdefault((rate, decay), []).append(value)
    parameters = [{"params": values, "lr": lr, "weight_decay": decay} for (lr, decay), values in groups.items()]
    device = next(net.parameters()).device
    fused = device.type in ("cpu", "cuda")
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    if config.optimizer == "muon":
        dtype = autocast_dtype(config.precision, device)
        if dtype == torch.float16 or emulates(dtype, device):  # its range is too small; or it is slow
            dtype = torch.float32
        return Muon(parameters, momentum=config.momentum, dtype=dtype)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    # without which a step could not be captured as a CUDA graph
    return kind(parameters, betas=(config.momentum, 0.999), fused=fused, capturable=device.type == "cuda")


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> lr_scheduler.LRScheduler:
    """The learning rate schedule, by steps."""
    total, warmup = config.epochs * steps, round(config.warmup * steps)
    if config.schedule == "onecycle":
        # steps before the one at the highest rate, which is the last at most
        rise = max(1, min(warmup or round(0.2 * total), total - 1))
        return lr_scheduler.OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=total + 1,  # the last step is made before the rate's end, not after it
            pct_start=(rise + 1) / (total + 1),  # torch takes one step off
            cycle_momentum=False,
        )
    main: lr_scheduler.LRScheduler
    if config.schedule == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, max(1, total - warmup))
    elif config.schedule == "linear":
        main = lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(1, total - warmup))
    elif config.schedule == "step":
        every = config.step_size * steps
        drops = [max(0, step - warmup) for step in range(every, total, every)]  # counted from the end of the warm-up
        main = lr_scheduler.MultiStepLR(optimizer, drops, config.gamma)
    else:
        main = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if not warmup:
        return main
    before = lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [before, main], [warmup])


def build_mixing(config: TrainConfig, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixup, CutMix (both torchvision's), or one of both for each batch; None for neither.

    Raises:
        DependencyError: torchvision does not work.
    """
    if not (config.mixup or config.cutmix):
        return None
    v2 = transforms()
    made = [v2.MixUp(alpha=config.mixup, num_classes=num_classes)] if config.mixup else []
    made += [v2.CutMix(alpha=config.cutmix, num_classes=num_classes)] if config.cutmix else []
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = v2.RandomChoice(made) if len(made) > 1 else made[0]
    return mix
