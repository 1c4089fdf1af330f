"""What a style transfer minimises (Gatys, Ecker and Bethge 2016, CVPR)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vggfeat.features import VGGFeatures
from vggfeat.functional import gram, gram_slope, total_variation, wide
from vggfeat.transfer.config import StyleConfig
from vggfeat.transfer.tiles import Tile, tiles

__all__ = ["TERMS", "Objective"]

Sums = dict[tuple[str, str], Tensor]  # by term and layer
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
        owned = {name: tile.own(taps[name], self._stride(name)) for name in self.style_shares}
        return {name: gram(own) * self._part(name, own, image) for name, own in owned.items()}

    def _part(self, name: str, own: Tensor, image: Tensor) -> float:
        """The share that a tile's own positions are of the layer's."""
        height, width = (side // self._stride(name) for side in image.shape[2:])
        return own.shape[2] * own.shape[3] / (height * width)

    def _error(self, name: str, own: Tensor, tile: Tile) -> Tensor:
        return wide(own) - wide(tile.of(self.content[name], self._stride(name)))

    def _sums(self, taps: dict[str, Tensor], tile: Tile, image: Tensor) -> Sums:
        """What a tile adds to each Gram matrix and to each squared error of the content."""
        sums = {("style", name): value for name, value in self._grams(taps, tile, image).items()}
        for name in self.content_shares:
            own = tile.own(taps[name], self._stride(name))
            sums["content", name] = self._error(name, own, tile).square().sum()
        return sums

    def _slope(self, name: str, tap: Tensor, tile: Tile, image: Tensor, worth: Sums) -> Tensor:
        """The total's gradient with respect to a tap of a tile, from those with respect to the sums."""
        stride = self._stride(name)
        own = tile.own(tap, stride)
        slopes = []
        if name in self.style_shares:
            slopes.append(gram_slope(own, worth["style", name] * self._part(name, own, image)))
        if name in self.content_shares:
            slopes.append(self._error(name, own, tile).mul_(2 * worth["content", name]).to(own.dtype))
        if not slopes:  # tapped for somebody else
            return torch.zeros_like(tap)
        slope = functools.reduce(torch.add, slopes)
        if own.shape == tap.shape:
            return slope
        padded = torch.zeros_like(tap)
        tile.own(padded, stride).copy_(slope)
        return padded

    def _whole(self, image: Tensor) -> Sums:
        """The sums over all tiles."""
        whole: Sums = {}
        for tile in self.tiles:
            sums = self._sums(self.features.taps(tile.read(image)), tile, image)
            whole = {key: whole[key] + value if whole else value for key, value in sums.items()}
        return whole

    def _terms(self, sums: Sums, image: Tensor) -> dict[str, Tensor]:
        paper = self.config.normalization == "gatys"
        zero = image.new_zeros(())
        style, content, smooth = zero, zero, zero
        for name, share in self.style_shares.items():
            error = (sums["style", name] - self.style[name]).square().sum()
            # our Gram matrix is the paper's over N·M, which cancels the N² M² of eq. 4
            style = style + share * error * (0.25 if paper else 1 / self._style_norms[name])
        for name, share in self.content_shares.items():
            content = content + share * sums["content", name] * (0.5 if paper else 1 / self._content_norms[name])
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
        image = image.detach()
        single = len(self.tiles) == 1
        with torch.no_grad():
            if single:
                taps, back = self.features.walk(image)
                sums = self._sums(taps, self.tiles[0], image)
            else:
                sums = self._whole(image)
        leaf = image.detach().requires_grad_()
        leaves = {key: value.requires_grad_() for key, value in sums.items()}
        terms = self._terms(leaves, leaf)
        outside = (leaf - image.clamp(0, 1)).square().mean()
        total = sum(terms.values(), self._range_weight * outside)
        grad, *slopes = torch.autograd.grad(total, [leaf, *leaves.values()])
        worth = dict(zip(leaves, slopes, strict=True))
        with torch.no_grad():
            for tile in self.tiles:
                if not single:  # once more, now that it is known what each sum is worth
                    _, back = self.features.walk(tile.read(image))
                slope = functools.partial(self._slope, tile=tile, image=image, worth=worth)
                tile.read(grad).add_(back(slope))
        return total.detach(), {name: value.detach() for name, value in terms.items()}, grad


def _norm(target: Tensor) -> Tensor:
    """Σ t² of a target; 1 where the layer is silent on it, whose error is then absolute."""
    norm = target.square().sum()
    return torch.where(norm > 0, norm, 1)
