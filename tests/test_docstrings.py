"""Docstrings of public functions are complete, as far as a program can tell.

Only a reader can judge whether a description is good. A program can tell whether there is a docstring, whether it names
the exceptions that the function raises itself, and whether it names the arguments whose annotation does not tell their
meaning: numbers, strings, flags, functions, containers, and arrays without a shape.
"""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.processes import ROOT

FILES = sorted(path for folder in ("sisma_jax", "kernels") for path in (ROOT / folder).rglob("*.py"))
_TELLS_NOTHING = re.compile(r"\b(int|float|str|bool|Any|Callable|dict|Mapping|Sequence|list|tuple|ndarray|Array)\b")
# "Otherwise as `load`", "see `Pipeline`": the arguments are described there.
_DESCRIBED_ELSEWHERE = re.compile(r"\b(see|as|of|for) `")


def _public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body, f"{node.name}.")


def _unclear_arguments(function: ast.FunctionDef) -> Iterator[str]:
    arguments = function.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is None or argument.arg in ("self", "cls") or argument.arg.startswith("_"):
            continue
        annotation = "" if argument.annotation is None else ast.unparse(argument.annotation)
        is_clear = "'" in annotation or "PathLike" in annotation  # an array with its shape, or a path
        if not annotation or (not is_clear and _TELLS_NOTHING.search(annotation)):
            yield argument.arg


def _raised(function: ast.FunctionDef) -> Iterator[str]:
    """Names of the exceptions raised in the function itself, not in functions that it defines."""
    nodes: list[ast.AST] = list(function.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            exception = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(exception, ast.Name) and exception.id[0].isupper():
                yield exception.id
        nodes.extend(ast.iter_child_nodes(node))


def _lacks(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    docstring = ast.get_docstring(node)
    if not docstring:
        return ["a docstring"]
    if isinstance(node, ast.ClassDef):
        return []
    arguments = [] if _DESCRIBED_ELSEWHERE.search(docstring) else _unclear_arguments(node)
    return [name for name in (*arguments, *_raised(node)) if not re.search(rf"(?<!\w){name}(?!\w)", docstring)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_complete(path):
    tree = ast.parse(path.read_text())
    lacking = {name: _lacks(node) for name, node in _public(tree.body)}
    assert not {name: what for name, what in lacking.items() if what}
