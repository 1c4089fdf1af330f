"""What a style transfer minimises (Gatys, Ecker and Bethge 2016, CVPR)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vggfeat.features import VGGFeatures
from vggfeat.functional import gram, total_variation, wide
from vggfeat.transfer.config import StyleConfig
from vggfeat.transfer.tiles import Tile, tiles

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
        side: of the tiles that images are computed in, in pixels, to the same values and gradients; 0 for none.
    """

    def __init__(
        self,
        features: VGGFeatures,
        config: StyleConfig,
        content: Tensor,
        styles: Sequence[Tensor],
        side: int = 0,
    ) -> None:
        self.features = features
        self.config = config
        self.side = side
        self.size = tuple(content.shape[2:])
        self.tiles = self._tiles(content)
        self.style_weight, self.content_weight = config.term_weights
        self.style_shares = dict(
            zip(config.style_layers, config.shares("style_layer_weights", len(config.style_layers)), strict=True)
        )
        self.content_shares = dict(
            zip(config.content_layers, config.shares("content_layer_weights", len(config.content_layers)), strict=True)
        )
        with torch.no_grad():
            self.content = self._content(content)
            self.style = dict.fromkeys(config.style_layers, torch.zeros((), device=content.device))
            for share, image in zip(config.shares("style_blend", len(styles)), styles, strict=True):
                for tile in self._tiles(image):
                    grams = self._grams(features(tile.read(image)), tile, image)
                    self.style = {name: value + share * grams[name] for name, value in self.style.items()}
            self._content_norms = {name: _norm(wide(value)) for name, value in self.content.items()}
            self._style_norms = {name: _norm(value) for name, value in self.style.items()}
            # the penalty has to keep up with terms that are as large as the network's activations make them
            scale = sum(self.terms(content).values()) if config.normalization == "gatys" else 1
            self._range_weight = RANGE_WEIGHT * scale

    def _tiles(self, image: Tensor) -> list[Tile]:
        height, width = image.shape[2:]
        return tiles(self.features.arch, self.features.layers, height, width, self.side)

    def _stride(self, name: str) -> int:
        arch = self.features.arch
        return 1 if name in arch.head_names else arch.layer(name).stride

    def _content(self, image: Tensor) -> dict[str, Tensor]:
        """The features that carry the content, of the whole image."""
        if len(self.tiles) == 1:
            taps = self.features(image)
            return {name: taps[name] for name in self.content_shares}
        height, width = self.size
        found: dict[str, Tensor] = {}
        for tile in self.tiles:
            taps = self.features(tile.read(image))
            for name in self.content_shares:
                stride = self._stride(name)
                own = tile.own(taps[name], stride)
                if name not in found:
                    shape = (1, own.shape[1], height // stride, width // stride)
                    found[name] = torch.empty(
                        shape, dtype=own.dtype, device=own.device, memory_format=torch.channels_last
                    )
                tile.of(found[name], stride).copy_(own)
        return found

    def _grams(self, taps: dict[str, Tensor], tile: Tile, image: Tensor) -> dict[str, Tensor]:
        """What a tile adds to the Gram matrix of each style layer."""
        found = {}
        for name in self.style_shares:
            own = tile.own(taps[name], self._stride(name))
            height, width = (side // self._stride(name) for side in image.shape[2:])
            found[name] = gram(own) * (own.shape[2] * own.shape[3] / (height * width))
        return found

    def _sums(self, part: Tensor, tile: Tile, image: Tensor) -> list[Tensor]:
        """What a tile, read as `part` of the image, adds to each Gram matrix, and then to each error of the content."""
        taps = self.features.taps(part)
        sums = [*self._grams(taps, tile, image).values()]
        for name, target in self.content.items():
            stride = self._stride(name)
            sums.append((wide(tile.own(taps[name], stride)) - wide(tile.of(target, stride))).square().sum())
        return sums

    def _whole(self, image: Tensor) -> list[Tensor]:
        """The sums over all tiles."""
        first, *others = self.tiles
        sums = self._sums(first.read(image), first, image)
        for tile in others:
            more = self._sums(tile.read(image), tile, image)
            sums = [one + other for one, other in zip(sums, more, strict=True)]
        return sums

    def _terms(self, sums: Sequence[Tensor], image: Tensor) -> dict[str, Tensor]:
        paper = self.config.normalization == "gatys"
        zero = image.new_zeros(())
        style, content, smooth = zero, zero, zero
        count = len(self.style_shares)
        for (name, share), found in zip(self.style_shares.items(), sums[:count], strict=True):
            error = (found - self.style[name]).square().sum()
            # our Gram matrix is the paper's over N·M, which cancels the N² M² of eq. 4
            style = style + share * error * (0.25 if paper else 1 / self._style_norms[name])
        for (name, share), error in zip(self.content_shares.items(), sums[count:], strict=True):
            content = content + share * error * (0.5 if paper else 1 / self._content_norms[name])
        if self.config.tv_weight:
            smooth = total_variation(image).sum()
        weighted = (self.style_weight * style, self.content_weight * content, self.config.tv_weight * smooth)
        return dict(zip(TERMS, weighted, strict=True))

    def terms(self, image: Tensor) -> dict[str, Tensor]:
        """The weighted terms of an image (1,3,H,W), which may leave [0,1], by the names of `TERMS`."""
        return self._terms(self._whole(image), image)

    def value_and_grad(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The total that is minimised, its terms, and its gradient with respect to the image.

        The total holds one thing more than the terms: a penalty on values outside [0,1], which keeps the optimiser's
        image close to the picture that can be saved.
        """
        image = image.detach().requires_grad_()
        tiled = len(self.tiles) > 1
        with torch.set_grad_enabled(not tiled):
            sums = self._whole(image)
        if tiled:
            sums = [each.requires_grad_() for each in sums]
        terms = self._terms(sums, image)
        outside = (image - image.detach().clamp(0, 1)).square().mean()
        total = sum(terms.values(), self._range_weight * outside)
        if tiled:
            grad, *outer = torch.autograd.grad(total, [image, *sums])
            for tile in self.tiles:  # once more, now that it is known what each sum is worth
                part = tile.read(image).detach().requires_grad_()
                tile.read(grad).add_(torch.autograd.grad(self._sums(part, tile, image), part, outer)[0])
        else:
            (grad,) = torch.autograd.grad(total, image)
        return total.detach(), {name: value.detach() for name, value in terms.items()}, grad


def _norm(target: Tensor) -> Tensor:
    """Σ t² of a target; 1 where the layer is silent on it, whose error is then absolute."""
    norm = target.square().sum()
    return torch.where(norm > 0, norm, 1)
