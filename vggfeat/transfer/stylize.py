"""The loop: from coarse to fine, step by step, never losing the best picture so far."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import vggfeat
from vggfeat import checkpoint as checkpoints
from vggfeat.cuda_graphs import AsyncScalars, captured_and_checked, lookahead
from vggfeat.devices import free_memory, lacks_memory, resolve, total_memory, trunk_dtype
from vggfeat.errors import InputError, RunError, WeightsError, first_line, optional, warn
from vggfeat.features import VGGFeatures
from vggfeat.files import DAY, check_path, remove_leftovers
from vggfeat.image import ImageLike, as_picture, fit, open_image, resize, save_image, size_for, to_pil, to_tensor
from vggfeat.modes import with_gradients
from vggfeat.settings import changed
from vggfeat.transfer.config import StyleConfig
from vggfeat.transfer.objective import TERMS, Objective
from vggfeat.transfer.optimize import LBFGS, Adam, FourierPreconditioner, Optimizer
from vggfeat.transfer.tiles import side_for
from vggfeat.weights import load

Callback = Callable[["StyleStep"], object]

EXPLODED = 4.0  # a total this many times the best of its scale counts as diverged
FIRST, LATER = 0.03, 0.02  # first step of L-BFGS at the coarsest scale and at others, as a mean change of a value
HISTORY, SHORT = 20, 8  # pairs that L-BFGS remembers: for whole pictures, and for tiled ones, to save memory
RESTARTS = 5  # per scale, before it ends with its best picture
CHECKPOINT_EVERY = 60.0  # seconds between checkpoints, which hold all that L-BFGS remembers: 40 pictures in float32


@dataclass(frozen=True)
class StyleStep:
    """What the callback is told after each step.

    Attributes:
        scale: which scale, from 1.
        scales: how many.
        step: which step of this scale, from 1.
        steps: how many.
        width: of the picture at this scale, in pixels.
        height: likewise.
        losses: `total`, `style`, `content`, `tv`, weighted, of the image before this step.
        elapsed: seconds since `stylize` began its first scale.
        progress: share of the work (pixels times steps) done.
        weights: the weights in use, in words.
    """

    scale: int
    scales: int
    step: int
    steps: int
    width: int
    height: int
    losses: dict[str, float]
    elapsed: float
    progress: float
    weights: str
    _picture: Callable[[], Image.Image] = field(repr=False, compare=False)

    def image(self) -> Image.Image:
        """The picture as it stands."""
        return self._picture()


@dataclass(frozen=True)
class StyleResult:
    """What `stylize` returns.

    Attributes:
        image: the picture.
        config: the settings.
        history: one record per step: `scale`, `step`, `width`, `height`, and the losses by name.
        losses: `total`, `style`, `content`, `tv` of the picture as saved, clamped and in 8 bits; empty if it ended
            before the finest scale.
        weights: the weights used, in words.
        arch: the network.
        device: where it ran.
        precision: the network's.
        elapsed: seconds.
        interrupted: whether Ctrl-C ended it early; the picture is then the best so far.
        failure: the error if memory did not suffice for a finer scale, else None; the picture is then that of the
            coarser scales, enlarged if memory suffices for that.
    """

    image: Image.Image
    config: StyleConfig
    history: list[dict[str, float]] = field(repr=False)
    losses: dict[str, float]
    weights: str
    arch: str
    device: str
    precision: str
    elapsed: float
    interrupted: bool
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the picture and the history, as plain values for JSON."""
        return {
            "vggfeat": vggfeat.__version__,
            "width": self.image.width,
            "height": self.image.height,
            "losses": self.losses,
            "steps": len(self.history),
            "weights": self.weights,
            "arch": self.arch,
            "device": self.device,
            "precision": self.precision,
            "elapsed": round(self.elapsed, 3),
            "interrupted": self.interrupted,
            "failure": self.failure,
            "config": self.config.to_dict(),
        }

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the picture with its settings in it; see `vggfeat.image.save_image` and `read_settings`."""
        return save_image(self.image, path, settings=self.to_dict(), overwrite=overwrite)


@with_gradients()
def stylize(
    content: ImageLike,
    style: ImageLike | Sequence[ImageLike],
    config: StyleConfig | None = None,
    *,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> StyleResult:
    """Paint the content in the manner of the style (Gatys, Ecker and Bethge 2016).

    After the first step Ctrl-C does not raise: it ends the run with the best picture so far, marked `interrupted`. Nor
    does a lack of memory at a finer scale than the first: the picture is then that of the coarser ones, and `failure`
    says why.

    Args:
        content: a file, a PIL image, or a tensor (1,3,H,W) in [0,1].
        style: likewise, or several, blended by `config.style_blend`.
        config: the settings.
        callback: called after each step. It may raise KeyboardInterrupt to end the run as Ctrl-C does; any other error
            ends the run without a picture.
        checkpoint: a file written after each scale but the last, once a minute, on Ctrl-C, and where it was written
            before, at an error, too. If it exists, the run resumes from it, and ends in the picture of an uninterrupted
            run, up to rounding. It is not deleted at the end.

    Raises:
        InputError: an image that cannot be read, settings that do not fit, images too small for the network, or a
            checkpoint of another run.
        WeightsError: weights that are unavailable or do not reach the deepest layer.
        RunError: the loss was not finite from the start.
        KeyboardInterrupt: Ctrl-C before anything was painted.
    """
    if not isinstance(config, StyleConfig | None):
        raise InputError(f"config must be a StyleConfig, got {type(config).__name__}")
    if callback is not None and not callable(callback):
        raise InputError(f"callback must be a function of a StyleStep, got {type(callback).__name__}")
    config = config or StyleConfig()
    picture = as_picture(content)
    several: Sequence[Any] = style if isinstance(style, list | tuple) else [style]
    styles = [as_picture(image) for image in several]
    if not styles:
        raise InputError("no style image: give at least one")
    config.shares("style_blend", len(styles))
    if config.keep_color:
        _colors()  # now, not when the picture is done
    device = resolve(config.device)
    dtype = trunk_dtype(config.precision, device)
    layers, weights = (*config.style_layers, *config.content_layers), load(config.weights, config.arch, default="vgg19")
    try:
        features = VGGFeatures(
            layers,
            weights=weights,
            pooling=config.pooling,
            padding=config.padding,
            precision=config.precision,
            # signs as bits cost 1 to 3 % of a step in float32, more in bfloat16, whose values take half the memory
            keep="bits" if dtype == torch.float32 else "values",
        )
    except WeightsError as error:
        if set(weights.arch.head_names) & set(layers):  # it may be another error, of the classifier
            raise
        raise WeightsError(f"{error}; choose style_layers and content_layers up to there") from None
    run = _Run(features, config, picture, styles, device, dtype, callback)
    if checkpoint is not None:
        given = (content, *several, *config.init_files)
        inputs = [each for each in given if isinstance(each, str | os.PathLike)]
        run.resume(_Checkpoint(checkpoint, run.identity(), inputs))
    try:
        run.go()
        return run.result()
    except KeyboardInterrupt:  # during the run, or while the result was assembled
        if not run.history:
            raise
        run.interrupted = True
        result = run.result()
        with contextlib.suppress(KeyboardInterrupt):
            run.write_checkpoint()
        return result
    except Exception:
        # a first checkpoint might be in the way of other settings
        if run.checkpoint is not None and run.checkpoint.path.exists():
            with contextlib.suppress(Exception):  # the first error is the one to tell
                run.write_checkpoint()
        raise


@dataclass
class _Scale:
    """How far one scale has come.

    Attributes:
        number: which scale, from 1.
        image: where the next step starts.
        optimizer: makes it.
        side: of the tiles, 0 for none.
        begun: steps so far.
        best: total of the best picture.
        restarts: of the optimizer.
    """

    number: int
    image: Tensor
    optimizer: Optimizer
    side: int
    begun: int = 0
    best: float = math.inf
    restarts: int = 0

    def state_dict(self) -> dict[str, Any]:
        """All of it as tensors and plain values, which later steps do not modify."""
        return vars(self) | {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what `state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("image", "begun", "best", "restarts"):
            setattr(self, name, state[name])


class _Checkpoint:
    """The file that a killed run resumes from.

    Args:
        path: of the file.
        identity: what distinguishes the run from another.
        inputs: files that it must not replace.

    Raises:
        InputError: a path that cannot be written, or of an input.
    """

    def __init__(
        self, path: str | os.PathLike[str], identity: dict[str, Any], inputs: Sequence[str | os.PathLike[str]]
    ) -> None:
        self.path, self.identity = check_path(path, overwrite=True, inputs=inputs), identity
        self.written_at = time.monotonic()
        remove_leftovers(self.path.parent, DAY)

    @property
    def due(self) -> bool:
        """Whether it is time to write it again."""
        return time.monotonic() - self.written_at >= CHECKPOINT_EVERY

    def read(self) -> dict[str, Any]:
        """The state of the run; empty where there is no file yet.

        Raises:
            InputError: a file that is no checkpoint, damaged, or of another run.
            RunError: one that cannot be read now.
        """
        if not self.path.exists():
            return {}
        try:
            state = checkpoints.read(self.path, self.identity.keys() | {"picture", "optimizer"})
        except RunError:
            raise
        except Exception as error:
            raise InputError(
                f"{self.path} is no checkpoint of a style transfer, or damaged ({first_line(error)}): name another file"
            ) from error
        if said := changed(state["config"], self.identity["config"], ("device",)):
            raise InputError(
                f"the run in {self.path} has other settings: {said}; name another file to begin anew, or from a "
                "picture by init=PICTURE (--init PICTURE)"
            )
        if odd := [what for what, value in self.identity.items() if what != "config" and state[what] != value]:
            others = " and ".join(odd)
            raise InputError(f"the run in {self.path} was written with other {others}: name another file to begin anew")
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Write the state of the run; a failure only warns, since the picture is worth more."""
        self.written_at = time.monotonic()
        try:
            checkpoints.write(self.path, self.identity | state)
        except OSError as error:
            warn(f"cannot write checkpoint {self.path}: {error.strerror}")


