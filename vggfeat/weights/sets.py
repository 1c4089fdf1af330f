"""Weight sets by name, files, folders of runs and state dicts: found, loaded, put into a network."""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

from vggfeat.arch import BLOCK_CHANNELS, HEAD_NAMES, Arch, parse
from vggfeat.checkpoint import saved
from vggfeat.errors import InputError, WeightsError, WeightsUnavailableError, nearest
from vggfeat.weights.fetch import fetch, file_key, published_digest, verify
from vggfeat.weights.files import is_keras, read
from vggfeat.weights.random import random_state
from vggfeat.weights.state_dicts import (
    LINEAR,
    check_finite,
    fitted,
    head_shapes,
    infer_arch,
    keys_of,
    keys_of_linear,
    map_keys,
    misfits,
    widths,
)

if TYPE_CHECKING:
    from vggfeat.network import VGG

WeightsLike = Union[str, os.PathLike[str], Mapping[str, Tensor], "Weights", None]


@dataclass(frozen=True)
class Convention:
    """What input a network expects, for images in [0,1]: (x - mean) / std, RGB order, then BGR if `bgr`."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bgr: bool = False


IMAGENET = Convention((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Oxford's release: BGR, 0..255, minus the mean of the ILSVRC training set
CAFFE = Convention((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255), bgr=True)


@dataclass(frozen=True)
class Published:
    """A published weight file. Its name ends in the first eight hex digits of its sha256."""

    url: str
    convention: Convention
    licence: str

    @property
    def filename(self) -> str:
        """The file's name, here as at its source."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def digest(self) -> str:
        """The leading hex digits of the sha256 that the name publishes."""
        return published_digest(self.filename)


_TORCHVISION = "https://download.pytorch.org/models/"
_OXFORD = "https://web.eecs.umich.edu/~justincj/models/"
_BSD = "BSD-3-Clause (torchvision); trained on ImageNet"
_CC_BY = "CC BY 4.0, Karen Simonyan and Andrew Zisserman, Visual Geometry Group, University of Oxford"

SETS: dict[str, dict[str, Published]] = {
    "imagenet": {
        file.rsplit("-", 1)[0]: Published(_TORCHVISION + file, IMAGENET, _BSD)
        for file in (
            "vgg11-8a719046.pth",
            "vgg11_bn-6002323d.pth",
            "vgg13-19584684.pth",
            "vgg13_bn-abd245e5.pth",
            "vgg16-397923af.pth",
            "vgg16_bn-6c64b313.pth",
            "vgg19-dcbb9e9d.pth",
            "vgg19_bn-c79401a0.pth",
        )
    },
    "caffe": {  # Oxford's release in Justin Johnson's conversion
        file.rsplit("-", 1)[0]: Published(_OXFORD + file, CAFFE, _CC_BY)
        for file in ("vgg16-00b39a1b.pth", "vgg19-d01eb7cb.pth")
    },
}
# SSD's convolutions in torchvision; its transform says RGB, and 0..255 minus these colours
_FEATURES = Published(
    f"{_TORCHVISION}vgg16_features-amdegroot-88682ab5.pth",
    Convention((0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)),
    _BSD,
)
BUNDLED = Path(__file__).parents[1] / "assets" / "vgg19-slim.safetensors"  # assets/README.md is its card
NAMES = (*SETS, "bundled", "random", "auto")


class _Default(str):
    """The default of every `weights=`: what VGGFEAT_WEIGHTS says at the time of use, else "imagenet"."""


DEFAULT = _Default("imagenet")


