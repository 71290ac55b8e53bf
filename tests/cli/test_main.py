"""Commands have help, errors have exit codes, data goes to stdout and everything else to stderr."""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import click
import pytest

from glance_trt import errors
from glance_trt.cli import bars
from glance_trt.cli.main import commands
from glance_trt.errors import GlanceError

from .conftest import Run

ROOT = Path(__file__).parents[2]
MAIN = "from glance_trt.cli.main import main\nmain()"
COMMANDS = commands.list_commands(click.Context(commands))
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "onnx",
    "onnxruntime",
    "tensorrt_rtx",
    "tokenizers",
    "PIL",
    "scipy",
}
COMMANDS_OF_THE_DESIGN = {"schedule", "distill", "build", "compile", "generate", "inspect", "verify", "bench", "doctor"}


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("glance_trt.bundle.Bundle.open", fail)


# --- help -----------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_with_a_sentence(run: Run) -> None:
    assert set(COMMANDS) == COMMANDS_OF_THE_DESIGN
    shown = run("--help")
    assert (shown.code, shown.err) == (0, "")
    for name in COMMANDS:
        assert re.search(rf"(?m)^  {name} +[A-Z]\w+ .+", shown.out)


@pytest.mark.parametrize("name", COMMANDS)
def test_command_has_help_with_an_example_and_a_line_in_the_readme(run: Run, name: str) -> None:
    shown = run(name, "-h")
    assert shown.code == 0
    assert shown.out.startswith(f"Usage: glance-trt {name} [OPTIONS]")
    assert re.search(rf"Example: glance-trt {name}\b", shown.out)
    assert f"glance-trt {name}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    command = commands.get_command(click.Context(commands), name)
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help is not None, parameter.name
            assert parameter.help.endswith("."), parameter.name


def test_a_misspelt_command_is_answered_with_the_right_one(run: Run) -> None:
    shown = run("genrate")
    assert (shown.code, shown.out) == (2, "")
    assert "No such command 'genrate'; did you mean 'generate'?" in shown.err


def test_the_package_runs_as_the_command_line() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "glance_trt", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("glance-trt, version ")


def test_help_of_all_commands_takes_under_a_second_of_cpu_and_loads_nothing_heavy() -> None:
    code = f"""
import sys, time
from click.testing import CliRunner
from glance_trt.cli.main import commands
for name in {["", *COMMANDS]!r}:
    result = CliRunner().invoke(commands, [*name.split(), "--help"])
    assert result.exit_code == 0, result.output
print(time.process_time())
print(*sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert float(shown[0]) < 1
    assert not HEAVY & set(shown[1].split())


def test_version_is_that_of_the_package(run: Run) -> None:
    import glance_trt

    assert run("--version").out == f"glance-trt, version {glance_trt.__version__}\n"


# --- exit codes -----------------------------------------------------------------------------------------------------

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GlanceError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_error_is_one_line_on_stderr_and_an_exit_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, kind: type[GlanceError]
) -> None:
    fail_with(monkeypatch, kind("what.yaml: it is wrong; mend it"))
    shown = run("inspect", "any")
    assert (shown.code, shown.out, shown.err) == (kind.exit_code, "", "error: what.yaml: it is wrong; mend it\n")


def test_exit_codes_are_distinct_and_listed_in_the_readme() -> None:
    codes = [kind.exit_code for kind in KINDS]
    assert len(set(codes)) == len(codes)
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("### Exit codes")[2].partition("\n## ")[0]
    assert sorted(map(int, re.findall(r"\b\d+\b", section))) == sorted({0, 2, 130, *codes})


@pytest.mark.parametrize(
    "arguments",
    [[], ["unknown"], ["inspect"], ["inspect", "a", "b"], ["generate", "a", "b", "--count", "many"], ["-x"]],
)
def test_wrong_usage_is_code_2_and_shows_how(run: Run, arguments: list[str]) -> None:
    shown = run(*arguments)
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith("Usage: glance-trt")


def test_interruption_is_code_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    shown = run("inspect", "any")
    assert (shown.code, shown.out, shown.err.strip()) == (130, "", "interrupted")


def test_missing_package_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ModuleNotFoundError("No module named 'torch'", name="torch"))
    shown = run("inspect", "any")
    assert shown.code == errors.TargetError.exit_code
    assert shown.err == "error: this command needs torch; glance-trt doctor says what to install\n"


def test_defect_of_ours_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for defect in (ModuleNotFoundError("No module named 'glance_trt.x'", name="glance_trt.x"), ZeroDivisionError()):
        fail_with(monkeypatch, defect)
        with pytest.raises(type(defect)):
            run("inspect", "any")


def test_warnings_of_ours_are_one_line_and_those_of_others_are_not_shown(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import warnings

    from glance_trt.prompts import PromptTruncated

    def warn(*_: object) -> None:
        warnings.warn("cut: 'x'", PromptTruncated, stacklevel=1)
        warnings.warn("a library grows old", DeprecationWarning, stacklevel=1)
        raise GlanceError("enough")

    monkeypatch.setattr("glance_trt.bundle.Bundle.open", warn)
    assert run("inspect", "any").err == "warning: cut: 'x'\nerror: enough\n"


# --- real processes -------------------------------------------------------------------------------------------------


def test_process_ends_with_the_exit_code(tmp_path: Path) -> None:
    missing = os.fsencode(tmp_path) + b"/\xff.bundle"  # a path need not be text
    shown = subprocess.run([sys.executable, "-c", MAIN, "inspect", missing], capture_output=True, check=False)
    assert (shown.returncode, shown.stdout) == (6, b"")
    assert shown.stderr.startswith(b"error: ")
    assert b"\\udcff.bundle: no such folder; a bundle is made with: glance-trt build RECIPE -o" in shown.stderr


def test_reader_of_stdout_that_leaves_is_no_error(tiny_bundle: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", MAIN, "inspect", tiny_bundle]
    with os.fdopen(writing, "wb") as pipe:
        shown = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (shown.returncode, shown.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_stdout_on_a_full_disk_is_said(tiny_bundle: Path) -> None:
    command = [sys.executable, "-c", MAIN, "inspect", tiny_bundle]
    with open("/dev/full", "wb") as full:
        shown = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (shown.returncode, shown.stderr) == (9, b"error: output: No space left on device\n")


# --- progress bars --------------------------------------------------------------------------------------------------


class Terminal:
    """Standard error that says whether it is a terminal, and a clock that stands until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
        self.now, self.text, self._is_terminal = 1000.0, "", is_terminal
        monkeypatch.setattr(sys, "stderr", self)
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)
        monkeypatch.setattr("glance_trt.cli.bars.time", self)
        monkeypatch.setattr("tqdm.std.TMonitor", None)  # no thread that draws by the real clock
        monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)

    def isatty(self) -> bool:
        return self._is_terminal

    def monotonic(self) -> float:
        return self.now

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_bar_appears_when_a_stage_takes_longer_than_two_seconds_and_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, is_terminal=True)
    with bars.bars() as progress:
        progress("fuse", 0, 10)
        for done in (1, 2, 3):
            terminal.now += 0.6
            progress("fuse", done, 10)
        assert terminal.text.strip() == ""
        terminal.now += 0.6
        progress("fuse", 4, 10)
        assert "fuse:  40%|" in terminal.text
        assert "4/10" in terminal.text
        progress("fuse", 10, 10)
        assert re.search(r"\r *\r$", terminal.text)  # wiped
    assert "\n" not in terminal.text


