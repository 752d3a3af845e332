import copy

import pytest

from benchmarks import timing
from benchmarks.__main__ import SECTIONS


class Clock:
    """A clock that only moves when somebody waits."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """The clock of paired rounds, replaced."""
    replaced = Clock()
    monkeypatch.setattr(timing, "time", replaced)
    return replaced


RESULT = {
    "provenance": {
        "version": "0",
        "commit": "abc",
        "command": "python -m benchmarks --out r.json",
        "seed": 3,
        "configuration": {"quick": False, "rounds": 7},
    },
    "date": "2026-01-02T03:04:05+00:00",
    "sources": "0",
    "machine": {
        "processor": "A processor",
        "cores": 2,
        "memory": 2**34,
        "system": "Linux x86_64",
        "backend": "cpu",
        "device": "cpu",
    },
    "versions": {"python": "3.11.7", "jax": "0.10.2", "torch": None},
    "sections": {section.name: {"setting": "n = 4", "rows": [], "targets": [], "notes": []} for section in SECTIONS},
}


@pytest.fixture
def result():
    """A made-up result: one row that has everything, one that is missing, and a target of each verdict."""
    made_up = copy.deepcopy(RESULT)
    made_up["sections"]["kernel"] = {
        "setting": "2 cells, n = 4",
        "rows": [
            {
                "name": "fast | exact",
                "cells": 2000,
                "time": {"median": 0.5, "low": 0.25, "high": 1.5},
                "time_a_cell": 0.25,
                "fast_over_this": {"median": 0.125, "low": 0.1, "high": 0.5},
                "share_of_matmul": {"median": 0.305, "low": 0.2, "high": 0.4},
            },
            {"name": "PyTorch", "missing": "PyTorch not installed"},
        ],
        "targets": [
            {"what": "low enough", "figure": 0.2, "at_most": 0.25},
            {"what": "too low", "figure": 0.2, "at_least": 0.25},
            {"what": "unknown", "figure": None, "at_most": 0.22},
        ],
        "notes": ["A note."],
    }
    return made_up
