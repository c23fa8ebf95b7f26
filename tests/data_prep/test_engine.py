"""Tasks are done once each, in order, whatever happens to the workers."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from data_prep.engine import WorkerLostError, run
from tests.data_prep import jobs


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_the_order_of_the_tasks(processes: int) -> None:
    assert list(run(jobs.square, range(20), processes=processes)) == [i * i for i in range(20)]
    assert list(run(jobs.slow_first, range(6), processes=processes)) == list(range(6))
    assert list(run(jobs.square, [], processes=processes)) == []
    assert list(run(partial(pow, 2), range(5), processes=processes)) == [1, 2, 4, 8, 16]


def test_one_process_is_this_one_and_several_are_others() -> None:
    assert set(run(jobs.process, range(3), processes=1)) == {os.getpid()}
    assert set(run(jobs.process, [0], processes=4)) == {os.getpid()}  # not worth a process
    others = set(run(jobs.process, range(8), processes=2))
    assert len(others) == 2
    assert os.getpid() not in others


def names_file(name: str) -> str:  # of this module, and with the test's own file system
    import fsspec

    with fsspec.open(name, "rb") as file:
        return file.read().decode()


@pytest.mark.parametrize("chosen", ["local", "ray"])
def test_what_lives_in_this_process_is_read_in_it(chosen: str) -> None:
    import fsspec

    names = [f"memory://engine/{i}" for i in range(4)]
    fsspec.filesystem("memory").pipe({name.removeprefix("memory:/"): b"here" for name in names})
    for tasks in (names, iter(names)):
        assert list(run(names_file, tasks, engine=chosen, processes=3)) == ["here"] * 4


def test_workers_do_not_import_torch() -> None:
    import torch  # noqa: F401 (it is here)

    assert list(run(jobs.torch_is_here, range(3), processes=2)) == [False] * 3


@pytest.mark.parametrize("processes", [1, 2])
def test_tasks_are_pulled_as_workers_become_free(processes: int) -> None:
    pulled: list[int] = []

    def tasks() -> Iterator[int]:
        for i in range(100):
            pulled.append(i)
            yield i

    results = run(jobs.square, tasks(), processes=processes)
    for taken in range(1, 20):
        next(results)
        assert len(pulled) <= taken + 2 * processes
    results.close()
    assert len(pulled) < 30


def test_what_a_function_prints_is_no_result(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(run(jobs.chatty, range(4), processes=2)) == list(range(4))
    assert capfd.readouterr().err.count("nor this") == 4


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_the_function_is_raised_here(processes: int) -> None:
    done = []
    with pytest.raises(KeyError, match="no 3") as caught:
        done += [result for result in run(jobs.fails, range(10), processes=processes) if not done.append(result)]
    assert done[:3] == [0, 1, 2]
    if processes > 1:
        assert "in fails" in caught.value.__notes__[0]  # where in the worker


def test_a_killed_worker_costs_its_task_alone(tmp_path: Path) -> None:
    tasks = [(str(tmp_path), i) for i in range(8)]
    assert list(run(jobs.killed_once, tasks, processes=2)) == list(range(8))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed-2", "killed-5"]


def test_a_task_that_kills_every_worker_is_named() -> None:
    with pytest.raises(WorkerLostError, match=r"task 1: its worker process died 4 times \(by SIGKILL\)"):
        list(run(jobs.always_killed, range(4), processes=2))


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    tasks = [str(tmp_path / "a"), str(tmp_path / "b")]
    script = f"from data_prep.engine import run\nfrom tests.data_prep import jobs\nlist(run(jobs.lives_on, {tasks}, processes=2))"
    starter = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 60
    while not all(Path(task).exists() and Path(task).read_text() for task in tasks) and time.monotonic() < deadline:
        time.sleep(0.02)
    starter.kill()  # it alone: its workers are told by nobody
    starter.wait()
    workers = [int(Path(task).read_text()) for task in tasks]
    while any(_runs(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_runs(worker) for worker in workers)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")  # killed, and not yet fetched by its parent, counts as ended
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_functions_and_options_that_cannot_work_are_named() -> None:
    with pytest.raises(ValueError, match="expected local or ray"):
        run(jobs.square, [1], engine="spark")
    with pytest.raises(ValueError, match="at least 1"):
        run(jobs.square, [1], processes=0)
    script = "from data_prep.engine import run\ndef f(x): return x\nprint(list(run(f, range(3), processes=2)))"
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Put it into a module, or pass --processes 1" in done.stderr


@pytest.mark.slow
def test_ray_does_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert list(run(jobs.slow_first, range(6), engine="ray", processes=2)) == list(range(6))
    tasks = [(str(tmp_path), i) for i in range(8)]
    assert list(run(jobs.killed_once, tasks, engine="ray", processes=2)) == list(range(8))
    with pytest.raises(KeyError, match="no 3"):
        list(run(jobs.fails, range(5), engine="ray", processes=2))
    with pytest.raises(WorkerLostError, match="task 1"):
        list(run(jobs.always_killed, range(4), engine="ray", processes=2))
