"""Imports form no cycle, within functions and for type checkers too: a module is understood after those that it imports."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
Graph = dict[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file."""
    paths = {path.relative_to(package.parent).with_suffix(""): path for path in sorted(package.rglob("*.py"))}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


def imported(source: str, name: str, is_package: bool, known: Iterable[str]) -> set[str]:
    """The modules among `known` that a module imports anywhere in its text."""
    known, result = set(known), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                result.add(submodule if submodule in known else base)
    return (result & known) - {name}


def import_graph(package: Path) -> Graph:
    known = modules(package)
    return {name: imported(path.read_text(), name, path.name == "__init__.py", known) for name, path in known.items()}


def cycles(graph: Graph) -> list[list[str]]:
    """The strongly connected components of several modules (Tarjan 1972), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    result: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            component = [stack.pop()]
            while component[-1] != name:
                component.append(stack.pop())
            if len(component) > 1:
                result.append(sorted(component))

    for name in graph:
        if name not in index:
            visit(name)
    return result


@pytest.mark.parametrize("package", ["mmpretrain", "data_prep"])
def test_no_module_imports_itself_through_others(package: str) -> None:
    graph = import_graph(ROOT / package)
    assert sum(map(len, graph.values())) > len(graph)  # imports are seen
    assert cycles(graph) == []


def test_imports_in_functions_and_relative_ones_count() -> None:
    known = ["p", "p.a", "p.b", "p.b.c"]
    assert imported("def f():\n    from p import b\n    from p.a import x", "p.b.c", False, known) == {"p.a", "p.b"}
    assert imported("from . import c\nfrom ..a import x\nimport os", "p.b", True, known) == {"p.b.c", "p.a"}


def test_cycles_are_found_however_long() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"d"}}) == [["a", "b", "c"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
