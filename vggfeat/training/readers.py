"""Processes that read images: started once, used for plan after plan, and ended with the one that started them."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from vggfeat.errors import ImageError, RunError, first_line
from vggfeat.image import pixels_of
from vggfeat.signals import ignore_termination


class Readers:
    """Processes that read items of a data set, plan after plan; without any, this one does.

    They start with the first plan and stay until `close`: where processes are not forked, each takes seconds to start.

    Args:
        dataset: gives an item by its place in a plan.
        workers: how many.
        collate: makes a batch of its items.
    """

    def __init__(self, dataset: Dataset[Any], workers: int, collate: Callable[[list[Any]], Any] = list) -> None:
        self.dataset, self.workers, self.collate = dataset, workers, collate
        self._plan: list[list[Any]] = []
        self._loader: DataLoader[Any] | None = None
        self._stop: Callable[[], object] | None = None  # where processes were started

    def read(self, plan: Iterable[list[Any]]) -> Iterator[Any]:
        """The batches of a plan, each a list of places; one plan at a time; it may be given up half way.

        Raises:
            RunError: one of the processes was ended from outside.
        """
        self._plan[:] = plan
        if self._loader is None:  # now, since it warns of more processes than the machine has processors
            self._loader = DataLoader(
                self.dataset,
                batch_sampler=self._plan,
                num_workers=self.workers,
                collate_fn=self.collate,
                worker_init_fn=_begin_worker,
                multiprocessing_context=_start_method() if self.workers else None,  # or torch would choose it for all
                generator=torch.Generator("cpu"),  # or else it would draw from the global one
                persistent_workers=self.workers > 0,
            )
        with reader_errors():
            with torch.device("cpu"):  # where it draws, whatever the default device is
                items = iter(self._loader)
            if self._stop is None and (stop := getattr(items, "_shutdown_workers", None)):
                # they ignore SIGTERM: at exit they would be waited for, for ever, where a traceback still holds them
                self._stop = atexit.register(stop)
            try:
                yield from items
            except MemoryError as error:
                raise RunError("there is not enough memory for the images at that size") from error

    def close(self) -> None:
        """End the processes; a further plan starts others."""
        if self._stop is not None:
            atexit.unregister(self._stop)
            self._stop()
        self._loader = self._stop = None


@contextlib.contextmanager
def reader_errors() -> Iterator[None]:
    """Say what happened where one of the processes was ended from outside, which torch raises wherever the main one is.

    Raises:
        RunError: one was.
    """
    try:
        yield
    except RuntimeError as error:
        torchs = not isinstance(error, RunError)
        if not (torchs and any(said in str(error) for said in ("exited unexpectedly", "killed by signal"))):
            raise
        guard = "" if _start_method() == "fork" else ', or a script without `if __name__ == "__main__":`'
        raise RunError(
            f"a process that reads images was ended, perhaps for lack of memory{guard} ({first_line(error)}); "
            "set workers lower, to 0 for none"
        ) from error


def _begin_worker(worker: int) -> None:
    """Ignore Ctrl-C and its like, which a terminal sends to all processes: the main one decides. And end with it."""
    ignore_termination()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def processes() -> int:
    """Processes to read images with: as many as threads, up to 8; 0 where that would not be faster, or cannot be.

    On 16 cores 60 000 small JPEGs take 5 s instead of 12; on two, where this process has enough to do with what it is
    given, no less than without. Where processes are not forked, each takes seconds to start.
    """
    most = min(8, torch.get_num_threads(), os.cpu_count() or 1)
    return most if most >= 4 and _start_method() == "fork" and not multiprocessing.current_process().daemon else 0


def _start_method() -> str:
    """How processes are started, without choosing it for the whole program."""
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


@dataclass(frozen=True)
class ScaledImages(Dataset[Any]):
    """Image number i as (H,W,3) uint8 of NumPy, its shorter side so long, or a message where it cannot be read."""

    read: Callable[[int], Image.Image]

    def __getitem__(self, item: tuple[int, int | None]) -> Any:
        i, shorter = item
        try:
            return pixels_of(scaled(self.read(i), shorter)).numpy()
        except ImageError as error:
            return str(error)


def scaled(image: Image.Image, shorter: int | None) -> Image.Image:
    """The picture with a shorter side of so many pixels, the aspect kept; as it is for None."""
    if shorter is None:
        return image
    short = min(image.size)
    width, height = (max(1, round(side * shorter / short)) for side in image.size)
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BILINEAR)
