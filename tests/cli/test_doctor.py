"""``doctor`` prints its findings, for people and for programs."""

from __future__ import annotations

import json

import pytest

from glance_trt import doctor
from glance_trt.doctor import Finding

from .conftest import Run

FINDINGS = [Finding("glance-trt", True, "0.1.0"), Finding("build for rtx", False, "two\n  lines: ü")]


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: FINDINGS)


def test_each_finding_is_a_line(run: Run) -> None:
    shown = run("doctor")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.splitlines() == ["ok  glance-trt     0.1.0", "--  build for rtx  two lines: ü"]


def test_json_holds_what_was_found(run: Run) -> None:
    shown = run("doctor", "--json")
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.isascii()
    assert [Finding(**item) for item in json.loads(shown.out)] == FINDINGS
