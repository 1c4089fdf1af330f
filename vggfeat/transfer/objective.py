"""What a style transfer minimises (Gatys, Ecker and Bethge 2016, CVPR)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vggfeat.features import VGGFeatures
from vggfeat.functional import gram, gram_backward, gram_backward_matrix, total_variation, upcast
from vggfeat.transfer.config import StyleConfig
from vggfeat.transfer.tiles import Tile, tiles
from vggfeat.trunk import Product

Sums = dict[tuple[str, str], Tensor]  # by term and layer
TERMS = ("style", "content", "tv")
RANGE_WEIGHT = 10.0  # of the mean squared distance of a value to [0,1], where the terms begin at about 1


@dataclass(frozen=True)
class _Part:
    """Some rows of a layer on a tile of a picture.

    Attributes:
        name: of the layer.
        values: of the rows, (1,C,h,w), or a classifier's (1,C).
        tile: what they are of the picture.
        stride: of the layer.
        size: height and width of the layer on the picture.
    """

    name: str
    values: Tensor
    tile: Tile
    stride: int
    size: tuple[int, int]

    @property
    def own(self) -> Tensor:
        """The values that count; a view."""
        return self.tile.own(self.values, self.stride)

    def of(self, whole: Tensor) -> Tensor:
        """The same positions of the layer on the whole picture; a view."""
        return self.tile.of(whole, self.stride)

    @property
    def share(self) -> float:
        """Which share of the layer's positions counts."""
        own = self.own
        return own.shape[2] * own.shape[3] / (self.size[0] * self.size[1])


