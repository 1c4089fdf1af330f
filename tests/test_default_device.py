"""Every way in works whatever torch's default device is: `meta` stands for a GPU, and refuses to be read."""

import pictures
import pytest
import torch

import vggfeat
from vggfeat.arch import Arch, scaled
from vggfeat.modes import without_modes
from vggfeat.visualize import distance, dream, filters, invert, maps

SCENES = [pictures.scene(48, 48, seed) for seed in (1, 2)]
TINY = {"arch": "vgg11_bn", "width": 0.125, "batch_size": 8, "epochs": 1, "precision": "float32"}
SMALL = Arch("A", channels=scaled(8))


def loss(kind):
    output = torch.rand(1, 3, 32, 32, device="cpu", requires_grad=True)
    kind(["relu2_2"], weights="bundled")(output, torch.rand(1, 3, 32, 32, device="cpu")).backward()
    return output.grad.norm() > 0


def styled(**settings):
    config = vggfeat.StyleConfig(size=48, steps=2, weights="bundled", init="noise", **settings)
    return vggfeat.stylize(SCENES[0], SCENES[1], config).losses["total"] > 0


def trained(tmp_path, **settings):
    data = pictures.folder(tmp_path / "data", pictures.tree(8))
    config = vggfeat.recipe("fast", **TINY, holdout=0.3, **settings)
    result = vggfeat.train(data, config=config, folder=tmp_path / "run")
    return vggfeat.evaluate(tmp_path / "run", data).images == result.evaluation.images


WAYS = {
    "PerceptualLoss": lambda _: loss(vggfeat.PerceptualLoss),
    "StyleLoss": lambda _: loss(vggfeat.StyleLoss),
    "stylize": lambda _: styled(),
    "stylize, Adam": lambda _: styled(optimizer="adam"),
    "effective_field": lambda _: vggfeat.effective_field("relu2_2", weights="bundled", samples=1).effective > 0,
    "filters": lambda _: filters("relu2_2", images=[SCENES[0]], weights="bundled").tiles,
    "maps": lambda _: maps(SCENES[0], weights="bundled", size=64).tiles,
    "dream": lambda _: dream(count=2, size=32, steps=2, weights="bundled").activations,
    "dream, pixels": lambda _: (
        dream(count=2, size=32, steps=6, weights="bundled", parametrization="pixels").activations
    ),
    "invert": lambda _: invert(SCENES[0], size=48, steps=2, weights="bundled").error >= 0,
    "distance": lambda _: distance(SCENES[0], SCENES[1], weights="bundled").total > 0,
    "compare": lambda _: vggfeat.compare([SMALL], input_size=32, measure=True, batch=1, seconds=0.01).nets,
    "train": trained,
    "train, read one by one": lambda tmp_path: trained(tmp_path, size=32, resize=(32, 36)),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_default_device_makes_no_difference(way, tmp_path):
    with torch.device("meta"):
        assert WAYS[way](tmp_path)


def test_outside_of_modes_there_is_no_default_device():
    """Not that of `torch.device`, nor what another mode makes of functions."""
    with torch.device("meta"), without_modes():
        assert torch.zeros(1).device.type == "cpu"
    assert torch.zeros(1).device.type == "cpu"
