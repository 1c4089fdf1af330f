"""Networks side by side: ours by arithmetic, torchvision's by counting during a run on the meta device."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vggfeat.analysis.layers import describe
from vggfeat.analysis.measure import Measured, machine, measure_net, saved_for_backward
from vggfeat.arch import ARCHS, LRN_AFTER, Arch, parse
from vggfeat.errors import InputError, check_choice, counted, first_line, optional, whole_number
from vggfeat.tables import Column, Report, Table, mega

if TYPE_CHECKING:
    from torch import nn

COUNTED = Path(__file__).parents[1] / "assets" / "torchvision.json"  # written by `python -m tests.counted`

# top-1 and top-5 in per cent on ImageNet's validation set, one 224 px crop, of torchvision's IMAGENET1K_V1 weights;
# repeated here (and checked in the tests) so that VGGs can be compared without torchvision
ACCURACY: dict[str, tuple[float, float]] = {
    "vgg11": (69.020, 88.628),
    "vgg11_bn": (70.370, 89.810),
    "vgg13": (69.928, 89.246),
    "vgg13_bn": (71.586, 90.374),
    "vgg16": (71.592, 90.382),
    "vgg16_bn": (73.360, 91.516),
    "vgg19": (72.376, 90.876),
    "vgg19_bn": (74.218, 91.842),
}

# when each family was published, by name prefix: the year of its paper's first version
YEARS = {
    "alexnet": 2012,  # Krizhevsky et al., NIPS; torchvision's is that of arXiv:1404.5997
    "convnext": 2022,  # arXiv:2201.03545
    "densenet": 2016,  # arXiv:1608.06993
    "efficientnet_b": 2019,  # arXiv:1905.11946
    "efficientnet_v2": 2021,  # arXiv:2104.00298
    "googlenet": 2014,  # arXiv:1409.4842
    "inception_v3": 2015,  # arXiv:1512.00567
    "maxvit": 2022,  # arXiv:2204.01697
    "mnasnet": 2018,  # arXiv:1807.11626
    "mobilenet_v2": 2018,  # arXiv:1801.04381
    "mobilenet_v3": 2019,  # arXiv:1905.02244
    "regnet": 2020,  # arXiv:2003.13678
    "resnet": 2015,  # arXiv:1512.03385
    "resnext": 2016,  # arXiv:1611.05431
    "shufflenet_v2": 2018,  # arXiv:1807.11164
    "squeezenet": 2016,  # arXiv:1602.07360
    "swin_v2": 2021,  # arXiv:2111.09883
    "swin_": 2021,  # arXiv:2103.14030
    "vgg": 2014,  # arXiv:1409.1556
    "vit": 2020,  # arXiv:2010.11929
    "wide_resnet": 2016,  # arXiv:1605.07146
}


@dataclass(frozen=True)
class Net:
    """One network of a comparison.

    Attributes:
        name: as asked for.
        input_size: side of the image in pixels.
        params: trainable parameters, without auxiliary heads.
        macs: MACs of one image's forward.
        activation_bytes: of one image: itself and the outputs of convolutions, pools, linear layers and attention.
        saved_bytes: what autograd keeps of one image for the backward of a training step; None where the network cannot
            be trained on a single image.
        published: top-1 and top-5 accuracy on ImageNet in per cent by weight set, oldest recipe first; empty where none
            is known for this size and number of classes.
        measured: what it took here, if measured.
    """

    name: str
    input_size: int
    params: int
    macs: int
    activation_bytes: int
    saved_bytes: int | None
    published: dict[str, tuple[float, float]]
    measured: Measured | None = None

    @property
    def year(self) -> int | None:
        """When its family was published; None if unknown."""
        return next((year for begins, year in YEARS.items() if self.name.startswith(begins)), None)


@dataclass(frozen=True, repr=False)
class Comparison(Report):
    """Networks side by side; see `compare`.

    Attributes:
        nets: in the order asked for.
        batch: images at a time when measured.
        machine: what it was measured on; empty if it was not.
    """

    nets: tuple[Net, ...]
    batch: int
    machine: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers; counts in units, sizes in bytes, times in seconds, accuracies in per cent."""
        nets = [asdict(net) | {"flops": 2 * net.macs, "year": net.year} for net in self.nets]
        return {"nets": nets, "batch": self.batch, "machine": self.machine}

    def tables(self) -> list[Table]:
        """One table."""
        percent, rate = "{:.2f}".format, "{:,.1f}".format
        columns = [
            Column("name", "network", left=True),
            Column("year", "year"),
            Column("input_size", "px"),
            Column("params", "M params", mega),
            Column("macs", "G MACs", lambda value: mega(value / 1e3, 3)),
            Column("activation_bytes", "activations MB", mega),
            Column("saved_bytes", "autograd MB", mega),
            Column("top1", "top-1 %", percent),
            Column("top5", "top-5 %", percent),
            Column("best_top1", "best recipe %", percent),
        ]
        rows: list[tuple[Any, ...]] = []
        for net in self.nets:
            scores = list(net.published.values())
            first, best = (scores[0], scores[-1][0]) if scores else ((None, None), None)
            costs = (net.input_size, net.params, net.macs, net.activation_bytes, net.saved_bytes)
            rows.append((net.name, net.year, *costs, *first, best))
        title = "Networks, one image, float32"
        if self.machine:
            title += f"; measured with {self.batch} images (latency: 1) on {self.machine}"
            columns += [
                Column("latency", "latency ms", lambda value: f"{1e3 * value:.1f}"),
                Column("throughput", "images/s", rate),
                Column("memory", "peak MB", lambda value: mega(value, 0)),
                Column("train_throughput", "train images/s", rate),
                Column("train_memory", "train peak MB", lambda value: mega(value, 0)),
            ]
            empty = (None,) * 5
            rows = [
                row + (tuple(asdict(net.measured).values()) if net.measured else empty)
                for row, net in zip(rows, self.nets, strict=True)
            ]
        return [Table(title, columns, rows)]