@dataclass(frozen=True)
class Weights:
    """Weights as loaded.

    Attributes:
        arch: the network they belong to; `head` is None where they hold no classifier.
        state: torchvision's keys, float32, the first convolution in RGB order.
        mean: per channel R, G, B, of images in [0,1], to subtract.
        std: per channel, to divide by.
        name: what titles call them: a set, or the name of a file.
        key: equal for two loads of the same numbers in one process; networks with equal keys share one copy of them.
        note: what else there is to say of them: the file of a published set, or what they stand in for.
        loaded: the tensors that `key` stands for, with their versions.
    """

    arch: Arch
    state: dict[str, Tensor] = field(repr=False)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    name: str
    key: tuple[object, ...]
    note: str = ""
    loaded: tuple[tuple[Tensor, int], ...] = field(default=(), repr=False, compare=False)

    @property
    def current_key(self) -> tuple[object, ...]:
        """`key`, or where the state was modified or replaced since it was loaded, that of the numbers it holds now."""
        same = [value for value, version in self.loaded if version >= 0 and value._version == version]
        unmodified = len(same) == len(self.state) and all(map(operator.is_, same, self.state.values()))
        return self.key if unmodified else ("state", _digest(self.state))

    @property
    def label(self) -> str:
        """What users are told was used."""
        return _label(self.name, self.note)

    def require(self, names: Iterable[str]) -> None:
        """Check that everything up to the deepest of `names` is there.

        Raises:
            InputError: a layer that the network lacks.
            WeightsError: keys are missing, of which it names some and the deepest layer that these weights can serve,
                or a classifier's have other shapes or values that are not finite.
        """
        names, arch = list(names), self.arch
        if arch.head is None and (lacking := HEAD_NAMES.intersection(names)):
            arch = replace(arch, head="slim" if lacking == {"fc"} else "paper")
        arch.check(names)
        deepest = max(arch.names.index(name) for name in names)
        keys = {layer.name: keys_of(layer) for layer in self.arch.layers}
        keys |= {name: keys_of_linear(name) for name in LINEAR}
        missing: list[str] = []
        served = "none"
        for name in arch.names[: deepest + 1]:
            missing += [key for key in keys.get(name, ()) if key not in self.state]
            if not missing:
                served = name
        if missing:
            raise WeightsError(
                f"weights {self.label} do not reach {arch.names[deepest]}: "
                f"missing {', '.join(missing[:4])}{' …' * (len(missing) > 4)}; the deepest layer they serve is {served}"
            )
        needed, shapes = [key for name in arch.names[: deepest + 1] for key in keys.get(name, ())], head_shapes(arch)
        for key in filter(shapes.__contains__, needed):
            if (shape := tuple(self.state[key].shape)) != shapes[key]:
                raise WeightsError(
                    f"weights {self.label} have another classifier: {key} has shape {shape}, expected {shapes[key]}"
                )
            check_finite(key, self.state[key], self.label)

    @property
    def classifier(self) -> str:
        """Which they hold, in words."""
        if self.arch.head is not None:
            return f"a {self.arch.head} head for {self.arch.num_classes} classes"
        theirs = next((key for key in self.state if key.startswith("classifier.") and key.endswith(".weight")), None)
        if theirs is None:
            return "no classifier"
        return f"a classifier of another shape than VGG's ({theirs} has {tuple(self.state[theirs].shape)})"

    def served(self, names: Iterable[str]) -> list[str]:
        """Those of the layers, shallow to deep, that the weights reach.

        Raises:
            InputError: a layer that the network lacks.
            WeightsError: they do not reach the first.
        """
        reached: list[str] = []
        for name in names:
            try:
                self.require([name])
            except WeightsError:
                if not reached:
                    raise
                break
            reached.append(name)
        return reached


def _label(name: str, note: str) -> str:
    return f"{name} ({note})" if note else name


# ── load ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def load(
    weights: WeightsLike, arch: str | Arch | None = None, *, default: str = "vgg16", classifier: bool = False
) -> Weights:
    """Load a weight set.

    Args:
        weights: `"imagenet"` (torchvision's), `"caffe"` (Oxford's release), `"bundled"` (a slim VGG-19 that comes
            with this package), `"random"` (seeded, every layer's output calibrated to unit scale), `"auto"`
            (what VGGFEAT_WEIGHTS says, else imagenet where it can be had, else bundled, or random for an architecture
            other than vgg19), a path to a `.pth`, `.safetensors` or Keras `.h5` file or to the folder of a run of
            `train`, or a state dict. `"caffe:PATH"` says of a `.pth` or `.safetensors` file that it takes Oxford's
            input convention (BGR, 0..255); files published under a known name and Keras files need no prefix. With it,
            or under another name, a published file may have been saved again.
            `Weights` are returned as they are. None means untrained, which is `"random"`.
        arch: the network, by name; None means the file's own, and `default` where nothing implies one.
        default: that network.
        classifier: give random weights `arch`'s classifier too; other sets have one or not.

    Raises:
        WeightsUnavailableError: a published set that is neither here nor can be fetched or lacks the network, or a
            file that does not exist or cannot be read.
        WeightsError: a damaged or tampered file, a pickle that would run code, keys of another network.
        DependencyError: a `.h5` file without h5py.
        InputError: an unknown architecture, or `weights` of another type.
    """
    if isinstance(weights, Weights):
        if arch is not None and (wanted := parse(arch)).name != weights.arch.name:
            raise WeightsError(f"weights {weights.label} are of {weights.arch.name}, not of {wanted.name}")
        return weights
    told = "random" if weights is None else resolved(weights)
    follows = isinstance(weights, _Default) or (isinstance(weights, str) and told != weights)
    try:
        return _load(told, arch, default, classifier)
    except WeightsError as error:
        if follows and os.environ.get("VGGFEAT_WEIGHTS"):
            raise type(error)(f"{error} (VGGFEAT_WEIGHTS is {told!r})") from error
        raise


