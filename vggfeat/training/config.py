"""The settings of a training run and of a test, and recipes by name: every default is stated here alone. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vggfeat.arch import HEADS, INITS, MIN_SIDE, channels_at, parse
from vggfeat.errors import InputError, check_choice, whole_number
from vggfeat.settings import PRECISIONS, Settings, option

MAX_SIDE = 1 << 16  # of images, in pixels: JPEG's
ARCH = "vgg16_bn"  # where neither the settings nor weights name one


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of `train`; each is a flag of `vggfeat train` with the same name in dashes.

    The defaults are those of a plain run; `recipe("fast")` and its like set many at once. `dropout`, `momentum`,
    `label_smoothing`, `ema` and `holdout` are at least 0 and below 1; `lr`, `gamma` and `features_lr` are above 0;
    `pad`, `cutout`, `size` and `resize` are in pixels.

    Attributes:
        arch: `vgg16`, `vgg16_bn`, …; None means the weights' own, and vgg16_bn where there are none.
        head: `slim` (global average pool and one linear layer) or `paper` (fc6, fc7, fc8).
        width: factor on every channel count; 1 where weights are given.
        dropout: probability in the head.
        init: `kaiming` or `paper`, see `vggfeat.VGG`.
        weights: where to start: what `vggfeat.weights.load` knows; None means a fresh draw.
        new_head: with weights, draw the classifier anew, all of it, for other classes.
        freeze: with weights, leave everything up to this layer of the convolutional part as it is (`relu3_3`, `pool4`),
            batch statistics included.
        features_lr: factor on the learning rate of the convolutional part, against the head's.
        epochs: passes over the training set.
        batch_size: images of a step, over all processes, gathered in `accumulate` parts.
        accumulate: parts that a step's batch is computed in, one after the other.
        optimizer: `sgd` (with momentum), `adam` (weight decay coupled, as in the chapter), `adamw`, or `muon`, which
            moves all directions of the filters alike and keeps their norm, and the rest as SGD (`training/muon.py`).
        lr: the highest learning rate; of Muon's filters, the length of a step as a share of their norm.
        momentum: of SGD and Muon; Adam's first beta.
        nesterov: Nesterov's form of it, for SGD; Muon's always is.
        weight_decay: of weights, but not of Muon's filters, whose norm is kept; see `decay_all`.
        decay_all: decay biases and batch normalisation's parameters too.
        clip: largest norm of the gradient; 0 means any.
        schedule: `constant`, `step` (times `gamma` every `step_size` epochs), `linear` and `cosine` (to 0), `onecycle`
            (up, and down to almost 0; Smith and Topin 2019, arXiv:1708.07120).
        step_size: epochs of a step of `step`.
        gamma: factor of a step.
        warmup: epochs that the rate takes to rise, part of `epochs`; for `onecycle` 0 means a fifth of them.
        label_smoothing: share of the target spread over all classes (Szegedy et al. 2016, arXiv:1512.00567).
        mixup: alpha of mixup (Zhang et al. 2018, arXiv:1710.09412); 0 means none.
        cutmix: alpha of CutMix (Yun et al. 2019, arXiv:1905.04899); 0 means none. With both, one of them a batch.
        size: side of the square that the network sees; None means the images' own side where they have one, else 224.
        resize: shorter side that images are brought to before cropping, one number or the range that it is drawn from;
            None means as they are where they have one size, else 8/7 of `size`.
        pad: pixels added around each image before cropping.
        pad_mode: `zeros` (the mean colour) or `reflect`.
        flip: `none`, `random`, or `alternating`: each image is mirrored in every second epoch (Jordan 2024,
            arXiv:2404.00498, section 3.6).
        cutout: side of a square set to the mean colour at a random place (DeVries and Taylor 2017, arXiv:1708.04552).
        augment: `trivialaugment` changes each image by one of 14 operations, such as rotation, shear or contrast, of
            random strength (Müller and Hutter 2021, arXiv:2103.10158); for long runs.
        ema: decay, per step, of a moving average of the weights, which is then what is tested and saved; 0 means none.
        precision: `auto` (bfloat16 where the device multiplies it in hardware: AMX, AVX512-BF16, CUDA from sm80; else
            float32), `float32`, `bfloat16`, `float16` (with a gradient scaler). Weights and their sums are float32 in
            each.
        compile: compile the network with `torch.compile`; on CUDA in place of vggfeat's own kernels.
        checkpointing: keep each block's input alone and compute the rest again in the backward (Chen et al. 2016,
            arXiv:1604.06174).
        deterministic: ask torch for deterministic algorithms, on GPUs too.
        holdout: share of the training images that is set aside for testing, where no test set is given. Which they are
            depends on the seed; they are also what `evaluate` tests, given the run's weights and images of the
            same names.
        bad_images: `fail` at an image that cannot be read, or `skip` it; skipped ones are named and counted.
        workers: processes that read images which do not fit into memory, so many for training and as many for the test;
            they make no difference to the result.
        save_every: steps between checkpoints. There is one at the end of each epoch, too; on a GPU, where epochs may
            be short, only if the last is ten seconds old.
        seed: of everything that is drawn.
        device: `auto` (CUDA, else the CPU), or a torch device.

    Raises:
        InputError: a value that is out of range or not among the choices.
    """

    CHOICES: ClassVar[Mapping[str, Sequence[str]]] = {
        "head": (*HEADS,),
        "init": INITS,
        "optimizer": ("sgd", "adam", "adamw", "muon"),
        "schedule": ("constant", "step", "linear", "cosine", "onecycle"),
        "flip": ("none", "random", "alternating"),
        "pad_mode": ("zeros", "reflect"),
        "augment": ("none", "trivialaugment"),
        "precision": (*PRECISIONS, "float16"),
        "bad_images": ("fail", "skip"),
    }

    arch: str | None = option(None, f"{ARCH} (default), vgg11, …; with --weights, their own.")
    head: str = option("slim", "Classifier.")
    width: float = option(1.0, "Factor on every channel count.")
    dropout: float = option(0.0, "Dropout in the head.")
    init: str = option("kaiming", "How new weights are initialised.")
    weights: str | Mapping[str, Any] | None = option(
        None, "Start from imagenet, caffe, bundled, random, a file or a run's folder."
    )
    new_head: bool = option(False, "With --weights, initialise a new classifier.")
    freeze: str | None = option(None, "With --weights, freeze everything up to this layer.")
    features_lr: float = option(1.0, "Factor on the learning rate of the convolutions.")
    epochs: int = option(20, "Passes over the training set.")
    batch_size: int = option(128, "Images per step, over all processes.")
    accumulate: int = option(1, "Parts that a step's batch is split into.")
    optimizer: str = option("sgd", "Optimizer.")
    lr: float = option(0.05, "Highest learning rate.")
    momentum: float = option(0.9, "Of SGD and Muon; Adam's first beta.")
    nesterov: bool = option(False, "Nesterov's form of momentum.")
    weight_decay: float = option(5e-4, "Weight decay.")
    decay_all: bool = option(False, "Decay biases and batch normalisation too.")
    clip: float = option(0.0, "Largest gradient norm; 0 for no limit.")
    schedule: str = option("cosine", "Learning-rate schedule.")
    step_size: int = option(30, "Epochs per step of the step schedule.")
    gamma: float = option(0.1, "Factor per step of the step schedule.")
    warmup: float = option(0.0, "Epochs over which the learning rate rises.")
    label_smoothing: float = option(0.0, "Share of the target spread over all classes.")
    mixup: float = option(0.0, "Alpha of mixup; 0 for none.")
    cutmix: float = option(0.0, "Alpha of CutMix; 0 for none.")
    size: int | None = option(None, "Side of the network's input; the images' own, else 224.")
    resize: tuple[int, ...] | None = option(None, "Shorter side before cropping, or two to draw it between.")
    pad: int = option(4, "Pixels added around each image before cropping.")
    pad_mode: str = option("zeros", "What is added: the mean colour, or a reflection.")
    flip: str = option("random", "Mirroring.")
    cutout: int = option(0, "Side of a blanked square; 0 for none.")
    augment: str = option("none", "Further augmentation.")
    ema: float = option(0.0, "Decay per step of an average of the weights; 0 for none.")
    precision: str = option("auto", "Precision of the network.")
    compile: bool = option(False, "Compile the network.")
    checkpointing: bool = option(False, "Recompute each block in the backward, to save memory.")
    deterministic: bool = option(False, "Ask for deterministic algorithms, on GPUs too.")
    holdout: float = option(0.0, "Share set aside for testing if no test set is given.")
    bad_images: str = option("fail", "What to do with an image that cannot be read.")
    workers: int = option(2, "Processes reading images that do not fit into memory; as many again for the test.")
    save_every: int = option(0, "Steps between checkpoints; 0 means every epoch.")
    seed: int = option(0, "Seed of everything random.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, …")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arch is not None:
            parse(self.arch)
        channels_at(self.width)  # raises
        for name in ("epochs", "batch_size", "accumulate", "step_size"):
            _within(self, name, 1, 2**31)
        for name in ("pad", "cutout"):
            _within(self, name, 0, MAX_SIDE)
        for name in ("workers", "save_every"):
            _within(self, name, 0, 2**31)
        for name in ("clip", "warmup", "mixup", "cutmix", "weight_decay"):
            _within(self, name, 0, math.inf)
        for name in ("dropout", "momentum", "label_smoothing", "ema", "holdout"):
            _within(self, name, 0, 1)
        for name in ("lr", "gamma", "features_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a positive number, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        if self.warmup >= self.epochs:
            raise InputError(f"warmup ({self.warmup:g} epochs) must be shorter than epochs ({self.epochs})")
        if self.batch_size % self.accumulate:
            raise InputError(f"batch_size {self.batch_size} is not divisible by accumulate = {self.accumulate}")
        if self.size is not None and not MIN_SIDE <= self.size < MAX_SIDE:
            raise InputError(f"size must be from {MIN_SIDE}, five pools' stride, to under {MAX_SIDE}, got {self.size}")
        if self.resize is not None:
            if len(self.resize) not in (1, 2) or not 0 < self.resize[0] <= self.resize[-1] < MAX_SIDE:
                raise InputError(
                    f"resize must be a number of pixels under {MAX_SIDE}, or a rising pair, got {self.resize}"
                )
            if self.resize[0] + 2 * self.pad < (self.size or 0):
                raise InputError(f"resize {self.resize[0]} with pad {self.pad} is smaller than size {self.size}")
        if self.weights is None and (self.new_head or self.freeze is not None):
            name = "new_head" if self.new_head else "freeze"
            raise InputError(f"{name} needs weights to start from: give weights (--weights)")
        if self.weights is not None and self.width != 1:
            raise InputError("weights have their own width: leave width at 1")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise InputError("nesterov is for SGD with momentum")


def _within(config: TrainConfig, name: str, low: float, high: float) -> None:
    value = getattr(config, name)
    if not low <= value < high:
        bounded = high < math.inf and (high == 1 or value >= high)
        what = f"from {low} to under {high}" if bounded else f"a number of at least {low}"
        raise InputError(f"{name} must be {what}, got {value}")


@dataclass(frozen=True)
class Views(Settings):
    """What a network sees of each test image; the probabilities of all views are averaged (paper, section 3.2).

    Each field is a flag of `vggfeat evaluate` with the same name in dashes.

    Attributes:
        size: side of the crops; None means the image's own where all have one, else 224. Dense has none.
        scales: shorter sides that each image is brought to in turn; None means as it is, or 8/7 of `size` where images
            differ in size.
        grid: crops are taken on a regular grid of so many by so many; 1 is the centre alone, 5 the paper's.
        flip: see each view mirrored, too.
        dense: run the network over the whole image, the fully connected layers as convolutions, and average the class
            scores over space, instead of crops.

    Raises:
        InputError: a number out of range, or no number.
    """

    size: int | None = option(None, "Side of the crops.  [default: a run's own; else the images', or 224]")
    scales: tuple[int, ...] | None = option(
        None, "Shorter sides to resize each image to, such as 256,384,512.  [default: a run's own]"
    )
    grid: int = option(1, "Grid of N×N crops; 1 is the centre, 5 the paper's.")
    flip: bool = option(False, "Also test each view mirrored.")
    dense: bool = option(False, "The paper's dense evaluation, instead of crops.")

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("grid", self.grid)
        if self.size is not None:
            whole_number("size", self.size, least=MIN_SIDE)
        if self.scales is not None and (not self.scales or min(self.scales) < MIN_SIDE):
            raise InputError(f"scales must be shorter sides of at least {MIN_SIDE} pixels, got {self.scales}")
        if self.dense and self.grid > 1:
            raise InputError("dense looks at the whole image: leave grid at 1")
        if self.dense and self.size is not None:
            raise InputError("dense looks at the whole image, not at crops of size: scales (--scales) resize images")


# The chapter: Adam, batch 64, steps of 30 epochs, crop and flip. The paper (section 3.1): SGD, batch 256, 74 epochs,
# the rate divided by ten three times (there when validation stalls); its scale jitter is resize=(256, 512), size=224.
# Fast is ours, for small images: measured in README.
RECIPES: dict[str, dict[str, Any]] = {
    "chapter": {
        "head": "paper",
        "dropout": 0.5,
        "optimizer": "adam",
        "lr": 1e-3,
        "weight_decay": 5e-4,
        "decay_all": True,
        "schedule": "step",
        "step_size": 30,
        "epochs": 100,
        "batch_size": 64,
    },
    "paper": {
        "head": "paper",
        "dropout": 0.5,
        "lr": 1e-2,
        "weight_decay": 5e-4,
        "decay_all": True,
        "schedule": "step",
        "step_size": 20,
        "epochs": 74,
        "batch_size": 256,
        "pad": 0,
    },
    "fast": {
        "epochs": 10,
        "batch_size": 500,
        "optimizer": "muon",
        "lr": 0.05,
        "schedule": "linear",
        "label_smoothing": 0.1,
        "pad_mode": "reflect",
        "flip": "alternating",
        "cutout": 8,
    },
}


FINE_TUNING_LR = 0.005  # of `fast` from trained weights, of any network: they need short steps


def _plain_lr(convs: int) -> float:
    """The rate of `fast` without batch normalisation, where one layer's too long step harms all others.

    0.02 suits VGG-11's 8 convolutions (0.05 learned nothing, 0.008 less), 0.008 VGG-16's 13 (0.02 learned nothing) and
    0.005 VGG-19's 16: inversely proportional to the squared depth. Measured in tests/bench/RESULTS.md.
    """
    return round(0.02 * (8 / convs) ** 2, 4)


def recipe(name: str, **changes: Any) -> TrainConfig:
    """The settings of a recipe, with changes.

    >>> recipe("chapter", epochs=3).lr
    0.001
    >>> recipe("fast").lr, recipe("fast", arch="vgg11").lr  # which has no batch normalisation
    (0.05, 0.02)
    >>> recipe("fast", arch="vgg16").lr  # less with more layers
    0.0076
    >>> recipe("fast", weights="imagenet").lr  # and least from weights that were trained, of any network
    0.005

    Args:
        name: `chapter` (the chapter's), `paper` (Simonyan and Zisserman's) or `fast` (ours). A recipe is how to train:
            the network is `arch`'s, the first weights are drawn as `init` says (theirs is `init="paper"`). Images are
            normalised by ImageNet's statistics and padded with the mean colour in each; the chapter has CIFAR's, and
            pads with black.
        changes: fields of `TrainConfig`.

    Raises:
        InputError: an unknown recipe or field, or a value out of range.
    """
    check_choice("recipe", name, RECIPES)
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    for key in changes:
        check_choice("setting", key, fields)
    settings = dict(RECIPES[name])
    if name == "fast":
        arch = parse(changes.get("arch") or (ARCH if changes.get("weights") is None else "vgg16"))
        if changes.get("weights") not in (None, "random"):
            settings["lr"] = FINE_TUNING_LR
        elif not arch.batch_norm:
            settings["lr"] = _plain_lr(len(arch.convs))
    return TrainConfig(**(settings | changes))
