"""The workplace of a build: nothing is made twice, nothing is half-made, and the bundle before stays whole."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glance_trt import trust
from glance_trt.bundle import Bundle
from glance_trt.errors import OutputError
from glance_trt.staging import Staging, key_of, locked, present, writing

from .models import tiny

Make = Callable[[Path], list[str]]


def _maker(calls: list[str], **files: str) -> Make:
    """Makes files of the given content (``a_txt="content"`` is ``a.txt``), and notes that it was called."""

    def make(folder: Path) -> list[str]:
        calls.append(",".join(files))
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_text(content)
        return [name.replace("_", ".") for name in files]

    return make


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "x.bundle"


@pytest.fixture
def bundle(tiny_bundle: Path, output: Path) -> Bundle:
    """A bundle at `output` whose files have their own names as keys."""
    _finish(tiny_bundle, output)
    return Bundle.open(output)


def _finish(source: Path, output: Path) -> None:
    """Put a copy of a bundle at `output`, by way of a workplace."""
    original = Bundle.open(source)
    staging = Staging(output)
    for name in original.manifest.files:

        def make(folder: Path, name: str = name) -> list[str]:
            (folder / name).write_bytes(original.path(name).read_bytes())
            return [name]

        staging.stage(key_of(name), make)
    files = staging.entries(original.manifest.files)
    staging.finish(dataclasses.replace(original.manifest, files=files))


def test_keys_differ_where_anything_differs() -> None:
    keys = {key_of("a"), key_of("a", 1), key_of("a", "1"), key_of(["a", 1]), key_of("a", {"x": 1}), key_of("a", None)}
    assert len(keys) == 6
    assert key_of({"x": 1, "y": 2}) == key_of({"y": 2, "x": 1})


def test_an_artefact_is_made_once_however_many_builds_ask(output: Path) -> None:
    calls: list[str] = []
    for _ in range(3):
        staging = Staging(output)
        assert staging.stage("key", _maker(calls, a_txt="one", b_txt="two")) == ["a.txt", "b.txt"]
        assert (staging.folder / "b.txt").read_text() == "two"
        assert staging.key("b.txt") == "key"
    assert calls == ["a_txt,b_txt"]
    assert not output.exists()


@pytest.fixture
def with_a_plan(output: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bundle:
    """A bundle of another user's, whose file ``gpu.a.plan`` says that it is what the key ``K`` stands for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = Bundle.open(tiny.make_bundle(tmp_path / "theirs", extra={"gpu.a.plan": b"code"}))
    entry = bundle.manifest.files["gpu.a.plan"]
    files = bundle.manifest.files | {"gpu.a.plan": dataclasses.replace(entry, key="K")}
    return Bundle(bundle.directory, dataclasses.replace(bundle.manifest, files=files), bundle.sha256)


def test_a_plan_of_the_bundle_before_is_taken_over_only_if_it_was_built_here(with_a_plan: Bundle, output: Path) -> None:
    def make(folder: Path) -> list[str]:
        (folder / "gpu.a.plan").write_bytes(b"ours")
        return ["gpu.a.plan"]

    staging = Staging(output, with_a_plan)
    staging.stage("K", make)
    assert (staging.folder / "gpu.a.plan").read_bytes() == b"ours"

    trust.remember([with_a_plan.manifest.files["gpu.a.plan"].sha256])
    again = Staging(output.with_name("y.bundle"), with_a_plan)
    again.stage("K", make)
    assert (again.folder / "gpu.a.plan").read_bytes() == b"code"


def test_a_file_that_is_kept_answers_to_no_key_of_its_own_bundle(with_a_plan: Bundle, output: Path) -> None:
    staging = Staging(output, with_a_plan)
    staging.keep("gpu.a.plan")
    assert (staging.folder / "gpu.a.plan").read_bytes() == b"code"
    assert staging.key("gpu.a.plan") != "K"
    staging.stage("K", _maker([], b_txt="made"))
    assert (staging.folder / "b.txt").read_text() == "made"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "full")])
def test_an_artefact_that_fails_leaves_nothing_and_is_made_again(output: Path, error: Any) -> None:
    def fail(folder: Path) -> list[str]:
        (folder / "a.txt").write_text("half")
        raise error

    staging = Staging(output)
    calls: list[str] = []
    staging.stage("other", _maker(calls, o_txt="o"))
    with pytest.raises((KeyboardInterrupt, OSError)):
        staging.stage("key", fail)
    assert [path.name for path in staging.folder.iterdir()] == ["o.txt"]
    again = Staging(output)
    again.stage("other", _maker(calls, o_txt="o"))
    again.stage("key", _maker(calls, a_txt="whole"))
    assert calls == ["o_txt", "a_txt"]
    assert (again.folder / "a.txt").read_text() == "whole"


