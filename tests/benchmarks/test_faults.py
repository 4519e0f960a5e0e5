"""Every case of the list of what went wrong is answered, refused by name, or warned of."""

from __future__ import annotations

import pytest

cases = pytest.importorskip("benchmarks._fault_cases", reason="run pytest as `python -m pytest`")


@pytest.fixture(scope="module")
def bench():
    return cases.Bench()


@pytest.mark.parametrize("number", cases.CASES)
def test_is_no_longer_open(number, bench):
    assert not cases.what_happens(number, bench).startswith("OPEN")


def test_what_is_open_is_said(bench, monkeypatch):
    def crash(bench):
        return len(3)

    for title, function, expected in (
        ("foreign errors", crash, "OPEN: TypeError: object of type"),
        ("silence", lambda bench: None, "OPEN: None"),
        ("wrong answers", lambda bench: False, "OPEN: False"),
    ):
        monkeypatch.setitem(cases.CASES, "X", (title, function))
        assert cases.what_happens("X", bench).startswith(expected)
