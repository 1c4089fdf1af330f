"""Losses that people put inside their own models."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data._utils.collate import default_collate_fn_map

from vggfeat.arch import Arch, layer_names
from vggfeat.cuda_graphs import Replays, supports_capture
from vggfeat.errors import InputError, check_choice
from vggfeat.features import CUSTOM_BACKWARD_DEVICES, VGGFeatures, count_and_size
from vggfeat.functional import (
    CRITERIA,
    DERIVATIVES,
    distance_and_gradient,
    gram,
    masked_mean,
    peak_at_1,
    unit_normalize,
    upcast,
)
from vggfeat.modes import needs_composite_ops, no_autocast, values_are_hidden
from vggfeat.weights import DEFAULT, WeightsLike

Criterion = str | Callable[[Tensor, Tensor], Tensor]
REDUCTIONS = ("none", "mean", "sum")
VALUES_AT_A_TIME = 1 << 22  # of the first layer's output, 16 MB in float32


@dataclass(eq=False)  # comparing tensors gives no single bool; frameworks that move batches refuse a frozen one
class EncodedTarget:
    """What a loss remembers of its targets; made by `encode`, given to the loss in place of the images.

    Attributes:
        values: by layer, features (N,C,h,w) or Gram matrices (N,C,C), detached.
        size: height and width of the images.
        made_by: the loss, its layers and network and a checksum of its weights, in words; only a loss of the same can
            use it.

    `len(target)` is the number of images; `target[i]`, `target[2:5]` and `target[[0, 3]]` are some of them,
    `EncodedTarget.cat` joins several, as a `DataLoader` does by itself with a data set encoded beforehand.
    `torch.save` writes it (of a slice, which is a view, all images: save `target[[i]]`); `torch.load` reads it once
    `vggfeat.EncodedTarget` was accessed: that registers it.
    """

    values: Mapping[str, Tensor] = field(repr=False)
    size: tuple[int, int]
    made_by: str

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> EncodedTarget:
        """Some of the images, for mini-batches: a position, a slice, or a tensor or list of positions.

        Raises:
            InputError: an index into anything but the images.
        """
        if index is None or isinstance(index, tuple):
            raise InputError(f"an encoded target is indexed by its images alone, got {index!r}")
        if isinstance(index, int) or getattr(index, "ndim", 1) == 0:
            index = [int(index)]  # type: ignore[arg-type]  # a batch of one
        return self.map(lambda value: value[index])

    @staticmethod
    def cat(targets: Sequence[EncodedTarget]) -> EncodedTarget:
        """Several targets as one batch, encoded by the same loss from images of one size.

        Raises:
            InputError: none, or such as do not fit together.
        """
        if len({(target.made_by, target.size, tuple(target.values)) for target in targets}) != 1:
            raise InputError("targets in a batch must be encoded by one loss, from images of one size")
        first = targets[0]
        return replace(
            first, values={name: torch.cat([each.values[name] for each in targets]) for name in first.values}
        )

    def to(self, *args: Any, **kwargs: Any) -> EncodedTarget:
        """The same on another device or in another type, as `torch.Tensor.to`."""
        return self.map(lambda value: value.to(*args, **kwargs))

    def pin_memory(self) -> EncodedTarget:
        """The same in page-locked memory, as `DataLoader(pin_memory=True)` wants it."""
        return self.map(Tensor.pin_memory)

    def map(self, change: Callable[[Tensor], Tensor]) -> EncodedTarget:
        """The same with every layer's values changed."""
        return replace(self, values={name: change(value) for name, value in self.values.items()})


torch.serialization.add_safe_globals([EncodedTarget])
default_collate_fn_map[EncodedTarget] = lambda batch, *, collate_fn_map=None: EncodedTarget.cat(batch)


