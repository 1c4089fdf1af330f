"""A run's folder: its lock, what a run resumes from, and what is written to it.

It holds `config.json`, `log.csv` (a row an epoch), `checkpoints/`, `tensorboard/` where that is installed, and at the
end `weights.safetensors`.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vggfeat import checkpoint
from vggfeat.arch import Arch
from vggfeat.errors import InputError, first_line
from vggfeat.files import TEMPORARY, locked, new_file, written
from vggfeat.network import VGG
from vggfeat.settings import changed
from vggfeat.training.config import TrainConfig
from vggfeat.training.data import ImageSet, would_hold

RESUMABLE = "the run can go on from its checkpoints"
NEEDED = ("config", "classes", "images", "size", "digest", "sizes", "test", "test_sizes", "net")  # a checkpoint of ours


@dataclass(frozen=True)
class Epoch:
    """Results of an epoch; a row of `log.csv`. Accuracies are shares from 0 to 1.

    Attributes:
        epoch: its number, from 1.
        lr: the learning rate at its end.
        train_loss: mean of the loss that was trained on, label smoothing included.
        train_accuracy: on the augmented images, as they were trained on.
        test_loss: cross-entropy on the test set; None without one, as the next two.
        test_accuracy: top-1.
        test_top5: None with five classes or fewer, too.
        seconds: of training, without the test.
        images_per_second: of training.
        skipped: images so far that could not be read, of both sets.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_loss: float | None
    test_accuracy: float | None
    test_top5: float | None
    seconds: float
    images_per_second: float
    skipped: int


def check_folder(folder: Path, config: TrainConfig, resume: bool, sources: Sequence[Any] = ()) -> None:
    """Make sure that nothing in the folder will be lost: it is as good as empty, or its run is to be resumed.

    A run that ended before its first checkpoint leaves nothing to lose.

    Raises:
        InputError: it is not empty and `resume` is False, or holds no run, or one with other settings; or it is inside
            one of the folders that the images come from, and would be a class there.
    """
    named = [os.fspath(source) for source in sources if isinstance(source, str | os.PathLike)]
    if any(would_hold(Path(name), folder) for name in named if name):
        raise InputError(f"{folder} is inside the images' folder, and would become a class of it: choose another")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    begun = {"config.json", "checkpoints", "tensorboard"}  # what a run that was killed early may have left
    rest = {each.name for each in folder.iterdir() if not each.match(TEMPORARY)} - begun if folder.is_dir() else {""}
    kept = [each for each in (folder / "checkpoints").glob("*") if not each.match(TEMPORARY)]
    if not rest and not kept and _config_of(folder / "config.json"):
        return
    if not resume:
        raise InputError(f"{folder} already exists: choose another folder, or resume with resume=True (--resume)")
    if rest and not kept:
        raise InputError(f"{folder} has no checkpoint to resume from: choose another folder")
    if before := _config_of(folder / "config.json"):  # before anything is said of settings that are not the run's
        _compare(folder, before, config)


def _compare(folder: Path, before: dict[str, Any], config: TrainConfig) -> None:
    free = ("device", "workers", "save_every", "compile", "bad_images")
    before = {key: tuple(value) if isinstance(value, list) else value for key, value in before.items()}
    before = TrainConfig().to_dict() | before  # a setting that there was not yet is as if it was not used
    now = config.to_dict()
    if said := changed(before, now, free):
        if now["epochs"] != before["epochs"]:
            again = f"weights={str(folder)!r} (--weights {folder})"
            said += f"; to train its network for longer, begin a new run with {again}"
        raise InputError(f"the run in {folder} has other settings, pass the same ones: {said}")


def _compare_images(folder: Path, state: dict[str, Any], images: ImageSet) -> None:
    if (state["classes"], state["images"]) != (images.classes, len(images)):
        raise InputError(
            f"the run in {folder} was on {state['images']} images of {len(state['classes'])} classes, "
            f"{images.label} has {len(images)} of {len(images.classes)}"
        )
    if state["digest"] != images.digest:
        raise InputError(f"the run in {folder} was on other images than {images.label}: their names or labels differ")
    if images.sizes != state["sizes"]:
        raise InputError(f"the run in {folder} was on other files than those of {images.label}: their sizes differ")