class _Run:
    """One style transfer: the scales, the best picture so far, and the record."""

    def __init__(
        self,
        features: VGGFeatures,
        config: StyleConfig,
        content: Image.Image,
        styles: list[Image.Image],
        device: torch.device,
        dtype: torch.dtype,
        callback: Callback | None,
    ) -> None:
        self.features, self.config, self.callback = features, config, callback
        self.device, self.dtype = device, dtype
        self.content, self.styles = content, styles
        self.sizes = _scales(content, config, features.plan.min_size)
        self.history: list[dict[str, float]] = []
        self.interrupted = False
        self.telling = False  # an error now is the callback's own
        self.failure: str | None = None
        self.started = time.perf_counter()
        self.work = sum(w * h * self._steps(number) for number, (w, h) in enumerate(self.sizes, start=1))
        self.done = 0
        # the picture to begin with; a file is read now, since every scale needs it and it may be gone by then
        starts = {"content": content, "noise": None}
        if config.init not in starts and not os.path.lexists(config.init):
            raise InputError(f"init is content, noise or an image file: there is none at {config.init!r}")
        self.start = starts[config.init] if config.init in starts else open_image(config.init)
        # measured before any work: memory that one scale took is free for the next, though the system counts it as used
        self.memory = free_memory(device)
        self._check_memory()
        self.image = self._initial(*self.sizes[0])
        self.objective: Objective | None = None
        self.checkpoint: _Checkpoint | None = None
        self.resumed: dict[str, Any] = {}  # the state that was in it
        self.state: dict[str, Any] = {}  # after the last complete step

    def _check_memory(self) -> None:
        """Raise `InputError` where the picture or a style cannot fit, however small the tiles are."""
        total = total_memory(self.device)
        if total is None:
            return
        most = max(self.memory, total // 2)  # what is free may be misreported, or grow
        width, height = self.sizes[-1]
        # the picture, its gradient, the content, and what the optimiser remembers when tiled: no run takes less
        images = 3 + (2 * SHORT if self.config.optimizer == "lbfgs" else 2)
        picture = f"at size {self.config.size} the picture is {width}×{height}"
        checks = [(picture, images * 12 * width * height, "choose a smaller size")]
        for number, style in enumerate(self.styles, start=1):
            w, h = self._style_size(style, width, height)
            needed = 2 * 12 * w * h  # as it is, and normalised
            checks.append((f"style {number} is read at {w}×{h}", needed, "choose a smaller style_scale, or crop it"))
        for what, needed, hint in checks:
            if needed > most:
                raise InputError(
                    f"{what}, which takes {needed / 2**30:,.1f} GiB of memory or more; the device has "
                    f"{total / 2**30:,.1f} GiB: {hint}"
                )

    def _tensor(self, picture: Image.Image, width: int, height: int) -> Tensor:
        return to_tensor(resize(picture, width, height)).to(self.device)

    def _initial(self, width: int, height: int) -> Tensor:
        if self.start is not None:
            return self._tensor(self.start, width, height)
        generator = torch.Generator().manual_seed(self.config.seed)
        noise = torch.randn(1, 3, height, width, generator=generator, dtype=torch.float32, device="cpu")
        return (0.5 + 0.2 * noise).clamp(0, 1).to(self.device)

    def _steps(self, number: int) -> int:
        """How many steps a scale gets: the last all, the others half as many, since it is the last that shows."""
        return self.config.steps if number == len(self.sizes) else math.ceil(self.config.steps / 2)

    def _enlarged(self, width: int, height: int) -> Tensor:
        """The picture at the next scale, with the detail of its starting picture.

        Only the change made to that picture is enlarged, as in a Laplacian pyramid. The picture itself, enlarged, would
        be smooth, and the next scale would spend its first steps on sharpening it.
        """

        def up(image: Tensor) -> Tensor:
            return F.interpolate(image, size=(height, width), mode="bicubic", align_corners=False)

        if self.start is None:  # every scale has different noise
            return up(self.image).clamp(0, 1)
        coarse = self._initial(self.image.shape[3], self.image.shape[2])
        return (self._initial(width, height) + up(self.image - coarse)).clamp(0, 1)

    def _style_size(self, picture: Image.Image, width: int, height: int) -> tuple[int, int]:
        """Width and height that a style has beside a picture of that size."""
        # a long thin style must still reach the deepest layer at the coarsest scale
        least = size_for(*picture.size, self.features.plan.min_size)
        side = max(least, round(max(width, height) * self.config.style_scale))
        return fit(picture.width, picture.height, side)

    def _objective(self, width: int, height: int, tile: int | None) -> Objective:
        styles = [self._tensor(picture, *self._style_size(picture, width, height)) for picture in self.styles]
        if tile is None:
            layers = self.features.layers
            tile = side_for(self.features.arch, layers, height, width, self.dtype, self.device, self.memory)
        return Objective(self.features, self.config, self._tensor(self.content, width, height), styles, tile)

    def go(self) -> None:
        """All scales, or as many as memory allows."""
        number = 1
        try:
            for number, (width, height) in enumerate(self.sizes, start=1):
                if number < self.resumed.get("number", 1):
                    continue  # already done
                if self.image.shape[2:] != (height, width):
                    self.image = self._enlarged(width, height)
                resumed = self.resumed if number == self.resumed.get("number") else {}
                self.objective = self._objective(width, height, resumed.get("side", self.config.tile))
                scale = _Scale(number, self.image, self._optimizer(number, self.objective), self.objective.side)
                if resumed:
                    scale.load_state_dict(_to(resumed, self.device))
                    self.resumed = resumed = {}  # which would keep pairs that L-BFGS forgets
                self._improve(scale, self.objective)
                if number < len(self.sizes):
                    self.write_checkpoint()
            if self.config.optimizer == "adam" and self.config.steps > 1 and not _improved(self.history):
                warn("no step improved on the picture to begin with, which is what is returned: lower learning_rate")
        except (MemoryError, RuntimeError) as error:
            if number == 1 or self.telling or not lacks_memory(error):
                raise
            self._gave_up(error, width, height)

    def _gave_up(self, error: Exception, width: int, height: int) -> None:
        self.objective = None  # frees its memory
        self.failure = f"not enough memory for {width}×{height}: {first_line(error)}"

    def _optimizer(self, number: int, objective: Objective) -> Optimizer:
        if self.config.optimizer == "adam":
            return Adam(self.config.learning_rate)
        history = HISTORY if len(objective.tiles) == 1 else SHORT
        return LBFGS(history, FIRST if number == 1 else LATER, FourierPreconditioner(self.image))

    def _improve(self, scale: _Scale, objective: Objective) -> None:
        number, steps = scale.number, self._steps(scale.number)
        # tiles are large: a graph is not worth it
        times = steps - scale.begun if len(objective.tiles) == 1 else 0
        evaluate = captured_and_checked(lambda image: _together(*objective.value_and_grad(image)), scale.image, times)
        # steps whose losses are being copied to the host: number, image, losses, and the state after the step
        waiting: deque[tuple[int, Tensor, AsyncScalars, dict[str, Any]]] = deque()
        while scale.begun < steps:
            image = scale.image
            numbers, grad = evaluate(image)
            scale.begun += 1
            scale.image = scale.optimizer.step(image, grad)
            waiting.append((scale.begun, image, AsyncScalars(numbers), self._state(scale)))
            due = self.checkpoint is not None and self.checkpoint.due
            while len(waiting) > (0 if due or scale.begun == steps else lookahead(self.device)):
                step, image, reading, state = waiting.popleft()
                value, *parts = reading.get()
                restarts = scale.restarts
                if not self._judge(scale, step, value, image):
                    return
                if scale.restarts > restarts:
                    waiting.clear()  # later steps are void
                    state = self._state(scale)
                self._tell(number, step, steps, {"total": sum(parts)} | dict(zip(TERMS, parts, strict=True)))
                self.state = state and state | {"best": scale.best} | self._progress()
            if due:
                self.write_checkpoint()

    def _judge(self, scale: _Scale, step: int, value: float, image: Tensor) -> bool:
        """Keep the best picture; after a diverged step restart from it. False ends the scale."""
        if value < scale.best:
            scale.best, self.image = value, image
        if math.isfinite(value) and value <= EXPLODED * scale.best:
            return True
        if scale.best == math.inf:
            if scale.number == 1:
                precise = "" if self.dtype == torch.float32 else "precision='float32' (--precision float32), "
                raise RunError(
                    f"the loss is {value} at the start; try {precise}other weights of the network, or smaller ones of "
                    "style and content"
                )
            return False  # keep the picture of the coarser scales
        scale.restarts += 1
        if scale.restarts > RESTARTS:
            return False
        scale.optimizer.restart()
        scale.image, scale.begun = self.image, step
        return True

    def _tell(self, number: int, step: int, steps: int, losses: dict[str, float]) -> None:
        """Record a step and call the callback."""
        width, height = self.sizes[number - 1]
        self.done += width * height
        self.history.append({"scale": number, "step": step, "width": width, "height": height} | losses)
        if self.callback is not None:
            elapsed, progress = time.perf_counter() - self.started, self.done / self.work
            where = (number, len(self.sizes), step, steps, width, height)
            picture = functools.partial(self._picture_on_demand, self.image)
            self.telling = True
            self.callback(StyleStep(*where, losses, elapsed, progress, self.features.weights, picture))
            self.telling = False

    def _picture(self, image: Tensor) -> Image.Image:
        picture = to_pil(image)
        return _with_colors_of(resize(self.content, *picture.size), picture) if self.config.keep_color else picture

    def _picture_on_demand(self, image: Tensor) -> Image.Image:
        """The same for a callback; a lack of memory in it is the run's own."""
        telling, self.telling = self.telling, False
        picture = self._picture(image)
        self.telling = telling
        return picture

    # ── what a killed run resumes from ────────────────────────────────────────────────────────────────────────────────

    def resume(self, checkpoint: _Checkpoint) -> None:
        """Go on from what is in the file, and save the run there from here on."""
        self.checkpoint, self.resumed = checkpoint, checkpoint.read()
        if self.resumed:
            self.history, self.done = self.resumed["history"], self.resumed["done"]
            self.image = self.resumed["picture"].to(self.device)
            self.started -= self.resumed["elapsed"]

    def identity(self) -> dict[str, Any]:
        """What distinguishes it from another run."""
        pictures = [self.content, *self.styles, *([self.start] if isinstance(self.start, Image.Image) else [])]
        digests = [hashlib.sha256(repr(each.size).encode() + each.tobytes()).hexdigest() for each in pictures]
        return {"config": self.config.to_dict(), "weights": self.features.checksum(), "pictures": digests}

    def _state(self, scale: _Scale) -> dict[str, Any]:
        return {} if self.checkpoint is None else scale.state_dict()

    def _progress(self) -> dict[str, Any]:
        elapsed = time.perf_counter() - self.started
        return {"picture": self.image, "told": len(self.history), "done": self.done, "elapsed": elapsed}

    def write_checkpoint(self) -> None:
        """Write the checkpoint, if there is one, as of the last complete step."""
        if self.checkpoint is not None and self.state:
            self.checkpoint.write(self.state | {"history": self.history[: self.state["told"]]})

    def result(self) -> StyleResult:
        """The picture as saved, and what is known about it."""
        width, height = self.sizes[-1]
        try:
            whole = self.image.shape[2:] == (height, width)
            picture = self._picture(self.image if whole else self._enlarged(width, height))
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            self._gave_up(error, width, height)
            picture = self._picture(self.image)
        losses: dict[str, float] = {}
        if self.objective is not None and self.objective.size == (height, width):
            with torch.no_grad():
                terms = self.objective.terms(to_tensor(picture).to(self.device))
            losses = {name: float(value) for name, value in terms.items()}
            losses = {"total": sum(losses.values())} | losses
        return StyleResult(
            image=picture,
            config=self.config,
            history=self.history,
            losses=losses,
            weights=self.features.weights,
            arch=self.features.arch.name,
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device),
            precision=str(self.dtype).removeprefix("torch."),
            elapsed=time.perf_counter() - self.started,
            interrupted=self.interrupted,
            failure=self.failure,
        )


