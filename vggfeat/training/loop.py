"""The training loop: epochs, checkpoints, testing, stopping and resuming. What a step does is in `learner.py`."""

from __future__ import annotations

import gc
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vggfeat import checkpoint
from vggfeat.arch import MIN_SIDE, Arch
from vggfeat.devices import autocast_dtype, emulates
from vggfeat.errors import InputError, RunError, counted, first_line
from vggfeat.files import PathLike
from vggfeat.modes import with_gradients
from vggfeat.network import VGG
from vggfeat.signals import on_termination
from vggfeat.training.batches import Batch, Batches, scale_for, seeded, split_holdout
from vggfeat.training.components import build_mixing, build_network, build_schedule
from vggfeat.training.config import TrainConfig, Views
from vggfeat.training.data import ImageSet, load_images
from vggfeat.training.distributed import World, all_gather_union, all_reduce_sum, process_group, run_on_main
from vggfeat.training.evaluation import Evaluation, evaluate_network, place_of
from vggfeat.training.folder import Board, Epoch, arch_of, begin_or_resume, check_folder, write_log, write_weights
from vggfeat.training.learner import Learner
from vggfeat.training.readers import Readers, ScaledImages, reader_errors

SAVE_AFTER = 10.0  # seconds from one epoch's checkpoint to another's


@dataclass(frozen=True)
class TrainStep:
    """What a callback gets after each step.

    Attributes:
        epoch: its number, from 1.
        epochs: how many there are.
        step: number of the step in the epoch, from 1.
        steps: how many an epoch has.
        loss: of this step, in the first process; on a GPU, which is read only every so often, the last known.
        lr: the learning rate of this step.
        net: the network after this step, with `ema` the averaged one: what is tested and saved.
        finished: the epoch, where this step was its last.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    net: VGG = field(repr=False, compare=False)
    finished: Epoch | None = None


@dataclass(frozen=True)
class TrainResult:
    """Results of a run.

    Attributes:
        net: the network, in evaluation mode; with `ema`, the averaged one.
        history: one `Epoch` for each.
        evaluation: of the last test that this call made; None where it made none.
        folder: of the run.
        interrupted: whether it was stopped before its end; `train(..., resume=True)` goes on.
        damaged: checkpoints that could not be used on resuming, and why.
    """

    net: VGG = field(repr=False)
    history: list[Epoch] = field(repr=False)
    evaluation: Evaluation | None = field(repr=False)
    folder: Path
    interrupted: bool
    damaged: list[str]


@with_gradients()
def train(
    data: PathLike | ImageSet,
    config: TrainConfig | None = None,
    *,
    test: PathLike | ImageSet | None = None,
    folder: PathLike = "run",
    resume: bool = False,
    callback: Callable[[TrainStep], None] | None = None,
    announce: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train a classifier.

    Under `torchrun` every process calls this, and the result is that of one process with the same batch, to rounding,
    but for dropout, which each process draws for its own part. A script that trains or evaluates more than once makes
    the process group itself, `torch.distributed.init_process_group()`: torch may fail to make a second one.

    Ctrl-C and SIGTERM end a run after the step that is being made (of several processes on GPUs, within 50 steps) and
    save a checkpoint. After a SIGKILL at any time, of one process or of several, `resume=True` goes on from the newest
    good checkpoint; on a CPU the weights at the end are those of the unbroken run, bit for bit.

    Args:
        data: what `vggfeat.load_images` knows: CIFAR's folder, a folder or a zip of class folders; or what it
            gave.
        config: the settings, such as `recipe("fast")`.
        test: the same as `data` for the test set, instead of one that `data` may hold, for validation or test.
        folder: of the run, new or empty unless it is resumed.
        resume: go on with the run in `folder`, whose settings (a state dict is not compared) and images (their names,
            labels and sizes) must be these; begin it where it has no checkpoint yet.
        callback: called after each step, in the first process. It may raise KeyboardInterrupt to end the run as Ctrl-C
            does; any other error ends it without a checkpoint of the steps since the last one.
        announce: called with a line for people, such as what is trained on what.

    Raises:
        InputError: data or settings that cannot be used, another run in `folder`.
        WeightsError: weights that are unavailable or do not fit.
        RunError: the loss is not finite, a checkpoint cannot be written, or an image cannot be read during the run.
        DependencyError: torchvision is needed, for images that do not fit into memory, mixup or CutMix, and is missing.
        KeyboardInterrupt: at a second Ctrl-C, before the step under way has ended.
    """
    if not isinstance(config, TrainConfig | None):
        raise InputError(f'config must be a TrainConfig, such as recipe("fast"), got {type(config).__name__}')
    config, folder = config or TrainConfig(), Path(folder)
    with process_group(config.device) as world, _repeatable(config, world):
        says = announce if announce is not None and world.is_main else _silent
        run_on_main(lambda: check_folder(folder, config, resume, (data, test)), world)
        images, test_images = load_images(data, test, resize=config.resize, bad_images=config.bad_images)
        if len(images.classes) < 2:
            raise InputError(f"{images.label} has one class, {images.classes[0]}: there is nothing to tell apart")
        if config.holdout:
            if test_images is not None:
                raise InputError("there is a test set: leave holdout at 0, which sets images aside where there is none")
            images, test_images = split_holdout(images, config.holdout, config.seed)
        arch = run_on_main(lambda: arch_of(folder) if resume else None, world)
        run = _Run(config, images, test_images, world, folder, callback if world.is_main else None, says, arch)
        with ExitStack() as lock:
            state, damaged = run_on_main(
                lambda: begin_or_resume(folder, config, run.net.arch, images, test_images, resume, lock), world
            )
            for text in run.summary(damaged):
                says(text)
            if state is None and resume:
                says(f"no checkpoint in {folder} yet: the run begins")
            if state is not None:
                run.load(state)
                says(f"resuming after {run.done} of {config.epochs * run.batches.steps} steps")
            return run.finish(damaged)


