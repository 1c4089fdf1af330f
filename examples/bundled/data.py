"""The pictures that the bundled weights are trained on, read in place from their zips, and crops of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1]))
from short_run import read_zip  # noqa: E402

DATA = Path(os.environ.get("VGGFEAT_TEST_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
TEACHER = DATA.parent / "weights" / "vgg19-oxford-conv1_1-conv3_4.safetensors"


def pictures(archive: str) -> tuple[Tensor, Tensor]:
    """Every picture of a zip, by name: uint8 (N,3,H,W), and the number of its folder among the folders' names."""
    data = read_zip(DATA / archive)
    return data.images.cpu(), data.labels.cpu()


def crops(images: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    """Random crops (count,3,side,side) in [0,1], between `side` and the picture's own size before scaling, mirrored."""
    full = images.shape[-1]
    out = []
    for index in torch.randint(len(images), (count,), generator=generator).tolist():
        take = int(torch.randint(side, full + 1, (), generator=generator))
        top, left = (int(torch.randint(full - take + 1, (), generator=generator)) for _ in range(2))
        crop = images[index : index + 1, :, top : top + take, left : left + take].float() / 255
        if take != side:
            crop = F.interpolate(crop, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        out.append(crop.flip(3) if torch.rand((), generator=generator) < 0.5 else crop)
    return torch.cat(out)
