"""Dispatch: a forced backend that cannot run raises, auto logs its choice once."""

from __future__ import annotations

import logging

import pytest

from worldenv.ops import BackendUnavailable
from worldenv.ops import backend as backends


def test_auto_takes_the_first_that_can_run_and_says_so_once(caplog):
    why_not = {"triton": "no GPU here", "sdpa": None, "reference": None}
    with caplog.at_level(logging.INFO, logger="worldenv.ops"):
        picks = [backends.choose("an_op_of_this_test", "auto", why_not) for _ in range(3)]
    assert picks == ["sdpa"] * 3
    assert [r.getMessage() for r in caplog.records] == [
        "an_op_of_this_test runs on sdpa (triton: no GPU here)"
    ]


def test_an_extension_that_is_not_built_is_warned_of_once(caplog, monkeypatch):
    monkeypatch.setattr(backends, "NO_CPP", "it is not built (build it)")
    with caplog.at_level(logging.WARNING, logger="worldenv.ops"):
        for op in ("one_op_of_this_test", "another_op_of_this_test"):
            backends.choose(op, "auto", {"cpp": "not built", "reference": None})
    assert [r.getMessage() for r in caplog.records] == [
        "slow: one_op_of_this_test runs in plain torch, as other ops may, for "
        "it is not built (build it)"
    ]


def test_forced_backend_raises_with_the_reason():
    with pytest.raises(BackendUnavailable, match=r"triton.*no GPU here"):
        backends.choose("op", "triton", {"triton": "no GPU here", "reference": None})
    with pytest.raises(ValueError, match="auto, reference"):
        backends.choose("op", "tritom", {"reference": None})
    with pytest.raises(BackendUnavailable, match="no backend can run"):
        backends.choose("op", "auto", {"reference": "broken"})