def test_what_a_killed_build_left_half_made_is_thrown_away(output: Path) -> None:
    staging = Staging(output)
    staging.stage("key", _maker([], a_txt="a"))
    (staging.folder / "stray.bin").write_text("stray")
    unfinished = staging.folder.parent / "unfinished"
    (unfinished / "draft").mkdir(parents=True)
    (unfinished / "draft" / "half").write_text("half")
    again = Staging(output)
    assert [path.name for path in again.folder.iterdir()] == ["a.txt"]
    assert not unfinished.exists()


def test_a_replaced_file_takes_its_former_key_with_it(output: Path) -> None:
    """Else another build of what was there before would take the new file for the old one."""
    calls: list[str] = []
    staging = Staging(output)
    staging.stage("old", _maker(calls, a_txt="old", b_txt="old"))
    staging.stage("new", _maker(calls, b_txt="new"))
    again = Staging(output)
    again.stage("old", _maker(calls, a_txt="old", b_txt="old"))
    assert calls == ["a_txt,b_txt", "b_txt", "a_txt,b_txt"]
    assert (again.folder / "b.txt").read_text() == "old"


def test_a_group_of_files_counts_only_whole(output: Path) -> None:
    calls: list[str] = []
    staging = Staging(output)
    staging.stage("key", _maker(calls, a_txt="a", b_txt="b"))
    (staging.folder / "b.txt").unlink()
    assert Staging(output).stage("key", _maker(calls, a_txt="a", b_txt="b")) == ["a.txt", "b.txt"]
    assert len(calls) == 2


def test_a_damaged_record_only_costs_time(output: Path) -> None:
    calls: list[str] = []
    Staging(output).stage("key", _maker(calls, a_txt="a"))
    (output.parent / ".x.bundle.building" / "finished.json").write_text("{")
    Staging(output).stage("key", _maker(calls, a_txt="a"))
    assert len(calls) == 2


def test_a_finished_bundle_is_whole_and_alone(bundle: Bundle, tiny_bundle: Path, output: Path) -> None:
    bundle.verify()
    assert os.listdir(output.parent) == ["x.bundle"]
    original = Bundle.open(tiny_bundle).manifest
    assert {name: entry.sha256 for name, entry in bundle.manifest.files.items()} == {
        name: entry.sha256 for name, entry in original.files.items()
    }


def test_files_of_the_bundle_before_are_taken_over_and_never_written_to(bundle: Bundle, output: Path) -> None:
    name = next(iter(bundle.manifest.files))
    content = bundle.path(name).read_bytes()
    calls: list[str] = []
    staging = Staging(output, bundle)
    assert staging.stage(key_of(name), _maker(calls)) == [name]
    assert calls == []
    assert (staging.folder / name).read_bytes() == content

    def replace(folder: Path) -> list[str]:
        (folder / name).write_text("other")
        return [name]

    staging.stage("other", replace)
    assert (staging.folder / name).read_text() == "other"
    assert bundle.path(name).read_bytes() == content
    bundle.verify()


def test_an_altered_file_of_the_bundle_before_is_not_taken_over(bundle: Bundle, output: Path) -> None:
    name = next(iter(bundle.manifest.files))
    content = bundle.path(name).read_bytes()
    bundle.path(name).write_bytes(bytes(len(content)))
    calls: list[str] = []

    def make(folder: Path) -> list[str]:
        calls.append(name)
        (folder / name).write_bytes(content)
        return [name]

    Staging(output, bundle).stage(key_of(name), make)
    assert calls == [name]


