"""Cores and locks, where the system has the calls for them and where it has not."""

import os
import signal
import threading

import pytest

from mmpretrain import system


def test_cores_without_affinity(monkeypatch):
    assert system.cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert system.cores() == os.cpu_count()


def test_a_lock_is_refused_or_waited_for(tmp_path):
    order = []

    def second():
        with system.hold(tmp_path / "lock"):
            order.append("second")

    with system.hold(tmp_path / "lock"):
        with pytest.raises(BlockingIOError):
            system.hold(tmp_path / "lock", wait=False)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_a_system_without_locks_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(system, "fcntl", None)
    with system.hold(tmp_path / "lock"), system.hold(tmp_path / "lock", wait=False):
        assert "no file locks" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_hold_the_locks_of_its_parent(tmp_path):
    read, write = os.pipe()
    held = system.hold(tmp_path / "lock")
    child = os.fork()
    if child == 0:
        os.write(write, b"I live")
        signal.pause()
    try:
        os.read(read, 6)
        with pytest.raises(BlockingIOError):
            system.hold(tmp_path / "lock", wait=False)  # the parent's own is there still
        held.close()
        system.hold(tmp_path / "lock", wait=False).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
