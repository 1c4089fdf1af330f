"""Optimisers of one image: L-BFGS and Adam, as plain objects that take its gradient and return the next image.

Neither reads a number back from the device, so that a step on a GPU never waits for the step before it.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

PAIRS = 3  # of the last steps, whose spectra the preconditioner is made of


class Optimizer(Protocol):
    """Moves an image by its gradients."""

    def step(self, image: Tensor, grad: Tensor) -> Tensor:
        """The next image, from the gradient at this one."""

    def restart(self) -> None:
        """Forget the history and take smaller steps from here on."""

    def state_dict(self) -> dict[str, Any]:
        """Its state, in tensors and plain values that later steps do not modify."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""


class FourierPreconditioner:
    """How far to go in each band of spatial frequencies: L-BFGS's first guess of the inverse Hessian, H₀.

    At 512 pixels a style allows broad patterns steps up to fifty times as long as fine ones, which the usual multiple
    of the identity ignores. Here H₀ is diagonal in the Fourier domain, with a factor for each band, separately for
    brightness and colour: √(Σ|S|² / Σ|Y|²) over the spectra of the last few steps s and gradient changes y. The overall
    scale is left to the optimiser. (Our own.)

    Args:
        image: (N,C,H,W); only its shape and device matter.
        bands: how many, of equal width in the logarithm of the frequency.
    """

    def __init__(self, image: Tensor, bands: int = 12) -> None:
        self.shape, self.bands = image.shape, bands
        channels, height, width = image.shape[1:]
        down, across = torch.fft.fftfreq(height, device="cpu")[:, None], torch.fft.rfftfreq(width, device="cpu")
        frequency = torch.hypot(down, across)  # in cycles per pixel, up to √½
        lowest = 1 / min(height, width)
        position = (frequency.clamp_min(lowest) / lowest).log() / math.log(math.sqrt(0.5) / lowest)
        band = (position * bands).long().clamp_(max=bands - 1)
        # a Fourier transform over the channels puts their mean, the brightness, first and differences after it
        apart = torch.arange(channels, device="cpu")[:, None, None].clamp_(max=1)
        self.band = (band + bands * apart).to(image.device)
        # half of the spectrum suffices: the other half mirrors the columns between the outer ones
        outer = (across == 0) | (across == 0.5)
        self.count = torch.where(outer, 1.0, 2.0).float().to(image.device)
        self.reset()

    def reset(self) -> None:
        """Forget all pairs."""
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def update(self, step: Tensor, change: Tensor) -> None:
        """Remember a step and the change of the gradient along it, each with as many values as the image."""
        self.pairs.append((self._energies(step), self._energies(change)))
        del self.pairs[:-PAIRS]

    def factors(self) -> Tensor:
        """For each band, brightness first, (2·bands,); their mean over the last changes' energy is 1."""
        steps, changes = (torch.stack(energies).sum(0).clamp_min(1e-30) for energies in zip(*self.pairs, strict=True))
        factors = (steps / changes).sqrt()
        return factors * (changes.sum() / factors.dot(changes))

    def apply(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """H₀ v and yᵀ H₀ y, for the last change y."""
        factors = self.factors()
        spectrum = self._spectrum(value) * factors[self.band]
        product = torch.fft.irfftn(spectrum, s=self.shape[1:], dim=(-3, -2, -1), norm="ortho")
        return product.reshape(value.shape), factors.dot(self.pairs[-1][1])

    def _spectrum(self, value: Tensor) -> Tensor:
        # the last dimension named is the one that is halved
        spectrum: Tensor = torch.fft.rfftn(value.view(self.shape), dim=(-3, -2, -1), norm="ortho")
        return spectrum

    def _energies(self, value: Tensor) -> Tensor:
        spectrum = self._spectrum(value)
        power = ((spectrum.real.square() + spectrum.imag.square()) * self.count).sum(0).flatten()
        energies: Tensor = power.new_zeros(2 * self.bands).index_add_(0, self.band.flatten(), power)
        return energies


class LBFGS:
    """Limited-memory BFGS with unit steps (Nocedal 1980; Nocedal and Wright 2006, algorithm 7.4).

    Args:
        history: pairs of steps and gradient changes to remember.
        first_step: length of the first step, as a mean change of a value.
        preconditioner: the first guess of the inverse Hessian; None means a multiple of the identity, sᵀy / yᵀy.
    """

    def __init__(
        self, history: int = 20, first_step: float = 0.01, preconditioner: FourierPreconditioner | None = None
    ) -> None:
        self.history = history
        self.first_step = first_step
        self.preconditioner = preconditioner
        self.scale = 1.0
        self._forget()

    def _forget(self) -> None:
        self.steps: list[Tensor] = []
        self.changes: list[Tensor] = []
        self.rhos: list[Tensor] = []  # ρ = 1 / sᵀy
        self.last: tuple[Tensor, Tensor] | None = None
        if self.preconditioner is not None:
            self.preconditioner.reset()

    def restart(self) -> None:
        """Drop the history and halve the steps."""
        self._forget()
        self.scale /= 2

    def state_dict(self) -> dict[str, Any]:
        """The pairs, the last image and gradient, and the step's scale."""
        lists = {name: list(getattr(self, name)) for name in ("steps", "changes", "rhos")}
        pairs = [] if self.preconditioner is None else list(self.preconditioner.pairs)
        return lists | {"last": self.last, "scale": self.scale, "pairs": pairs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.last, self.scale = state["last"], state["scale"]
        self.steps, self.changes, self.rhos = (list(state[name]) for name in ("steps", "changes", "rhos"))
        if self.preconditioner is not None:
            self.preconditioner.pairs = list(state["pairs"])

    def step(self, image: Tensor, grad: Tensor) -> Tensor:
        """The next image."""
        x, g = image.flatten(), grad.flatten()
        if self.last is not None:
            s, y = x - self.last[0], g - self.last[1]
            sy = s.dot(y)
            # a pair without positive curvature is kept as zeros, which change nothing: dropping it would need a sync
            good = sy > 1e-10 * y.dot(y).sqrt() * s.dot(s).sqrt()
            self.steps.append(torch.where(good, s, 0))
            self.changes.append(torch.where(good, y, 0))
            self.rhos.append(torch.where(good, 1 / sy, 0))
            if len(self.steps) > self.history:
                del self.steps[0], self.changes[0], self.rhos[0]
            if self.preconditioner is not None:
                self.preconditioner.update(self.steps[-1], self.changes[-1])
        direction = -g
        alphas = []
        for s, y, rho in zip(self.steps[::-1], self.changes[::-1], self.rhos[::-1], strict=True):
            alphas.append(rho * s.dot(direction))
            direction = torch.addcmul(direction, y, -alphas[-1])
        first_scale = self.first_step / g.abs().mean().clamp_min(1e-30)
        if self.last is None:
            direction = direction * first_scale
        else:
            y = self.changes[-1]
            if self.preconditioner is None:
                length = y.dot(y)
            else:
                direction, length = self.preconditioner.apply(direction)
            # γ = sᵀy / yᵀH₀y scales the unknown rest of the Hessian; without a good pair the first step's rule holds
            gamma = 1 / (self.rhos[-1] * length)
            direction = direction * torch.where(self.rhos[-1] > 0, gamma, first_scale)
        for s, y, rho, alpha in zip(self.steps, self.changes, self.rhos, alphas[::-1], strict=True):
            direction = torch.addcmul(direction, s, alpha - rho * y.dot(direction))
        self.last = (x, g)
        return torch.add(x, direction, alpha=self.scale).view_as(image)


class Adam:
    """Adam (Kingma and Ba 2015) on values clamped to [0,1] after every step.

    Args:
        learning_rate: the step, in units of a value's full range.
        betas: decay of the mean of gradients and of their squares.
    """

    def __init__(self, learning_rate: float = 0.04, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self.learning_rate = learning_rate
        self.betas = betas
        self._forget()

    def _forget(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.square: Tensor | None = None

    def restart(self) -> None:
        """Drop the averages and halve the step."""
        self._forget()
        self.learning_rate /= 2

    def state_dict(self) -> dict[str, Any]:
        """The averages, how many gradients are in them, and the step."""
        return {name: getattr(self, name) for name in ("count", "mean", "square", "learning_rate")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.count, self.mean, self.square = state["count"], state["mean"], state["square"]
        self.learning_rate = state["learning_rate"]

    def step(self, image: Tensor, grad: Tensor) -> Tensor:
        """The next image."""
        if self.mean is None or self.square is None:
            self.mean, self.square = torch.zeros_like(grad), torch.zeros_like(grad)
        self.count += 1
        first, second = self.betas
        self.mean = self.mean.lerp(grad, 1 - first)
        self.square = (self.square * second).addcmul_(grad, grad, value=1 - second)
        root = (self.square / (1 - second**self.count)).sqrt_().add_(1e-12)
        step = self.learning_rate / (1 - first**self.count)
        return image.addcdiv(self.mean, root, value=-step).clamp_(0, 1)
