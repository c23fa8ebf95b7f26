"""Registries of objectives and evaluators: the project's own, those of installed packages, and of modules that the user names.

A recipe is data, possibly untrusted: a `kind` such as `my_package.my_module:MyObjective` imports nothing by itself. It
needs the module on the command line (`--plugin my_package.my_module`); an installed package offers its classes as
entry points instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from mmpretrain.config.build import OptionError, nearest

_allowed: set[str] = set()  # modules named on the command line


def allow(modules: list[str]) -> None:
    """Let recipes name classes of these modules.

    Raises:
        OptionError: a name that is not that of a module.
    """
    for module in modules:
        if not all(part.isidentifier() for part in module.split(".")):
            raise OptionError(f"--plugin {module!r}: expected a module, such as my_package.my_module")
        _allowed.add(module)


class Kinds(Mapping[str, Any]):
    """Kind -> class. Classes of installed packages are imported on first use.

    Args:
        known: the project's own, by kind.
        group: the entry-point group of other packages, such as `mmpretrain.objectives`.
        what: "objective" or "evaluator", for messages.
    """

    def __init__(self, known: Mapping[str, type], group: str, what: str) -> None:
        self.known, self.group, self.what = dict(known), group, what
        self._loaded: dict[str, Any] = {}

    def _offered(self) -> dict[str, Any]:
        return {point.name: point for point in entry_points(group=self.group) if point.name not in self.known}

    def __getitem__(self, kind: str) -> Any:
        if kind in self.known:
            return self.known[kind]
        if kind not in self._loaded:
            self._loaded[kind] = self._load(kind)
        return self._loaded[kind]

    def __contains__(self, kind: object) -> bool:
        return isinstance(kind, str) and (kind in self.known or kind in self._loaded or ":" in kind or kind in self._offered())

    def _load(self, kind: str) -> Any:
        """Import the class of an entry point, or of an allowed module. Raises KeyError, or OptionError with the remedy."""
        module, colon, name = kind.partition(":")
        if not colon:
            return self._class(self._offered()[kind].load(), kind)
        if module not in _allowed:
            raise OptionError(
                f"{self.what} {kind!r} is code of the module {module!r}, and a recipe does not import: "
                f"if you trust it, name it on the command line, --plugin {module}"
            )
        try:
            return self._class(getattr(import_module(module), name), kind)
        except (ImportError, AttributeError) as error:
            raise OptionError(f"{self.what} {kind!r}: {error}") from error

    def _class(self, value: Any, kind: str) -> Any:
        if not isinstance(value, type) or not hasattr(value, "Config"):
            raise OptionError(f"{self.what} {kind!r} is {value!r}, expected a class with a Config")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter([*self.known, *self._offered()])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def refusal(self, kind: object) -> str:
        """Return the message for an unknown `kind`, with the nearest name."""
        return f"unknown {self.what} {kind!r}" + nearest(str(kind), self)
