"""Dataclasses and enumerations of robusttrain, read from its source without importing torch.

A schema needs the fields of a component, with their types and defaults, and nothing else of it. To
import the component would import torch, which takes longer than all that a mistyped command line
needs.

Only what a class declares is run: its fields, its constants and its bases, with all that these
name. Methods lose their bodies. Whatever comes from another package than the standard library is
`Foreign`.
"""

import ast
import builtins
import copy
import functools
import importlib
import sys
from collections.abc import Iterator
from typing import Any, cast

from robusttrain.config.folders import PACKAGE


class _Foreign(type):
    """The type of `Foreign`, which has every attribute, item and alternative."""

    def __getattr__(cls, name: str) -> "_Foreign":
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, key: object) -> "_Foreign":
        return cls


class Foreign(metaclass=_Foreign):
    """Stands for all modules, classes and values of other packages."""

    def __new__(cls, *given: object, **named: object) -> Any:
        """Itself, for what a call would return."""
        return cls


@functools.cache
def declared(module: str, name: str) -> Any:
    """What a module of robusttrain calls `name`: a class, or a value that a class refers to.

    A class is not that of the module but a copy of its declarations, without the code; `original`
    returns the class itself.
    """
    statement = _statements(module).get(name)
    match statement:
        case ast.ClassDef():
            return _run(_without_code(statement), module)[name]
        case ast.Assign() | ast.AnnAssign():
            return _run(statement, module)[name]
        case ast.ImportFrom(module=str(source)):
            (alias,) = (one for one in statement.names if name in (one.asname, one.name))
            return _imported(source, alias.name)
        case ast.Import():
            return importlib.import_module(name) if _is_standard(name) else Foreign
        case None:
            return getattr(builtins, name)
    return Foreign


def original(kind: type) -> Any:
    """The class that a declared class is a copy of; imports its module."""
    return getattr(importlib.import_module(kind.__module__), kind.__qualname__)


def class_names(module: str) -> list[str]:
    """The classes that a module of robusttrain defines."""
    statements = _statements(module).items()
    return [name for name, statement in statements if isinstance(statement, ast.ClassDef)]


def modules(place: str) -> list[str]:
    """The modules of a package of robusttrain; a module itself, if `place` is one."""
    folder = PACKAGE.parent.joinpath(*place.split("."))
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    return [f"{place}.{name}" for name in names] or [place]


def source(module: str) -> str:
    """The text of a module of robusttrain."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text(encoding="utf-8")


@functools.cache
def _statements(module: str) -> dict[str, ast.stmt]:
    """The statements of a module by the names that they define."""
    body = ast.parse(source(module)).body
    return {name: statement for statement in body for name in _defined(statement)}


def _defined(statement: ast.stmt) -> Iterator[str]:
    match statement:
        case ast.ClassDef() | ast.FunctionDef():
            yield statement.name
        case ast.Import() | ast.ImportFrom():
            yield from (one.asname or one.name for one in statement.names)
        case ast.Assign() | ast.AnnAssign():
            stored = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
            yield from (node.id for node in stored if isinstance(node.ctx, ast.Store))


def _imported(source: str, name: str) -> Any:
    if source.partition(".")[0] == PACKAGE.name:
        return declared(source, name)
    return getattr(importlib.import_module(source), name) if _is_standard(source) else Foreign


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _without_code(defined: ast.ClassDef) -> ast.ClassDef:
    kept = (ast.Assign, ast.AnnAssign, ast.FunctionDef)
    bare = copy.copy(defined)
    bare.body = [_stub(node) for node in defined.body if isinstance(node, kept)] or [ast.Pass()]
    return bare


def _stub(node: ast.stmt) -> ast.stmt:
    """A method without code, which is abstract if it was; any other statement as it is."""
    if not isinstance(node, ast.FunctionDef):
        return node
    stub = ast.parse(f"def {node.name}(self): ...").body[0]
    marks = [mark for mark in node.decorator_list if ast.unparse(mark).endswith("abstractmethod")]
    cast(ast.FunctionDef, stub).decorator_list = marks
    return stub


def _run(statement: ast.stmt, module: str) -> dict[str, Any]:
    """The names after a statement, which is run with all names that it refers to."""
    namespace: dict[str, Any] = {"__name__": module}
    own = {*_statements(module), *vars(builtins)}
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in own:
            namespace[node.id] = declared(module, node.id)
    tree = ast.fix_missing_locations(ast.Module([statement], []))
    exec(compile(tree, module, "exec"), namespace)
    return namespace
