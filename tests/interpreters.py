"""Interpreters that begin with torch and vggfeat imported, which takes a fresh one seconds."""

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_context = multiprocessing.get_context(_METHOD)
_context.set_forkserver_preload(["torch._dynamo", "vggfeat_cli.learn", "vggfeat.training.loop", "vggfeat.losses"])


class Python:
    """`python WORDS`: a script, or `-m` and a module, with arguments; on one thread.

    Attributes:
        process: killed, waited for, or asked about as any of multiprocessing's.
    """

    def __init__(self, *words, environment=None):
        self._folder = tempfile.TemporaryDirectory()
        logs = [f"{self._folder.name}/{name}" for name in ("stdout", "stderr")]
        self._logs = [Path(log) for log in logs]
        environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | (environment or {})
        self.process = _context.Process(target=_live, args=([str(word) for word in words], environment, logs))
        self.process.start()

    def wait(self, timeout=200):
        """Its status, standard output and standard error, once it has ended; it is killed if it does not."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"no end after {timeout} s: {self._logs[1].read_text()}")
        out, err = (log.read_text() if log.exists() else "" for log in self._logs)
        self._folder.cleanup()
        return self.process.exitcode, out, err


def together(count, *words, environment=None):
    """What became of so many processes of one group, by `Python.wait`, in the order of their ranks."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        Python(*words, environment={"RANK": str(i), "LOCAL_RANK": str(i)} | group | (environment or {}))
        for i in range(count)
    ]
    return [each.wait() for each in started]


def _live(words, environment, logs):
    for number, log in enumerate(logs, start=1):
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    import torch

    torch.set_num_threads(1)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