def compare(
    names: Iterable[str | Arch],
    *,
    num_classes: int = 1000,
    input_size: int | None = None,
    measure: bool = False,
    batch: int = 8,
    device: str = "auto",
    seconds: float = 1.0,
    callback: Callable[[str], None] | None = None,
) -> Comparison:
    """VGGs and any classifiers of torchvision side by side: size, cost, published accuracy, and what they take here.

    VGGs are computed as `describe` does; other networks are built without memory (torch's meta device) and counted
    while they run there (`torch.utils.flop_counter`). The counts at the usual size and for 1000 classes are kept in
    `assets/torchvision.json`, so that they need not be repeated.

    Args:
        names: a VGG's name (or `Arch`), or a name that `torchvision.models.list_models` has, such as `resnet50`.
        num_classes: outputs; an `Arch` has its own.
        input_size: side of the image in pixels; None means what each network's published weights were tested at.
        measure: run each network, randomly initialised, for latency, throughput and peak memory.
        batch: images at a time when measured.
        device: where to measure; `auto` means a CUDA device if there is one.
        seconds: how long to repeat each of the three timings, at least three times.
        callback: called with each network's name before work on it begins.

    Raises:
        InputError: no name, an unknown one, or a size or batch that the network cannot take.
        DependencyError: a network of torchvision's where torchvision is missing or broken.
    """
    if isinstance(names, str):
        raise InputError(f"names is a list of networks: write [{names!r}]")
    batch, num_classes = whole_number("batch", batch), whole_number("num_classes", num_classes)
    networks = [*dict.fromkeys(_network(name, num_classes) for name in names)]
    if not networks:
        raise InputError("nothing to compare: name at least one network, such as 'vgg16'")
    if input_size is not None:
        input_size = whole_number("input_size", input_size)
    builders = [_builder(network, num_classes, input_size) for network in networks]  # checks all before work begins
    place = None
    if measure:
        from vggfeat.devices import resolve
        from vggfeat.modes import with_gradients

        place = resolve(device)
    nets = []
    for label, look, build in builders:
        if callback:
            callback(label)
        net = look()
        if place is not None:
            size = net.input_size
            try:
                with with_gradients():
                    net = replace(net, measured=measure_net(build, size, batch, place, seconds))
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):  # to normalise a batch by
                    raise
                raise InputError(
                    f"{label} cannot be trained on {counted(batch, 'image')} of {size}×{size} "
                    f"({first_line(error)}): raise batch"
                ) from error
        nets.append(net)
    return Comparison(tuple(nets), batch, machine(place) if place is not None else "")


_Builder = tuple[str, Callable[[], Net], Callable[[], "nn.Module"]]


def _network(name: str | Arch, num_classes: int) -> str | Arch:
    """A VGG as data, so that each is there once, whatever it is called; another network's name as it is."""
    if isinstance(name, Arch):
        return name
    try:
        return replace(parse(name), num_classes=num_classes)
    except InputError:
        if not isinstance(name, str):
            raise
        return name