def _load(weights: Any, arch: str | Arch | None, default: str, classifier: bool) -> Weights:
    if isinstance(weights, Mapping):
        return _read_state(weights, arch, IMAGENET, "from a state dict")
    if not isinstance(weights, str | os.PathLike):
        ways = ("state_dict", "get_state_dict")  # of modules, and of torchvision's enums
        hint = "".join(f"; give its {name}()" for name in ways if hasattr(weights, name))
        raise InputError(
            f"weights is {', '.join(map(repr, NAMES))}, a path or a state dict, got {type(weights).__name__}{hint}"
        )
    if weights == "auto":
        return _load_auto(arch, default, classifier)
    if weights == "bundled":
        return _load_bundled(arch)
    if weights == "random":
        return _load_random(parse(arch or default), classifier)
    if isinstance(weights, str) and weights in SETS:
        return _load_published(weights, arch, default)
    return _load_path(os.fspath(weights), arch)


def _load_auto(arch: str | Arch | None, default: str, classifier: bool) -> Weights:
    try:
        return _load_published("imagenet", arch, default)
    except WeightsError as error:  # unavailable, or not what was published
        other = arch is not None and parse(arch).name != "vgg19"
        loaded = _load_random(parse(arch or default), classifier) if other else _load_bundled(arch)
        # no paths of this machine, as pictures store labels; `vggfeat weights fetch` gives the details
        why = "are unavailable" if isinstance(error, WeightsUnavailableError) else "are damaged"
        return replace(loaded, note=f"imagenet weights for {parse(arch or default).name} {why}")


def _load_bundled(arch: str | Arch | None) -> Weights:
    return _read_state(read(BUNDLED, mapped=True), arch, IMAGENET, "bundled", file_key(BUNDLED))


def _load_random(arch: Arch, classifier: bool) -> Weights:
    arch = arch if classifier else replace(arch, head=None)
    # the same numbers on any default device and under autocast
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        state = random_state(arch)
    return Weights(arch, state, IMAGENET.mean, IMAGENET.std, "random", ("random", arch), loaded=_versions(state))


def _load_published(name: str, arch: str | Arch | None, default: str) -> Weights:
    chosen = parse(arch or default)
    published = _published(name, chosen)
    try:
        path = find(name, chosen.name)
    except WeightsUnavailableError as error:
        if arch is not None and chosen.name != "vgg19":
            raise
        raise WeightsUnavailableError(f"{error}, or use the weights 'bundled' (a slim VGG-19)") from None
    key = file_key(path)
    return _read_state(read(path, mapped=True), chosen, published.convention, name, key, published.filename)


def resolved(weights: WeightsLike) -> Any:
    """What the default and `"auto"` mean: what VGGFEAT_WEIGHTS says, if it is set; other weights as they are."""
    default = isinstance(weights, _Default)
    if not default and not (isinstance(weights, str) and weights == "auto"):
        return weights
    told = os.environ.get("VGGFEAT_WEIGHTS") or ("imagenet" if default else "auto")
    if told not in NAMES and not os.path.exists(os.path.expanduser(told.removeprefix("caffe:"))):
        raise WeightsUnavailableError(f"VGGFEAT_WEIGHTS is {told!r}: expected {', '.join(NAMES)} or a file, found none")
    return told


def _versions(state: Mapping[str, Tensor]) -> tuple[tuple[Tensor, int], ...]:
    return tuple((value, -1 if value.is_inference() else value._version) for value in state.values())


def _digest(state: Mapping[str, Tensor]) -> str:
    """A sha256 of all values, with their keys, types and shapes."""
    sha = hashlib.sha256()
    for key in sorted(state):
        sha.update(f"{key}{state[key].dtype}{tuple(state[key].shape)}".encode())
        raw: Any = state[key].flatten().contiguous().view(torch.uint8).numpy()
        sha.update(raw)
    return sha.hexdigest()


