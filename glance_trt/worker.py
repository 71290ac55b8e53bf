"""Runs functions in a Python process of its own: its memory comes back when it ends, and its crash is an error here.

It is started as ``python -m glance_trt.worker`` and reached through pipes, rather than by `multiprocessing`: a forked
child inherits locks and thread pools of the caller, a spawned one runs the caller's main module again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import IO, Any, TypeVar

from glance_trt.errors import GlanceError, TargetError
from glance_trt.progress import Progress, silent

T = TypeVar("T")

_LENGTH = struct.Struct("<Q")
_LOG_LINES = 5
_REPORTS_APART = 0.05  # seconds


class RemoteError(Exception):
    """What a function in a worker raised, unless it is a `GlanceError` or an `OSError`; those are raised themselves."""


class Worker:
    """A child process that runs functions, one after the other. Use it as a context manager; at its end the process is
    killed, whatever it does.

    what: names the process in errors. environment: variables that it gets beside this process's own.
    """

    def __init__(self, what: str, environment: Mapping[str, str] | None = None) -> None:
        self._what = what
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (`__exit__` closes it)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "glance_trt.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={
                **os.environ,
                # The child imports what this process would import, wherever its packages were found.
                "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
                "PYTHONSAFEPATH": "1",
                **(environment or {}),
            },
        )

    def call(self, function: Callable[..., T], *arguments: Any, progress: Progress | None = None, **named: Any) -> T:
        """The function's result. It is a module's own, and its arguments, its result and its errors can be pickled.

        progress: hears what the function reports to its argument of that name, which it gets only if this is given.
        Raises what the function raises, `RemoteError` in place of what only its process may know, and `TargetError`,
        with the end of the log, where the process dies.
        """
        assert self._child.stdin and self._child.stdout
        with contextlib.suppress(BrokenPipeError):  # it is dead, which the reading below finds
            frame = pickle.dumps((function, arguments, named, progress is not None))
            self._child.stdin.write(_LENGTH.pack(len(frame)) + frame)
            self._child.stdin.flush()
        while True:
            try:
                kind, value = pickle.load(self._child.stdout)
            except (EOFError, pickle.UnpicklingError):
                raise TargetError(self._death()) from None
            if kind == "result":
                return value  # type: ignore[no-any-return]
            if kind == "progress":
                (progress or silent)(*value)
            elif kind == "error":
                raise value
            else:
                raise RemoteError(value)

    def log(self) -> list[str]:
        """The lines that the process and the libraries in it have printed so far."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace").splitlines()

    def _death(self) -> str:
        code = self._child.wait()
        if code < 0:
            reason = f"was ended by {signal.Signals(-code).name}"
            reason += "; that is usually for want of memory" if -code == signal.SIGKILL else ""
        else:
            reason = f"ended with code {code}"
        return "\n  ".join([f"{self._what}: its process {reason}", *self.log()[-_LOG_LINES:]])

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._log):
            with contextlib.suppress(OSError):  # a request that was never read
                stream.close()  # type: ignore[union-attr]


def _serve(requests: queue.SimpleQueue[bytes], replies: IO[bytes]) -> None:
    def reply(kind: str, value: object) -> None:
        frame = pickle.dumps((kind, value))
        replies.write(frame)
        replies.flush()

    while True:
        frame = requests.get()
        try:
            function, arguments, named, reporting = pickle.loads(frame)
            if reporting:
                named["progress"] = _Reports(reply)
            reply("result", function(*arguments, **named))
        except (GlanceError, OSError) as error:
            reply("error", error)
        except Exception:
            reply("unknown", traceback.format_exc())


class _Reports:
    """A `Progress` that passes on the first and the last report of a stage, and of the others a few a second."""

    def __init__(self, reply: Callable[[str, object], None]) -> None:
        self._reply, self._last = reply, 0.0

    def __call__(self, stage: str, done: float, total: float) -> None:
        now = time.monotonic()
        if 0 < done < total and now < self._last + _REPORTS_APART:
            return
        self._last = now
        self._reply("progress", (stage, done, total))


def _read(requests: queue.SimpleQueue[bytes]) -> None:
    """Take requests from stdin. Its end is the parent's: whatever runs here ends with it."""
    while len(header := sys.stdin.buffer.read(_LENGTH.size)) == _LENGTH.size:
        requests.put(sys.stdin.buffer.read(*_LENGTH.unpack(header)))
    os._exit(1)


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends this process
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    _serve(requests, replies)


if __name__ == "__main__":
    _main()