def _compare_test(folder: Path, state: dict[str, Any], test: ImageSet | None) -> None:
    now = None if test is None else test.digest
    if state["test"] != now:
        if state["test"] is None:
            raise InputError(f"the run in {folder} has no test set: go on without one, or begin anew")
        given = f"not {test.label}" if test is not None else "and now there is none"
        raise InputError(f"the run in {folder} has another test set, {given}: pass the same one")
    if test is not None and test.sizes != state["test_sizes"]:
        raise InputError(f"the run in {folder} has another test set, not {test.label}, whose files differ in size")


def arch_of(folder: Path) -> Arch | None:
    """The network of the run in a folder that has a checkpoint; None where that is not recorded."""
    recorded = _config_of(folder / "config.json").get("network")
    if recorded is None or not checkpoint.saved(folder / "checkpoints"):
        return None
    try:
        return Arch(**recorded | {"channels": tuple(recorded["channels"])})
    except (TypeError, KeyError, InputError) as error:
        raise InputError(f"{folder / 'config.json'} was changed: its network is {recorded}") from error


def begin_or_resume(
    folder: Path,
    config: TrainConfig,
    arch: Arch,
    images: ImageSet,
    test: ImageSet | None,
    resume: bool,
    lock: ExitStack,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Make the run's folder, or find how far its run has got.

    Args:
        folder: of the run.
        config: its settings.
        arch: the network.
        images: that it trains on.
        test: those that it is tested on.
        resume: go on with the run that is there.
        lock: until it is closed, no other process trains there.

    Returns:
        The state of the newest good checkpoint, None for a run that begins, and what is wrong with damaged ones.

    Raises:
        InputError: a folder that cannot be written or is in use by another process, another run, or no intact
            checkpoint.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.enter_context(locked(folder))
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    check_folder(folder, config, resume)  # what was made there meanwhile
    state, damaged = checkpoint.newest(folder / "checkpoints", NEEDED) if resume else (None, [])
    if resume and damaged and state is None:
        raise InputError(f"no checkpoint in {folder} is intact, start another run: {'; '.join(damaged)}")
    if resume and state is None and (folder / "config.json").exists() and not _config_of(folder / "config.json"):
        raise InputError(f"{folder / 'config.json'} was not written by vggfeat: choose another folder")
    if state is not None:
        _compare(folder, state["config"], config)
        _compare_images(folder, state, images)
        _compare_test(folder, state, test)
    else:
        facts = {"classes": images.classes, "data": images.label, "network": asdict(arch)}
        text = json.dumps(facts | config.to_dict(), indent=2)
        try:
            with new_file(folder / "config.json", overwrite=True) as file:
                file.write((text + "\n").encode())
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    return state, damaged


def _config_of(path: Path) -> dict[str, Any]:
    """The settings that a run wrote; empty if there are none, or not a run's."""
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return config if {"classes", "data", "optimizer", "seed"} <= config.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def write_log(folder: Path, history: Sequence[Epoch], hint: str = RESUMABLE) -> None:
    """Write `log.csv` anew.

    Raises:
        RunError: it cannot be written.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, [each.name for each in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(epoch) for epoch in history)
    with written(folder / "log.csv", overwrite=True, hint=hint) as file:
        file.write(out.getvalue().encode())


def write_weights(folder: Path, net: VGG, facts: dict[str, Any]) -> None:
    """Write `weights.safetensors`, with what `vggfeat.weights.run_metadata` is to know of them.

    Raises:
        RunError: it cannot be written.
    """
    from safetensors.torch import save

    state = {key: value.detach().contiguous().cpu() for key, value in net.state_dict().items()}
    # one entry: several are written in an order that changes from run to run
    content = save(state, {"vggfeat": json.dumps(facts)})
    with written(folder / "weights.safetensors", overwrite=True, hint=RESUMABLE) as file:
        file.write(content)


class Board:
    """TensorBoard's log, where it is installed and works."""

    def __init__(self, folder: Path, announce: Callable[[str], None]) -> None:
        self.writer = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder))
        except ImportError:
            pass
        except Exception as error:  # just an additional log: no reason to stop
            announce(f"no log for TensorBoard, which does not work here: {first_line(error)}")

    def write(self, epoch: Epoch) -> None:
        """A point on every curve."""
        if self.writer is None:
            return
        for name, value in asdict(epoch).items():
            if value is not None and name != "epoch":
                self.writer.add_scalar(name, value, epoch.epoch)
        self.writer.flush()

    def close(self) -> None:
        """Flush and close."""
        if self.writer is not None:
            self.writer.close()
