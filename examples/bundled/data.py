"""The pictures that the bundled weights are trained on, read in place from their zips, and crops of them."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vggfeat.errors import InputError

DATA = Path(os.environ.get("VGGFEAT_TEST_DATA", Path(__file__).parents[2] / "../shared/data")).resolve()
TEACHER = DATA.parent / "weights" / "vgg19-oxford-conv1_1-conv3_4.safetensors"


def pictures(archive: str) -> tuple[Tensor, Tensor]:
    """Every picture of a zip, by name: uint8 (N,3,H,W), and the number of its folder among the folders' names."""
    path, pixels, sizes = DATA / archive, bytearray(), set()
    try:
        with zipfile.ZipFile(path) as files:
            names = sorted(n for n in files.namelist() if n.lower().endswith((".jpg", ".jpeg", ".png")))
            for name in names:
                with files.open(name) as file, Image.open(file) as image:
                    pixels += image.convert("RGB").tobytes()
                    sizes.add(image.size)
    except (OSError, zipfile.BadZipFile) as error:  # a damaged picture is an OSError, too
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(sizes) != 1:
        raise InputError(f"{path}: expected pictures of one size, got {len(sizes)} sizes")
    ((width, height),) = sizes
    folders = [PurePosixPath(name).parent.name for name in names]
    number = {folder: i for i, folder in enumerate(sorted(set(folders)))}
    images = torch.frombuffer(pixels, dtype=torch.uint8).view(len(names), height, width, 3).permute(0, 3, 1, 2)
    return images, torch.tensor([number[folder] for folder in folders])


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