def test_a_swap_that_fails_keeps_the_bundle_before(
    bundle: Bundle, tiny_bundle: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == output and "replaced" not in str(source):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        _finish(tiny_bundle, output)
    Bundle.open(output).verify()
    monkeypatch.undo()
    _finish(tiny_bundle, output)
    assert os.listdir(output.parent) == ["x.bundle"]


def test_a_build_killed_in_the_middle_of_the_swap_is_mended_by_the_next(bundle: Bundle, output: Path) -> None:
    workplace = output.parent / ".x.bundle.building"
    workplace.mkdir()
    os.replace(output, workplace / "replaced")
    Staging(output)
    Bundle.open(output).verify()


def test_a_link_to_a_bundle_stays_a_link(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "x.bundle").symlink_to(tmp_path / "disk" / "real.bundle")
    for _ in range(2):
        _finish(tiny_bundle, tmp_path / "x.bundle")
    assert (tmp_path / "x.bundle").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["real.bundle"]
    Bundle.open(tmp_path / "x.bundle").verify()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"x\.bundle: disk full \(\d+ MB free\); free some space and build again"),
        (errno.EDQUOT, "disk full"),
        (errno.EACCES, "some/file: Permission denied; give another -o"),
        (errno.EROFS, "some/file: Read-only file system; give another -o"),
        (errno.ENOTDIR, "some/file: Not a directory; give another -o"),
    ],
)
def test_a_place_that_cannot_be_written_is_an_output_error(output: Path, number: int, message: str) -> None:
    with pytest.raises(OutputError, match=message), writing(output / "not" / "there" / "x.bundle"):
        raise OSError(number, os.strerror(number), "some/file")


def test_other_errors_of_the_system_stay_what_they_are(output: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(output):
        (output / "no").read_text()


def test_a_process_that_outlives_its_build_cannot_put_its_files_into_the_next(output: Path) -> None:
    """Each writes into a folder of its own, which the next build clears away."""

    def make(folder: Path) -> list[str]:
        (folder / "a.txt").write_text("old")
        again = Staging(output)  # meanwhile the build was killed, and begun anew
        again.stage("key", _maker([], a_txt="new"))
        return ["a.txt"]

    with pytest.raises(FileNotFoundError):
        Staging(output).stage("key", make)
    assert (Staging(output).folder / "a.txt").read_text() == "new"


def test_what_is_there_already_is_counted_once(bundle: Bundle, output: Path) -> None:
    size = sum(entry.size for entry in bundle.manifest.files.values())
    assert present(output) == 0
    assert present(output, bundle) == size
    staging = Staging(output, bundle)
    name = next(iter(bundle.manifest.files))
    staging.stage(key_of(name), _maker([]))  # a link to the bundle's
    staging.stage("other", _maker([], a_txt="12345"))
    record = (staging.folder.parent / "finished.json").stat().st_size
    assert present(output, bundle) == size + 5 + record


# --- one build at a time --------------------------------------------------------------------------------------------

HOLD = """
import os, sys, time
from pathlib import Path
from glance_trt.staging import locked

output, times, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
waited = []
for _ in range(times):
    with locked(output, lambda *report: waited.append(report)):
        os.close(os.open("held", os.O_CREAT | os.O_EXCL))  # fails if another holds it as well
        print("held", flush=True)
        time.sleep(seconds)
        os.unlink("held")
print(waited, flush=True)
"""


def _hold(output: Path, times: int = 1, seconds: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(output), str(times), str(seconds)]
    return subprocess.Popen(command, cwd=output.parent, stdout=subprocess.PIPE, text=True)


def test_the_second_waits_for_the_first_and_says_so(output: Path) -> None:
    with _hold(output, seconds=0.5) as first:
        assert first.stdout
        first.stdout.readline()
        with _hold(output) as second:
            assert second.communicate()[0].splitlines()[-1] == (
                "[('wait for another build of x.bundle', 0, 1), ('wait for another build of x.bundle', 1, 1)]"
            )
        assert first.stdout.read() == "[]\n"
    assert os.listdir(output.parent) == []


def test_never_do_two_hold_it_while_its_file_comes_and_goes(output: Path) -> None:
    processes = [_hold(output, times=1000) for _ in range(3)]
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert os.listdir(output.parent) == []


def test_what_a_killed_build_held_is_free(output: Path) -> None:
    with _hold(output, seconds=60) as first:
        assert first.stdout
        first.stdout.readline()
        first.kill()
    reports: list[Any] = []
    with locked(output, lambda *report: reports.append(report)):
        assert os.listdir(output.parent).count(".x.bundle.lock") == 1
    assert reports == []
    assert ".x.bundle.lock" not in os.listdir(output.parent)


def test_an_error_frees_it_and_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "x.bundle").symlink_to(tmp_path / "disk" / "real.bundle")
    with contextlib.suppress(KeyboardInterrupt), locked(tmp_path / "x.bundle"):
        assert os.listdir(tmp_path / "disk") == [".real.bundle.lock"]
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "disk") == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
def test_an_output_where_no_file_can_be_made_is_refused() -> None:
    with (
        pytest.raises(OutputError, match=r"^/proc: no file can be made there; give another -o$"),
        locked(Path("/proc/x")),
    ):
        pass
