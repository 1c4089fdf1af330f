"""The network: every VGG of the paper as ordinary modules, with torchvision's state-dict keys.

This is the network to train and take apart. What only sees images through frozen weights (features, losses, style
transfer) uses `features.py` and its faster trunk instead.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # SyncBatchNorm is one, but not a BatchNorm2d
from torch.utils.checkpoint import checkpoint

from vggfeat.arch import HEADS, INITS, LRN, MIN_SIDE, Arch, Layer, channels_at, layer_names, parse
from vggfeat.convolution import Conv2d
from vggfeat.errors import InputError, WeightsError, check_choice
from vggfeat.functional import average_pool

if TYPE_CHECKING:
    from vggfeat.weights import Weights, WeightsLike


def _module(layer: Layer) -> nn.Module:
    if layer.kind == "conv":
        return Conv2d(layer.in_channels, layer.channels, layer.kernel, padding=layer.kernel // 2)
    if layer.kind == "bn":
        return nn.BatchNorm2d(layer.channels)
    if layer.kind == "relu":
        # not in place: hooks on the layer before see its true output, and nothing more is saved for the backward,
        # since the next convolution saves this same output
        return nn.ReLU()
    if layer.kind == "lrn":
        return nn.LocalResponseNorm(*LRN)
    return nn.MaxPool2d(2)


@contextmanager
def _still(block: nn.Module) -> Iterator[None]:
    """Batch normalisation as in training, but with running statistics and counters unchanged."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    layers = [bn for bn in norms if bn.num_batches_tracked is not None]
    before = [(bn.momentum, bn.num_batches_tracked.clone()) for bn in layers]  # type: ignore[union-attr]
    for bn in layers:
        bn.momentum = 0.0
    try:
        yield
    finally:
        for bn, (momentum, count) in zip(layers, before, strict=True):
            bn.momentum = momentum
            bn.num_batches_tracked.copy_(count)  # type: ignore[union-attr]


