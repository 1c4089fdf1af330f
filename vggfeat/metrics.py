"""Distances that agree with human judgement."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vggfeat.errors import InputError, WeightsError
from vggfeat.features import per_channel
from vggfeat.losses import PerceptualLoss
from vggfeat.weights import DEFAULT, WeightsLike, resolved
from vggfeat.weights.files import read

CALIBRATION = Path(__file__).with_name("assets") / "lpips-vgg16.safetensors"  # LICENSE-lpips.txt is beside it


def lpips_weights(weights: WeightsLike) -> WeightsLike:
    """ImageNet's for `"auto"`, which may end in random ones, whose result would pass for LPIPS; others as they are.

    Raises:
        WeightsError: the bundled ones.
        InputError: None, with which an untrained network's values would pass for LPIPS.
    """
    if weights is None:
        raise InputError("weights=None is an untrained network, which is no LPIPS: leave it out, or say 'random'")
    told = resolved(weights)
    if told == "bundled":
        raise WeightsError("LPIPS is made for ImageNet's VGG-16, 'imagenet', which the bundled VGG-19 cannot replace")
    return "imagenet" if told == "auto" else weights


class LPIPS(PerceptualLoss):
    """How different two images look to people (Zhang et al. 2018, arXiv:1801.03924, eq. 1): 0 if they are equal.

    Σ over relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of VGG-16 of the mean over positions of Σ over channels of
    w · (difference of the features at unit length)², per image, with the weights w of the paper's authors (version 0.1,
    `lin`), which were fitted to half a million judgements and come with this package.

    Otherwise it is a `PerceptualLoss`, and as good a loss: finite gradients everywhere, nothing to train, targets that
    are encoded once, masks. Values agree with the package `lpips` to rounding, for the network "vgg" and
    `weights="imagenet"`; only then are they those of the literature.

        >>> import torch, vggfeat
        >>> metric = vggfeat.LPIPS(weights="random")  # only for this example; it is made for "imagenet"
        >>> image = torch.rand(2, 3, 64, 64)
        >>> metric(image, image)
        tensor([0., 0.])

    Args:
        weights: of VGG-16, see `vggfeat.weights.load`; `"auto"` means `"imagenet"`, as nothing can replace them.
        input_range: lowest and highest value of both images; `lpips` itself takes (-1, 1).
        reduction: `"none"` gives a value for each image, (N,); `"mean"` and `"sum"` reduce those.
        precision: see `VGGFeatures`.
        repeat_grey: accept one channel and repeat it.
        keep: see `PerceptualLoss`.
        cuda_graphs: see `PerceptualLoss`.

    Raises:
        InputError: an unknown choice, or weights of a narrower VGG-16.
        WeightsError: weights that are unavailable, of a network other than VGG-16, or do not reach relu5_3.
    """

    def __init__(
        self,
        *,
        weights: WeightsLike = DEFAULT,
        input_range: tuple[float, float] = (0.0, 1.0),
        reduction: str = "none",
        precision: str = "float32",
        repeat_grey: bool = False,
        keep: str = "bits",
        cuda_graphs: bool = True,
    ) -> None:
        calibration = {name: tuple(values.tolist()) for name, values in sorted(read(CALIBRATION).items())}
        super().__init__(
            list(calibration),
            arch="vgg16",
            weights=lpips_weights(weights),
            normalize_features=True,
            input_range=input_range,
            reduction=reduction,
            precision=precision,
            repeat_grey=repeat_grey,
            keep=keep,
            cuda_graphs=cuda_graphs,
        )
        # by layer and channel, scaled so that the mean over channels is the paper's sum
        self._by_layer = {name: tuple(len(values) * value for value in values) for name, values in calibration.items()}
        arch = self.features.arch
        if any(arch.layer(name).channels != len(values) for name, values in calibration.items()):
            raise InputError(f"LPIPS is made for VGG-16 at full width, got {arch.name} with {arch.channels} channels")

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"calibrated for {', '.join(self.layer_weights)}, reduction={self.reduction}"

    def _channel_weights(self, name: str, like: Tensor) -> Tensor | None:
        return per_channel(self._by_layer[name], like)