def _silent(text: str) -> None:
    pass


@contextmanager
def _repeatable(config: TrainConfig, world: World) -> Iterator[None]:
    """Seed torch's global generators for the block, then restore them and torch's settings."""
    before, chosen = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warns, workspace = torch.is_deterministic_algorithms_warn_only_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    with torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else []):
        _seed(world.device, config.seed, -3)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS refuses
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not config.deterministic  # all steps have the same shapes
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)
            if workspace is None:
                os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
            torch.backends.cudnn.benchmark = chosen


def _seed(device: torch.device, *numbers: int) -> None:
    """Seed the CPU's generator and the device's own, and no other that a program may be using."""
    seed = seeded(*numbers).initial_seed()
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


class _Run:
    """A run in progress: what a checkpoint holds, and the loop over it."""

    def __init__(
        self,
        config: TrainConfig,
        images: ImageSet,
        test: ImageSet | None,
        world: World,
        folder: Path,
        callback: Callable[[TrainStep], None] | None,
        announce: Callable[[str], None] = _silent,
        resumed: Arch | None = None,
    ) -> None:
        self.config, self.images, self.test, self.world = config, images, test, world
        self.folder, self.callback, self.announce = folder, callback, announce
        # once: a million names take a second, and files may be gone later
        self.digests = {"digest": images.digest, "sizes": images.sizes, "test": None, "test_sizes": None}
        if test is not None:
            self.digests |= {"test": test.digest, "test_sizes": test.sizes}
        self.size = config.size or images.side
        if self.size < MIN_SIDE:
            raise InputError(
                f"images of {self.size} pixels are smaller than {MIN_SIDE}, five pools' stride: set resize and size"
            )
        self.dtype = autocast_dtype(config.precision, world.device)
        self.batches = Batches(images, config, self.size, world)
        self.readers = None if test is None else Readers(ScaledImages(test.read), config.workers)
        with torch.device("cpu"):  # drawn there, whatever the default device is, so that a seed means the same network
            net = build_network(config, len(images.classes), resumed)
        self.net = net.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net.checkpointing = config.checkpointing
        self.average = get_ema_multi_avg_fn(config.ema)
        self.ema = AveragedModel(self.net, multi_avg_fn=self.average, use_buffers=True) if config.ema else None
        self.learner = Learner(self.net, config, world, self.dtype)
        self.frozen = [
            module
            for module in self.net.features
            if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters())
        ]
        # tested at the scale of training, the largest of several
        scale = self.batches.sides[-1]
        if test is not None and scale < self.size:
            raise InputError(
                f"images are tested {scale} pixels high or wide, smaller than size {self.size}: set resize"
            )
        self.views = Views(self.size, (scale,) if scale >= self.size else None)
        self.scheduler = build_schedule(self.learner.optimizer, config, self.batches.steps)
        self.mix = build_mixing(config, len(images.classes))
        self.epoch = self.step = 0  # done so far; steps of the epoch in progress
        self.history: list[Epoch] = []
        wide = torch.float32 if world.device.type == "mps" else torch.float64  # which MPS lacks
        self.sums = torch.zeros(3, dtype=wide, device=world.device)  # loss, right, images of the epoch so far
        self.bad = torch.full((), -1, device=world.device)  # the first step whose loss was not finite
        self.loss = self.lr = math.nan  # of the last step, as far as known
        self.seconds, self.saved = 0.0, -math.inf  # of the epoch so far; when the last checkpoint was written
        self.unreadable = set() if test is None else set(test.skipped)  # test images that people were told of
        self.asked = self.insisted = False  # this process to end, by a signal or the callback; by a second Ctrl-C
        self.stop = False  # all of them

    @property
    def done(self) -> int:
        """Steps since the beginning."""
        return self.epoch * self.batches.steps + self.step

    @property
    def tested_net(self) -> VGG:
        """What is tested and saved."""
        net = self.net if self.ema is None else self.ema.module
        assert isinstance(net, VGG)
        return net

    def summary(self, damaged: list[str]) -> Iterator[str]:
        """What people are told before it begins."""
        arch, config = self.net.arch, self.config
        count = sum(value.numel() for value in self.net.parameters())
        learning = sum(value.numel() for value in self.net.parameters() if value.requires_grad)
        yield f"{arch.name}, {arch.head} head, {count / 1e6:.2f} M parameters" + (
            f", {learning / 1e6:.2f} M of them learning" if config.freeze else ""
        )
        where = "in memory" if self.images.pixels is not None else "read in every epoch"
        sides = self.batches.sides
        crop = f" cropped from {' to '.join(map(str, sides))}" if sides != (self.size,) else ""
        test = "no test set"
        if self.test is not None:
            apart = f" ({self.test.label})" if self.test.label != self.images.label else ""
            test = f"{len(self.test):,} for the test{apart}"
        found = f"{len(self.images):,} images of {len(self.images.classes)} classes"
        yield f"{found} at {self.size} px{crop}, {where}; {test}"
        if self.images.pixels is not None:
            share = self.size**2 / math.prod(self.images.pixels.shape[1:3])
            if share < 0.5:  # ImageNet's customary 224 of 256 pixels are 77 %
                yield f"each crop shows {share:.0%} of an image; resized to {scale_for(self.size)}, it shows most of it"
        precision, device = str(self.dtype).removeprefix("torch."), str(self.world.device)
        if emulates(self.dtype, self.world.device):
            device += ", which computes it in loops: float32 is about ten times as fast"
        several = f", {self.world.size} processes" if self.world.size > 1 else ""
        epochs, steps = config.epochs, self.batches.steps
        yield f"{counted(epochs, 'epoch')} of {counted(steps, 'step')}, {precision} on {device}{several}"
        for each in (self.images, self.test):
            if each is not None and each.skipped:
                named = ", ".join([*each.skipped][:5]) + " …" * (len(each.skipped) > 5)
                yield f"left out {counted(len(each.skipped), 'image')} of {each.label} that cannot be read: {named}"
            if each is not None and each.others:
                named = each.others[0] + " …" * (len(each.others) > 1)
                odd = "outside its folders or without an image suffix"
                yield f"left out {counted(len(each.others), 'file')} of {each.label} {odd}: {named}"
        yield from damaged

    # ── the state ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def save(self) -> None:
        """Write a checkpoint, in the first process, unless the network is no longer finite."""
        sums = all_reduce_sum(self.sums.clone(), self.world)
        self.batches.skipped = all_gather_union(self.batches.skipped, self.world)
        if not self.world.is_main:
            return
        if not all(bool(value.isfinite().all()) for value in self.net.state_dict().values()):
            raise self._diverged(self.step)
        state = {
            "config": self.config.to_dict(),
            "classes": self.images.classes,
            "images": len(self.images),
            **self.digests,
            "vggfeat": self._metadata(),
            "size": self.size,
            "epoch": self.epoch,
            "step": self.step,
            "net": self.net.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "sums": sums,
            "lr": self.lr,
            "loss": self.loss,
            "seconds": self.seconds,
            "skipped": sorted(self.batches.skipped),
            "history": [asdict(epoch) for epoch in self.history],
        } | self.learner.state_dict()
        checkpoint.save(self.folder / "checkpoints", self.done, state)

    def load(self, state: dict[str, Any]) -> None:
        """Go back to where a checkpoint was written.

        Raises:
            InputError: it was written at another size, as where the images do not fit into memory here, or by a version
                that trained other parameters.
        """
        if (size := state["size"]) != self.size:
            raise InputError(
                f"the run in {self.folder} used crops of {size} pixels, here they would have {self.size}: images "
                f"{'were in memory, for which there is too little now' if size < self.size else 'were read one by one'}"
            )
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        try:
            self.net.load_state_dict(state["net"])
        except RuntimeError as error:
            raise InputError(
                f"the run in {self.folder} is of another network than its config.json says: {first_line(error)}"
            ) from error
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        try:
            self.learner.load_state_dict(state)
        except ValueError as error:
            raise InputError(
                f"the run in {self.folder} was begun by another version, which trained other parameters: begin anew in "
                "another folder"
            ) from error
        self.scheduler.load_state_dict(state["scheduler"])
        if self.world.is_main:  # they are the sums of all processes
            self.sums.copy_(state["sums"])
        self.lr, self.loss = state["lr"], state["loss"]
        self.batches.skipped.update(state["skipped"])
        self.history = [Epoch(**row) for row in state["history"]]

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def finish(self, damaged: list[str]) -> TrainResult:
        """Train from where it is to the end."""
        evaluation = None
        board = Board(self.folder / "tensorboard", self.announce) if self.world.is_main else None
        with ExitStack() as ending:
            for each in (board, self.batches.readers, self.readers, self.learner):
                if each is not None:
                    ending.callback(each.close)
            with on_termination(self._asked_to_end), reader_errors():
                while self.epoch < self.config.epochs and not self.stop:
                    evaluation = self._epoch(board) or evaluation
                    self._agree()
                if self.stop and self.step == 0 and self.epoch < self.config.epochs:
                    # it was asked for during a test, and the epoch before may not have been saved
                    self.save()
        if complete := self.epoch == self.config.epochs:
            if self.world.is_main:
                write_weights(self.folder, self.tested_net, self._metadata())
                write_log(self.folder, self.history)
        if self.world.size > 1:
            gc.collect()  # free references to the process group: at the interpreter's end, its threads abort
        return TrainResult(self.tested_net.eval(), self.history, evaluation, self.folder, not complete, damaged)

    def _epoch(self, board: Board | None) -> Evaluation | None:
        self._train_mode()
        config, steps, known = self.config, self.batches.steps, set(self.batches.skipped)
        begun = time.perf_counter()
        for batch in self.batches.epoch(self.epoch, self.step):
            self.lr = float(self.scheduler.get_last_lr()[-1])
            value = self._step(batch)
            self.step += 1
            last = self.step == steps
            saves = (last and self._epoch_saves()) or (config.save_every > 0 and self.done % config.save_every == 0)
            # wait for the device; on a GPU only now and then
            waits = self.world.device.type == "cpu" or last or saves or self.step == 1 or self.done % 50 == 0
            if waits:
                self.loss = value.item()
                if (bad := int(self.bad)) >= 0:
                    raise self._diverged(bad % steps + 1)
            if not last:
                self._tell(self.epoch + 1, self.step)
            if waits or self.world.size == 1:
                self._agree()
            if last or saves or self.stop:
                self.seconds += time.perf_counter() - begun
                if saves or self.stop:
                    self.save()  # before the test, which may fail
                    self.saved = time.perf_counter()
                begun = time.perf_counter()
            if self.stop:
                return None
        if new := sorted(self.batches.skipped - known):
            self.announce(f"{counted(len(new), 'image')} left out: {'; '.join(new)}")
        evaluation = self._test()
        if evaluation is not None and (new := sorted({*evaluation.skipped} - self.unreadable)):
            self.announce(f"{counted(len(new), 'image')} of the test left out: {'; '.join(new)}")
            self.unreadable.update(new)
        self._close_epoch(evaluation)
        if self.world.is_main:
            try:
                write_log(self.folder, self.history, hint="the next epoch tries again")
            except RunError as error:  # on Windows, spreadsheets lock what they show
                self.announce(str(error))
            if board is not None:
                board.write(self.history[-1])
        self._tell(self.epoch, steps, self.history[-1])
        return evaluation

    def _train_mode(self) -> None:
        self.learner.model.train()
        for module in self.frozen:
            module.eval()

    def _tell(self, epoch: int, step: int, finished: Epoch | None = None) -> None:
        if self.callback is None:
            return
        epochs, steps = self.config.epochs, self.batches.steps
        try:
            self.callback(TrainStep(epoch, epochs, step, steps, self.loss, self.lr, self.tested_net, finished))
        except KeyboardInterrupt:
            if self.insisted:
                raise
            self.asked = True
        if not finished and not self.net.training:  # the callback tested it
            self._train_mode()

    def _epoch_saves(self) -> bool:
        """Whether a checkpoint is due at this epoch's end: on a GPU, epochs may be shorter than writing one."""
        final, alone = self.epoch + 1 == self.config.epochs, self.world.size == 1
        short = alone and self.world.device.type == "cuda" and time.perf_counter() - self.saved < SAVE_AFTER
        return final or not short

    def _asked_to_end(self, number: int, frame: object) -> None:
        """End after the step in progress; at a second Ctrl-C at once.

        Of several processes each may get a Ctrl-C twice, from the terminal and from `torchrun`: the second is ignored.
        """
        if self.asked and number == signal.SIGINT and self.world.size == 1:
            self.insisted = True
            raise KeyboardInterrupt
        self.asked = True

    def _agree(self) -> None:
        """Stop all processes after the same step, if any was asked to."""
        self.stop = self.asked
        if self.world.size > 1:
            self.stop = all_reduce_sum(torch.tensor(float(self.asked), device=self.world.device), self.world).item() > 0

    def _step(self, parts: list[Batch]) -> Tensor:
        """One step of the optimizer; returns the mean loss of this process' images."""
        total = torch.zeros((), device=self.world.device)
        for number, (images, labels) in enumerate(parts, start=1):
            # what torch and torchvision draw depends on the step alone, too; how to mix, in all processes alike
            drawn = (self.config.seed, self.epoch, self.step, number)
            targets = labels
            if self.mix is not None:
                _seed(self.world.device, *drawn, 2)
                images, targets = (value[self.batches.extra :] for value in self.mix(images, labels))
                labels = labels[self.batches.extra :]
            _seed(self.world.device, *drawn, 3, self.world.rank)
            loss, right = self.learner.step(images, labels, targets, last=number == len(parts))
            total += loss / len(parts)
            self.sums += torch.stack([loss * len(labels), right, torch.full_like(right, len(labels))])
        self.bad = torch.where((self.bad < 0) & ~total.isfinite(), self.done, self.bad)
        self.scheduler.step()
        if self.ema is not None:
            self._average(self.ema)
        return total

    @torch.no_grad()
    def _average(self, ema: AveragedModel) -> None:
        """`ema.update_parameters` without its wait, at every step, for copying an unused count to the device."""
        if ema.n_averaged == 0:
            ema.update_parameters(self.net)  # copies all
            return
        averaged: list[tuple[Tensor, Tensor]] = []
        for values in (nn.Module.parameters, nn.Module.buffers):
            for ours, theirs in zip(values(ema.module), values(self.net), strict=True):
                if ours.is_floating_point():
                    averaged.append((ours, theirs))
                else:
                    ours.copy_(theirs)  # a count has no average
        self.average(*map(list, zip(*averaged, strict=True)), ema.n_averaged)
        ema.n_averaged += 1

    def _diverged(self, step: int) -> RunError:
        kept = checkpoint.saved(self.folder / "checkpoints")
        rest = f"; {kept[0]} is from before, and another run can start with it as its weights" if kept else ""
        return RunError(
            f"the loss is not finite at epoch {self.epoch + 1}, step {step} of {self.batches.steps}: lower lr, or "
            f"set warmup or clip{rest}"
        )

    def _test(self) -> Evaluation | None:
        if self.test is None or self.readers is None:
            return None
        batch_size = 256
        if self.world.device.type == "cuda":  # small batches would leave it waiting; what training has fits, and more
            batch_size = max(batch_size, 4 * self.config.batch_size // self.config.accumulate)
        return evaluate_network(
            self.tested_net,
            self.test,
            self.views,
            self.world,
            self.dtype,
            batch_size,
            self.config.bad_images,
            self.readers,
        )

    def _close_epoch(self, evaluation: Evaluation | None) -> None:
        loss, right, count = all_reduce_sum(self.sums, self.world).tolist()
        self.history.append(
            Epoch(
                epoch=self.epoch + 1,
                lr=self.lr,
                train_loss=loss / count,
                train_accuracy=right / count,
                test_loss=evaluation.loss if evaluation else None,
                test_accuracy=evaluation.top1 if evaluation else None,
                test_top5=evaluation.top5 if evaluation else None,
                seconds=self.seconds,
                images_per_second=count / self.seconds,
                skipped=len(self.images.skipped) + len(self.batches.skipped) + len(self.unreadable),
            )
        )
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()

    def _metadata(self) -> dict[str, Any]:
        """What weights and checkpoints say of how they were trained, for `evaluate` and for people's labels."""
        config = self.config
        facts: dict[str, Any] = {"classes": self.images.classes, "size": self.size, "scales": self.views.scales}
        if config.holdout:
            facts["holdout"] = {
                "share": config.holdout,
                "seed": config.seed,
                "digest": self.digests["test"],
                "sizes": self.digests["test_sizes"],
                "data": place_of(self.images.label),
            }
        return facts
