"""Whose death stops a run: a launcher's, not a shell's."""

import os
import time

import pytest

from mmpretrain.interrupts import Interrupts


@pytest.mark.parametrize("variable", ["LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", None])
def test_only_a_launcher_is_watched(monkeypatch, variable):
    for name in list(os.environ):
        if name == "LOCAL_RANK" or name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)
    if variable:
        monkeypatch.setenv(variable, "0")
    interrupts = Interrupts()
    try:
        monkeypatch.setattr(os, "getppid", lambda: 1)  # the parent died: init adopted this process
        deadline = time.monotonic() + (10 if variable else 1.5)
        while interrupts.reason is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert interrupts.reason == ("the launcher exited" if variable else None)
    finally:
        interrupts.close()
