from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glance_trt.errors import RecipeError, TargetError
from glance_trt.progress import Progress
from glance_trt.worker import RemoteError, Worker

REPOSITORY = Path(__file__).parent.parent


def start() -> Worker:
    """A worker that can import this file, to find the functions below."""
    return Worker("work", {"PYTHONPATH": str(REPOSITORY)})


def count(progress: Progress) -> str:
    for done in range(4001):
        progress("counting", done, 4000)
    return "counted"


def refuse(error: Exception) -> None:
    raise error


def die(how: int) -> None:
    print("about to", "die")
    sys.stdout.flush()
    os.kill(os.getpid(), how)


def leave(code: int) -> None:
    os.write(2, b"leaving\n")
    os._exit(code)


def sleep_and_leave_word(path: Path) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(60)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def gone(process: int, within: float = 5) -> bool:
    end = time.monotonic() + within
    while is_alive(process) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(process)


def test_calls_run_one_after_the_other_in_one_other_process_which_ends_with_the_worker() -> None:
    with start() as worker:
        first, second = worker.call(os.getpid), worker.call(os.getpid)
        assert first == second != os.getpid()
    assert gone(first)


def test_progress_is_heard_from_the_first_report_to_the_last_without_a_flood() -> None:
    calls: list[tuple[str, float, float]] = []
    with start() as worker:
        assert worker.call(count, progress=lambda *call: calls.append(call)) == "counted"
    assert calls[0] == ("counting", 0, 4000)
    assert calls[-1] == ("counting", 4000, 4000)
    assert len(calls) < 400


def test_errors_that_the_caller_knows_come_as_they_are_and_others_with_their_trace() -> None:
    with start() as worker:
        with pytest.raises(RecipeError, match=r"^phases: empty$"):
            worker.call(refuse, RecipeError("phases: empty"))
        with pytest.raises(FileNotFoundError) as found:
            worker.call(refuse, FileNotFoundError(2, "No such file", "there"))
        assert found.value.filename == "there"
        with pytest.raises(RemoteError, match=r"(?s)in refuse.*ZeroDivisionError: once"):
            worker.call(refuse, ZeroDivisionError("once"))
        assert worker.call(os.getpid), "it goes on working"


@pytest.mark.parametrize(
    ("how", "text"),
    [
        (signal.SIGKILL, r"work: its process was ended by SIGKILL; that is usually for want of memory\n  about to die"),
        (signal.SIGSEGV, r"work: its process was ended by SIGSEGV\n  about to die"),
    ],
)
def test_a_crash_is_an_error_with_the_end_of_the_log(how: int, text: str) -> None:
    with start() as worker:
        with pytest.raises(TargetError, match=text):
            worker.call(die, how)
        with pytest.raises(TargetError, match="its process was ended by"):
            worker.call(os.getpid)


def test_an_exit_is_an_error_too() -> None:
    with start() as worker, pytest.raises(TargetError, match=r"^work: its process ended with code 3\n  leaving"):
        worker.call(leave, 3)


def test_nothing_that_a_library_prints_reaches_the_caller_s_streams(capfd: pytest.CaptureFixture[str]) -> None:
    with start() as worker:
        worker.call(print, "from a library", flush=True)
        assert worker.log() == ["from a library"]
    assert capfd.readouterr() == ("", "")


def test_an_interruption_of_the_caller_ends_the_process_at_once(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with contextlib.suppress(KeyboardInterrupt), start() as worker:
            worker.call(os.getpid)
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            begun = time.monotonic()
            worker.call(sleep_and_leave_word, tmp_path / "pid")
        assert time.monotonic() - begun < 2
    finally:
        signal.signal(signal.SIGALRM, before)
    assert gone(int((tmp_path / "pid").read_text()))


def test_it_does_not_outlive_a_caller_that_is_killed(tmp_path: Path) -> None:
    word = tmp_path / "pid"
    script = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from tests.test_worker import start, sleep_and_leave_word, Path\n"
        f"with start() as worker: worker.call(sleep_and_leave_word, Path({str(word)!r}))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as caller:
        end = time.monotonic() + 20
        while not (word.is_file() and word.read_text()) and time.monotonic() < end:
            time.sleep(0.02)
        caller.kill()
    assert gone(int(word.read_text()))
