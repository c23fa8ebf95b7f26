"""Stubs for heavy libraries, so that `train.py --help` and `--print-config` start without importing them.

They need only the dataclasses of options, but these are defined in the files of objectives and evaluators, whose
imports (torch and others) take about eight seconds. In a process that only shows options, `install` replaces each
library by a stub.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LIBRARIES = frozenset({
    "accelerate", "cv2", "datasets", "huggingface_hub", "imagehash", "matplotlib", "open_clip", "pandas", "pyarrow", "safetensors",
    "scipy", "simplejpeg", "sklearn", "tensorboard", "timm", "tokenizers", "torch", "torchmetrics", "torchvision", "transformers",
    "webdataset", "xxhash",
})  # fmt: skip


class Blank:
    """A stub of any object of a library: its attributes, calls, items and bases are stubs too."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __iter__(self) -> Any:
        return iter(())

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()


class _BlankModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Blank()


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in LIBRARIES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _BlankModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Let this process import stubs in place of LIBRARIES. It cannot compute afterwards: print and exit.

    Where one of them is already imported, nothing is replaced: stubs beside real libraries would break later
    computation.
    """
    if not LIBRARIES & sys.modules.keys():
        sys.meta_path.insert(0, _Finder())