def _load_path(text: str, arch: str | Arch | None) -> Weights:
    caffe, place = text.startswith("caffe:"), text.removeprefix("caffe:")
    if not place:
        raise WeightsUnavailableError(f"no weights: {text!r} names no file")
    given = Path(os.path.expanduser(place))
    path = _of_run(given)
    try:
        path.stat()
    except (OSError, ValueError) as error:  # the second is of a name with a zero byte
        if "://" in text:  # first, since on Windows that is no name at all
            raise WeightsUnavailableError(f"{text} is an address: download the file, and give its path") from None
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise WeightsUnavailableError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
        theirs = text.upper().startswith(("IMAGENET1K", "DEFAULT"))  # what torchvision calls its own
        near = "did you mean imagenet?" if theirs else nearest(text, NAMES)
        hint = "" if path.suffix or len(path.parts) > 1 else f"; or a weight set: {near}"
        raise WeightsUnavailableError(f"no weights at {path}: give a .pth, .safetensors or .h5 file{hint}") from None
    if path.is_dir():
        if kept := saved(path / "checkpoints"):
            raise WeightsError(
                f"the run in {path} has no weights yet: resume its training with resume=True (--resume), or name a "
                f"checkpoint, such as {kept[0]}"
            )
        raise WeightsError(f"{path} is a folder without weights.safetensors: give a .pth, .safetensors or .h5 file")
    known = published_files()
    published = None if caffe else known.get(path.name) or known.get(path.resolve().name)
    if published:
        verify(
            path, published.digest, otherwise="rename it if it was saved again, and say caffe:PATH if it is Oxford's"
        )
    convention = CAFFE if caffe or is_keras(path) else published.convention if published else IMAGENET
    name = "caffe:" * caffe + (path.name if path == given else f"{given.name}/{path.name}")
    key = (*file_key(path), convention)  # before it is read: a file that takes its place meanwhile has another
    raw = read(path, mapped=published is not None)  # others may be written again
    return _read_state(raw, arch, convention, name, key)


def published_files() -> dict[str, Published]:
    """Every published file that is known, by its name."""
    return {file.filename: file for file in (_FEATURES, *(each for group in SETS.values() for each in group.values()))}


def _of_run(path: Path) -> Path:
    """The weights in a run's folder; any other path unchanged."""
    return inside if os.path.isfile(inside := path / "weights.safetensors") else path


def _read_state(
    raw: Mapping[str, Any],
    arch: str | Arch | None,
    convention: Convention,
    name: str,
    key: tuple[object, ...] | None = None,
    note: str = "",
) -> Weights:
    label = _label(name, note)
    state = map_keys(raw, label, convention == CAFFE)
    if key is None:  # the caller's own tensors, which may go on training
        state = {each: value.to("cpu", copy=True) for each, value in state.items()}
        key = ("state", _digest(state))
    inferred = infer_arch(state, label)
    if arch is not None:
        wanted = parse(arch)
        if (wanted.config, wanted.batch_norm) != (inferred.config, inferred.batch_norm):
            # a shallow file fits several networks: it serves any of them whose keys and shapes it has
            wanted = fitted(replace(wanted, head=inferred.head, num_classes=inferred.num_classes), state)
            if misfits(wanted, state):
                raise WeightsError(f"weights {label} belong to {inferred.name}, not to {wanted.name}")
            inferred = wanted
    if convention.bgr:
        state["features.0.weight"] = state["features.0.weight"].flip(1)
    # a first convolution that took 0..255 still does: its std of 1/255 travels along
    return Weights(inferred, state, convention.mean, convention.std, name, key, note, _versions(state))


