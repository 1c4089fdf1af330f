"""One VGG: a perceptual loss, Gatys' style transfer, features by layer name, and the weights for them.

Names are imported on first use, so that `import vggfeat` and `vggstyle --help` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    "vggfeat.encoded_target": ("EncodedTarget",),
    "vggfeat.losses": ("CombinedLoss", "PerceptualLoss", "StyleLoss"),
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
    "vggfeat.training.config": ("TrainConfig", "Views", "recipe"),
    "vggfeat.training.data": ("ImageSet", "load_images"),
    "vggfeat.training.loop": ("TrainResult", "TrainStep", "train"),
    "vggfeat.training.evaluation": ("Evaluation", "evaluate"),
}
_MODULES = ("analysis", "errors", "functional", "image", "visualize", "weights")
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME, *_MODULES, "__version__"])


if TYPE_CHECKING:  # the same for type checkers and editors
    from vggfeat import (
        analysis as analysis,
        errors as errors,
        functional as functional,
        image as image,
        visualize as visualize,
        weights as weights,
    )
    from vggfeat.analysis import (
        compare as compare,
        describe as describe,
        effective_field as effective_field,
        stacked_3x3 as stacked_3x3,
    )
    from vggfeat.encoded_target import EncodedTarget as EncodedTarget
    from vggfeat.errors import (
        DependencyError as DependencyError,
        ImageError as ImageError,
        InputError as InputError,
        RunError as RunError,
        VGGFeatError as VGGFeatError,
        WeightsError as WeightsError,
        WeightsUnavailableError as WeightsUnavailableError,
    )
    from vggfeat.features import VGGFeatures as VGGFeatures
    from vggfeat.losses import CombinedLoss as CombinedLoss, PerceptualLoss as PerceptualLoss, StyleLoss as StyleLoss
    from vggfeat.metrics import LPIPS as LPIPS
    from vggfeat.network import VGG as VGG, vgg as vgg, vgg11 as vgg11, vgg13 as vgg13, vgg16 as vgg16, vgg19 as vgg19
    from vggfeat.plots import (
        plot_comparison as plot_comparison,
        plot_confusion as plot_confusion,
        plot_parameters as plot_parameters,
        plot_receptive_fields as plot_receptive_fields,
        plot_stacked as plot_stacked,
        plot_training as plot_training,
    )
    from vggfeat.training.config import TrainConfig as TrainConfig, Views as Views, recipe as recipe
    from vggfeat.training.data import ImageSet as ImageSet, load_images as load_images
    from vggfeat.training.evaluation import Evaluation as Evaluation, evaluate as evaluate
    from vggfeat.training.loop import TrainResult as TrainResult, TrainStep as TrainStep, train as train
    from vggfeat.transfer.config import StyleConfig as StyleConfig
    from vggfeat.transfer.stylize import StyleResult as StyleResult, StyleStep as StyleStep, stylize as stylize
    from vggfeat.weights import load_weights as load_weights
else:

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"vggfeat.{name}")
        if name not in _HOME:
            raise AttributeError(f"module 'vggfeat' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
        return value


def __dir__() -> list[str]:
    return __all__
