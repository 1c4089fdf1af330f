"""State dicts: keys as torchvision names them, whatever they are wrapped in, and the network that they are of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vggfeat.arch import Arch, Layer, scaled
from vggfeat.errors import WeightsError, warn

VALUES = (".weight", ".bias", ".running_mean", ".running_var")
WRAPPERS = ("state_dict", "model_state_dict", "model", "ema", "net")  # the last two are those of our own checkpoints
LINEAR = {"fc6": 0, "fc7": 3, "fc8": 6, "fc": 1}  # where the head's layers are in `classifier`


def keys_of(layer: Layer) -> list[str]:
    """State-dict keys of a layer, without the counter that evaluation does not need."""
    parts = {"conv": ("weight", "bias"), "bn": ("weight", "bias", "running_mean", "running_var")}.get(layer.kind, ())
    return [f"features.{layer.index}.{part}" for part in parts]


def keys_of_linear(name: str) -> list[str]:
    """State-dict keys of a layer of the classifier."""
    return [f"classifier.{LINEAR[name]}.{part}" for part in ("weight", "bias")]


def _unwrapped(raw: Mapping[str, Any], depth: int = 4) -> Mapping[str, Any] | None:
    """The state dict of a VGG in whatever wraps it, so many times at most; None where there is none."""
    if _is_of_features(raw) or any(str(key).endswith("features.0.weight") for key in raw):
        return raw
    wrapped = (raw[name] for name in WRAPPERS if depth and isinstance(raw.get(name), Mapping))
    return next((found for each in wrapped if (found := _unwrapped(each, depth - 1)) is not None), None)


def _is_of_features(raw: Mapping[str, Any]) -> bool:
    """Whether it is that of a network's `features` alone."""
    return getattr(raw.get("0.weight"), "ndim", 0) == 4


def map_keys(raw: Mapping[str, Any], label: str, oxfords: bool = False) -> dict[str, Tensor]:
    """The tensors under torchvision's keys, whatever wraps them: {"state_dict": …}, "module." and other prefixes.

    Args:
        raw: as it was saved.
        label: what messages call it.
        oxfords: whether the file is known to be Oxford's; if not, a warning says where the classifier looks like it.
    """
    raw = _unwrapped(raw) or raw
    if _is_of_features(raw):
        raw = {f"features.{key}": value for key, value in raw.items()}
    prefixes = {key.removesuffix("features.0.weight") for key in raw if str(key).endswith("features.0.weight")}
    if len(prefixes) > 1:
        shown = ", ".join(sorted(repr(each) for each in prefixes))
        raise WeightsError(f"weights {label} hold {len(prefixes)} networks, under {shown}: give the state dict of one")
    prefix = prefixes.pop() if prefixes else ""
    state = {
        key.removeprefix(prefix): value.detach().to(torch.float32) if value.is_floating_point() else value
        for key, value in raw.items()
        if isinstance(key, str) and key.startswith(prefix) and isinstance(value, Tensor)
    }
    # Oxford's conversion numbers them differently
    if "classifier.4.weight" in state and "classifier.0.weight" not in state:
        if not oxfords:
            warn(
                f"weights {label} number their classifier as Oxford's files do: if they take BGR in 0..255, too, load "
                "their file as caffe:PATH"
            )
        moved = {"classifier.1": "classifier.0", "classifier.4": "classifier.3"}
        state = {moved.get(key[:12], key[:12]) + key[12:]: value for key, value in state.items()}
    if "features.0.weight" not in state:
        if odd := [value for key, value in raw.items() if str(key).endswith("features.0.weight")]:
            raise WeightsError(f"weights {label} hold values of type {type(odd[0]).__name__}, expected tensors")
        shown = ", ".join(map(str, list(raw)[:3])) or "nothing"
        raise WeightsError(
            f"weights {label} are not a VGG's: expected keys like features.0.weight (conv1_1), found {shown}"
        )
    for key, value in state.items():
        what = ""
        if value.is_meta:
            what = "no values"
        elif value.layout != torch.strided:
            what = f"values of layout {value.layout}: give it dense"
        elif key.startswith(("features.", "classifier.")) and key.endswith(VALUES) and not value.is_floating_point():
            what = f"{value.dtype} values, expected floating-point ones"
        if what:
            raise WeightsError(f"weights {label} cannot be used: {key} has {what}")
        if key.startswith("features."):
            check_finite(key, value, label)
        if key.endswith("running_var") and bool((value < 0).any()):
            raise WeightsError(f"weights {label} are damaged: {key} holds negative variances")
    return state


