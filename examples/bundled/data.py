"""The pictures that the bundled weights are trained on, read in place from their zips, as uint8 tensors."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

DATA = Path(os.environ.get("VGGFEAT_TEST_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
TEACHER = DATA.parent / "weights" / "vgg19-oxford-conv1_1-conv3_4.safetensors"


def pictures(archive: str, under: str = "", size: int | None = None) -> tuple[Tensor, list[str]]:
    """Every picture of a zip whose name begins with `under`: uint8 (N,3,H,W), and each one's folder."""
    images, folders = [], []
    with zipfile.ZipFile(DATA / archive) as zipped:
        for name in sorted(n for n in zipped.namelist() if n.startswith(under) and n.lower().endswith(".jpg")):
            image = Image.open(io.BytesIO(zipped.read(name))).convert("RGB")
            if size and image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BICUBIC)
            images.append(np.asarray(image).transpose(2, 0, 1))
            folders.append(name.rsplit("/", 2)[-2])
    return torch.from_numpy(np.stack(images)), folders


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