def load_weights(net: VGG, weights: WeightsLike, *, head: bool = True) -> VGG:
    """Load a weight set into a network, in place.

    The network then takes images normalised by ImageNet's mean and standard deviation, whatever the set's own
    convention: another one is folded into conv1_1. (With zero padding that is exact except for the outermost ring of
    conv1_1, where black padding stands for a colour half a grey level away.)

    Args:
        net: any network of `vggfeat.vgg`.
        weights: see `load`.
        head: load the classifier too; False keeps the network's own, for a new set of classes, as do random `Weights`
            that hold none.

    Returns:
        `net`.

    Raises:
        InputError: `net` is something else, or `weights` of another type.
        WeightsError: as `load`, and where the classifier or its number of classes does not fit.
    """
    if not isinstance(getattr(net, "arch", None), Arch):
        raise InputError(f"expected a network of vggfeat.vgg, got {type(net).__name__}")
    loaded = load(weights, net.arch, classifier=head)
    arch, state = loaded.arch, dict(loaded.state)
    if arch.channels != net.arch.channels:
        raise WeightsError(f"weights {loaded.label} have {widths(arch)}, the network {widths(net.arch)}")
    head = head and (loaded.key[0] != "random" or arch.head is not None)
    if head and arch.head is not None and keys_of_linear(arch.names[-1])[0] not in state:
        loaded.require([arch.names[-1]])  # raises: the number of classes to compare is unknown
    if head and (arch.head, arch.num_classes) != (net.arch.head, net.arch.num_classes):
        raise WeightsError(
            f"weights {loaded.label} have {loaded.classifier}, "
            f"the network a {net.arch.head} head for {net.arch.num_classes}; "
            "load_weights(net, weights, head=False) loads the convolutions and leaves the head as it is"
        )
    loaded.require([arch.names[-1] if head else arch.layers[-1].name])
    mean, std, mean_here, std_here = (
        torch.tensor(values, dtype=torch.float32, device="cpu")  # whatever the default type is
        for values in (loaded.mean, loaded.std, IMAGENET.mean, IMAGENET.std)
    )
    scale, shift = std_here / std, (mean_here - mean) / std
    first = state["features.0.weight"]
    state["features.0.bias"] = state["features.0.bias"] + (first * shift[:, None, None]).sum((1, 2, 3))
    state["features.0.weight"] = first * scale[:, None, None]
    meta = next(net.parameters()).is_meta
    if meta and not head:
        net.classifier.to_empty(device="cpu")
        net.reset_parameters()
    own = net.state_dict()
    if meta:  # assigned tensors are now the network's: it may be trained, and saved over the file they came from
        state = {key: value.clone() for key, value in state.items() if key in own}
    for key in own:
        if not head and key.startswith("classifier."):
            state[key] = own[key]
        elif key.endswith("num_batches_tracked"):
            state.setdefault(key, torch.zeros((), dtype=torch.long, device="cpu"))
    net.load_state_dict({key: state[key] for key in own}, assign=meta)
    return net


def run_metadata(weights: str | os.PathLike[str]) -> dict[str, Any]:
    """What `vggfeat.train` recorded in weights and checkpoints (classes, size, scales, holdout); empty for any others.

    Raises:
        WeightsError: a damaged file.
    """
    weights = resolved(weights)
    path = _of_run(Path(os.path.expanduser(weights)))
    if not os.path.isfile(path) or path.suffix.lower() not in (".safetensors", ".pt"):
        return {}
    if path.suffix.lower() == ".pt":
        facts = read(path, mapped=True).get("vggfeat")
        return facts if isinstance(facts, dict) else {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("vggfeat", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is damaged or no safetensors file: {error}") from error
    return facts if isinstance(facts, dict) else {}


# ── find ───────────────────────────────────────────────────────────────────────────────────────────────


def _published(name: str, arch: Arch) -> Published:
    published = arch.channels == BLOCK_CHANNELS
    if not published or arch.name not in SETS[name]:
        what = arch.name if published else f"{arch.name} at {widths(arch)}"
        raise WeightsUnavailableError(f"there are no {name!r} weights for {what}: choose from {', '.join(SETS[name])}")
    return SETS[name][arch.name]


def folders() -> list[Path]:
    """Where published files are looked for: VGGFEAT_WEIGHTS_DIR, then torch.hub's cache."""
    own = os.environ.get("VGGFEAT_WEIGHTS_DIR")
    return [*([Path(os.path.expanduser(own))] if own else []), Path(torch.hub.get_dir()) / "checkpoints"]


def find(name: str, arch: str = "vgg16") -> Path:
    """The verified file of a published set: from VGGFEAT_WEIGHTS_DIR, torch.hub's cache, or fetched into the latter.

    Args:
        name: a key of `SETS`.
        arch: the network's name.

    Raises:
        WeightsUnavailableError: it is not here and cannot be fetched, or there is no such network in the set; the
            message lists the alternatives.
        WeightsError: it is here but damaged, or there is no such set.
        InputError: an unknown architecture.
    """
    if name in ("bundled", "random"):
        raise WeightsError(f"{name} weights need no file fetched: ask for them by that name, weights={name!r}")
    if name not in SETS:
        raise WeightsError(f"unknown weight set {name!r}: {nearest(name, SETS)}")
    published = _published(name, parse(arch))
    for folder in folders():
        if os.path.isfile(path := folder / published.filename):
            verify(path, published.digest)
            return path
    try:
        return fetch(published.url, folders()[-1])
    except WeightsUnavailableError as error:
        looked = " and ".join(map(str, folders()))
        raise WeightsUnavailableError(
            f"{name} weights for {arch} are unavailable: {published.filename} is not in {looked}, {error}; give a "
            "path or set VGGFEAT_WEIGHTS_DIR to a folder that has the file"
        ) from None
