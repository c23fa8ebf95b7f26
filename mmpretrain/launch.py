"""The start of a run on this machine: device, precision, threads and processes, and the record of its environment."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from mmpretrain import __version__, distributed
from mmpretrain.compute import Choice, Rates, choose_precision, model_width
from mmpretrain.config.build import OptionError
from mmpretrain.config.recipe import Config
from mmpretrain.cpu import cpu_kind, waiting
from mmpretrain.system import cores


def start(config: Config) -> tuple[Config, Accelerator, Choice]:
    """Configure this process, and resolve the recipe's `precision`, `threads` and `loader_threads`.

    Plain `accelerate launch` leaves one OpenMP thread per process, which is slow.

    Returns:
        (resolved recipe, Accelerator of this process, choice of precision).

    Raises:
        OptionError: it was launched in a way that this trainer does not support.
    """
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted not in ("no", "bf16"):
        raise OptionError(
            f"launched with --mixed_precision {wanted}, which this trainer does not compute in (fp16 would need loss scaling): "
            "launch with bf16 or no, or leave it to precision: auto"
        )
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = config.threads
    if threads is None:
        # `accelerate launch` and torchrun set one OpenMP thread; any other number is the user's choice.
        chosen = os.environ.get("OMP_NUM_THREADS", "1")
        threads = int(chosen) if chosen.isdigit() and int(chosen) > 1 else max(1, cores() // local_ranks)
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    loader_threads = config.loader_threads or (2 if cpu else max(2, min(16, cores() // local_ranks)))
    torch.set_num_threads(threads)
    keep_freed_memory()
    choice = Choice("fp32" if config.precision == "fp32" else "bf16", "")  # stated in the recipe: no reason to print
    if config.precision == "auto":
        PartialState(cpu=cpu)  # connects the processes, which must agree before the Accelerator fixes the precision
        choice = distributed.broadcast_object(distributed.on_main(lambda: precision(config)))
    config = replace(config, precision=choice.precision, threads=threads, loader_threads=loader_threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # its successor syncs buffers at the start
    # Each step has one DDP forward, and every trainable parameter gets a gradient; running statistics are equal on all ranks.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    # Without cpu=True, torchrun on a machine without an accelerator would run its processes unconnected.
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no", cpu=cpu, kwargs_handlers=[ddp])
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise OptionError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {accelerator.num_processes} process(es) are connected; launch with torchrun"
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise OptionError(
            f"launched as {accelerator.distributed_type.value}: this trainer runs on one device or under DDP; launch without it"
        )
    return config, accelerator, choice


def keep_freed_memory() -> None:
    """Let glibc keep freed memory.

    By default it returns tensors of more than 128 KB to the system, and their pages are faulted in again at every
    step. Keeping them saves about 7% of a small CPU step (11,000 page faults -> 0). Without glibc nothing is done.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)  # the largest that glibc allows
        libc.mallopt(trim_threshold, 1 << 30)


def precision(config: Config) -> Choice:
    """Resolve `auto`: as launched, else as recorded in the run folder, else chosen for this device.

    A run keeps its first precision: it is part of the recipe's meaning, and a measurement may differ on another
    machine or day.
    """
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        return Choice("bf16", "precision bf16: as launched")
    return recorded_precision(Path(config.run_dir)) or choose_precision(model_width(config.model))


def recorded_precision(folder: Path) -> Choice | None:
    """Return the precision recorded in a run folder, with the measured rates; None without a record."""
    path = folder / "config.yaml"
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
        value = stored["precision"]
        noted = stored.get("environment") or {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError):
        return None  # no run, or a damaged record, which `check_resume` reports
    if value not in ("fp32", "bf16"):
        return None
    try:
        rates = Rates(int(noted["product_width"]), float(noted["product_gflops_fp32"]), float(noted["product_gflops_bf16"]))
    except (KeyError, TypeError, ValueError):
        rates = None
    return Choice(value, f"precision {value}: this run began with it ({path}); auto measures for a new run only", rates)


def environment(accelerator: Accelerator, config: Config, choice: Choice) -> dict[str, Any]:
    """Describe what is needed to repeat the run: versions, device, precision, threads, command.

    Args:
        accelerator: of this process.
        config: the resolved recipe.
        choice: as returned by `start`; its rates are GFLOP/s at the first start of the run.
    """
    packages = [
        "torch",
        "torchvision",
        "open_clip_torch",
        "accelerate",
        "transformers",
        "timm",
        "webdataset",
        "numpy",
        "pillow",
        "simplejpeg",
        "opencv-python-headless",
    ]
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else platform.processor() or platform.machine()
    rates = choice.rates
    products = (
        {}
        if rates is None
        else {
            "product_width": rates.width,
            "product_gflops_fp32": round(rates.fp32, 1),
            "product_gflops_bf16": round(rates.bf16, 1),
        }
    )
    return {
        "mmpretrain": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "git_commit": _git_commit(),
        "device": f"{accelerator.device.type} ({device})",
        "cpu": cpu_kind(),
        "precision": config.precision,
        **products,
        "openmp": " ".join(f"{name}={value}" for name, value in waiting().items()),
        "threads": config.threads,
        "processes": accelerator.num_processes,
        "command": " ".join(sys.argv),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    here = Path(__file__).parent
    try:
        completed = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.strip() or None
