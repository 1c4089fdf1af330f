"""Optimisers of one image: L-BFGS and Adam, as plain objects that are told value and gradient and move the image.

Neither reads a number back from the device, so that a step on a GPU never waits for the step before it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["LBFGS", "Adam", "Optimizer"]


class Optimizer(Protocol):
    """Moves an image by what it has seen."""

    def step(self, image: Tensor, grad: Tensor) -> Tensor:
        """The next image, from the gradient at this one."""

    def restart(self) -> None:
        """Forget what was seen and be more careful from here on."""


class LBFGS:
    """Limited-memory BFGS with unit steps (Nocedal 1980; Nocedal and Wright 2006, algorithm 7.4).

    Args:
        history: pairs of steps and gradient changes to remember.
        first: length of the first step, as a mean change of a value.
    """

    def __init__(self, history: int = 20, first: float = 0.01) -> None:
        self.history = history
        self.first = first
        self.scale = 1.0
        self._forget()

    def _forget(self) -> None:
        self.steps: list[Tensor] = []
        self.changes: list[Tensor] = []
        self.curvatures: list[Tensor] = []  # 1 / sᵀy
        self.last: tuple[Tensor, Tensor] | None = None

    def restart(self) -> None:
        """Drop the history and halve the steps."""
        self._forget()
        self.scale /= 2

    def step(self, image: Tensor, grad: Tensor) -> Tensor:
        """The next image."""
        x, g = image.flatten(), grad.flatten()
        if self.last is not None:
            s, y = x - self.last[0], g - self.last[1]
            sy = s.dot(y)
            # a pair without positive curvature is kept as zeros, which change nothing: to drop it would take a look
            good = sy > 1e-10 * y.dot(y).sqrt() * s.dot(s).sqrt()
            self.steps.append(torch.where(good, s, 0))
            self.changes.append(torch.where(good, y, 0))
            self.curvatures.append(torch.where(good, 1 / sy, 0))
            if len(self.steps) > self.history:
                del self.steps[0], self.changes[0], self.curvatures[0]
        direction = -g
        alphas = []
        for s, y, rho in zip(self.steps[::-1], self.changes[::-1], self.curvatures[::-1], strict=True):
            alphas.append(rho * s.dot(direction))
            direction = torch.addcmul(direction, y, -alphas[-1])
        if self.last is None:
            direction = direction * (self.first / g.abs().mean().clamp_min(1e-30))
        else:
            y = self.changes[-1]
            # γ = sᵀy / yᵀy scales the unknown rest of the Hessian; without a good pair the first step's rule serves
            gamma = 1 / (self.curvatures[-1] * y.dot(y))
            gamma = torch.where(self.curvatures[-1] > 0, gamma, self.first / g.abs().mean().clamp_min(1e-30))
            direction = direction * gamma
        for s, y, rho, alpha in zip(self.steps, self.changes, self.curvatures, alphas[::-1], strict=True):
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

    def step(self, image: Tensor, grad: Tensor) -> Tensor:
        """The next image."""
        if self.mean is None or self.square is None:
            self.mean, self.square = torch.zeros_like(grad), torch.zeros_like(grad)
        self.count += 1
        first, second = self.betas
        self.mean.lerp_(grad, 1 - first)
        self.square.mul_(second).addcmul_(grad, grad, value=1 - second)
        root = (self.square / (1 - second**self.count)).sqrt_().add_(1e-12)
        step = self.learning_rate / (1 - first**self.count)
        return image.addcdiv(self.mean, root, value=-step).clamp_(0, 1)
