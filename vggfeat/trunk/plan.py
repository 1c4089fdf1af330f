"""What to run: the stages of a network for the taps named, as plain data that compiled graphs hold as a string."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from vggfeat.arch import Arch


@dataclass(frozen=True)
class Stage:
    """One convolution and what follows it up to the next: [bn] [relu] [lrn] [pool].

    Attributes:
        conv: name of the convolution.
        pad: pixels of padding on each side.
        steps: what follows the convolution before the trunk ends: some of "bn", "relu", "lrn", "pool", in this order.
        taps: kinds of layer to hand out: "conv" or some of the steps.
    """

    conv: str
    pad: int
    steps: tuple[str, ...]
    taps: tuple[str, ...]

    @property
    def unfolded(self) -> bool:
        """Whether the convolution is tapped in front of a batch normalisation, which is folded into the one that runs.

        The tap is then a second convolution, so that later values do not depend on what is tapped.
        """
        return "bn" in self.steps and "conv" in self.taps


@dataclass(frozen=True)
class Plan:
    """The stages up to the deepest tap, and how to pool and pad."""

    arch: Arch
    names: tuple[str, ...]
    pooling: str = "max"
    padding: str = "zeros"

    def __post_init__(self) -> None:
        # computed now, since torch.compile cannot follow a cached property's first use (it takes a lock in Python 3.11)
        _ = self.code, self.stages, self._first_block, self.by_depth, self.tapped, self.min_size

    @functools.cached_property
    def code(self) -> str:
        """The plan as a string, for the operators; `Plan.decode` reads it back."""
        arch = self.arch
        return "|".join(
            (
                arch.config,
                str(int(arch.batch_norm)),
                ",".join(map(str, arch.channels)),
                ",".join(self.names),
                self.pooling,
                self.padding,
            )
        )

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def decode(code: str) -> Plan:
        """The plan of a code."""
        config, bn, channels, names, pooling, padding = code.split("|")
        arch = Arch(config, bool(int(bn)), tuple(map(int, channels.split(","))), head=None)
        return Plan(arch, tuple(names.split(",")), pooling, padding)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Shallow to deep."""
        stages: list[Stage] = []
        for layer in self.arch.until(self.names):
            tapped = (layer.kind,) if layer.name in self.names else ()
            if layer.kind == "conv":
                stages.append(Stage(layer.name, layer.kernel // 2, (), tapped))
            else:
                last = stages[-1]
                stages[-1] = Stage(last.conv, last.pad, (*last.steps, layer.kind), last.taps + tapped)
        return tuple(stages)

    def in_strips(self, device: str) -> int:
        """How many stages, from the first, go strip by strip (`strips.py`) on a type of device: 0 but on a CPU."""
        return self._first_block if device == "cpu" else 0

    @functools.cached_property
    def _first_block(self) -> int:
        """How many stages make the first block; 0 where the plan ends in it, or its maps do not suit strips.

        With a multiple of 8 channels, the bits of a row fill whole bytes. With more than the published, maps are
        convolved by Winograd's algorithm (`winograd.py`), whose grid, and so rounding, would differ in a strip from the
        whole map's.
        """
        count = next((i for i, stage in enumerate(self.stages, start=1) if "pool" in stage.steps), 0)
        widths = [self.arch.layer(stage.conv).channels for stage in self.stages[:count]]
        suits = all(width % 8 == 0 and width <= 64 for width in widths)
        return count if suits and count < len(self.stages) else 0

    @functools.cached_property
    def by_depth(self) -> tuple[str, ...]:
        """The names, shallow to deep."""
        return tuple(sorted(self.names, key=self.arch.names.index))

    @functools.cached_property
    def tapped(self) -> tuple[dict[str, str], ...]:
        """For each stage the names of its taps, by kind."""
        names = iter(self.by_depth)
        return tuple({kind: next(names) for kind in stage.taps} for stage in self.stages)

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width that each stage works at, for images of that size."""
        sizes = []
        for stage in self.stages:
            sizes.append((height, width))
            if "pool" in stage.steps:
                height, width = height // 2, width // 2
        return sizes

    @functools.cached_property
    def min_size(self) -> int:
        """The shortest image side for which the deepest tap exists."""
        layers = self.arch.until(self.names)
        if self.padding != "reflect":
            return layers[-1].stride
        # reflection needs a second pixel at every 3×3 convolution, the pool after the last needs none
        return max(2 * layer.stride if layer.kind == "conv" and layer.kernel > 1 else layer.stride for layer in layers)
