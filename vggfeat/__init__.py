"""One VGG: a perceptual loss, Gatys' style transfer, features by layer name, and the weights for them.

Names are imported on first use, so that `import vggfeat` and `vggstyle --help` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "vggfeat.errors": (
        "DependencyError",
        "ImageError",
        "InputError",
        "RunError",
        "VGGFeatError",
        "WeightsError",
        "WeightsUnavailableError",
    ),
    "vggfeat.network": ("VGG", "vgg", "vgg11", "vgg13", "vgg16", "vgg19"),
    "vggfeat.weights": ("load_weights",),
    "vggfeat.features": ("VGGFeatures",),
    "vggfeat.losses": ("EncodedTarget", "PerceptualLoss", "StyleLoss"),
    "vggfeat.metrics": ("LPIPS",),
    "vggfeat.analysis": ("compare", "describe", "effective_field", "stacked_3x3"),
    "vggfeat.plots": (
        "plot_comparison",
        "plot_confusion",
        "plot_parameters",
        "plot_receptive_fields",
        "plot_stacked",
        "plot_training",
    ),
    "vggfeat.transfer.config": ("StyleConfig",),
    "vggfeat.transfer.stylize": ("StyleResult", "StyleStep", "stylize"),
    "vggfeat.training.config": ("TrainConfig", "recipe"),
    "vggfeat.training.loop": ("TrainResult", "TrainStep", "train"),
    "vggfeat.training.evaluation": ("Evaluation", "Views", "evaluate"),
}
_MODULES = ("errors", "functional", "image", "visualize", "weights")
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"vggfeat.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'vggfeat' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
