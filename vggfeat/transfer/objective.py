"""What a style transfer minimises (Gatys, Ecker and Bethge 2016, CVPR)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vggfeat.features import VGGFeatures
from vggfeat.functional import gram, total_variation, wide
from vggfeat.transfer.config import StyleConfig

__all__ = ["TERMS", "Objective"]

TERMS = ("style", "content", "tv")
RANGE_WEIGHT = 10.0  # of the mean squared distance of a value to [0,1], where the terms begin at about 1


class Objective:
    """Style, content and total variation of an image, against targets of one size.

    Scale-free, with G the Gram matrices of the image and A of the style, F the features of the image and P of the
    content, shares w that sum to 1:

        style    Σ w_l ‖G_l - A_l‖² / ‖A_l‖²        content    Σ w_l ‖F_l - P_l‖² / ‖P_l‖²

    so that one setting serves every size, network and weight set. With `normalization="gatys"` they are the paper's:
    eq. 4, Σ w_l ‖G_l - A_l‖² / (4 N² M²) with G = F Fᵀ, and eq. 1, ½ ‖F - P‖².

    Args:
        features: taps every layer that `config` names.
        config: the settings.
        content: (1,3,H,W) in [0,1].
        styles: (1,3,h,w) each, in [0,1].
    """

    def __init__(self, features: VGGFeatures, config: StyleConfig, content: Tensor, styles: Sequence[Tensor]) -> None:
        self.features = features
        self.config = config
        self.size = tuple(content.shape[2:])
        self.style_weight, self.content_weight = config.term_weights
        self.style_shares = dict(
            zip(config.style_layers, config.shares("style_layer_weights", len(config.style_layers)), strict=True)
        )
        self.content_shares = dict(
            zip(config.content_layers, config.shares("content_layer_weights", len(config.content_layers)), strict=True)
        )
        with torch.no_grad():
            taps = features(content)
            self.content = {name: taps[name] for name in config.content_layers}
            self.style = dict.fromkeys(config.style_layers, torch.zeros((), device=content.device))
            for share, image in zip(config.shares("style_blend", len(styles)), styles, strict=True):
                taps = features(image)
                for name in config.style_layers:
                    self.style[name] = self.style[name] + share * gram(taps[name])
            self._content_norms = {name: _norm(wide(value)) for name, value in self.content.items()}
            self._style_norms = {name: _norm(value) for name, value in self.style.items()}
            # the penalty has to keep up with terms that are as large as the network's activations make them
            scale = sum(self.terms(content).values()) if config.normalization == "gatys" else 1
            self._range_weight = RANGE_WEIGHT * scale

    def terms(self, image: Tensor) -> dict[str, Tensor]:
        """The weighted terms of an image (1,3,H,W), which may leave [0,1], by the names of `TERMS`."""
        taps = self.features.taps(image)
        paper = self.config.normalization == "gatys"
        zero = image.new_zeros(())
        style, content, smooth = zero, zero, zero
        for name, share in self.style_shares.items():
            error = (gram(taps[name]) - self.style[name]).square().sum()
            # our Gram matrix is the paper's over N·M, which cancels the N² M² of eq. 4
            style = style + share * error * (0.25 if paper else 1 / self._style_norms[name])
        for name, share in self.content_shares.items():
            error = (wide(taps[name]) - wide(self.content[name])).square().sum()
            content = content + share * error * (0.5 if paper else 1 / self._content_norms[name])
        if self.config.tv_weight:
            smooth = total_variation(image).sum()
        weighted = (self.style_weight * style, self.content_weight * content, self.config.tv_weight * smooth)
        return dict(zip(TERMS, weighted, strict=True))

    def value_and_grad(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The total that is minimised, its terms, and its gradient with respect to the image.

        The total holds one thing more than the terms: a penalty on values outside [0,1], which keeps the optimiser's
        image close to the picture that can be saved.
        """
        image = image.detach().requires_grad_()
        terms = self.terms(image)
        outside = (image - image.detach().clamp(0, 1)).square().mean()
        total = sum(terms.values(), self._range_weight * outside)
        (grad,) = torch.autograd.grad(total, image)
        return total.detach(), {name: value.detach() for name, value in terms.items()}, grad


def _norm(target: Tensor) -> Tensor:
    """Σ t² of a target; 1 where the layer is silent on it, whose error is then absolute."""
    norm = target.square().sum()
    return torch.where(norm > 0, norm, 1)
