"""What may surround a call: a compiler, `torch.func`, forward-mode derivatives, autocast, inference mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

F = TypeVar("F", bound=Callable[..., Any])


def exporting() -> bool:
    """Whether `torch.export` or its predecessor, `torch.jit.trace`, is at work."""
    if torch._C._get_tracing_state() is not None:
        return True
    # `is_exporting()` of torch 2.10 and 2.11 is true in torch.compile, too
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else bool(flag)


def in_functorch() -> bool:
    """Whether vmap, grad or another transform of torch.func is at work.

    This depends on the active transform, not on the tensors: under one, `Function.apply` needs `setup_context` and a
    vmap rule even for tensors that nothing maps over.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_batched(*grads: torch.Tensor | None) -> bool:
    """Whether a gradient is many at once (`is_grads_batched=True`, `jacobian(..., vectorize=True)`).

    Those are made by an older vmap, which `in_functorch` does not detect.
    """
    if torch.compiler.is_compiling():
        return False
    return any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)


def is_watched(*tensors: torch.Tensor) -> bool:
    """Whether something besides a profiler observes operators: a compiler, torch.func, a mode, a kind of tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or in_functorch()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
        or any(torch._is_functional_tensor(tensor) for tensor in tensors)
    )


def in_forward_mode() -> bool:
    """Whether derivatives are taken forward (`torch.autograd.forward_ad`, `torch.func.jvp`)."""
    return forward_ad._current_level >= 0


def values_are_hidden() -> bool:
    """Whether numbers cannot be read: the code is being traced or mapped over, or a FakeTensorMode is on."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or in_functorch():
        return True
    modes: Any = torch._C
    return modes._get_dispatch_mode(modes._TorchDispatchModeKey.FAKE) is not None


def needs_composite_ops() -> bool:
    """Whether only differentiable composite operations will do: while compiling, under torch.func, in forward mode."""
    return values_are_hidden() or in_forward_mode()


def no_autocast(device: torch.device) -> Any:
    """A context without autocast, for code that has already chosen its precision by it."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextlib.contextmanager
def with_gradients() -> Iterator[None]:
    """Gradients for code that needs its own, even inside a caller's `no_grad` or `inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Outside the caller's modes (inference mode, export, vmap, a default device): what is cached must be real."""
    tracing = torch._C._get_tracing_state()
    with _disable_current_modes(), torch._C._DisableFuncTorch(), torch._C.DisableTorchFunction():
        # inside those: export notes in its graph where gradients are switched
        with torch.inference_mode(False), torch.no_grad():
            try:
                torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
                yield
            finally:
                torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


def constant_when_traced(function: F) -> F:
    """Run, not traced, during tracing: `torch.compiler.assume_constant_result`, without importing the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