def _around(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpointed block's first forward and of its second."""
    return nullcontext(), _still(block)


class _AvgPool(nn.AdaptiveAvgPool2d):
    """The pool before a paper head, on every device."""

    def forward(self, x: Tensor) -> Tensor:
        return average_pool(x)


class VGG(nn.Module):
    """VGG (Simonyan & Zisserman 2015, Table 1): `features`, `avgpool`, `classifier`, keys as in torchvision.

    `forward` takes (N,3,H,W), H and W at least 32, and returns logits (N,num_classes). With loaded weights, of whatever
    set, images must be normalised by ImageNet's mean and standard deviation.

    Args:
        arch: which VGG.
        dropout: probability of the dropout before each hidden-to-hidden or last linear layer.
        init: `kaiming` (He et al. 2015, fan-out, for convolutions, σ = 0.01 for linear layers) or `paper` (σ = 0.1
            everywhere, the paper's section 3.1: "10⁻² variance").

    Attributes:
        checkpointing: keep only each block's input for the backward and recompute the rest there (Chen et al. 2016,
            arXiv:1604.06174). Batch statistics are still updated once per step.

    Raises:
        InputError: a dropout outside [0,1), an unknown init, or an `arch` without a head.
    """

    def __init__(self, arch: Arch, dropout: float = 0.5, init: str = "kaiming") -> None:
        super().__init__()
        try:
            fits = 0 <= dropout < 1
        except TypeError:  # no number
            fits = False
        if not fits:
            raise InputError(f"dropout must be in [0, 1), got {dropout!r}")
        check_choice("init", init, INITS)
        if arch.head is None:
            raise InputError("this network needs a head: choose 'paper' or 'slim'")
        self.arch = arch
        self.features = nn.Sequential(*map(_module, arch.layers))
        channels = arch.layers[-1].channels
        if arch.head == "paper":
            self.avgpool: nn.AdaptiveAvgPool2d = _AvgPool(7)
            self.classifier = nn.Sequential(
                nn.Linear(channels * 49, arch.hidden),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(arch.hidden, arch.hidden),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(arch.hidden, arch.num_classes),
            )
        else:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, arch.num_classes))
        self.init = init
        self.checkpointing = False
        self.reset_parameters()

    @property
    def num_classes(self) -> int:
        """Outputs of the last linear layer, which may be another than `arch` says: people replace it."""
        linear = [module for module in self.classifier.modules() if isinstance(module, nn.Linear)]
        return linear[-1].out_features if linear else self.arch.num_classes

    def reset_parameters(self) -> None:
        """Draw new weights as `init` says, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                assert module.bias is not None
                nn.init.zeros_(module.bias)
                if self.init == "paper":
                    nn.init.normal_(module.weight, std=0.1)
                elif isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                else:
                    nn.init.normal_(module.weight, std=0.01)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(N,3,H,W) to logits (N,num_classes)."""
        x = self._recomputed(x) if self.checkpointing and self.training else self.features(x)
        return self.classifier(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]

    def _recomputed(self, x: Tensor) -> Tensor:
        start = 0
        for end in (layer.index + 1 for layer in self.arch.layers if layer.kind == "pool"):
            block = self.features[start:end]
            x = checkpoint(block, x, use_reentrant=False, context_fn=functools.partial(_around, block))
            start = end
        return x

    def dense(self, x: Tensor) -> Tensor:
        """Class scores at every position: the fully connected layers as convolutions (paper, section 3.2).

        Args:
            x: normalised images (N,3,H,W); with the paper's head H and W are at least 224.

        Returns:
            Logits (N,num_classes,h,w), h and w being H/32 and W/32, less 6 with the paper's head. At its 224×224 they
            equal `forward`'s, but not for larger images: there the pool before the classifier averages.

        Raises:
            InputError: images that are too small.
        """
        if min(x.shape[2:]) < MIN_SIDE:
            raise InputError(
                f"images of {x.shape[3]}×{x.shape[2]} are too small: at least {MIN_SIDE} pixels on each side"
            )
        x = self.features(x)
        if self.arch.head == "paper" and min(x.shape[2:]) < 7:
            raise InputError(
                f"dense evaluation with the paper's head needs 7×7 positions after the last pool, got {x.shape[2]}×"
                f"{x.shape[3]}: images of at least 224×224, as scales (--scales) make them in a test, or the slim head"
            )
        kernel = 7 if self.arch.head == "paper" else 1
        for module in self.classifier:
            if isinstance(module, nn.Linear):
                weight = module.weight.unflatten(1, (-1, kernel, kernel))
                x, kernel = nn.functional.conv2d(x, weight, module.bias), 1
            else:
                x = module(x)
        return x

    def extract_features(self, x: Tensor, return_all: bool = False) -> Tensor | list[Tensor]:
        """Features of (N,3,H,W): the last stage's output, or each convolution's own.

        Args:
            x: normalised images.
            return_all: give every convolution's own output (before BN and ReLU), detached, shallow to deep.

        Returns:
            (N,C,H/32,W/32), or the list.
        """
        if not return_all:
            return self.features(x)  # type: ignore[no-any-return]
        return [tap.detach() for tap in self.taps(x, [layer.name for layer in self.arch.convs]).values()]

    def taps(self, x: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Outputs of the named layers by ordinary autograd, so that weights get gradients too.

        Args:
            x: normalised images (N,3,H,W).
            names: layer names of `arch.names`; nothing past the deepest is run.

        Returns:
            The outputs by name, in the order asked for.

        Raises:
            InputError: a layer that this network lacks, or no name at all.
        """
        names = layer_names(names)
        self.arch.check(names)
        outputs = {}
        for layer, module in zip(self.arch.until(names), self.features, strict=False):
            outputs[layer.name] = x = module(x)
        if wanted := set(names) & set(self.arch.head_names):
            x = self.avgpool(x).flatten(1)
            head_names = iter(self.arch.head_names)
            for module in self.classifier:
                x = module(x)
                if not isinstance(module, nn.Dropout):
                    outputs[name := next(head_names)] = x
                    wanted.discard(name)
                if not wanted:
                    break
        return {name: outputs[name] for name in names}


def vgg(
    config: str = "D",
    num_classes: int = 1000,
    batch_norm: bool = False,
    weights: WeightsLike | None = None,
    head: str = "paper",
    width: float = 1.0,
    dropout: float = 0.5,
    init: str = "kaiming",
) -> VGG:
    """A VGG by its column of the paper's Table 1.

    Args:
        config: `A`, `A-LRN`, `B`, `C`, `D`, `E`, or a name such as `vgg16_bn`.
        num_classes: outputs.
        batch_norm: batch normalisation after each convolution.
        weights: anything `vggfeat.weights.load` takes (`"imagenet"`, a path, a state dict, …), or None for fresh ones.
        head: `paper` (fc6, fc7, fc8) or `slim` (global average pool and one linear layer).
        width: factor on every channel count, rounded so that the first block has whole channels; left at 1, the
            weights' own channel counts if given.
        dropout: dropout probability in the head.
        init: `kaiming` or `paper`, see `VGG`.

    Raises:
        InputError: an argument that is unknown or does not fit.
        WeightsError: weights of another network, or without this head (`load_weights(..., head=False)` loads the
            convolutions only).
    """
    arch = parse(config)
    check_choice("head", head, HEADS)
    arch = Arch(arch.config, batch_norm or arch.batch_norm, channels_at(width), head, num_classes)
    if weights is None:
        return VGG(arch, dropout, init)
    from vggfeat.weights import load, load_weights

    loaded = load(weights, arch, classifier=True)
    if width == 1:
        arch = replace(arch, channels=loaded.arch.channels)
    with torch.device("meta"):  # no time spent on numbers that are replaced immediately
        net = VGG(arch, dropout, init)
    # as for fresh weights; "meta" would lose the loaded ones
    device = torch.get_default_device()
    load_weights(net, loaded)
    return net.to(device="cpu" if device.type == "meta" else device, dtype=torch.get_default_dtype())


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """The network in evaluation mode; afterwards each of its modules is back in its own mode."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def network_from_weights(weights: Weights) -> VGG:
    """The network that the weights belong to, with its classifier.

    Raises:
        WeightsError: they hold none.
    """
    from vggfeat.weights import load_weights

    if weights.arch.head is None:
        raise WeightsError(
            f"weights {weights.label} have {weights.classifier}: give imagenet, the folder of a run of "
            "`vggfeat train`, or a file with a VGG's"
        )
    with torch.device("meta"):
        net = VGG(weights.arch)
    return load_weights(net, weights)


def vgg11(
    num_classes: int = 1000,
    batch_norm: bool = False,
    weights: WeightsLike | None = None,
    head: str = "paper",
    width: float = 1.0,
    dropout: float = 0.5,
    init: str = "kaiming",
) -> VGG:
    """VGG-11, the paper's A: 8 convolutions and 3 fully connected layers; see `vgg`."""
    return vgg("A", num_classes, batch_norm, weights, head, width, dropout, init)


def vgg13(
    num_classes: int = 1000,
    batch_norm: bool = False,
    weights: WeightsLike | None = None,
    head: str = "paper",
    width: float = 1.0,
    dropout: float = 0.5,
    init: str = "kaiming",
) -> VGG:
    """VGG-13, the paper's B: 10 convolutions and 3 fully connected layers; see `vgg`."""
    return vgg("B", num_classes, batch_norm, weights, head, width, dropout, init)


def vgg16(
    num_classes: int = 1000,
    batch_norm: bool = False,
    weights: WeightsLike | None = None,
    head: str = "paper",
    width: float = 1.0,
    dropout: float = 0.5,
    init: str = "kaiming",
) -> VGG:
    """VGG-16, the paper's D: 13 convolutions and 3 fully connected layers; see `vgg`."""
    return vgg("D", num_classes, batch_norm, weights, head, width, dropout, init)


def vgg19(
    num_classes: int = 1000,
    batch_norm: bool = False,
    weights: WeightsLike | None = None,
    head: str = "paper",
    width: float = 1.0,
    dropout: float = 0.5,
    init: str = "kaiming",
) -> VGG:
    """VGG-19, the paper's E: 16 convolutions and 3 fully connected layers; see `vgg`."""
    return vgg("E", num_classes, batch_norm, weights, head, width, dropout, init)