class _FeatureLoss(nn.Module):
    """A weighted sum over layers of a distance between a VGG's features of two batches of images."""

    __jit_unused_properties__ = ("_signature",)  # so that hosts can be scripted, though not calls of the loss

    def __init__(
        self,
        layers: Sequence[str] = (),
        *,
        layer_weights: Sequence[float] | Mapping[str, float] | None = None,
        criterion: Criterion = "mse",
        arch: str | Arch | None = None,
        weights: WeightsLike = DEFAULT,
        normalize_features: bool = False,
        input_range: tuple[float, float] = (0.0, 1.0),
        reduction: str = "mean",
        precision: str = "float32",
        pooling: str = "max",
        padding: str = "zeros",
        repeat_grey: bool = False,
        keep: str = "bits",
        cuda_graphs: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(criterion, type):
            raise InputError(f"criterion is a class: make one of it, {criterion.__name__}()")
        if not callable(criterion):
            check_choice("criterion", criterion, CRITERIA, " (or pass a function)")
        check_choice("reduction", reduction, REDUCTIONS)
        names = tuple(dict.fromkeys(layer_names(layers)))
        self.layer_weights = _weights_by_layer(names, layer_weights)
        self.features = VGGFeatures(
            names,
            arch,
            weights,
            pooling=pooling,
            padding=padding,
            precision=precision,
            input_range=input_range,
            repeat_grey=repeat_grey,
            keep=keep,
        )
        self._checksum = self.features.checksum()  # now: a compiler could not trace it
        self.criterion = criterion
        self.normalize_features = normalize_features
        self.reduction = reduction
        self.cuda_graphs = cuda_graphs
        self._replays = Replays()

    def _encode(self, target: Tensor, mask: Tensor | None = None) -> EncodedTarget:
        """What the loss needs of target images."""
        _, size = count_and_size(target)
        with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode cannot be trained against
            values = self._represent(target.detach(), mask)
        return EncodedTarget(values, size, self._signature)

    @torch.jit.unused
    def forward(self, input: Tensor, target: Tensor | EncodedTarget, mask: Tensor | None = None) -> Tensor:
        """The loss of `input` against `target`.

        Args:
            input: (N,3,H,W), floating, in `input_range`.
            target: (N,3,H,W) or (1,3,H,W) of the same kind, or what `encode` made of such images; of `StyleLoss` also
                of another size.
            mask: (N,1,H,W) or (1,1,H,W), not negative, such as a mask in [0,1], of the input's size: its area average
                over each feature's pixels weighs the mean, or the Gram matrices' positions: those of the input alone
                where the target is encoded. None weighs all alike.

        Returns:
            A scalar, or with `reduction="none"` a value for each image, (N,); float32, float64 for float64 images.

        Raises:
            InputError: images that the features refuse, shapes that do not match, or a target encoded by another loss.
        """
        target = self._checked_target(input, target, mask is not None)
        if mask is not None:
            self._check_masked()
            mask = _checked_mask(mask, input)
        constant = self._compares_with_constants(input, target, mask)
        if constant and torch.is_grad_enabled() and input.requires_grad:
            target = target.map(_for_graphs) if isinstance(target, EncodedTarget) else _for_graphs(target)
            total: Tensor = _LossWithGradient.apply(input, self, target, mask)
        elif constant and self._may_replay(input):
            (total,) = self._snapshot()._replayed(self._replays, input, target, mask, gradient=False)
        else:
            total = self._compare_parts(input, target, mask)
        if self.reduction == "none":
            if total.ndim != 1:
                raise InputError("reduction='none' needs a criterion that keeps the batch, got one that gives a scalar")
            return total
        return {"mean": Tensor.mean, "sum": Tensor.sum}[self.reduction](total)

    def _checked_target(
        self, input: Tensor, target: Tensor | EncodedTarget, masked: bool = False
    ) -> Tensor | EncodedTarget:
        """The target, which fits the input: as many images or one, of a valid size, and in a type no wider."""
        if isinstance(input, EncodedTarget):
            raise InputError("the input is an encoded target: give images, and what was encoded as the target")
        if isinstance(target, EncodedTarget):
            if target.made_by != self._signature:
                raise InputError(f"this target was encoded by {target.made_by}; this is {self._signature}")
            count, size = len(target), target.size
            place = next(iter(target.values.values())).device
        else:
            count, size = count_and_size(target)
            place = target.device
        images, own_size = count_and_size(input)
        if place != input.device:
            raise InputError(f"the input is on {input.device}, the target on {place}: target.to({str(input.device)!r})")
        if count not in (1, images):
            raise InputError(f"{images} images against {count} targets: expected as many, or one for all")
        self._check_sizes(own_size, size, masked and isinstance(target, Tensor))
        if input.dtype == torch.float64:
            return target
        return target.map(_narrowed) if isinstance(target, EncodedTarget) else _narrowed(target)

    def _check_masked(self) -> None:
        if heads := [name for name in self.layer_weights if name in self.features.arch.head_names]:
            raise InputError(f"a mask fits no layer of the classifier, which has no positions: leave out {heads[0]}")

    def _compares_with_constants(self, input: Tensor, target: Tensor | EncodedTarget, mask: Tensor | None) -> bool:
        """Whether no gradient but the input's can be asked for, so that it is computed with the value."""
        others = [*target.values.values()] if isinstance(target, EncodedTarget) else [target]
        others += [] if mask is None else [mask]
        weights: Iterable[Any] = self.layer_weights.values()
        others += [weight for weight in weights if isinstance(weight, Tensor)]
        return (
            input.device.type in CUSTOM_BACKWARD_DEVICES
            and not (torch.is_grad_enabled() and any(other.requires_grad for other in others))
            and isinstance(self.criterion, str)
            and not (self.features._forward_hooks or self.features._forward_pre_hooks)  # which want to see both images
            and not needs_composite_ops()
            and not torch._C._len_torch_dispatch_stack()  # modes see operators, and no graph
        )

    def _may_replay(self, input: Tensor) -> bool:
        """Whether calls may become CUDA graphs."""
        return (
            self.cuda_graphs
            and supports_capture(input.device)
            and input.numel() > 0
            and all(isinstance(weight, int | float) for weight in self.layer_weights.values())
        )

    def _replayed(
        self,
        replays: Replays,
        input: Tensor,
        target: Tensor | EncodedTarget,
        mask: Tensor | None,
        *,
        gradient: bool,
    ) -> tuple[Tensor, ...]:
        """`_value_and_gradient`, or `_compare` alone, of the whole batch; of a snapshot, which a graph then keeps."""
        encoded = replace(target, values={}) if isinstance(target, EncodedTarget) else None
        theirs = target.values if isinstance(target, EncodedTarget) else {"": target}
        names, masks = [*theirs], [] if mask is None else [mask]

        def compute(input: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            values = dict(zip(names, others[: len(names)], strict=True))
            target = values[""] if encoded is None else replace(encoded, values=values)
            mask = None if len(others) == len(names) else others[-1]
            if gradient:
                return self._value_and_gradient(input, target, mask)
            return (self._compare(input, target, mask),)

        features, kind = self.features, input.device.type
        settings = (
            (features.trunk, features.plan.code, features.precision, features.keep, features.input_range),
            (self.criterion, self.normalize_features, *self.layer_weights.items()),
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
        )
        with torch.no_grad():
            return replays(compute, [input.detach(), *theirs.values(), *masks], (gradient, *names, settings))

    def _snapshot(self) -> _FeatureLoss:
        """The loss as it is now, without graphs."""
        loss = object.__new__(type(self))  # no copy: where FSDP changed the class, that would call __init__
        loss.__dict__.update(self.__dict__)
        loss.layer_weights, loss._replays = dict(self.layer_weights), Replays()
        return loss

    def _images_at_a_time(self, input: Tensor) -> int:
        """How many images to run together: on a CPU few enough that activations stay in its caches.

        Blocks of more than 32 MB are also fetched from the system and returned at every use, which takes as long as
        computing on them. For a user's criterion, which may look at the whole batch, it stays whole.
        """
        images = max(1, input.shape[0])
        if input.device.type != "cpu" or not isinstance(self.criterion, str):
            return images
        values = input.shape[2] * input.shape[3] * self.features.arch.layers[0].channels
        return min(images, max(1, VALUES_AT_A_TIME // max(1, values)))

    def _parts(
        self, input: Tensor, target: Tensor | EncodedTarget, mask: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | EncodedTarget, Tensor | None]]:
        """Some images at a time, each with its target and mask."""
        if torch.compiler.is_compiling():  # whole, whatever their number: a loop would fix it in the graph
            yield input, target, mask
            return
        step, images = self._images_at_a_time(input), len(input)
        if step < images and len(target) == 1 and isinstance(target, Tensor):  # encoded once, not for every part
            target = EncodedTarget(self._represent(target, mask), count_and_size(target)[1], self._signature)
        for i in range(0, max(1, images), step):
            yield (
                input[i : i + step],
                target if len(target) == 1 else target[i : i + step],
                mask if mask is None or len(mask) == 1 else mask[i : i + step],
            )

    def _compare_parts(self, input: Tensor, target: Tensor | EncodedTarget, mask: Tensor | None) -> Tensor:
        parts = [self._compare(*part) for part in self._parts(input, target, mask)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)  # one part may be a scalar, of the user's criterion

    def _compare(self, input: Tensor, target: Tensor | EncodedTarget, mask: Tensor | None) -> Tensor:
        ours = self._represent(input, mask)
        theirs = self._representation_of(target, mask)
        with no_autocast(input.device):
            parts = [
                weight * self._distance(name, ours[name], theirs[name], self._mask_of(name, mask))
                for name, weight in self.layer_weights.items()
            ]
        return functools.reduce(torch.add, parts)

    def _value_and_gradient(
        self, images: Tensor, target: Tensor | EncodedTarget, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The losses (N,) and their gradients in the images' shape, by the trunk's pullback."""
        theirs = dict(self._representation_of(target, mask))
        # in float16, small gradients would be lost: they are not scaled yet
        _, pullback = self.features.vjp(self.features.checked(upcast(images.detach())))
        values: dict[str, Tensor] = {}

        def tap_grad(name: str, tap: Tensor) -> Tensor:
            weight = self.layer_weights[name]
            with no_autocast(images.device):
                value, grad = self._distance_and_gradient(name, tap, theirs.pop(name), self._mask_of(name, mask))
            values[name] = weight * value
            return grad if weight == 1 else grad.mul_(weight)

        gradient = pullback(tap_grad).sum_to_size(images.shape)  # of a grey image that was repeated
        return functools.reduce(torch.add, (values[name] for name in self.layer_weights)), gradient

    def _mask_of(self, name: str, mask: Tensor | None) -> Tensor | None:
        """The mask's mean over the pixels of each position of a layer: squares of its stride, as the pools see them."""
        if mask is None:
            return None
        stride = self.features.arch.layer(name).stride
        return mask if stride == 1 else F.avg_pool2d(mask, stride)

    @property
    def _signature(self) -> str:
        features, plan = self.features, self.features.plan
        normalized = ", normalized features" * self.normalize_features
        own = next(each for each in type(self).__mro__ if not each.__module__.startswith("torch."))  # not FSDP's
        return (
            f"{own.__name__} of {', '.join(sorted(features.layers))}{normalized}, {plan.arch.name} with "
            f"{'/'.join(map(str, plan.arch.channels))} channels, {plan.pooling} pooling, {plan.padding} padding, "
            f"weights {self._checksum}"
        )

    def _represent(self, images: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """By layer, what images are compared by."""
        taps = self.features(images)
        return {name: self._representation(tap, self._mask_of(name, mask)) for name, tap in taps.items()}

    def _representation_of(self, target: Tensor | EncodedTarget, mask: Tensor | None) -> Mapping[str, Tensor]:
        """The same of targets, which may have been encoded."""
        return target.values if isinstance(target, EncodedTarget) else self._represent(target, mask)

    def _representation(self, tap: Tensor, mask: Tensor | None) -> Tensor:
        """What is compared of a tap."""
        raise NotImplementedError

    def _distance(self, name: str, ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
        """Distance of two representations: (N,), or a scalar if the user's criterion gives one."""
        raise NotImplementedError

    def _distance_and_gradient(
        self, name: str, tap: Tensor, theirs: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The distance (N,) of a tap, which is in no graph, and its gradient with respect to that."""
        with torch.enable_grad():
            leaf = tap.detach().requires_grad_()
            distance = self._distance(name, self._representation(leaf, mask), theirs, mask)
            (gradient,) = torch.autograd.grad(distance.sum(), leaf)
        return distance.detach(), gradient

    def _criterion(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if isinstance(self.criterion, str):
            return CRITERIA[self.criterion](upcast(ours), upcast(theirs))
        theirs = theirs.expand(len(ours), *theirs.shape[1:])  # of one target for all
        values = self.criterion(upcast(ours), upcast(theirs))
        if not isinstance(values, Tensor) or (values.ndim and len(values) != len(ours)):
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)
            raise InputError(f"expected the criterion to give values ({len(ours)},…) or a scalar tensor, got {got}")
        return values

    def _check_sizes(self, input: tuple[int, int], target: tuple[int, int], masked: bool) -> None:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What `print` shows."""
        named = self.criterion
        if not isinstance(named, str):
            named = getattr(named, "__name__", type(named).__name__)
        return f"criterion={named}, reduction={self.reduction}, layer_weights={self.layer_weights}"


class _LossWithGradient(torch.autograd.Function):
    """Losses (N,) whose input gradient is computed in the forward, and is all that is kept for the backward.

    If the input requires a gradient, it will be asked for sooner or later. Computed one chunk of the batch at a time,
    it needs memory for one chunk only, for which the activations may be kept unpacked.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        loss: _FeatureLoss,
        target: Tensor | EncodedTarget,
        mask: Tensor | None,
    ) -> Tensor:
        kind = input.device.type
        ctx.autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        now = ctx.loss = loss._snapshot()  # for a second derivative, too
        # hooks on what is saved (checkpointing, offloading) are meant for the caller's graph, not for this one
        with _no_saved_tensors_hooks():
            if loss._may_replay(input):
                values, gradient = now._replayed(loss._replays, input, target, mask, gradient=True)
            else:
                parts = [loss._value_and_gradient(*part) for part in loss._parts(input, target, mask)]
                values, gradient = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.gradient = gradient.contiguous() if input.is_contiguous() else gradient
        ctx.dtype = input.dtype
        # only for a second derivative, where images modified in the meantime are an error; a first one does not care
        if isinstance(target, Tensor):
            ctx.encoded, theirs = None, [target]
        else:
            ctx.encoded, ctx.names, theirs = replace(target, values={}), [*target.values], [*target.values.values()]
        ctx.save_for_backward(input, mask, *theirs)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a second derivative was asked for
            input, mask, *theirs = ctx.saved_tensors
            target = theirs[0]
            if ctx.encoded is not None:
                target = replace(ctx.encoded, values=dict(zip(ctx.names, theirs, strict=True)))
            with torch.autocast(input.device.type, **ctx.autocast):
                losses = ctx.loss._compare_parts(input, target, mask)
            (gradient,) = torch.autograd.grad(losses, input, grad, create_graph=True)
        else:
            if ctx.gradient is None:
                raise RuntimeError("backward() a second time on one loss: pass retain_graph=True the first time")
            gradient = (ctx.gradient * grad[:, None, None, None]).to(ctx.dtype)
            if not _keeps_graph():
                ctx.gradient = None
        return gradient, None, None, None


def _keeps_graph() -> bool:
    """Whether the backward that is running was asked with `retain_graph`."""
    asked: Any = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    # torch's compiled backward cannot trace the question; a gradient that is kept costs memory alone
    return asked is None or torch.compiler.is_compiling() or bool(asked())


def _narrowed(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _no_saved_tensors_hooks() -> AbstractContextManager[object]:
    """A context without the caller's."""
    allowed = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", bool)  # where forbidden, there are none
    return torch.autograd.graph.saved_tensors_hooks(_same, _same) if allowed() else contextlib.nullcontext()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _for_graphs(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of an inference tensor: autograd takes none."""
    return tensor.clone() if tensor.is_inference() else tensor


class PerceptualLoss(_FeatureLoss):
    """Distance of two images in the features of a VGG (Johnson et al. 2016, arXiv:1603.08155, eq. 2).

    Σ over layers of weight · mean over channels and positions of criterion(F(input), F(target)), per image.

    In another model it is as good as invisible: no parameters, nothing in `state_dict()`, the same in train and eval
    mode, computed wherever the images are. Gradients flow to `input`, and to `target` where it requires them.

    The gradient with respect to `input` is computed together with the value, on a CPU for a few images at a time, on a
    GPU for the whole batch. Until `backward` only that gradient and the images are held; compute values for monitoring
    under `torch.no_grad()`. Where the target or mask requires a gradient too, for a criterion of your own, under
    `torch.compile` and `torch.func`, it is computed in the backward.

    On a GPU with few small images most of the time would be Python's. Calls that repeat with images of the same sizes
    are therefore captured as a CUDA graph, at the sixth, if the device is found to wait for the host. The graph keeps
    the memory that a call needs, if that is at most a fifth of what is free, as long as the loss lives.

        >>> import torch, vggfeat
        >>> loss = vggfeat.PerceptualLoss(layers=["relu1_2", "relu2_2"], weights="random")
        >>> output = torch.rand(2, 3, 64, 64, requires_grad=True)
        >>> loss(output, torch.rand(2, 3, 64, 64)).backward()
        >>> output.grad.shape
        torch.Size([2, 3, 64, 64])

    Args:
        layers: names such as `conv3_3` (before the ReLU) and `relu3_3` (after it).
        layer_weights: one for each layer, in order or by name; 1 by default.
        criterion: `"mse"`, `"l1"`, `"charbonnier"` (ε = 1e-3), `"cosine"` (1 - cos of the channel vectors at each
            position), or a function of two feature tensors (N,C,h,w) that gives values (N,…), elementwise; if it
            gives a scalar, that is the loss, for `reduction="mean"` and `"sum"` alike. A module keeps its parameters,
            which are then the loss's, too.
        arch: the network; None means the weights' own, and vgg16 where nothing implies one.
        weights: see `vggfeat.weights.load`.
        normalize_features: bring the channel vector at each position to unit length first, as LPIPS does.
        input_range: lowest and highest value of input and target.
        reduction: `"mean"` or `"sum"` over the images of the batch, or `"none"`: one value per image, (N,).
        precision: `"float32"`, `"bfloat16"` or `"auto"`, see `VGGFeatures`; distances are float32 in any case.
        pooling: `"max"`, `"average"` or `"l2"`.
        padding: `"zeros"`, `"reflect"` or `"replicate"`.
        repeat_grey: accept one channel and repeat it.
        keep: `"bits"` or `"values"`, see `VGGFeatures`: kept for the current images until their gradient is known.
            Values in any case for small images on a CPU: 256×256 in float32, 362×362 in bfloat16, in all that run
            together.
        cuda_graphs: allow that on a GPU. While a graph is captured, other threads must not draw random numbers there.

    Raises:
        InputError: an unknown layer or choice.
        WeightsError: weights that are unavailable or do not reach the deepest layer.
    """

    def encode(self, target: Tensor, mask: Tensor | None = None) -> EncodedTarget:
        """The features of target images, computed once and used often.

        Args:
            target: (N,3,H,W).
            mask: must be None: a mask belongs to the comparison, give it to `forward`.

        Raises:
            InputError: images that the features refuse, or a mask.
        """
        if mask is not None:
            raise InputError("a perceptual target is encoded whole; give the mask to the comparison")
        return self._encode(target)

    def maps(self, input: Tensor, target: Tensor | EncodedTarget) -> dict[str, Tensor]:
        """The distance at each position of each layer, (N,h,w); the sum of their means is the distance.

        Args:
            input: (N,3,H,W), floating, in `input_range`.
            target: the same shape, or (1,3,H,W), or what `encode` made of such images.

        Raises:
            InputError: images that the features refuse, shapes that do not match, or a criterion or layer that has no
                positions.
        """
        target = self._checked_target(input, target)
        theirs = self._representation_of(target, None)
        maps: dict[str, Tensor] = {}
        for name, ours in self._represent(input, None).items():
            with no_autocast(input.device):
                values = self._values(name, ours, theirs[name])
            if ours.ndim != 4 or values.shape[-2:] != ours.shape[2:] or values.ndim not in (3, 4):
                raise InputError(f"there is no map of {name}: its values have the shape {tuple(values.shape)}")
            maps[name] = self.layer_weights[name] * (values if values.ndim == 3 else values.mean(1))
        return maps

    def _representation(self, tap: Tensor, mask: Tensor | None) -> Tensor:
        return tap

    def _channel_weights(self, name: str, like: Tensor) -> Tensor | None:
        """Factors for the channels' values, (C,1,1); None where all count the same."""
        return None

    def _values(self, name: str, ours: Tensor, theirs: Tensor) -> Tensor:
        """The criterion's values on a layer's features; the distance is their mean."""
        if self.normalize_features:
            ours, theirs = unit_normalize(ours), unit_normalize(theirs)
        values = self._criterion(ours, theirs)
        weights = self._channel_weights(name, values)
        return values if weights is None else values * weights

    def _distance(self, name: str, ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
        values = self._values(name, ours, theirs)
        if mask is not None:
            if values.ndim != 4 or values.shape[2:] != mask.shape[2:]:
                got = tuple(values.shape)
                raise InputError(f"a mask needs a criterion that gives (N,C,h,w) or (N,1,h,w), got shape {got}")
        return masked_mean(values, mask)

    def _distance_and_gradient(
        self, name: str, tap: Tensor, theirs: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.criterion not in DERIVATIVES or tap.ndim != 4:
            return super()._distance_and_gradient(name, tap, theirs, mask)
        weights = self._channel_weights(name, upcast(tap[:0]))  # whose type and device count
        return distance_and_gradient(tap, theirs, str(self.criterion), self.normalize_features, mask, weights)

    def _check_sizes(self, input: tuple[int, int], target: tuple[int, int], masked: bool) -> None:
        if input != target:
            raise InputError(f"input of {input[1]}×{input[0]} pixels against a target of {target[1]}×{target[0]}")


class StyleLoss(_FeatureLoss):
    """Distance of two images in the Gram matrices of a VGG's features (Gatys et al. 2016; Johnson et al. 2016, eq. 4).

    Σ over layers of weight · mean of criterion(G(input), G(target)), per image, with G of `vggfeat.functional.gram`.
    The images may differ in size. A mask weights positions in the Gram matrices of the input and of a target of the
    same size; give a target with its own size or mask through `encode(target, mask)`.

    Args:
        As for `PerceptualLoss`, but a criterion of your own gets Gram matrices (N,C,C), and `normalize_features`
        brings channel vectors to unit length before these are computed.

    Raises:
        InputError: an unknown layer or choice.
        WeightsError: weights that are unavailable or do not reach the deepest layer.
    """

    def encode(self, target: Tensor, mask: Tensor | None = None) -> EncodedTarget:
        """The Gram matrices of target images, computed once and used often.

        Args:
            target: (N,3,H,W), of any size.
            mask: (N,1,H,W) or (1,1,H,W) weights of its positions.

        Raises:
            InputError: images that the features refuse, or a mask that does not fit them.
        """
        return self._encode(target, None if mask is None else _checked_mask(mask, target))

    def _representation(self, tap: Tensor, mask: Tensor | None) -> Tensor:
        if tap.ndim != 4:
            raise InputError("layers of the classifier have no positions and so no Gram matrices: leave them out")
        return gram(unit_normalize(tap) if self.normalize_features else tap, mask)

    def _distance(self, name: str, ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
        return masked_mean(self._criterion(ours, theirs))

    def _check_sizes(self, input: tuple[int, int], target: tuple[int, int], masked: bool) -> None:
        if masked and input != target:
            raise InputError("a mask fits one size: encode a target of another size, loss.encode(target, its_mask)")


def _weights_by_layer(layers: Sequence[str], given: Sequence[float] | Mapping[str, float] | None) -> dict[str, float]:
    if given is None:
        return dict.fromkeys(layers, 1.0)
    if isinstance(given, Mapping):
        if unknown := set(given) - set(layers):
            raise InputError(f"layer_weights for {', '.join(sorted(unknown))}, which is not among {', '.join(layers)}")
        given = [given.get(name, 1.0) for name in layers]
    unfit = f"layer_weights are numbers, one for each of {', '.join(layers)}; got {given!r}"
    given = [*given] if isinstance(given, Iterable) else None
    if given is None or any(isinstance(value, str) for value in given):
        raise InputError(unfit)
    if any(isinstance(value, Tensor) and value.requires_grad for value in given):
        raise InputError("layer_weights are fixed numbers: weigh the losses of single layers by what is trained")
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError) as error:
        raise InputError(unfit) from error
    if bad := [value for value in values if not math.isfinite(value)]:
        raise InputError(f"layer_weights must be finite numbers, got {bad[0]}")
    if len(values) != len(layers):
        raise InputError(f"{len(values)} layer_weights for {len(layers)} layers ({', '.join(layers)})")
    return dict(zip(layers, values, strict=True))


def _checked_mask(mask: Tensor, images: Tensor) -> Tensor:
    n, (h, w) = count_and_size(images)
    if not isinstance(mask, Tensor) or mask.is_complex():
        what = f"{mask.dtype} values" if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"expected a mask ({n},1,{h},{w}) or (1,1,{h},{w}) with values such as 0 and 1, got {what}")
    if mask.ndim != 4 or mask.shape[0] not in (1, n) or mask.shape[1] != 1 or tuple(mask.shape[2:]) != (h, w):
        raise InputError(f"expected a mask ({n},1,{h},{w}) or (1,1,{h},{w}), got shape {tuple(mask.shape)}")
    mask = mask.to(images.device, torch.float64 if images.dtype == torch.float64 else torch.float32)
    if mask.device.type == "cpu" and mask.numel() and not values_are_hidden():
        low, high = torch.aminmax(mask.detach())
        if not (low >= 0 and high < math.inf):
            reach = f"{float(low):.4g} to {float(high):.4g}"
            raise InputError(f"a mask has finite values of at least 0, this one from {reach}")
    return peak_at_1(mask)  # now: the means over a layer's pixels are sums, too
