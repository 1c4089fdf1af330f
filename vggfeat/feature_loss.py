"""What the losses share: checks, batches in parts, and the gradient that is computed together with the value."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vggfeat.arch import Arch, layer_names
from vggfeat.cuda_graphs import Replays, supports_capture
from vggfeat.encoded_target import EncodedTarget
from vggfeat.errors import InputError, check_choice
from vggfeat.features import CUSTOM_BACKWARD_DEVICES, VGGFeatures, count_and_size
from vggfeat.functional import CRITERIA, peak_at_1, upcast
from vggfeat.modes import needs_composite_ops, no_autocast, values_are_hidden
from vggfeat.weights import DEFAULT, WeightsLike

Criterion = str | Callable[[Tensor, Tensor], Tensor]
ELSEWHERE = {  # criteria by other packages' names
    "mae": "here it is 'l1'",
    "l2": "the mean square is 'mse'",
    "fro": "pass lambda a, b: torch.linalg.vector_norm(a - b)",
}
REDUCTIONS = ("none", "mean", "sum")
VALUES_AT_A_TIME = 1 << 22  # of the first layer's output, 16 MB in float32


class Term(NamedTuple):
    """One distance of a loss.

    Attributes:
        key: of what is compared, in `EncodedTarget.values`.
        layer: whose features are compared.
        loss: which says how.
        weight: what the distance is multiplied by.
    """

    key: str
    layer: str
    loss: LayerLoss
    weight: float


class FeatureLoss(nn.Module):
    """A weighted sum of distances between a VGG's features of two batches of images."""

    # so that hosts can be scripted, though not calls of the loss
    __jit_unused_properties__ = ("_signature", "_terms", "_takes_parts", "_each")

    def __init__(self, features: VGGFeatures, reduction: str, cuda_graphs: bool) -> None:
        super().__init__()
        self.features = features
        self.reduction = reduction
        self.cuda_graphs = cuda_graphs
        self._replays = Replays()

    @property
    def _terms(self) -> list[Term]:
        """What is summed."""
        raise NotImplementedError

    @property
    def _signature(self) -> str:
        """In words, all that an encoded target depends on."""
        raise NotImplementedError

    def _check_sizes(self, input: tuple[int, int], target: tuple[int, int], masked: bool) -> None:
        """Raise `InputError` where images of these sizes, in pixels, cannot be compared."""
        raise NotImplementedError

    def _encode(self, target: Tensor, mask: Tensor | None = None) -> EncodedTarget:
        """What the loss needs of target images."""
        _, size = count_and_size(target)
        with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode cannot be trained against
            values = self._represent(target, mask)
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
            InputError: images that the features refuse, NaN and infinite values among them (`VGGFeatures.forward`),
                shapes that do not match, or a target encoded by another loss.
        """
        target, mask = self._checked(input, target, mask)
        if isinstance(target, Tensor) and target.requires_grad and not input.requires_grad:
            if self._may_change_places(input, target):  # what is computed with the value is the input's gradient
                input, target = target, input
        by_hand = self._goes_by_hand(input, target, mask)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            target = target.map(_for_graphs) if isinstance(target, EncodedTarget) else _for_graphs(target)
        if by_hand and torch.is_grad_enabled() and input.requires_grad:
            total: Tensor = _LossWithGradient.apply(input, target, self, mask)
        elif by_hand and self._may_replay(input):
            (total,) = self._snapshot()._replayed(self._replays, input, target, mask, gradient=False)
        else:
            total = self._compare_parts(input, target, mask)
        return self._reduced(total)

    def _reduced(self, values: Tensor) -> Tensor:
        """The images' values (N,), or the scalar of a user's criterion, as `reduction` says."""
        if self.reduction == "none":
            if values.ndim != 1:
                raise InputError("reduction='none' needs a criterion that keeps the batch, got one that gives a scalar")
            return values
        return {"mean": Tensor.mean, "sum": Tensor.sum}[self.reduction](values)

    def _checked(
        self, input: Tensor, target: Tensor | EncodedTarget, mask: Tensor | None
    ) -> tuple[Tensor | EncodedTarget, Tensor | None]:
        """Target and mask, which fit the input."""
        target = self._checked_target(input, target, mask is not None)
        if mask is not None:
            self._check_masked()
            mask = checked_mask(mask, input)
        return target, mask

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
        if heads := [term.layer for term in self._terms if term.layer in self.features.arch.head_names]:
            raise InputError(f"a mask fits no layer of the classifier, which has no positions: leave out {heads[0]}")

    def _may_change_places(self, input: Tensor, target: Tensor | EncodedTarget) -> bool:
        """Whether the loss of the target against the input is the same, as a named criterion makes it."""
        return (
            isinstance(target, Tensor)
            and (input.shape, input.dtype) == (target.shape, target.dtype)
            and self._takes_parts
        )

    def _goes_by_hand(self, input: Tensor, target: Tensor | EncodedTarget, mask: Tensor | None) -> bool:
        """Whether no gradient can be asked for but that of images, which is then computed with the value."""
        constants = [] if self._may_change_places(input, target) else _taken_apart(target)[0]
        weights: list[Any] = [term.weight for term in self._terms]
        others = [*constants, *[each for each in (mask, *weights) if isinstance(each, Tensor)]]
        return (
            input.device.type in CUSTOM_BACKWARD_DEVICES
            and not (torch.is_grad_enabled() and any(other.requires_grad for other in others))
            and self._takes_parts
            and not (self.features._forward_hooks or self.features._forward_pre_hooks)  # which want to see both images
            and not needs_composite_ops()
            and not torch._C._len_torch_dispatch_stack()  # modes see operators, and no graph
        )

    @property
    def _takes_parts(self) -> bool:
        """Whether images may be compared a few at a time: a user's criterion may look at the whole batch."""
        return all(isinstance(term.loss.criterion, str) for term in self._terms)

    def _may_replay(self, input: Tensor) -> bool:
        """Whether calls may become CUDA graphs."""
        return (
            self.cuda_graphs
            and supports_capture(input.device)
            and input.numel() > 0
            and all(isinstance(term.weight, int | float) for term in self._terms)
        )

    def _replayed(
        self,
        replays: Replays,
        input: Tensor,
        target: Tensor | EncodedTarget,
        mask: Tensor | None,
        *,
        gradient: bool,
        both: bool = False,
    ) -> tuple[Tensor, ...]:
        """`_value_and_gradients`, or `_compare` alone, of the whole batch; of a snapshot, which a graph then keeps."""
        theirs, put_together = _taken_apart(target)
        count, names = len(theirs), tuple(target.values) if isinstance(target, EncodedTarget) else ()

        def compute(input: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            target, (mask,) = put_together(others[:count]), others[count:] or (None,)
            if gradient:
                return self._value_and_gradients(input, target, mask, both=both)
            return (self._compare(input, target, mask),)

        features, terms, kind = self.features, self._terms, input.device.type
        settings = (
            (features.trunk, features.plan.code, features.precision, features.keep, features.input_range),
            tuple((key, type(loss), loss.criterion, loss.normalize_features, weight) for key, _, loss, weight in terms),
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
        )
        with torch.no_grad():
            tensors = [input.detach(), *theirs, *([] if mask is None else [mask])]
            return replays(compute, tensors, (gradient, both, names, settings))

    def _snapshot(self) -> Self:
        """The loss as it is now, without graphs."""
        loss = object.__new__(type(self))  # no copy: where FSDP changed the class, that would call __init__
        loss.__dict__.update(self.__dict__)
        loss._replays = Replays()
        return loss

    def _images_at_a_time(self, input: Tensor) -> int:
        """How many images to run together: on a CPU few enough that activations stay in its caches.

        Blocks of more than 32 MB are also fetched from the system and returned at every use, which takes as long as
        computing on them.
        """
        images = max(1, input.shape[0])
        if input.device.type != "cpu" or not self._takes_parts:
            return images
        values = input.shape[2] * input.shape[3] * self.features.arch.layers[0].channels
        return min(images, max(1, VALUES_AT_A_TIME // max(1, values)))

    def _parts(
        self, input: Tensor, target: Tensor | EncodedTarget, mask: Tensor | None, *, both: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | EncodedTarget, Tensor | None]]:
        """Some images at a time, each with its target and mask."""
        if torch.compiler.is_compiling():  # whole, whatever their number: a loop would fix it in the graph
            yield input, target, mask
            return
        step, images = self._images_at_a_time(input), len(input)
        step = max(1, step // 2) if both else step  # of both run at once
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
        return functools.reduce(torch.add, self._weighted(input, target, mask))

    def _weighted(self, input: Tensor, target: Tensor | EncodedTarget, mask: Tensor | None) -> list[Tensor]:
        """The weighted distances of `_terms`, each (N,), or a scalar if a user's criterion gives one."""
        ours = self._represent(input, mask)
        theirs = self._representation_of(target, mask)
        with no_autocast(input.device):
            parts = [
                weight * loss._distance(layer, ours[key], theirs[key], self._mask_of(layer, mask))
                for key, layer, loss, weight in self._terms
            ]
        if self.reduction != "mean" and len({part.ndim for part in parts}) > 1:
            raise InputError("criteria that give a scalar and such as keep the batch: only reduction='mean' suits both")
        return parts

    def _value_and_gradients(
        self, images: Tensor, target: Tensor | EncodedTarget, mask: Tensor | None, *, both: bool
    ) -> tuple[Tensor, ...]:
        """The losses (N,) and their gradients in the images' shape, by the trunk's pullback.

        With `both` also those in the target's: images of the same shape, which then run in one batch with the others.
        """
        theirs = {} if both else dict(self._representation_of(target, mask))
        images = torch.cat([images, cast(Tensor, target)]) if both else images
        # in float16, small gradients would be lost: they are not scaled yet
        _, pullback = self.features.vjp(self.features.checked(upcast(images.detach())))
        values: dict[str, Tensor] = {}
        terms = self._terms

        def compare(key: str, loss: LayerLoss, name: str, tap: Tensor) -> tuple[Tensor, Tensor]:
            small = self._mask_of(name, mask)
            if not both:
                return loss._distance_and_gradient(name, tap, theirs.pop(key), small)
            one, other = tap.tensor_split(2)
            value, grad = loss._distance_and_gradient(name, one, loss._representation(other, small), small)
            _, back = loss._distance_and_gradient(name, other, loss._representation(one, small), small)
            return value, torch.cat([grad, back])

        def tap_grad(name: str, tap: Tensor) -> Tensor:
            total: Tensor | None = None
            for key, _, loss, weight in (term for term in terms if term.layer == name):
                with no_autocast(images.device):
                    value, grad = compare(key, loss, name, tap)
                values[key] = weight * value
                grad = grad if weight == 1 else grad.mul_(weight)
                total = grad if total is None else total.add_(grad)
            assert total is not None
            return total

        gradient = pullback(tap_grad).sum_to_size(images.shape)  # of a grey image that was repeated
        total = functools.reduce(torch.add, (values[term.key] for term in terms))
        return total, *gradient.tensor_split(2 if both else 1)

    def _mask_of(self, name: str, mask: Tensor | None) -> Tensor | None:
        """The mask's mean over the pixels of each position of a layer: squares of its stride, as the pools see them."""
        if mask is None:
            return None
        stride = self.features.arch.layer(name).stride
        return mask if stride == 1 else F.avg_pool2d(mask, stride)

    def _represent(self, images: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """By key, what images are compared by."""
        taps = self.features(images)
        return {
            key: loss._representation(taps[layer], self._mask_of(layer, mask)) for key, layer, loss, _ in self._terms
        }

    def _representation_of(self, target: Tensor | EncodedTarget, mask: Tensor | None) -> Mapping[str, Tensor]:
        """The same of targets, which may have been encoded."""
        return target.values if isinstance(target, EncodedTarget) else self._represent(target, mask)


class LayerLoss(FeatureLoss):
    """One distance, of the same kind for each layer."""

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
        if isinstance(criterion, type):
            raise InputError(f"criterion is a class: make one of it, {criterion.__name__}()")
        if not callable(criterion):
            if isinstance(criterion, str) and criterion in ELSEWHERE:
                raise InputError(f"unknown criterion {criterion!r}: {ELSEWHERE[criterion]}")
            check_choice("criterion", criterion, CRITERIA, " (or pass a function)")
        check_choice("reduction", reduction, REDUCTIONS)
        names = tuple(dict.fromkeys(layer_names(layers)))
        by_layer = _weights_by_layer(names, layer_weights)
        features = VGGFeatures(
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
        super().__init__(features, reduction, cuda_graphs)
        self.layer_weights = by_layer
        self.criterion = criterion
        self.normalize_features = normalize_features
        self._checksum = features.checksum()  # now: a compiler could not trace it

    @property
    def _terms(self) -> list[Term]:
        return [Term(name, name, self, weight) for name, weight in self.layer_weights.items()]

    def _snapshot(self) -> Self:
        loss = super()._snapshot()
        loss.layer_weights = dict(self.layer_weights)
        return loss

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

    def extra_repr(self) -> str:
        """What `print` shows."""
        named = self.criterion
        if not isinstance(named, str):
            named = getattr(named, "__name__", type(named).__name__)
        return f"criterion={named}, reduction={self.reduction}, layer_weights={self.layer_weights}"


class _LossWithGradient(torch.autograd.Function):
    """Losses (N,) whose gradients are computed in the forward, and are all that is kept for the backward.

    If images require a gradient, it will be asked for sooner or later. Computed one chunk of the batch at a time, it
    needs memory for one chunk only, for which the activations may be kept unpacked. Target images may require one, too,
    if they may change places with the input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor | EncodedTarget,
        loss: FeatureLoss,
        mask: Tensor | None,
    ) -> Tensor:
        both = ctx.needs_input_grad[1]
        kind = input.device.type
        ctx.autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
        now = ctx.loss = loss._snapshot()  # for a second derivative, too
        # hooks on what is saved (checkpointing, offloading) are meant for the caller's graph, not for this one
        with _no_saved_tensors_hooks():
            if loss._may_replay(input):
                values, *gradients = now._replayed(loss._replays, input, target, mask, gradient=True, both=both)
            else:
                pairs = loss._parts(input, target, mask, both=both)
                parts = [loss._value_and_gradients(*part, both=both) for part in pairs]
                values, *gradients = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.gradients = [gradient.contiguous() if input.is_contiguous() else gradient for gradient in gradients]
        ctx.dtype = input.dtype
        # only for a second derivative, where images modified in the meantime are an error; a first one does not care
        theirs, ctx.put_together = _taken_apart(target)
        ctx.save_for_backward(input, mask, *theirs)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a second derivative was asked for
            input, mask, *theirs = ctx.saved_tensors
            # views, since one image may be computed from the other, whose gradient is none of this function's
            input = input.view_as(input)
            if both := ctx.needs_input_grad[1]:
                theirs = [target.view_as(target) for target in theirs]
            with torch.autocast(input.device.type, **ctx.autocast):
                losses = ctx.loss._compare_parts(input, ctx.put_together(theirs), mask)
            images = [input, *theirs] if both else [input]
            gradients = [*torch.autograd.grad(losses, images, grad, create_graph=True)]
        else:
            if ctx.gradients is None:
                raise RuntimeError("backward() a second time on one loss: pass retain_graph=True the first time")
            gradients = [(gradient * grad[:, None, None, None]).to(ctx.dtype) for gradient in ctx.gradients]
            if not _keeps_graph():
                ctx.gradients = None
        of_input, of_target = (*gradients, None)[:2]
        return of_input, of_target, None, None


def _keeps_graph() -> bool:
    """Whether the backward that is running was asked with `retain_graph`."""
    asked: Any = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    # torch's compiled backward cannot trace the question; a gradient that is kept costs memory alone
    return asked is None or torch.compiler.is_compiling() or bool(asked())


def _taken_apart(
    target: Tensor | EncodedTarget,
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Tensor | EncodedTarget]]:
    """A target's tensors, and a function that puts such a target together from others like them."""
    if isinstance(target, Tensor):
        return [target], lambda tensors: tensors[0]
    empty, names = replace(target, values={}), [*target.values]  # no tensor of this target is kept alive
    return [*target.values.values()], lambda tensors: replace(empty, values=dict(zip(names, tensors, strict=True)))


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


def _weights_by_layer(layers: Sequence[str], given: Sequence[float] | Mapping[str, float] | None) -> dict[str, float]:
    if isinstance(given, Mapping):
        if unknown := set(given) - set(layers):
            raise InputError(f"layer_weights for {', '.join(sorted(unknown))}, which is not among {', '.join(layers)}")
        given = [given.get(name, 1.0) for name in layers]
    return dict(zip(layers, checked_weights("layer_weights", given, layers), strict=True))


def checked_weights(name: str, given: Sequence[float] | None, of: Sequence[str]) -> list[float]:
    """One finite number for each; 1 where none are given.

    Args:
        name: of the argument.
        given: the numbers.
        of: what they weigh, by name.

    Raises:
        InputError: something else, or not as many.
    """
    if given is None:
        return [1.0] * len(of)
    unfit = f"{name} are numbers, one for each of {', '.join(of)}; got {given!r}"
    if not isinstance(given, Iterable) or isinstance(given, Mapping):
        raise InputError(unfit)
    given = [*given]
    if any(isinstance(value, str) for value in given):
        raise InputError(unfit)
    if any(isinstance(value, Tensor) and value.requires_grad for value in given):
        raise InputError(f"{name} are fixed numbers: weigh single losses by what is trained")
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError) as error:
        raise InputError(unfit) from error
    if bad := [value for value in values if not math.isfinite(value)]:
        raise InputError(f"{name} must be finite numbers, got {bad[0]}")
    if len(values) != len(of):
        raise InputError(f"{len(values)} {name} for {', '.join(of)}: expected {len(of)}")
    return values


def checked_mask(mask: Tensor, images: Tensor) -> Tensor:
    """A mask (N,1,H,W) or (1,1,H,W) of images in float32, float64 with such images, its largest value 1.

    Raises:
        InputError: no such mask, or one with negative or infinite values.
    """
    n, (h, w) = count_and_size(images)
    if not isinstance(mask, Tensor) or mask.is_complex():
        what = f"{mask.dtype} values" if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"expected a mask {_fitting(n, h, w)} with values such as 0 and 1, got {what}")
    if mask.ndim != 4 or mask.shape[0] not in (1, n) or mask.shape[1] != 1 or tuple(mask.shape[2:]) != (h, w):
        fits = mask.ndim in (3, 4) and mask.shape[0] in (1, n) and tuple(mask.shape[-2:]) == (h, w)
        hint = "; mask[:, None] adds the channel" if mask.ndim == 3 else "; mask[:, :1] is its first channel"
        hint = hint if fits and mask.shape[1] else ""
        raise InputError(f"expected a mask {_fitting(n, h, w)}, got shape {tuple(mask.shape)}{hint}")
    mask = mask.to(images.device, torch.float64 if images.dtype == torch.float64 else torch.float32)
    if mask.device.type == "cpu" and mask.numel() and not values_are_hidden():
        low, high = torch.aminmax(mask.detach())
        if not (low >= 0 and high < math.inf):
            reach = f"{float(low):.4g} to {float(high):.4g}"
            raise InputError(f"a mask has finite values of at least 0, this one from {reach}")
    return peak_at_1(mask)  # now: the means over a layer's pixels are sums, too


def _fitting(n: int, h: int, w: int) -> str:
    """Shapes of masks in words."""
    return f"(1,1,{h},{w})" if n == 1 else f"({n},1,{h},{w}) or (1,1,{h},{w})"
