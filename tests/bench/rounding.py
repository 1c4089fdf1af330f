"""Which of bfloat16's roundings turn the gradient of a perceptual loss: photographs, Oxford's VGG-19, relu3_3.

Each row computes part of the forward exactly, the rest as the trunk does: products of bfloat16 numbers summed in
float32, and each map rounded. The way back is exact. The cosine is with float64's gradient.

python -m tests.bench.rounding        (with the test data)
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import normalize

from tests.bench.harness import DATA, WEIGHTS
from vggfeat import PerceptualLoss
from vggfeat.image import open_image, to_tensor
from vggfeat.weights import IMAGENET

CONVS = {"conv1_1": 0, "conv1_2": 2, "conv2_1": 5, "conv2_2": 7, "conv3_1": 10, "conv3_2": 12, "conv3_3": 14}
POOLED = ("conv1_2", "conv2_2")
EXACT = {
    "what the trunk does": (["conv1_1"], []),
    "and maps before the pools unrounded": (["conv1_1"], [*POOLED]),
    "the first block exact": (["conv1_1", "conv1_2"], ["conv1_1", "conv1_2"]),
    "and the map before the second pool": (["conv1_1", "conv1_2"], ["conv1_1", *POOLED]),
    "both blocks exact": ([*CONVS][:4], [*CONVS][:4]),
    "all exact, in float32": ([*CONVS], [*CONVS]),
}


def rounded(value: Tensor) -> Tensor:
    """To bfloat16's numbers, by identity's gradient."""
    return value + (value.bfloat16().to(value.dtype) - value).detach()


def tap(image: Tensor, state: dict[str, Tensor], exact_weights: list[str], exact_maps: list[str]) -> Tensor:
    """relu3_3 of an image (1,3,H,W) in [0,1]; a pool's output is rounded even where its input is not."""
    x = normalize(image, IMAGENET.mean, IMAGENET.std)
    for name, index in CONVS.items():
        weight, bias = (state[f"features.{index}.{kind}"].to(x) for kind in ("weight", "bias"))
        x = F.conv2d(x, weight if name in exact_weights else rounded(weight), bias, padding=1).relu()
        x = x if name in exact_maps else rounded(x)
        if name in POOLED:
            x = F.max_pool2d(x, 2)
            x = x if {*exact_maps} == {*CONVS} else rounded(x)
    return x


def main() -> None:
    torch.set_num_threads(2)
    names = ("golden_gate", "hoovertowernight", "lion", "taj_mahal")
    photos = [to_tensor(open_image(DATA / "photos" / f"{name}.jpg")) for name in names]
    photos = [F.interpolate(photo, (192, 256), mode="bilinear", antialias=True) for photo in photos]
    blurred = F.interpolate(F.avg_pool2d(photos[0], 4), scale_factor=4, mode="bilinear")
    pairs = [(photos[0], photos[1]), (photos[1], photos[0]), (photos[2], photos[3]), (photos[3], photos[2])]
    pairs.append((blurred, photos[0]))
    state = load_file(WEIGHTS)

    def gradient(pair: tuple[Tensor, Tensor], exact: tuple[list[str], list[str]], dtype: torch.dtype) -> Tensor:
        x, y = (image.to(dtype) for image in pair)
        x = x.clone().requires_grad_()
        F.mse_loss(tap(x, state, *exact), tap(y, state, *exact).detach()).backward()
        assert x.grad is not None
        return x.grad.double().flatten()

    references = [gradient(pair, EXACT["all exact, in float32"], torch.float64) for pair in pairs]

    def show(label: str, gradients: list[Tensor]) -> None:
        cosines = [F.cosine_similarity(*both, dim=0) for both in zip(references, gradients, strict=True)]
        print(f"  {label:36s}" + "".join(f"{float(cosine):10.5f}" for cosine in cosines), flush=True)

    print(" " * 38 + "".join(f"{name:>10s}" for name in ("1, 2", "2, 1", "3, 4", "4, 3", "blurred 1")))
    for label, exact in EXACT.items():
        show(label, [gradient(pair, exact, torch.float32) for pair in pairs])
    loss = PerceptualLoss(["relu3_3"], arch="vgg19", weights=WEIGHTS, precision="bfloat16")
    ours = []
    for x, y in pairs:
        leaf = x.clone().requires_grad_()
        loss(leaf, y).sum().backward()
        assert leaf.grad is not None
        ours.append(leaf.grad.double().flatten())
    show("PerceptualLoss in bfloat16", ours)


if __name__ == "__main__":
    main()
