"""Run our scripts as processes of their own, forked from one that has imported torch: a start takes no five seconds.

Such a process takes signals as one that a shell has started in the foreground. Faults can be ordered for it: to be
killed at a file operation, a disk that is full.
"""
from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parents[1]
PRELOADED = ["train", "matplotlib.figure", "transformers.models.qwen3.modeling_qwen3"]


@dataclass(frozen=True)
class Faults:
    """What is to go wrong in a process."""

    kill_at: int = 0
    """SIGKILL at this file operation in `folder`; 0: never."""
    kill_after: float = 0.0
    """Seconds from that operation to the kill."""
    folder: str = ""
    witness: str = ""
    """A file that gets the name of what that operation was about."""
    longest_file: int = 0
    """Bytes at which every file's growth ends in an error, as on a full disk; 0: none."""
    removed: str = ""
    """A folder that gets a copy of each kept group's file before the process removes it."""


class Script:
    """A script that runs: `python SCRIPT ARGUMENTS`."""

    def __init__(
        self, arguments: Sequence[object], environment: Mapping[str, str], *, script: str = "train.py",
        cwd: Path | None = None, faults: Faults | None = None, terminal: str | None = None,
    ) -> None:  # fmt: skip
        """Start it. terminal: what it is started in and writes to, in place of what `wait` returns."""
        start_server(environment)
        self.arguments = [str(ROOT / script), *map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory()
        self._output = [Path(self._folder.name) / name for name in ("out", "err")]
        for path in self._output:
            path.touch()
        names = [terminal or str(path) for path in self._output]
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=(self.arguments, dict(environment), str(cwd or Path.cwd()), names, faults or Faults())
        )
        self._process.start()
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 600) -> CompletedProcess[str]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"{' '.join(self.arguments)} took more than {timeout} s")
        out, err = (path.read_text() for path in self._output)
        return CompletedProcess(self.arguments, self._process.exitcode, out, err)


def start_server(environment: Mapping[str, str]) -> None:
    """Start the process that others are forked from, once; what libraries read as they are imported is fixed then."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOADED, __name__])
    before = dict(os.environ)
    os.environ.update(environment)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # a process that was killed has left semaphores to it
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(arguments: list[str], environment: dict[str, str], cwd: str, output: list[str], faults: Faults) -> None:
    os.setsid()  # so that it has no terminal, or the one that it opens now
    for number, name in enumerate(output, start=1):
        os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).parent)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a fork server ignores it
    for number in (signal.SIGHUP, signal.SIGTERM):  # as nohup, which may have started the tests, does with SIGHUP
        signal.signal(number, signal.SIG_DFL)
    if faults.removed:
        sys.addaudithook(_archivist(Path(faults.removed)))
    if faults.kill_at:
        sys.addaudithook(_killer(faults))
    if faults.longest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (faults.longest_file, faults.longest_file))
    runpy.run_path(arguments[0], run_name="__main__")


def _killer(faults: Faults):
    left = faults.kill_at

    def on_event(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        changing = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and arguments[1] not in (None, "r", "rb"))
        # a tree is deleted by names inside it and the number of its open folder
        inside = event in ("os.remove", "os.rmdir") and isinstance(arguments[-1], int) and arguments[-1] >= 0
        if changing and (inside or faults.folder in str(arguments[0])):
            left -= 1
            if left == 0:
                Path(faults.witness).write_text(Path(str(arguments[0])).name)
                kill = (os.getpid(), signal.SIGKILL)
                threading.Timer(faults.kill_after, os.kill, kill).start() if faults.kill_after else os.kill(*kill)

    return on_event


def _archivist(folder: Path):
    def on_event(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.remove":
            path, number = Path(str(arguments[0])), arguments[1]
            if isinstance(number, int) and number >= 0:
                path = Path(os.readlink(f"/proc/self/fd/{number}")) / path
            if path.parent.name == "kept":
                shutil.copy(path, folder / path.name)

    return on_event
