"""Targets of losses, encoded once and used often."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map

from vggfeat.errors import InputError


@dataclass(eq=False)  # comparing tensors gives no single bool; frameworks that move batches refuse a frozen one
class EncodedTarget:
    """What a loss remembers of its targets; made by `encode`, given to the loss in place of the images.

    Attributes:
        values: by layer (of a `CombinedLoss` by loss and layer), features (N,C,h,w) or Gram matrices (N,C,C), detached.
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
        if len({(target.made_by, target.size) for target in targets}) != 1:
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
