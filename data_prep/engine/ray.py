"""The engine on a Ray cluster: the one at RAY_ADDRESS, else one that is started on this machine and ends with this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

from data_prep.engine.common import REPEATS, ahead, lost
from mmpretrain.system import cores

START_ATTEMPTS = 3


def results_of(function: Callable[[Any], Any], tasks: Iterator[Any], processes: int | None) -> Generator[Any, None, None]:
    try:
        import ray
        from ray.exceptions import RayTaskError, WorkerCrashedError
    except ImportError as error:
        raise ValueError("--engine ray needs Ray: pip install 'mmpretrain-clip[ray]'; or take --engine local") from error
    _connect(ray, processes)
    most = processes or int(ray.cluster_resources().get("CPU", 1))
    remote = ray.remote(max_retries=REPEATS, retry_exceptions=False, num_cpus=1)(_apply)
    shared = ray.put(function)

    def take(given: tuple[Any, Any]) -> Any:
        task, reference = given
        try:
            return ray.get(reference)
        except WorkerCrashedError as error:
            raise lost(task, str(error).splitlines()[0]) from None
        except RayTaskError as error:
            raise error.cause from None

    yield from ahead(lambda task: (task, remote.remote(shared, task)), take, tasks, 2 * most)


def _connect(ray: Any, processes: int | None) -> None:
    """A cluster that is started here stays for later stages: starting one takes seconds."""
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"num_cpus": processes or cores(), "include_dashboard": False}
    for attempt in range(START_ATTEMPTS):
        if ray.is_initialized():
            return
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error", **local)
        except Exception as error:  # a busy machine exceeds Ray's 30 s for starting a node
            ray.shutdown()
            if attempt == START_ATTEMPTS - 1:
                raise OSError(f"Ray did not start ({address or 'on this machine'}): {error}") from error


def _apply(function: Callable[[Any], Any], task: Any) -> Any:
    return function(task)
