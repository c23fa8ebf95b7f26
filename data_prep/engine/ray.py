"""The Ray engine: the cluster at RAY_ADDRESS, else one started on this machine that ends with this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

from data_prep.engine.common import REPEATS, EngineError, ahead, lost
from mmpretrain.system import cores

START_ATTEMPTS = 3


def results_of(function: Callable[[Any], Any], tasks: Iterator[Any], processes: int | None) -> Generator[Any, None, None]:
    """Yields `function(task)` for every task in order, from tasks of a Ray cluster; see `engine.run`."""
    try:
        import ray
        from ray.exceptions import RayTaskError, WorkerCrashedError
    except ImportError as error:
        raise EngineError("--engine ray needs Ray: pip install 'mmpretrain-clip[ray]'; or use --engine local") from error
    _connect(ray, processes)
    max_workers = processes or int(ray.cluster_resources().get("CPU", 1))
    remote = ray.remote(max_retries=REPEATS, retry_exceptions=False, num_cpus=1)(_apply)
    shared = ray.put(function)

    def result_of(submitted: tuple[Any, Any]) -> Any:
        task, reference = submitted
        try:
            return ray.get(reference)
        except WorkerCrashedError as error:
            raise lost(task, str(error).splitlines()[0]) from None
        except RayTaskError as error:
            raise error.cause from None

    yield from ahead(lambda task: (task, remote.remote(shared, task)), result_of, tasks, 2 * max_workers)


def _connect(ray: Any, processes: int | None) -> None:
    """Connects to a cluster, or starts one, which then serves later stages too: a start takes seconds."""
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
                raise EngineError(f"Ray did not start ({address or 'on this machine'}): {error}") from error


def _apply(function: Callable[[Any], Any], task: Any) -> Any:
    return function(task)
