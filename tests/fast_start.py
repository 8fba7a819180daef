"""Run our scripts as processes of their own, forked from one that has imported torch: a start takes no five seconds."""
from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parents[1]
PRELOADED = ["train", "matplotlib.figure", "sqlite3", "transformers.models.qwen3.modeling_qwen3",
             "multiprocessing.popen_forkserver"]


def start_server(environment: Mapping[str, str]) -> None:
    """Start the process that others are forked from, once; what libraries read as they are imported is fixed then."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, __name__])
    before = dict(os.environ)
    os.environ.update(environment)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class Script:
    """A script that runs: `python SCRIPT ARGUMENTS`."""

    def __init__(
        self, arguments: Sequence[object], environment: Mapping[str, str], *, script: str = "train.py",
        cwd: Path | None = None, stdout: str | None = None,
    ) -> None:
        start_server(environment)
        self.arguments = [str(ROOT / script), *map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory()
        self._output = [Path(self._folder.name) / name for name in ("out", "err")]
        names = [stdout or str(path) for path in self._output]
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(
            target=_run, args=(self.arguments, dict(environment), str(cwd or Path.cwd()), names)
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

    def wait(self, timeout: float | None = None) -> CompletedProcess[str]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
            raise TimeoutError(f"{' '.join(self.arguments)} took more than {timeout} s")
        out, err = (path.read_text() if path.exists() else "" for path in self._output)
        return CompletedProcess(self.arguments, self._process.exitcode, out, err)


def _run(arguments: list[str], environment: dict[str, str], cwd: str, output: list[str]) -> None:
    for number, name in enumerate(output, start=1):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOCTTY), number)
    for stream in (sys.stdout, sys.stderr):  # bound to the new files, whatever they were
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = arguments
    sys.path[0] = str(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a fork server ignores it
    runpy.run_path(arguments[0], run_name="__main__")