def check_finite(key: str, value: Tensor, label: str) -> None:
    """Check the values under a key.

    Raises:
        WeightsError: some are not finite.
    """
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise WeightsError(f"weights {label} are damaged: {key} holds NaN or infinite values")


def misfits(arch: Arch, state: Mapping[str, Tensor]) -> list[str]:
    """Keys of the convolutional part that `arch` lacks, or has in another shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in arch.layers:
        if layer.kind == "conv":
            shapes[f"features.{layer.index}.weight"] = (layer.channels, layer.in_channels, layer.kernel, layer.kernel)
            shapes[f"features.{layer.index}.bias"] = (layer.channels,)
        elif layer.kind == "bn":
            shapes |= dict.fromkeys(keys_of(layer), (layer.channels,))
            shapes[f"features.{layer.index}.num_batches_tracked"] = ()
    return [key for key, value in state.items() if key.startswith("features.") and shapes.get(key) != value.shape]


def fitted(arch: Arch, state: Mapping[str, Tensor]) -> Arch:
    """The architecture with the channels of the state's convolutions; in proportion where those are missing."""
    channels = list(scaled(state["features.0.weight"].shape[0]))
    for layer in arch.convs:
        value = state.get(f"features.{layer.index}.weight")
        if value is not None and layer.name.endswith("_1"):
            channels[int(layer.name[4]) - 1] = value.shape[0]
    return replace(arch, channels=tuple(channels))


def widths(arch: Arch) -> str:
    """Its channel counts, for messages."""
    return f"channels {'/'.join(map(str, arch.channels))}" if arch.width is None else f"width {arch.width:g}"


def infer_arch(state: Mapping[str, Tensor], label: str) -> Arch:
    """The network that a state dict belongs to, inferred from its keys and shapes.

    A file with only the first layers may fit several networks: one that it fills completely is preferred, then vgg16,
    vgg19 and the others.

    Raises:
        WeightsError: no VGG has these keys and shapes.
    """
    first = state["features.0.weight"]
    if first.ndim != 4 or not first.numel():
        raise WeightsError(f"weights {label} are not a VGG's: features.0.weight has shape {tuple(first.shape)}")
    convs = sum(value.ndim == 4 for value in state.values())
    bn = "features.1.weight" in state
    configs = ("D", "E", "B", "A", "C") if bn else ("D", "E", "B", "A", "C", "A-LRN")
    candidates = [fitted(Arch(config, bn, head=None), state) for config in configs]
    fitting = [arch for arch in candidates if not misfits(arch, state)]
    if not fitting:
        closest = min((misfits(arch, state) for arch in candidates), key=len)
        raise WeightsError(
            f"weights {label} are not a VGG's: {closest[0]} has shape {tuple(state[closest[0]].shape)}, "
            "which fits no configuration"
        )
    arch = next((arch for arch in fitting if len(arch.convs) == convs), fitting[0])
    hidden, channels = arch.hidden, arch.layers[-1].channels
    for head, last, width in (("paper", "classifier.6.weight", hidden), ("slim", "classifier.1.weight", channels)):
        if last in state and state[last].ndim == 2 and state[last].shape[1] == width:
            return replace(arch, head=head, num_classes=len(state[last]))
    paper, fc6 = replace(arch, head="paper"), state.get("classifier.0.weight")
    return arch if fc6 is None or fc6.shape != head_shapes(paper)["classifier.0.weight"] else paper  # without its last


def head_shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    """Shapes of the classifier's weights and biases by key, none where there is no classifier."""
    channels, hidden, classes = arch.layers[-1].channels, arch.hidden, arch.num_classes
    weights = {
        "fc6": (hidden, 49 * channels),
        "fc7": (hidden, hidden),
        "fc8": (classes, hidden),
        "fc": (classes, channels),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in weights.items():
        if name in arch.head_names:
            shapes |= dict(zip(keys_of_linear(name), (shape, shape[:1]), strict=True))
    return shapes
