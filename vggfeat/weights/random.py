"""Random weights, seeded and calibrated, for tests and previews."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from vggfeat.arch import LRN, Arch
from vggfeat.weights.state_dicts import LINEAR, keys_of


def random_state(arch: Arch) -> dict[str, Tensor]:
    """Gaussian weights, each convolution's channels calibrated to mean 0 and variance 1 on 1/f noise.

    Random features with calibrated layers carry texture and colour (Ustyuzhaninov et al. 2016, arXiv:1606.00021), so
    they serve tests and previews where nothing can be downloaded. The calibration is what batch normalisation would
    subtract and divide by (Mishkin and Matas 2015, arXiv:1511.06422, per channel). A classifier's layers, for which the
    noise gives too few values, are brought to variance 1 as a whole.
    """
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    x = torch.zeros(8, 3, 96, 96, dtype=torch.float32)
    for side in (3, 6, 12, 24, 48, 96):  # octaves of equal power make 1/f
        noise = draw(8, 3, side, side)
        x += F.interpolate(noise, size=96, mode="bilinear", align_corners=False)
    x /= x.std()
    state: dict[str, Tensor] = {}
    for layer in arch.layers:
        if layer.kind == "conv":
            weight = draw(layer.channels, layer.in_channels, layer.kernel, layer.kernel)
            x = F.conv2d(x, weight, padding=layer.kernel // 2)
            std, mean = torch.std_mean(x, dim=(0, 2, 3))
            x = (x - mean[:, None, None]) / std[:, None, None]
            state[f"features.{layer.index}.weight"] = weight / std[:, None, None, None]
            state[f"features.{layer.index}.bias"] = -mean / std
        elif layer.kind == "bn":
            ones = torch.ones(layer.channels, dtype=torch.float32)
            parts = (ones, torch.zeros_like(ones), torch.zeros_like(ones), ones.clone())
            state |= dict(zip(keys_of(layer), parts, strict=True))
        elif layer.kind == "relu":
            x = x.relu()
        elif layer.kind == "lrn":
            x = F.local_response_norm(x, *LRN)
        else:
            x = F.max_pool2d(x, 2)
    if arch.head is None:
        return state
    slim = arch.head == "slim"
    x = F.adaptive_avg_pool2d(x, 1 if slim else 7).flatten(1)
    for name in arch.head_names:
        if name not in LINEAR:
            x = x.relu()
            continue
        outputs = arch.num_classes if name == arch.head_names[-1] else arch.hidden
        weight = draw(outputs, x.shape[1])
        x = x @ weight.T
        std = x.square().mean().sqrt()
        x /= std
        state[f"classifier.{LINEAR[name]}.weight"] = weight / std
        state[f"classifier.{LINEAR[name]}.bias"] = torch.zeros(outputs, dtype=torch.float32)
    return state