def test_bar_of_a_short_stage_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal in (True, False):
        terminal = Terminal(monkeypatch, is_terminal)
        with bars.bars() as progress:
            for stage in ("one", "two"):
                for done in range(11):
                    progress(stage, done, 10)
                    terminal.now += 0.1
                    assert "%" not in terminal.text
        assert is_terminal or terminal.text == ""


def test_a_log_gets_a_line_for_a_stage_and_one_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, is_terminal=False)
    with bars.bars() as progress:
        progress("trace slow", 0, 1)
        assert terminal.text == "trace slow\n", "of what does not count, at once"
        progress("trace slow", 1, 1)
        for done in range(11):
            progress("hash", done * 1e9, 1e10)
            terminal.now += 13
        progress("hash", 1e10, 1e10)
    assert terminal.text == "trace slow\nhash 10 %\nhash 60 %\n"


def test_bar_is_wiped_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, is_terminal=True)

    def fail_half_way() -> None:
        with bars.bars() as progress:
            progress("fuse", 0, 1)
            terminal.now += 3
            progress("fuse", 0.5, 1)
            raise GlanceError

    with pytest.raises(GlanceError):
        fail_half_way()
    assert "fuse:  50%|" in terminal.text
    assert re.search(r"\r *\r$", terminal.text)


def test_bytes_are_shown_in_large_units(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch, is_terminal=True)
    with bars.bars() as progress:
        progress("check", 0, 5e9)
        terminal.now += 3
        progress("check", 1e9, 5e9)
        assert "1.00G/5.00G" in terminal.text


@pytest.mark.parametrize("on_terminal", [True, False])
def test_real_terminal_gets_a_bar_and_a_file_does_not(tiny_bundle: Path, tmp_path: Path, on_terminal: bool) -> None:
    code = "import glance_trt.cli.bars\nglance_trt.cli.bars._DELAY = 0\n" + MAIN
    command = [sys.executable, "-c", code, "generate", tiny_bundle, "a red star", "-n", "2", "--seed", "7", "--json"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    reading, writing = os.openpty() if on_terminal else os.pipe()
    if on_terminal:
        fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # rows, columns
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=writing) as process:
        os.close(writing)
        shown = b""
        try:
            while block := os.read(reading, 4096):
                shown += block
        except OSError:  # Linux's way to say that a terminal has closed
            pass
        os.close(reading)
        assert process.stdout is not None
        records = [json.loads(line) for line in process.stdout]
    assert process.returncode == 0
    assert [record["file"] for record in records] == ["a-red-star-7.png", "a-red-star-8.png"]
    assert shown.startswith(b"seed 7")
    assert (b"generate:" in shown and b"%|" in shown) == on_terminal
    assert on_terminal or shown == b"seed 7\ngenerate\n"
