"""The walk: forward through the stages, keeping what the backward needs, and backward to the image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from vggfeat.modes import no_autocast
from vggfeat.trunk import layers
from vggfeat.trunk.filters import bounds, by_stage
from vggfeat.trunk.plan import Plan
from vggfeat.trunk.stage import (
    ByName,
    ByRows,
    GradientAccumulator,
    Keep,
    OnTap,
    Product,
    ReadyStage,
    Rows,
    TapGrad,
    kept_of,
    whole,
)
from vggfeat.trunk.strips import Held, Recompute, backward_in_strips, forward_in_strips

TapGradOf = Callable[[str, Tensor], Tensor]  # the gradient with respect to a tap, by the tap's name and value
TapGradOfRows = Callable[[str, Tensor, Rows], Tensor | Product]  # the same of some rows of one image's tap


def reread(plan: Plan, keep: Keep) -> tuple[int, ...]:
    """Positions, shallow to deep, of the taps that the backward reads again, rather than keep them twice."""
    kinds = [(number, kind) for number, stage in enumerate(plan.stages) for kind in stage.taps]
    return tuple(i for i, (number, kind) in enumerate(kinds) if kind in kept_of(plan, number, keep))


class Walk:
    """The stages of a plan with their filters.

    Args:
        filters: of `Trunk.filters` for the plan.
        plan: what to run.
        keep: see `Keep`.
    """

    def __init__(self, filters: Sequence[Tensor], plan: Plan, keep: Keep) -> None:
        self.filters, self.plan, self.keep = filters, plan, keep
        self.device = filters[0].device
        self.stages = [
            ReadyStage(plan, stage, folded, unfolded, kept_of(plan, number, keep))
            for number, (stage, (folded, unfolded)) in enumerate(zip(plan.stages, by_stage(plan, filters), strict=True))
        ]
        self.in_strips = plan.in_strips(self.device.type)

    def forward(self, x: Tensor, on_tap: OnTap | None = None) -> list[tuple[ByName, ByName]]:
        """For each stage its taps by kind, and what else `backward` needs of it.

        Args:
            x: normalised images (N,3,H,W), float32 for bfloat16 filters, else in the filters' type.
            on_tap: gets every tap, shallow to deep, as it is computed; `x` is then one image. Where the first
                convolution runs in strips, its taps are passed strip by strip and not returned; with "none", none is.
        """
        return self._forward(*self._prepared(x), on_tap)

    def _prepared(self, x: Tensor) -> tuple[Tensor, bool]:
        """Images as the first convolution takes them, and whether everything stays finite."""
        squares = {"lrn", "pool"} if self.plan.pooling == "l2" else {"lrn"}
        safe = (layers.SAFE_SQUARED if squares & set(each.steps) else layers.SAFE for each in self.plan.stages)
        finite = layers.stays_finite(x, bounds(stage.folded for stage in self.stages), safe)
        return layers.channels_last(layers.split_bfloat16(x, self.filters[0], fused=True)), finite

    def _forward(self, x: Tensor, finite: bool, on_tap: OnTap | None) -> list[tuple[ByName, ByName]]:
        walked: list[tuple[ByName, ByName]] = []

        def give(number: int, kind: str, part: Tensor, rows: Rows) -> None:
            assert on_tap is not None
            on_tap(self.plan.tapped[number][kind], part, rows)

        def given(number: int, taps: ByName) -> ByName:
            """The stage's taps that are still returned, after passing all to `on_tap`, if any."""
            if on_tap is None:
                return taps
            for kind, tap in taps.items():
                give(number, kind, tap, slice(0, tap.shape[2]))
            return {} if self.keep == "none" else taps

        with no_autocast(x.device):
            if count := self.in_strips:
                first = None if on_tap is None else functools.partial(give, 0)
                x, walked = forward_in_strips(x, finite, self.stages[:count], first)
                walked = [(given(number, taps), kept) for number, (taps, kept) in enumerate(walked)]
            for number, stage in enumerate(self.stages[count:], start=count):
                x, taps, kept = stage.forward(x, finite, overwrite=number > 0 and self.stages[number - 1].hands_over)
                walked.append((given(number, taps), kept))
        return walked

    def kept_by_stage(self, taps: Sequence[Tensor], kept: Sequence[Tensor]) -> list[ByName]:
        """What `backward` needs, from the taps at `reread` and the rest of what `forward` kept, both in order."""
        again, rest = iter(taps), iter(kept)
        return [
            {name: next(again if name in ready.stage.taps else rest) for name in ready.keeps} for ready in self.stages
        ]

    def backward(
        self,
        tap_grad: Callable[[str], TapGrad],
        kept: list[ByName],
        size: tuple[int, int],
        recompute: Recompute | None = None,
    ) -> Tensor | None:
        """The gradient with respect to the normalised images, in the filters' type; None where no tap has one.

        Args:
            tap_grad: gives the gradient with respect to a tap by its name, called once for each, deepest first: when
                the walk gets there, or, for stages in strips, before the first strip.
            kept: for each stage what the forward kept of it, by the names of `kept_of`; is emptied on the way, to
                free memory early.
            size: height and width of the images.
            recompute: what the first stage's taps are recomputed from, where they were passed in strips.
        """
        sizes = self.plan.sizes(*size)
        flow = GradientAccumulator()
        held: list[Held] = []

        def of_kind(names: dict[str, str], kind: str) -> TapGrad:
            return tap_grad(names[kind]) if kind in names else None

        with no_autocast(self.device):
            for number, stage in reversed([*enumerate(self.stages)]):
                names = self.plan.tapped[number]  # by kind
                if number < self.in_strips:
                    held.append(Held(stage, {kind: of_kind(names, kind) for kind in reversed(names)}, kept.pop()))
                else:
                    stage.backward(flow, functools.partial(of_kind, names), kept.pop(), *sizes[number])
            if held:
                flow.replace(backward_in_strips(flow.grad, held, size, recompute))
        images = self.plan.arch.layers[0].in_channels
        if flow.grad is not None and flow.grad.shape[1] > images:  # CUDA computes more
            flow.replace(layers.channels_last(flow.grad[:, :images]))
        return flow.grad

    def vjp(self, x: Tensor) -> tuple[dict[str, Tensor], Callable[[TapGradOf], Tensor]]:
        """The taps by name, and the pullback to the images, bypassing autograd.

        No graph holds on to what was kept: it is freed on the way, and so is each tap, once its gradient is known and
        the walk is past it. The pullback can be called once.

        Args:
            x: normalised images, as for `forward`; the walk keeps "taps" or "values".

        Returns:
            The taps, shallow to deep, and a function of `tap_grad(name, tap)`, which gives the gradient with respect to
            a tap; it returns the gradient with respect to `x`, in its type.
        """
        taps, pullback = self._vjp(x)

        def of(tap_grad: TapGradOf, name: str) -> Tensor:
            return tap_grad(name, taps.pop(name))

        return taps, lambda tap_grad: pullback(functools.partial(of, tap_grad))

    def vjp_by_rows(self, x: Tensor, on_tap: OnTap) -> Callable[[TapGradOfRows], Tensor]:
        """As `vjp` of one image, for functions of a tap that, like their gradient, can be computed by rows.

        Where the first convolution runs in strips, its taps, the largest of all, never exist whole: they are passed as
        they are computed, and recomputed in the backward. Only a few rows of a tap's gradient exist at a time, except
        for the deepest tap's (and that of a convolution tapped before its batch normalisation).

        Args:
            x: one normalised image, as for `vjp`.
            on_tap: gets every tap, as by `forward`.

        Returns:
            A function of `tap_grad(name, part, rows)`, which gives the gradient with respect to some rows of a tap, on
            a GPU all of them; it returns the gradient with respect to `x`, in its type.
        """
        taps, pullback = self._vjp(x, on_tap)

        def of(tap_grad: TapGradOfRows, name: str) -> TapGrad:
            tap = taps.pop(name, None)
            if tap is None or tap.device.type == "cpu":
                return ByRows(lambda part, rows: whole(tap_grad(name, part, rows)), tap)
            return tap_grad(name, tap, slice(0, tap.shape[2]))

        return lambda tap_grad: pullback(functools.partial(of, tap_grad))

    def _vjp(
        self, x: Tensor, on_tap: OnTap | None = None
    ) -> tuple[dict[str, Tensor], Callable[[Callable[[str], TapGrad]], Tensor]]:
        """The taps by name, except those passed in strips, and the pullback, which can be called once."""
        prepared, finite = self._prepared(x)
        taps: dict[str, Tensor] = {}
        kept: list[ByName] = []
        walked = self._forward(prepared, finite, on_tap)
        for ready, names, (own, besides) in zip(self.stages, self.plan.tapped, walked, strict=True):
            taps |= {names[kind]: tap for kind, tap in own.items()}
            kept.append(besides | {kind: tap for kind, tap in own.items() if kind in ready.keeps})
        recompute = Recompute(prepared, finite) if len(taps) < len(self.plan.names) else None
        size, dtype = (x.shape[2], x.shape[3]), x.dtype

        def pullback(tap_grad: Callable[[str], TapGrad]) -> Tensor:
            grad = self.backward(tap_grad, kept, size, recompute)
            assert grad is not None  # every tap has one
            return grad.to(dtype)

        return taps, pullback
