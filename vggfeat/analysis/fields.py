"""How far a VGG sees: stacked 3×3 convolutions against a single one, and the receptive field as measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vggfeat.arch import Arch
from vggfeat.errors import InputError, whole_number
from vggfeat.tables import Column, Report, Table

if TYPE_CHECKING:
    from torch import Tensor

    from vggfeat.weights import WeightsLike


NEGLIGIBLE = math.erfc(math.sqrt(2))  # 4.55 % of the largest gradient: a Gaussian's share beyond two deviations


@dataclass(frozen=True, repr=False)
class Stacked(Report):
    """1 to `n` stacked 3×3 convolutions against one with the same receptive field; see `stacked_3x3`.

    Attributes:
        n: how many 3×3 convolutions are stacked.
    """

    n: int

    @property
    def receptive_field(self) -> int:
        """Side of what one output sees, the same for the stack and the single convolution: each 3×3 adds two pixels."""
        return 2 * self.n + 1

    @property
    def stacked_params(self) -> int:
        """Weights of the stack in units of C², for C channels in and out; as many MACs per pixel."""
        return self.n * 3**2

    @property
    def single_params(self) -> int:
        """Weights of the one large convolution in units of C²."""
        return self.receptive_field**2

    @property
    def saving(self) -> float:
        """The share of the large convolution's weights that the stack saves."""
        return 1 - self.stacked_params / self.single_params

    @property
    def nonlinearities(self) -> int:
        """ReLUs in the stack, where the large convolution has one."""
        return self.n

    def to_dict(self) -> dict[str, Any]:
        """One entry for each stack of 1 to `n`."""
        names = ("n", "receptive_field", "stacked_params", "single_params", "saving", "nonlinearities")
        return {"stacks": [{name: getattr(stack, name) for name in names} for stack in self._upwards()]}

    def _upwards(self) -> list[Stacked]:
        return [Stacked(n) for n in range(1, self.n + 1)]

    def tables(self) -> list[Table]:
        """One table."""
        columns = [
            Column("n", "stacked 3×3"),
            Column("kernel", "single conv", lambda side: f"{side}×{side}"),
            Column("receptive_field", "field px"),
            Column("stacked_params", "weights / C²"),
            Column("single_params", "its weights / C²"),
            Column("saving", "saved", "{:.1%}".format),
            Column("nonlinearities", "ReLUs"),
            Column("single_nonlinearities", "its ReLUs"),
        ]
        rows = [
            (s.n, s.receptive_field, s.receptive_field)
            + (s.stacked_params, s.single_params, s.saving, s.nonlinearities, 1)
            for s in self._upwards()
        ]
        title = "Stacked 3×3 convolutions against one with the same receptive field, C channels in and out"
        return [Table(title, columns, rows)]


def stacked_3x3(n: int) -> Stacked:
    """Why VGG stacks 3×3 convolutions: n of them see what one (2n+1)×(2n+1) sees (paper, section 2.3).

    >>> print(stacked_3x3(3))
    Stacked 3×3 convolutions against one with the same receptive field, C channels in and out
    stacked 3×3  single conv  field px  weights / C²  its weights / C²  saved  ReLUs  its ReLUs
              1          3×3         3             9                 9   0.0%      1          1
              2          5×5         5            18                25  28.0%      2          1
              3          7×7         7            27                49  44.9%      3          1

    Args:
        n: up to how many.

    Raises:
        InputError: n outside 1 to 50.
    """
    n = whole_number("n", n)
    if n > 50:
        raise InputError(f"n must be at most 50, got {n}")
    return Stacked(n)


@dataclass(frozen=True)
class EffectiveField:
    """What a unit in the middle of a layer depends on, as measured; see `effective_field`.

    Attributes:
        layer: its name.
        theoretical: side of the square that the architecture lets it see, in pixels.
        support: (height, width) of the box around every pixel whose gradient is not 0.
        effective: root of the number of pixels that count, in pixels: those with more than 4.55 % of the largest
            gradient (two standard deviations of a Gaussian; Luo et al. 2016, section 3).
        gradient: mean absolute gradient (theoretical, theoretical) of the square, its largest value 1; float32.
    """

    layer: str
    theoretical: int
    support: tuple[int, int]
    effective: float
    gradient: Tensor


def effective_field(
    layer: str,
    arch: str | Arch | None = None,
    *,
    weights: WeightsLike = "auto",
    samples: int = 8,
    seed: int = 0,
) -> EffectiveField:
    """Measure a layer's receptive field: the gradient of a unit in the middle, averaged over random images.

    Luo et al. 2016, "Understanding the effective receptive field" (arXiv:1701.04128): the gradient of all channels
    together at one position, its magnitude averaged over noise images and colours. A max pool lets one pixel of each
    window through, so a single image shows less than the whole square.

    Args:
        layer: a name of the convolutional part, such as `conv3_3`.
        arch: the network; None means what the weights imply.
        weights: as in `VGGFeatures`; `"auto"` is ImageNet's where available, else others, see
            `vggfeat.weights.load`.
        samples: images of uniform noise to average over; a layer that sees fewer than 128 pixels, where an image is
            cheap and noise shows, gets up to 16 times as many.
        seed: of the noise.

    Raises:
        InputError: a layer that the convolutional part lacks, or too few samples.
        WeightsError: weights that are unavailable or do not reach the layer.
    """
    import torch

    from vggfeat.features import VGGFeatures
    from vggfeat.modes import with_gradients
    from vggfeat.weights import load

    samples = whole_number("samples", samples)
    features = VGGFeatures([layer], weights=load(weights, arch))
    spec = features.arch.layer(layer)
    field, stride = spec.receptive_field, spec.stride
    middle = math.ceil(field / stride / 2)  # units on each side, so that the image has the whole square
    side = stride * (2 * middle + 1)
    generator = torch.Generator().manual_seed(seed)
    with with_gradients():
        total = torch.zeros(side, side, dtype=torch.float64, device="cpu")
        for _ in range(round(samples * min(16, max(1, 128 / field)))):
            noise = torch.rand(1, 3, side, side, generator=generator, dtype=torch.float32, device="cpu")
            # in float64, whose convolutions are direct: Winograd's leave rounding errors outside the field
            image = noise.double().requires_grad_()
            unit = features(image)[layer][0, :, middle, middle].sum()
            total += torch.autograd.grad(unit, image)[0][0].abs().mean(0)
    rows, columns = (total.amax(1) > 0).nonzero(), (total.amax(0) > 0).nonzero()
    if not len(rows):
        raise InputError(f"no gradient reaches the image from the middle of {layer}: try more samples")
    support = (int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1)
    start = (side - field) // 2
    square = (total / total.max()).float()[start : start + field, start : start + field]
    return EffectiveField(layer, field, support, float((square > NEGLIGIBLE).sum()) ** 0.5, square)
