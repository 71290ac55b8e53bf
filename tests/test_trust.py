from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from glance_trt import records, trust
from glance_trt.errors import BundleError, TargetError

CONTENT = b"a plan"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a.plan"
    path.write_bytes(CONTENT)
    return path


def test_a_plan_that_was_built_here_is_read(plan: Path) -> None:
    trust.remember([SHA256])
    assert trust.read(plan, SHA256) == CONTENT


def test_a_plan_from_elsewhere_is_read_only_if_the_user_says_so(plan: Path) -> None:
    with pytest.raises(TargetError, match=r"a\.plan: a plan is native code, .* give --trust; .* glance-trt compile"):
        trust.read(plan, SHA256)
    trust.remember(["0" * 64])
    with pytest.raises(TargetError, match="native code"):
        trust.read(plan, SHA256)
    assert trust.read(plan, SHA256, trusted=True) == CONTENT


@pytest.mark.parametrize("trusted", [False, True])
def test_an_altered_plan_is_never_read(plan: Path, trusted: bool) -> None:
    trust.remember([SHA256])
    plan.write_bytes(b"A plan")
    with pytest.raises(BundleError, match=re.escape(f"{plan}: altered")):
        trust.read(plan, SHA256, trusted=trusted)


def test_a_record_that_others_could_have_written_does_not_count(plan: Path) -> None:
    trust.remember([SHA256])
    (records.folder() / "trusted.json").chmod(0o666)
    with pytest.raises(TargetError, match="native code"):
        trust.read(plan, SHA256)
