"""The CPU: its kind, and how OpenMP's threads on it wait for each other. Imports nothing that computes.

libgomp, which torch's Linux wheels bring, lets a thread that waits at a barrier spin 300,000 times, some 20 ms,
before it sleeps. Where another program takes one of the cores, the thread that it displaced cannot move to the core
whose thread only waits, because a spinning thread looks busy: two threads beside one busy program then get about 0.6
of an even share (docs/performance.md). A thread that sleeps frees its core at once, but waking it costs a system
call. The bound below outlasts the short pauses between a step's operations, and ends long before a time slice of the
scheduler does. It changes when threads sleep and nothing else: results keep every bit.
"""

from __future__ import annotations

import os
import platform
from collections.abc import MutableMapping
from pathlib import Path

SPINS = 1000  # about 60 microseconds where a `pause` takes 140 cycles (Intel since Skylake), 10 to 20 where it takes 40 (AMD)
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # any of them is the user's own wish
# What /proc/cpuinfo calls an instruction set -> what is called here, best first.
ISAS = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}


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


def cpu_kind() -> str:
    """The CPU's name and its best instructions for products, and the cap of ONEDNN_MAX_CPU_ISA where one is set."""
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
