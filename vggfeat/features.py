"""Images to taps: the one place that checks and normalises input, and the module around the trunk."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vggfeat import trunk as _trunk
from vggfeat.arch import HEAD_NAMES, PADDINGS, POOLINGS, Arch, check_names, layer_names
from vggfeat.devices import trunk_dtype
from vggfeat.errors import InputError, check_choice, warn
from vggfeat.functional import average_pool
from vggfeat.modes import exporting, in_functorch, no_autocast, values_are_hidden, without_modes
from vggfeat.settings import PRECISIONS
from vggfeat.trunk import OnTap, PickledTrunk, Plan, TapGradOf, TapGradOfRows, Trunk, Walk, whole
from vggfeat.weights import DEFAULT, SETS, WeightsLike, load, resolved
from vggfeat.weights.state_dicts import LINEAR

# devices on which the trunk's own walk runs; elsewhere ordinary operations do
CUSTOM_BACKWARD_DEVICES = ("cpu", "cuda")
# bytes of one channel of the images up to which nothing is packed where the gradient comes with the value, on a CPU:
# 60 MB in all, for VGG-19 with max pooling
SMALL = 1 << 18

RANGE = "range"  # the warning about it

Pullback = Callable[[TapGradOf], Tensor]
PullbackByRows = Callable[[TapGradOfRows], Tensor]


class VGGFeatures(nn.Module):
    """The values of named VGG layers for images.

    The weights are permanently frozen: the module has no parameters and no buffers, gradients flow to the images only,
    and nothing is run past the deepest layer asked for. It computes wherever the images are, so `.to()` has nothing to
    move. Modules with the same weights share one copy of them, deep copies and pickles included. (For a network with
    trainable weights use `vggfeat.vgg16().taps(x, names)`.)

    Args:
        layers: names such as `conv3_3` (the convolution's own output), `bn3_3`, `relu3_3`, `pool3`, `fc7`.
        arch: the network, such as `"vgg19"`; None means the weights' own, and vgg16 where nothing implies one.
        weights: see `vggfeat.weights.load`; the environment variable VGGFEAT_WEIGHTS changes the default.
        pooling: `"max"` (the network's own), `"average"` (Gatys et al. 2016, section 2) or `"l2"`: the root of the
            mean square of each 2×2 window.
        padding: `"zeros"` (the network's own), `"reflect"` or `"replicate"`.
        precision: `"float32"` (bfloat16 inside autocast, float64 for float64 images), `"bfloat16"`, or `"auto"`:
            bfloat16 where the device multiplies such matrices in hardware, else float32. A CPU that cannot multiply
            bfloat16 at all computes it in float32, which saves memory but no time.
        input_range: the lowest and the highest value of an image.
        repeat_grey: accept (N,1,H,W) and repeat the channel three times.
        keep: what is saved for the backward: `"bits"` takes least memory, `"values"` least time, above all in
            bfloat16 on a CPU.

    Raises:
        InputError: an unknown layer, a layer that the network lacks, or an unknown choice.
        WeightsError: weights that are unavailable, or do not reach the deepest layer.
    """

    # so that modules that hold this one can be scripted, though not calls of it
    __jit_unused_properties__ = ("arch", "input_range")

    def __init__(
        self,
        layers: Sequence[str],
        arch: str | Arch | None = None,
        weights: WeightsLike = DEFAULT,
        pooling: str = "max",
        padding: str = "zeros",
        precision: str = "float32",
        input_range: tuple[float, float] = (0.0, 1.0),
        repeat_grey: bool = False,
        keep: str = "bits",
    ) -> None:
        super().__init__()
        names = tuple(dict.fromkeys(layer_names(layers)))
        check_choice("precision", precision, PRECISIONS)
        check_choice("keep", keep, ("bits", "values"))
        try:
            low, high = (float(value) for value in input_range)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"input_range is lowest and highest value, such as (0, 255); got {input_range!r}"
            ) from error
        if not (low < high and math.isfinite(high - low)):
            raise InputError(f"input_range must rise and be finite, got ({low:g}, {high:g})")
        check_choice("pooling", pooling, POOLINGS)
        check_choice("padding", padding, PADDINGS)
        told = resolved(weights)
        published = isinstance(told, str) and told in SETS
        check_names(names, arch or ("vgg16" if published else None))  # before half a gigabyte is fetched
        with without_modes():  # inside `torch.func.grad`, too
            loaded = load(weights, arch, classifier=not HEAD_NAMES.isdisjoint(names))
            loaded.require(names)
            key = loaded.current_key
        if told == "auto" and loaded.name != "imagenet":
            warn(f"weights='auto' resolved to {loaded.label}")
        self.layers = names
        self.weights = loaded.label
        self.precision = precision
        self._input_range = (low, high)
        self.repeat_grey = repeat_grey
        self.keep = keep
        arch = loaded.arch
        in_trunk = tuple(name for name in names if name not in arch.head_names)
        deepest = max(map(arch.names.index, names))
        self._head = tuple(name for name in arch.head_names if arch.names.index(name) <= deepest)
        if self._head and "pool5" not in in_trunk:
            in_trunk = (*in_trunk, "pool5")
        self.plan = Plan(arch, in_trunk, pooling, padding)
        held = {f"features.{layer.index}." for layer in arch.until(names)}
        state = {
            key: value
            for key, value in loaded.state.items()
            if key[: key.rindex(".") + 1] in held or (self._head and key.startswith("classifier."))
        }
        self.trunk = Trunk.shared(arch, state, key)
        self._held, self._mean, self._std = tuple(sorted(state)), loaded.mean, loaded.std
        # (x - low) / (high - low), then (· - mean) / std, as one factor and one shift per channel
        span = high - low
        self._scale = tuple(1 / (span * std) for std in loaded.std)
        self._shift = tuple(-(low / span + mean) / std for mean, std in zip(loaded.mean, loaded.std, strict=True))
        # what was said once, and on which devices values were looked at; one set for all replicas of a DataParallel
        self._done: set[str | torch.device] = set()

    def joined(self, *others: VGGFeatures) -> VGGFeatures:
        """The same with the layers of others, too.

        Args:
            others: with the same weights and options, but for `keep`.

        Raises:
            InputError: they differ.
        """
        every = (self, *others)
        for name in ("arch", "weights", "pooling", "padding", "precision", "input_range", "repeat_grey"):
            first, *rest = (getattr(each.plan if name in ("pooling", "padding") else each, name) for each in every)
            if odd := [value for value in rest if value != first]:
                got = [f"{a.name} with head {a.head}" if isinstance(a, Arch) else str(a) for a in (first, odd[0])]
                raise InputError(f"one pass needs the same {name}, got {' and '.join(got)}")
        if any(each.trunk is not self.trunk for each in others):
            raise InputError(f"one pass needs the same weights, not others that are called {self.weights}, too")
        joined = object.__new__(type(self))
        joined.__dict__.update(self.__dict__)
        joined.layers = tuple(dict.fromkeys(name for each in every for name in each.layers))
        in_trunk = dict.fromkeys(name for each in every for name in each.plan.names)
        joined.plan = replace(self.plan, names=tuple(in_trunk))
        joined._head = max((each._head for each in every), key=len)
        joined._held = tuple(sorted({key for each in every for key in each._held}))
        joined._done = set()
        return joined

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"trunk": PickledTrunk(self.trunk, self._held)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        trunk = state["trunk"]  # a part where this is a copy, the trunk itself where it was pickled
        state = state | {"trunk": trunk.trunk if isinstance(trunk, PickledTrunk) else trunk}
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    @property
    def input_range(self) -> tuple[float, float]:
        """The lowest and the highest value of an image; it cannot be changed."""
        return self._input_range

    @property
    def arch(self) -> Arch:
        """The network."""
        return self.plan.arch

    @torch.jit.unused
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The taps.

        Args:
            images: RGB (N,3,H,W), floating, in `input_range`.

        Returns:
            For each of `layers`, in that order, its value (N,C,h,w) or (N,C), in the trunk's precision; values
            (N,C,h,w) are laid out channels_last.

        Raises:
            InputError: another shape or channel count, integers, images too small for the deepest layer, or NaN or
                infinite values (off the CPU checked in a device's first batch only, and not under `torch.compile` and
                `torch.func`: there they make the taps NaN).
        """
        return self.taps(self.checked(images))

    def taps(self, images: Tensor) -> dict[str, Tensor]:
        """Like a call of the module, for images (N,3,H,W) known to be good: nothing is checked."""
        filters = self._filters(images)
        with no_autocast(images.device):  # autocast's choice is already in the filters' type
            return self._run(self._normalised(images), filters)

    def vjp(self, images: Tensor) -> tuple[dict[str, Tensor], Pullback]:
        """The taps of images known to be good, outside autograd, and the pullback to the images.

        Args:
            images: RGB (N,3,H,W), floating, in `input_range`.

        Returns:
            The taps by name, and the pullback: given a function `tap_grad(name, tap)` of the gradient with respect to a
            tap of that value, it returns the gradient with respect to the images, in their type. `tap_grad` is called
            once for each tap, deepest first, when the backward gets there, and the tap is then freed, so that there is
            never more than one such gradient (except on a CPU within the first block, with a classifier's layers, and
            on devices that leave the walk to autograd). The pullback can be called once and empties the taps. On a CPU
            it keeps values of small images, whatever `keep` says.
        """
        if not self._walks(images):
            return self._vjp_by_autograd(images)
        keep = "values" if self._are_small(images) else self._keep_beside_taps
        with self._outside_autograd(images, keep) as (x, walk):
            taps, pullback = walk.vjp(x)
        return taps, functools.partial(self._image_grad, pullback, images.dtype)

    def vjp_by_rows(self, image: Tensor, on_tap: OnTap) -> PullbackByRows:
        """As `vjp` of one image (1,3,H,W), for what can be computed from a tap, and its gradient, some rows at a time.

        On a CPU the first convolution's taps, the largest of all, are never whole, and of the taps' gradients only the
        deepest one is. Values (1,C) of a classifier, and all values on devices that leave the walk to autograd, come
        whole.

        Args:
            image: RGB (1,3,H,W), floating, in `input_range`.
            on_tap: called as `on_tap(name, part, rows)` for every tap, shallow to deep, as it is made.

        Returns:
            The pullback: given a function `tap_grad(name, part, rows)` of the gradient with respect to these rows of a
            tap, called as often as needed, it returns the gradient with respect to the image, in its type. Off the CPU,
            where a part is the whole, the function may give a `trunk.Product`.
        """
        if not self._walks(image):
            taps, pull = self._vjp_by_autograd(image)
            for name, tap in taps.items():
                on_tap(name, tap, _every_row(tap))
            return lambda tap_grad: pull(lambda name, tap: whole(tap_grad(name, tap, _every_row(tap))))
        with self._outside_autograd(image, self._keep_beside_taps) as (x, walk):
            pullback = walk.vjp_by_rows(x, on_tap)
        return functools.partial(self._image_grad, pullback, image.dtype)

    def taps_by_rows(self, image: Tensor, on_tap: OnTap) -> None:
        """The taps of one image (1,3,H,W) as `vjp_by_rows` gives them to `on_tap`, and no pullback."""
        if not self._walks(image):
            with torch.no_grad():
                for name, tap in self.taps(image).items():
                    on_tap(name, tap, _every_row(tap))
            return
        with self._outside_autograd(image, "none") as (x, walk):
            walk.forward(x, on_tap)

    def _walks(self, images: Tensor) -> bool:
        """Whether the trunk's own walk runs instead of autograd."""
        return not self._head and images.device.type in CUSTOM_BACKWARD_DEVICES

    @property
    def _keep_beside_taps(self) -> str:
        """What a walk keeps whose caller holds the taps."""
        return "taps" if self.keep == "bits" else "values"

    def _are_small(self, images: Tensor) -> bool:
        """Whether packing bits would save little memory and cost time that shows."""
        size = trunk_dtype(self.precision, images.device, images.dtype).itemsize
        return images.device.type == "cpu" and images[:, 0].numel() * size <= SMALL

    @contextmanager
    def _outside_autograd(self, images: Tensor, keep: str) -> Iterator[tuple[Tensor, Walk]]:
        """The normalised images and the walk for them; `keep` as `trunk.stage.Keep`."""
        walk = Walk(self._filters(images), self.plan, keep)
        # autocast's choice is already in the filters' type, and in float16 it refuses to concatenate bfloat16
        with torch.no_grad(), no_autocast(images.device):
            yield self._normalised(images), walk

    @torch.no_grad()
    def _image_grad(self, pullback: Callable[[Any], Tensor], dtype: torch.dtype, tap_grad: Any) -> Tensor:
        """The gradient with respect to the images, in their type, by the pullback to the normalised ones."""
        grad = pullback(tap_grad)
        scale, _ = self._factors(grad)
        return grad.mul_(scale).to(dtype)

    def _vjp_by_autograd(self, images: Tensor) -> tuple[dict[str, Tensor], Pullback]:
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            taps = self.taps(leaf.view_as(leaf))  # hooks of counters and trackers cannot handle a leaf
        known = {name: tap.detach() for name, tap in taps.items()}

        def pullback(tap_grad: TapGradOf) -> Tensor:
            deepest_first = sorted(taps, key=self.arch.names.index, reverse=True)
            with torch.no_grad(), no_autocast(leaf.device):
                grads = [tap_grad(name, known.pop(name)) for name in deepest_first]
            return torch.autograd.grad([taps.pop(name) for name in deepest_first], leaf, grads)[0]

        return known, pullback

    def checksum(self) -> str:
        """Eight hex digits (CRC-32) of all that the taps depend on, options aside: weights and their normalisation."""
        if torch._C._len_torch_dispatch_stack():  # fake tensors have no values
            return "unknown"
        crc = zlib.crc32(repr((self._mean, self._std)).encode())
        with without_modes():
            for key in self._held:
                values: Any = self.trunk.state[key].flatten().view(torch.uint8).numpy()
                crc = zlib.crc32(values, zlib.crc32(key.encode(), crc))
        return f"{crc:08x}"

    def _run(self, x: Tensor, filters: list[Tensor]) -> dict[str, Tensor]:
        if exporting() or x.device.type not in CUSTOM_BACKWARD_DEVICES:
            values = _trunk.plain(x, filters, self.plan)
        else:
            values = _trunk.run(x, filters, self.plan, keep=self.keep)
        taps = dict(zip(self.plan.by_depth, values, strict=True))
        if self._head:
            taps |= self._run_head(taps["pool5"])
        return {name: taps[name] for name in self.layers}

    def _normalised(self, images: Tensor) -> Tensor:
        work = torch.float64 if images.dtype == torch.float64 else torch.float32
        images = images.to(work)
        if not in_functorch():  # where tensors have another rank
            # a CPU multiplies planes ten times as fast as pixels of three values
            planes = images.device.type == "cpu"
            images = images.contiguous(memory_format=torch.contiguous_format if planes else torch.channels_last)
        scale, shift = self._factors(images)
        return images * scale + shift

    def _factors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The normalisation as one factor and one shift per channel, (3,1,1), in the type of the images."""
        return per_channel(self._scale, images), per_channel(self._shift, images)

    def _filters(self, images: Tensor) -> list[Tensor]:
        linear = [LINEAR[name] for name in self._head if name in LINEAR]
        # an exported graph serves any size
        size = None if exporting() else (images.shape[2], images.shape[3])
        dtype = trunk_dtype(self.precision, images.device, images.dtype)
        return self.trunk.filters(self.plan, images.device, dtype, linear, size)

    def _run_head(self, x: Tensor) -> dict[str, Tensor]:
        taps = {}
        slim = self.arch.head == "slim"
        x = (F.adaptive_avg_pool2d(x, 1) if slim else average_pool(x)).flatten(1)
        for name in self._head:
            x = F.linear(x, *self.trunk.linear(LINEAR[name], x.device, x.dtype)) if name in LINEAR else F.relu(x)
            taps[name] = x
        return taps

    def checked(self, images: Tensor) -> Tensor:
        """The images (N,3,H,W) unchanged, grey ones repeated; see `forward` for what is refused."""
        count_and_size(images)
        shape = tuple(images.shape)
        if not images.is_floating_point():
            in_bytes = "use .float()" if self.input_range[1] == 255 else "divide 8-bit values by 255"
            hint = f"; {in_bytes}" if images.dtype == torch.uint8 else ""
            raise InputError(f"expected floating-point images, got {images.dtype}{hint}")
        if images.shape[1] == 1 and self.repeat_grey:
            images = images.expand(-1, 3, -1, -1)
        if images.shape[1] != 3:
            hints = {1: "; repeat_grey=True accepts one channel", 4: "; images[:, :3] is RGBA without transparency"}
            hint = hints.get(images.shape[1], "")
            if images.shape[3] == 3:
                hint = "; channels come second: images.permute(0, 3, 1, 2)"
            raise InputError(f"expected 3 channels (N,3,H,W), got shape {shape}{hint}")
        if min(images.shape[2:]) < self.plan.min_size:
            deepest = max(self.plan.names, key=self.arch.names.index)
            raise InputError(
                f"images of {shape[3]}×{shape[2]} are too small for {deepest}: "
                f"it needs at least {self.plan.min_size} pixels on each side"
            )
        if not values_are_hidden():
            self._check_values(images)
        return images

    def _check_values(self, images: Tensor) -> None:
        if images.device.type == "meta" or not images.numel():
            return
        if images.device.type != "cpu":
            # reading two numbers back at every step would stall the device: only its first batch is checked
            if images.device in self._done:
                return
            self._done.add(images.device)
        low, high = (float(value) for value in torch.aminmax(images.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(
                "the images hold NaN or infinite values: check what produced them, a bad file or too long a step"
            )
        if RANGE in self._done:
            return
        floor, ceiling = self.input_range
        span = ceiling - floor
        reach = f"images reach from {low:.4g} to {high:.4g}"
        if low < floor - span / 2 or high > ceiling + span / 2:
            normalised = span == 1 and -2.2 < low < -0.5 and high < 2.7  # as by ImageNet's mean and standard deviation
            hint = "give them before their normalisation, which the features do themselves, or " if normalised else ""
            self._done.add(RANGE)
            warn(
                f"{reach}, far outside input_range=({floor:g}, {ceiling:g}); "
                f"{hint}say what they are, e.g. input_range=(-1, 1) or (0, 255)"
            )
        elif span >= 255 and 0 < high - floor <= span / 200:
            self._done.add(RANGE)
            warn(f"{reach}, a small part of input_range=({floor:g}, {ceiling:g}); say what they are, e.g. (0, 1)")

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{', '.join(self.layers)}; {self.arch.name}, weights {self.weights}, {self.precision}"


def _every_row(tap: Tensor) -> slice:
    return slice(0, tap.shape[2] if tap.ndim == 4 else 1)


def per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    """One value per channel, (C,1,1), in the type and on the device of `like`."""
    # a compiler makes them constants; elsewhere they are cached, since a GPU waits for what is copied to it
    ready = _channels if torch.compiler.is_compiling() else _kept_channels
    return ready(values, like.dtype, like.device)


def _channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


@functools.cache
def _kept_channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with without_modes():
        return _channels(values, dtype, device)


def count_and_size(images: Tensor) -> tuple[int, tuple[int, int]]:
    """How many images, and their height and width.

    Raises:
        InputError: not a tensor (N,C,H,W).
    """
    if not isinstance(images, Tensor):
        hint = "; torchvision.transforms.functional.to_tensor(image)[None] makes one of a PIL image or an array"
        if isinstance(images, torch.fx.Proxy):
            hint = ", with which torch.fx traces: use torch.export, or keep the loss a leaf module"
        raise InputError(f"expected a tensor of images (N,3,H,W), got {type(images).__name__}{hint}")
    if images.ndim != 4:
        hints = {3: "; add the batch dimension: images[None]", 5: "; frames as images: video.flatten(0, 1)"}
        if images.ndim == 3 and images.shape[2] == 3 != images.shape[0]:
            hints[3] = "; channels come first, after the batch dimension: image.permute(2, 0, 1)[None]"
        raise InputError(f"expected images (N,3,H,W), got shape {tuple(images.shape)}{hints.get(images.ndim, '')}")
    return images.shape[0], (images.shape[2], images.shape[3])