class Objective:
    """Style, content and total variation of an image, against targets of one size.

    Scale-free, with G the Gram matrices of the image and A of the style, F the features of the image and P of the
    content, shares w that sum to 1:

        style    Σ w_l ‖G_l - A_l‖² / ‖A_l‖²        content    Σ w_l ‖F_l - P_l‖² / ‖P_l‖²

    so that one setting serves every size, network and weight set; this normalisation is our own. With
    `normalization="gatys"` they are the paper's:
    eq. 4, Σ w_l ‖G_l - A_l‖² / (4 N² M²) with G = F Fᵀ, and eq. 1, ½ ‖F - P‖².

    Args:
        features: taps every layer that `config` names.
        config: the settings.
        content: (1,3,H,W) in [0,1].
        styles: (1,3,h,w) each, in [0,1].
        side: of the tiles that images are computed in, in pixels, to the same values and gradients; 0 for none.

    Raises:
        InputError: images that the features refuse, or shares that do not fit in number.
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
        self.size = tuple(features.checked(content).shape[2:])
        self.tiles = self._tiles(content)
        self.style_weight, self.content_weight = config.term_weights
        self.style_shares = dict(
            zip(config.style_layers, config.shares("style_layer_weights", len(config.style_layers)), strict=True)
        )
        self.content_shares = dict(
            zip(config.content_layers, config.shares("content_layer_weights", len(config.content_layers)), strict=True)
        )
        with torch.no_grad():
            self.content: dict[str, Tensor] = {}
            self._each_part(content, self._hold)
            self.style = dict.fromkeys(config.style_layers, torch.zeros((), device=content.device))
            for share, image in zip(config.shares("style_blend", len(styles)), styles, strict=True):
                grams: Sums = {}
                self._each_part(features.checked(image), functools.partial(self._add, grams, ("style",)))
                self.style = {name: value + share * grams["style", name] for name, value in self.style.items()}
            self._content_norms = {name: _norm(upcast(value)) for name, value in self.content.items()}
            self._style_norms = {name: _norm(value) for name, value in self.style.items()}
            # the penalty has to keep up with terms that are as large as the network's activations make them
            scale = sum(self.terms(content).values()) if config.normalization == "gatys" else 1
            self._range_weight = RANGE_WEIGHT * scale

    def _tiles(self, image: Tensor) -> list[Tile]:
        height, width = image.shape[2:]
        return tiles(self.features.arch, self.features.layers, height, width, self.side)

    def _each_part(self, image: Tensor, use: Callable[[_Part], object]) -> None:
        """Use every layer of an image, a part at a time."""
        for tile in self._tiles(image):
            self.features.taps_by_rows(tile.read(image), self._by_part(image, tile, use))

    def _by_part(self, image: Tensor, tile: Tile, use: Callable[[_Part], Any]) -> Callable[[str, Tensor, slice], Any]:
        """A function of some rows of a layer on a tile of an image, as the features call it."""
        arch = self.features.arch

        def on_rows(name: str, values: Tensor, rows: slice) -> Any:
            if name in arch.head_names:
                return use(_Part(name, values, tile, 1, (1, 1)))
            stride = arch.layer(name).stride
            size = (image.shape[2] // stride, image.shape[3] // stride)
            return use(_Part(name, values, tile.part(rows, stride), stride, size))

        return on_rows

    def _hold(self, part: _Part) -> None:
        """Store the content features."""
        if part.name not in self.content_shares:
            return
        own = part.own
        if part.name not in self.content:
            if own.ndim == 2 or own.shape[2:] == part.size:
                self.content[part.name] = own if own.device.type == "cpu" else upcast(own)  # not again at every step
                return
            shape = (1, own.shape[1], *part.size)
            self.content[part.name] = torch.empty(
                shape, dtype=own.dtype, device=own.device, memory_format=torch.channels_last
            )
        part.of(self.content[part.name]).copy_(own)

    def _add(self, sums: Sums, terms: Collection[str], part: _Part) -> None:
        """Add its share: in the Gram matrix for the style, the squared error for the content."""
        own_sums: Sums = {}
        if "style" in terms and part.name in self.style_shares and part.own.numel():
            own_sums["style", part.name] = gram(part.own) * part.share
        if "content" in terms and part.name in self.content_shares:
            own_sums["content", part.name] = self._error(part).square().sum()
        for key, value in own_sums.items():
            sums[key] = sums[key] + value if key in sums else value

    def _error(self, part: _Part) -> Tensor:
        return part.own - upcast(part.of(self.content[part.name]))  # in float32 or float64

    def _tap_grad(self, sum_grads: Sums, part: _Part) -> Tensor | Product:
        """The total's gradient with respect to the values, from those with respect to the sums."""
        own, grads = part.own, []
        if part.name in self.style_shares and own.numel():
            of_gram = sum_grads["style", part.name] * part.share
            if own.device.type != "cpu" and own.shape == part.values.shape and part.name not in self.content_shares:
                return Product(own, gram_backward_matrix(own, of_gram)[0])
            grads.append(gram_backward(own, of_gram))
        if part.name in self.content_shares:
            grads.append(self._error(part).mul_(2 * sum_grads["content", part.name]).to(own.dtype))
        if not grads:  # a layer in no term, or all of it around the tile
            return torch.zeros_like(part.values)
        grad = functools.reduce(torch.add, grads)
        if own.shape == part.values.shape:
            return grad
        whole = replace(part, values=torch.zeros_like(part.values))
        whole.own.copy_(grad)
        return whole.values

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
        sums: Sums = {}
        self._each_part(image, functools.partial(self._add, sums, TERMS))
        return self._terms(sums, image)

    def value_and_grad(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The total that is minimised, its terms, and its gradient with respect to the image.

        The total holds one thing more than the terms: a penalty on values outside [0,1], which keeps the optimiser's
        image close to the picture that can be saved.

        Args:
            image: (1,3,H,W).

        Returns:
            Scalars, the terms by the names of `TERMS`, and (1,3,H,W).
        """
        image, sums = image.detach(), Sums()
        add = functools.partial(self._add, sums, TERMS)
        with torch.no_grad():
            if single := len(self.tiles) == 1:
                back = self.features.vjp_by_rows(image, self._by_part(image, self.tiles[0], add))
            else:
                self._each_part(image, add)
        leaf = image.detach().requires_grad_()
        leaves = {key: value.requires_grad_() for key, value in sums.items()}
        terms = self._terms(leaves, leaf)
        outside = (leaf - image.clamp(0, 1)).square().mean()
        total = sum(terms.values(), self._range_weight * outside)
        grad, *of_sums = torch.autograd.grad(total, [leaf, *leaves.values()])
        tap_grad = functools.partial(self._tap_grad, dict(zip(leaves, of_sums, strict=True)))
        with torch.no_grad():
            for tile in self.tiles:
                if not single:  # again, now that each sum's gradient is known
                    back = self.features.vjp_by_rows(tile.read(image), _ignore)
                tile.read(grad).add_(back(self._by_part(image, tile, tap_grad)))
                del back  # and what it holds on to, before the next tile
        return total.detach(), {name: value.detach() for name, value in terms.items()}, grad


def _ignore(name: str, part: Tensor, rows: slice) -> None:
    pass


def _norm(target: Tensor) -> Tensor:
    """Σ t² of a target; 1 where the layer is silent on it, whose error is then absolute."""
    norm = target.square().sum()
    return torch.where(norm > 0, norm, 1)
