"""How OpenMP's threads wait for each other. Imports nothing that computes: the setting is read when torch loads the library.

libgomp, which torch's Linux wheels bring, lets a thread that waits at a barrier spin 300,000 times, some 20 ms, before it sleeps. Where another
program takes one of the cores, the thread that it displaced cannot move to the core whose thread only waits, because a spinning thread
looks busy: two threads beside one busy program then get about 0.6 of an even share (docs/performance.md). A thread that sleeps frees its
core at once, but waking it costs a system call. The bound below outlasts the short pauses between a step's operations, and ends long
before a time slice of the scheduler does. It changes when threads sleep and nothing else: results keep every bit.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPINS = 1000  # about 60 microseconds where a `pause` takes 140 cycles (Intel since Skylake), 10 to 20 where it takes 40 (AMD)
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them is the user's own wish


def bound_spinning(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Bound the spinning of this process's OpenMP threads and of the processes it starts; call it before torch is imported.

    Returns: whether it was set, which it is only where the user set none of `WAITING`.
    """
    if any(name in environ for name in WAITING):
        return False
    environ["GOMP_SPINCOUNT"] = str(SPINS)
    return True


def waiting(environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """The settings in force, for the record of a run."""
    return {name: environ[name] for name in WAITING if name in environ}
