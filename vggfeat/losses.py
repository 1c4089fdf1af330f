"""Losses that people put inside their own models."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Self, cast

import torch
from torch import Tensor, nn

from vggfeat.encoded_target import EncodedTarget
from vggfeat.errors import InputError
from vggfeat.feature_loss import FeatureLoss, LayerLoss, Term, checked_mask, checked_weights
from vggfeat.functional import DERIVATIVES, distance_and_gradient, gram, masked_mean, unit_normalize, upcast
from vggfeat.modes import no_autocast


class PerceptualLoss(LayerLoss):
    """Distance of two images in the features of a VGG (Johnson et al. 2016, arXiv:1603.08155, eq. 2).

    Σ over layers of weight · mean over channels and positions of criterion(F(input), F(target)), per image.

    In another model it is as good as invisible: no parameters, nothing in `state_dict()`, the same in train and eval
    mode, computed wherever the images are. Gradients flow to `input`, and to `target` where it requires them.

    Gradients are computed together with the value, on a CPU for a few images at a time, on a GPU for the whole batch.
    Until `backward` only they and the images are held; compute values for monitoring under `torch.no_grad()`. Where
    the mask or a target of another shape or type requires a gradient too, for a criterion of your own, under
    `torch.compile` and `torch.func`, they are computed in the backward.

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
        """The features of target images, computed once and used often; gradients do not flow to these images.

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
            if values.ndim not in (3, 4) or values.shape[-2:] != ours.shape[2:]:
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
        if mask is not None and values.shape[2:] != mask.shape[2:]:
            got = tuple(values.shape)
            raise InputError(f"a mask needs a criterion that gives (N,C,h,w) or (N,1,h,w), got shape {got}")
        return masked_mean(values, mask)

    def _distance_and_gradient(
        self, name: str, tap: Tensor, theirs: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(self.criterion, str) or self.criterion not in DERIVATIVES or tap.ndim != 4:
            return super()._distance_and_gradient(name, tap, theirs, mask)
        weights = self._channel_weights(name, upcast(tap[:0]))  # whose type and device count
        return distance_and_gradient(tap, theirs, self.criterion, self.normalize_features, mask, weights)

    def _check_sizes(self, input: tuple[int, int], target: tuple[int, int], masked: bool) -> None:
        if input != target:
            raise InputError(f"input of {input[1]}×{input[0]} pixels against a target of {target[1]}×{target[0]}")


class StyleLoss(LayerLoss):
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
        """The Gram matrices of target images, computed once and used often; gradients do not flow to these images.

        Args:
            target: (N,3,H,W), of any size.
            mask: (N,1,H,W) or (1,1,H,W) weights of its positions.

        Raises:
            InputError: images that the features refuse, or a mask that does not fit them.
        """
        return self._encode(target, None if mask is None else checked_mask(mask, target))

    def _representation(self, tap: Tensor, mask: Tensor | None) -> Tensor:
        if tap.ndim != 4:
            raise InputError("layers of the classifier have no positions and so no Gram matrices: leave them out")
        return gram(unit_normalize(tap) if self.normalize_features else tap, mask)

    def _distance(self, name: str, ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
        return masked_mean(self._criterion(ours, theirs))

    def _check_sizes(self, input: tuple[int, int], target: tuple[int, int], masked: bool) -> None:
        if masked and input != target:
            raise InputError("a mask fits one size: encode a target of another size, loss.encode(target, its_mask)")


class CombinedLoss(FeatureLoss):
    """A weighted sum of losses of one network, such as content and style, for which the network runs once.

    Its value and gradient are those of the sum; two losses of their own would run the network twice. For a log, `parts`
    says what each contributes.

        >>> import torch, vggfeat
        >>> content = vggfeat.PerceptualLoss(["relu3_3"], criterion="l1", weights="random")
        >>> style = vggfeat.StyleLoss(["relu1_2", "relu2_2", "relu3_3"], criterion="l1", weights="random")
        >>> loss = vggfeat.CombinedLoss([content, style], weights=[0.05, 120])
        >>> output, target = torch.rand(2, 3, 64, 64, requires_grad=True), torch.rand(2, 3, 64, 64)
        >>> loss(output, target).backward()

    Args:
        losses: `PerceptualLoss`, `StyleLoss`, `LPIPS` or such sums, with the same network, weights, pooling, padding,
            precision, input range and reduction, which is then that of the sum.
        weights: a number for each; 1 by default.

    Raises:
        InputError: no loss, something else, losses that differ in what they must share, or weights that are no finite
            numbers or not as many.
    """

    def __init__(self, losses: Sequence[FeatureLoss], weights: Sequence[float] | None = None) -> None:
        given = [*losses] if isinstance(losses, Iterable) else []
        kinds = [type(loss).__name__ for loss in given]
        if not given or not all(isinstance(loss, FeatureLoss) for loss in given):
            got = ", ".join(kinds) or ("none" if isinstance(losses, Iterable) else type(losses).__name__)
            raise InputError(f"losses are a list of PerceptualLoss, StyleLoss and the like, got {got}")
        if odd := [loss.reduction for loss in given if loss.reduction != given[0].reduction]:
            raise InputError(f"a sum needs losses with the same reduction, got {given[0].reduction} and {odd[0]}")
        features = given[0].features.joined(*(loss.features for loss in given[1:]))
        super().__init__(features, given[0].reduction, all(loss.cuda_graphs for loss in given))
        self.losses = nn.ModuleList(given)
        self.weights = checked_weights("weights", weights, kinds)

    def encode(self, target: Tensor, mask: Tensor | None = None) -> EncodedTarget:
        """What the losses need of target images, computed once and used often; gradients do not flow to these images.

        Args:
            target: (N,3,H,W).
            mask: (N,1,H,W) or (1,1,H,W) weights of its positions, in the Gram matrices of style losses.

        Raises:
            InputError: images that the features refuse, or a mask that does not fit them.
        """
        return self._encode(target, None if mask is None else checked_mask(mask, target))

    @torch.no_grad()
    def parts(self, input: Tensor, target: Tensor | EncodedTarget, mask: Tensor | None = None) -> list[Tensor]:
        """What each loss contributes to the sum, weighted, without gradients; the network runs once, for a log's sake.

        Args:
            input: as of a call.
            target: as of a call.
            mask: as of a call.

        Returns:
            For each of `losses` a scalar, or with `reduction="none"` a value for each image, (N,).

        Raises:
            InputError: as a call.
        """
        target, mask = self._checked(input, target, mask)
        values = iter(self._weighted(input, target, mask))  # loss after loss
        parts = [itertools.islice(values, len(loss._terms)) for loss in self._each]
        return [self._reduced(functools.reduce(torch.add, part)) for part in parts]

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"weights={self.weights}, reduction={self.reduction}"

    @property
    def _each(self) -> Iterable[FeatureLoss]:
        return cast(Iterable[FeatureLoss], self.losses)

    @property
    def _terms(self) -> list[Term]:
        return [
            term._replace(key=f"{i}/{term.key}", weight=weight * term.weight)
            for i, (loss, weight) in enumerate(zip(self._each, self.weights, strict=True))
            for term in loss._terms
        ]

    @property
    def _signature(self) -> str:
        return f"({' and '.join(loss._signature for loss in self._each)})"

    def _snapshot(self) -> Self:
        now = super()._snapshot()
        now.weights = [*self.weights]
        now.__dict__["_modules"] = self._modules | {"losses": nn.ModuleList(loss._snapshot() for loss in self._each)}
        return now

    def _check_sizes(self, input: tuple[int, int], target: tuple[int, int], masked: bool) -> None:
        for loss in self._each:
            loss._check_sizes(input, target, masked)