def _improved(history: list[dict[str, float]]) -> bool:
    """Whether a step was better than its scale's first, or there was nothing to improve."""
    first: dict[float, float] = {}
    return any(step["total"] < first.setdefault(step["scale"], step["total"]) or step["total"] == 0 for step in history)


def _to(value: Any, device: torch.device) -> Any:
    """Tensors in lists, tuples and dictionaries, moved to the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(each, device) for key, each in value.items()}
    return type(value)(_to(each, device) for each in value) if isinstance(value, list | tuple) else value


def _together(total: Tensor, terms: dict[str, Tensor], grad: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers as one tensor, since each read waits for the device, and the gradient."""
    return torch.stack([total, *terms.values()]), grad


def _scales(content: Image.Image, config: StyleConfig, least: int) -> list[tuple[int, int]]:
    """Width and height of each scale, coarse to fine, a factor of about 2 apart."""
    full = fit(content.width, content.height, config.size)
    if min(full) < least:
        needed = size_for(*content.size, least)
        raise InputError(
            f"at size {config.size} the picture is {full[0]}×{full[1]}, too small for the deepest layer, which needs "
            f"{least} pixels on each side; choose a size of {needed} or more, or shallower layers"
        )
    count = max(0, math.ceil(math.log2(max(1, config.size / config.start_size)) - 0.25))
    sizes = [
        fit(content.width, content.height, round(config.start_size * (config.size / config.start_size) ** (i / count)))
        for i in range(count)
    ]
    return [size for size in sizes if min(size) >= least] + [full]


def _with_colors_of(colors: Image.Image, picture: Image.Image) -> Image.Image:
    """The picture's lightness in the other's colours (Gatys et al. 2016, arXiv:1606.05897, luminance only)."""
    color = _colors()
    lightness = color.rgb_to_yuv(to_tensor(picture))[:, :1]
    return to_pil(color.yuv_to_rgb(torch.cat([lightness, color.rgb_to_yuv(to_tensor(colors))[:, 1:]], dim=1)))


def _colors() -> Any:
    return optional("kornia.color", "keep_color needs kornia, which does not work here: pip install kornia")
