"""The CPU: its kind, and a bound on the spinning of OpenMP's threads. Imports neither torch nor NumPy.

libgomp, part of torch's Linux wheels, lets a thread that waits at a barrier spin 300,000 times, about 20 ms, before it
sleeps. Where another program takes one of the cores, the displaced thread cannot move to the core whose thread only
waits, because a spinning thread looks busy: two threads beside one busy program then get about 0.6 of an even share
(docs/performance.md). A sleeping thread frees its core at once, but waking it costs a system call. The bound below is
longer than the pauses between a step's operations, and much shorter than a time slice of the scheduler. It changes
only when threads sleep: results keep every bit.
"""

from __future__ import annotations

import os
import platform
from collections.abc import MutableMapping
from pathlib import Path

SPINS = 1000  # about 60 microseconds where a `pause` takes 140 cycles (Intel since Skylake), 10 to 20 where it takes 40 (AMD)
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them is the user's choice
# Name of an instruction set in /proc/cpuinfo -> name here, best first.
ISAS = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}


def bound_spinning(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Bound the spinning of OpenMP threads in this process and those it starts; call it before torch is imported.

    Returns:
        Whether the bound was set: not where the user has set one of `WAITING`.
    """
    if any(name in environ for name in WAITING):
        return False
    environ["GOMP_SPINCOUNT"] = str(SPINS)
    return True


def waiting(environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """Return the settings in force, for the record of a run."""
    return {name: environ[name] for name in WAITING if name in environ}


def cpu_kind() -> str:
    """Return the CPU's name, its best instruction set for products, and the cap of ONEDNN_MAX_CPU_ISA where set."""
    name, best = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name = fields.get("model name", name)
        flags = set(fields.get("flags", "").split())
        best = next((title for flag, title in ISAS.items() if flag in flags), "")
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return name + (f", {best}" if best else "") + (f", oneDNN capped at {cap}" if cap else "")