def _builder(name: str | Arch, num_classes: int, input_size: int | None) -> _Builder:
    """The network's label, a function for its costs, and one that builds it."""
    if isinstance(name, str):
        net = _counted().get(name)
        if net is not None and num_classes == 1000 and input_size in (None, net.input_size):
            return name, lambda: net, functools.partial(_torchvision_net, name, num_classes)
        return _uncounted(name, num_classes, input_size)
    arch = name
    size = 224 if input_size is None else input_size
    report = describe(arch, input_size=size)

    def build() -> nn.Module:
        from vggfeat.network import VGG

        return VGG(arch)

    paper = arch == parse(arch.name) and size == 224  # as for the published accuracies
    published = {"IMAGENET1K_V1": ACCURACY[arch.name]} if paper and arch.name in ACCURACY else {}
    costs = (report.params, report.macs, report.activation_bytes, report.saved_bytes)
    return report.label, lambda: Net(report.label, size, *costs, published), build


@functools.cache
def _counted() -> dict[str, Net]:
    """Torchvision's classifiers at their own size and 1000 classes, counted once: importing torch takes seconds."""
    nets = json.loads(COUNTED.read_text(encoding="utf-8"))
    return {net["name"]: Net(**net | {"published": {k: tuple(v) for k, v in net["published"].items()}}) for net in nets}


def _uncounted(name: str, num_classes: int, input_size: int | None) -> _Builder:
    models = _torchvision_models(name)
    known = models.list_models(module=models)
    ours = [*ARCHS, *(f"{vgg}_bn" for vgg, config in ARCHS.items() if config not in LRN_AFTER)]
    check_choice("network", name, dict.fromkeys([*ours, *known]))
    weights = [entry for entry in models.get_model_weights(name) if entry.name.startswith("IMAGENET1K_V")]
    own = weights[0].transforms.keywords["crop_size"] if weights else 224
    size = own if input_size is None else input_size
    published = {}
    for entry in weights:
        score = entry.meta["_metrics"]["ImageNet-1K"]
        if num_classes == 1000 and entry.transforms.keywords["crop_size"] == size:
            published[entry.name] = (score["acc@1"], score["acc@5"])
    build = functools.partial(_torchvision_net, name, num_classes)
    return name, lambda: _count(name, build, size, published), build


def _torchvision_net(name: str, num_classes: int) -> nn.Module:
    models = _torchvision_models(name)
    with warnings.catch_warnings():  # GoogLeNet and Inception warn of a default that will change
        warnings.simplefilter("ignore", FutureWarning)
        net: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
    for child, _ in list(net.named_children()):
        if child.lower().startswith("aux"):  # heads that help training and are absent from published counts
            setattr(net, child, None)
            net.aux_logits = False  # type: ignore[assignment]
    return net


def _torchvision_models(name: str) -> Any:
    otherwise = (
        f"{name!r} is no VGG ({', '.join(ARCHS)}, '_bn' behind), and torchvision, which may know it, does not work "
        "here: install the torchvision that belongs to your torch"
    )
    return optional("torchvision", otherwise).models


def _count(name: str, build: Callable[[], nn.Module], size: int, published: dict[str, tuple[float, float]]) -> Net:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Outputs(TorchDispatchMode):
        """Adds up the output bytes of layers with arithmetic or pooling."""

        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if any(part in func.__name__ for part in ("convolution", "mm", "max_pool", "avg_pool2d", "attention")):
                first = out[0] if isinstance(out, tuple) else out
                if "adaptive" not in func.__name__:
                    self.total += first.numel() * first.element_size()
            return out

    try:
        with torch.device("meta"):
            net = build().eval()
    except NotImplementedError:  # RegNets compute their widths with tensors, whose values a meta tensor lacks
        net = build().to("meta").eval()
    image = torch.empty(1, 3, size, size, device="meta")
    counter, outputs = FlopCounterMode(display=False), Outputs()  # type: ignore[no-untyped-call]
    try:
        with counter, outputs:  # with gradients: without, attention takes a path that the counter does not know
            net(image)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name} cannot take images of {size}×{size}: {reason}") from error
    try:
        saved: int | None = saved_for_backward(net.train(), image)
    except ValueError:  # BN of a single value
        saved = None
    params = sum(p.numel() for p in net.parameters())
    activations = image.numel() * image.element_size() + outputs.total
    return Net(name, size, params, counter.get_total_flops() // 2, activations, saved, published)
