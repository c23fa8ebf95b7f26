"""Reading options without the libraries that compute.

`train.py --help` and `--print-config` need the options' dataclasses alone, but these stand in the files of objectives and evaluators,
which import torch and more: about eight seconds. In a process that only shows options, `install` puts a blank in each such library's place.
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
    """Whatever a file asks of a library while it is imported: any name of it, called, indexed, derived from or used as a decorator."""

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
    """From here on this process imports blanks for LIBRARIES. Nothing can be computed afterwards: print and end.

    Where one of them is there already, all are: blanks beside the real ones would break what a process goes on to compute.
    """
    if not LIBRARIES & sys.modules.keys():
        sys.meta_path.insert(0, _Finder())
