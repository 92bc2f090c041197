"""Where the package makes its errors, and the texts they can have, read off its source: no list is kept by hand.

A text is a template: what is known only when the error is made stands between two marks, as `OPEN + "name" + CLOSE`.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import itertools
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax_surgery_hooks
from flax_surgery_hooks import errors

OPEN, CLOSE = "\ue000", "\ue001"
"""Marks from Unicode's private area: no message can contain them, as one can contain `<`."""
CLASSES: dict[str, type[errors.SurgeryError]] = {
    name: cls
    for name, cls in vars(errors).items()
    if inspect.isclass(cls) and issubclass(cls, errors.SurgeryError) and cls is not errors.SurgeryError
}
_MAX_VARIANTS = 12
_DEPTH = 8
_TRANSPARENT = {"shorten", "listed", "repr", "str", "list", "sorted", "tuple", "map", "shown", "told", "typed", "plain"}
"""Functions that show their (last) argument, so that a placeholder is named after that."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Texts = tuple[str | None, ...]


class Site(NamedTuple):
    """One place in the source where an error is made, with what it can say.

    Attributes:
      error: name of the class.
      problems: the texts of the problem.
      found: those after "Found:"; None stands for an error without.
      write: those after "Write instead:", likewise.
      module: name of the module.
      line: for finding it; no text that is kept may hold it.
    """

    error: str
    problems: Texts
    found: Texts
    write: Texts
    module: str
    line: int


class Module(NamedTuple):
    """A module of the package, parsed.

    Attributes:
      name: its name within the package, "surgeries.norms".
      tree: its syntax tree.
      values: what it holds once it is imported.
      inside: node -> the function that it stands in.
    """

    name: str
    tree: ast.Module
    values: dict[str, Any]
    inside: dict[ast.AST, Function]


class Scope(NamedTuple):
    """Where an expression stands.

    Attributes:
      module: the module.
      function: the function, or None.
      bound: texts of parameters, where only one call of the function is meant.
    """

    module: Module
    function: Function | None
    bound: tuple[tuple[str, Texts], ...] = ()


@functools.cache
def modules() -> tuple[Module, ...]:
    """All modules of the package but errors.py and the laws, which raise `AssertionError` to tests, by name."""
    root = pathlib.Path(flax_surgery_hooks.__file__).parent
    found = []
    for file in sorted(root.rglob("*.py")):
        name = ".".join(file.relative_to(root).with_suffix("").parts)
        if name == "errors" or name.startswith("testing.") or file.name == "__init__.py":
            continue
        tree = ast.parse(file.read_text())
        inside: dict[ast.AST, Function] = {}
        for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
            for child in ast.iter_child_nodes(function):
                inside.update(dict.fromkeys(ast.walk(child), function))  # outer ones come first: the innermost stays
        values = vars(importlib.import_module(f"flax_surgery_hooks.{name}"))
        found.append(Module(name, tree, values, inside))
    return tuple(found)


def sites() -> Iterator[Site]:
    """Every error that the package makes, and every problem that it puts into a `ConfigError`."""
    for module in modules():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            scope = Scope(module, module.inside.get(node))
            name = _name_of(node.func)
            if name in CLASSES:
                yield from _constructed(node, name, scope)
            elif module.name.startswith("config") and name == "add" and _is_report(node.func):
                problems = tuple(f"{OPEN}key{CLOSE}: {text}" for text in _texts(node.args[0], scope))
                yield Site("ConfigError", problems, (None,), (None,), module.name, node.lineno)


def _constructed(node: ast.Call, name: str, scope: Scope) -> Iterator[Site]:
    """One site; one for each caller if a function is told what its error says."""
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    problem, found, write = (node.args[0], *(keywords.get(key, ast.Constant(None)) for key in ("found", "write")))
    for bound in _bound([problem, write], scope):
        problems, founds, writes = (_texts(each, bound) for each in (problem, found, write))
        yield Site(name, problems, founds, writes, scope.module.name, node.lineno)


def _bound(expressions: list[ast.expr], scope: Scope, depth: int = 3) -> Iterator[Scope]:
    """The scope for each call of its function, with what the call gives for the parameters that expressions name.

    Without that, each text of one would stand beside all those of another: "`k` must be at least 1" and `steps=100`.
    """
    named = [{each.id for each in ast.walk(one) if isinstance(each, ast.Name)} for one in expressions]
    told = [name for name in _parameters(scope.function) for names in named if name in names]
    calls = _calls(scope) if depth and (len(told) > 1 or any(_name_of(one) in told for one in expressions)) else []
    for call, caller in calls:
        arguments = {name: _argument(name, call, scope) for name in told}
        known = {name: argument for name, argument in arguments.items() if argument is not None}
        for above in _bound(list(known.values()), caller, depth - 1):
            yield scope._replace(bound=tuple((name, _texts(argument, above)) for name, argument in known.items()))
    if not calls:
        yield scope


def _is_report(function: ast.expr) -> bool:
    """Whether `function` is `report.add`, `report.at(...).add` or the like, and not the `add` of a set."""
    receiver = function.value if isinstance(function, ast.Attribute) else function
    return _name_of(receiver) in ("report", "at") or (
        isinstance(receiver, ast.Call) and _name_of(receiver.func) in ("report", "at")
    )


# Texts


def _texts(node: ast.expr, scope: Scope, depth: int = _DEPTH) -> Texts:
    """What an expression can be, as templates."""
    found: Texts
    if depth == 0:
        return (placeholder(node),)
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str)):
        return (node.value,)
    if (value := _evaluated(node, scope)) is not None:
        return (value,)
    match node:
        case ast.JoinedStr(values):
            found = _joined([_field(part, scope, depth) for part in values])
        case ast.BinOp(left, ast.Add(), right):
            found = _joined([_texts(left, scope, depth - 1), _texts(right, scope, depth - 1)])
        case ast.IfExp(_, body, orelse):
            found = (*_texts(body, scope, depth - 1), *_texts(orelse, scope, depth - 1))
        case ast.BoolOp(ast.Or(), values):
            found = tuple(text for value in values for text in _texts(value, scope, depth - 1))
            if isinstance(values[-1], ast.Constant) is False:
                found = tuple(text for text in found if text is not None)
        case ast.Name(name):
            found = _named(name, scope, depth)
        case ast.Call() | ast.Attribute():
            found = _returned(node, scope, depth)
        case _:
            found = ()
    found = tuple(dict.fromkeys(found))
    return found if 0 < len(found) <= _MAX_VARIANTS else (placeholder(node),)


def _joined(parts: list[Texts]) -> Texts:
    return tuple("".join(text or "" for text in texts) for texts in itertools.product(*parts))


def _field(part: ast.expr, scope: Scope, depth: int) -> Texts:
    """A part of an f-string: written out where that says more than a placeholder."""
    if not isinstance(part, ast.FormattedValue):
        return _texts(part, scope, depth - 1)
    spec = part.format_spec
    value = _evaluated(part.value, scope, ast.unparse(spec)[2:-1] if spec is not None else "")
    if value is not None:
        return (value,)
    if part.conversion == -1 and spec is None:
        texts = _texts(part.value, scope, depth - 1)
        if any(map(says, texts)) and all(text == "" or says(text) for text in texts):
            return texts
    return (placeholder(part.value),)


def _named(name: str, scope: Scope, depth: int) -> Texts:
    """What the variable can be: from its assignments, and from the arguments of the calls of its function."""
    if scope.function is None:
        return ()
    found: list[str | None] = []
    for node in ast.walk(scope.function):
        if isinstance(node, ast.Assign) and any(_name_of(target) == name for target in node.targets):
            either = node.value.values if isinstance(node.value, ast.BoolOp) else [node.value]
            parts = [part for part in either if _name_of(part) != name]  # what = what or "..."
            found.extend(text for part in parts for text in _texts(part, scope, depth - 1))
    bound = dict(scope.bound).get(name)
    if bound is not None:
        found.extend(bound)
    elif name in _parameters(scope.function):
        for call, caller in _calls(scope):
            argument = _argument(name, call, scope)
            found.extend(() if argument is None else _texts(argument, caller, depth - 1))
    # One that may be anything stands for all.
    return () if any(text and not says(text) for text in found) else tuple(text for text in found if text is not None)


def _returned(node: ast.expr, scope: Scope, depth: int) -> Texts:
    """What a function of the package, or a property of one of its classes, can return, if that is text."""
    called = node.func if isinstance(node, ast.Call) else node
    if _name_of(called) in _TRANSPARENT:
        return ()
    for module, function in _functions():
        is_property = any(_name_of(each) == "property" for each in function.decorator_list)
        is_it = is_property if isinstance(node, ast.Attribute) else _refers(called, scope, Scope(module, function))
        if function.name == _name_of(called) and _name_of(function.returns) == "str" and is_it:
            values = [each.value for each in ast.walk(function) if isinstance(each, ast.Return) and each.value]
            texts = [_texts(value, Scope(module, function), depth - 1) for value in values]
            return tuple(itertools.chain.from_iterable(texts))
    return ()


def _evaluated(node: ast.expr, scope: Scope, spec: str = "") -> str | None:
    """The value of an expression of constants of its module, such as the known rules; None for any other."""
    names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    fixed = {name: texts[0] for name, texts in scope.bound if len(texts) == 1 and OPEN not in (texts[0] or OPEN)}
    known = scope.module.values | fixed
    if not names or names & _locals(scope) - fixed.keys() or not names <= known.keys():
        return None
    value = eval(compile(ast.Expression(node), scope.module.name, "eval"), known)
    return format(value, spec) if isinstance(value, str | int | float) else None


def _locals(scope: Scope) -> set[str]:
    """Names that a function, or one around it, gives to its parameters and variables."""
    function, names = scope.function, set()
    while function is not None:
        for node in ast.walk(function):
            if isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
        function = scope.module.inside.get(function)
    return names


# Calls


@functools.cache
def _functions() -> tuple[tuple[Module, Function], ...]:
    return tuple((module, node) for module in modules() for node in ast.walk(module.tree) if isinstance(node, Function))


def _parameters(function: Function | None) -> list[str]:
    if function is None:
        return []
    names = [each.arg for each in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


@functools.cache
def _all_calls() -> dict[str, list[tuple[ast.Call, Scope]]]:
    """Every call in the package with where it stands, by the name of the function."""
    found: dict[str, list[tuple[ast.Call, Scope]]] = {}
    for module in modules():
        for node in (each for each in ast.walk(module.tree) if isinstance(each, ast.Call)):
            at = Scope(module, module.inside.get(node))
            found.setdefault(_name_of(node.func), []).append((node, at))
            if node.args:  # handed on: attempt(function, *arguments)
                handed = ast.Call(node.args[0], node.args[1:], node.keywords)
                found.setdefault(_name_of(node.args[0]), []).append((handed, at))
    return found


def _calls(scope: Scope) -> list[tuple[ast.Call, Scope]]:
    """The calls of the function of a scope but its own."""
    calls = _all_calls().get(scope.function.name, []) if scope.function is not None else []
    return [(call, at) for call, at in calls if at.function is not scope.function and _refers(call.func, at, scope)]


def _refers(node: ast.expr, at: Scope, scope: Scope) -> bool:
    """Whether an expression that stands somewhere is the function of a scope."""
    function = scope.function
    if function is None or _name_of(node) != function.name:
        return False
    meant = scope.module.values.get(function.name)
    if meant is None:  # a method, or a function in another
        return isinstance(node, ast.Attribute) or at.module is scope.module
    return meant is (at.module.values.get(node.id) if isinstance(node, ast.Name) else _attribute(node, at))


def _attribute(node: ast.expr, at: Scope) -> Any:
    base = node.value if isinstance(node, ast.Attribute) else None
    return getattr(at.module.values.get(_name_of(base)), _name_of(node), None)


def _argument(name: str, call: ast.Call, scope: Scope) -> ast.expr | None:
    """What a call gives for a parameter, or its default, or None."""
    assert scope.function is not None
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    names = _parameters(scope.function)
    given |= dict(zip(names, call.args, strict=False))
    if any(isinstance(each, ast.Starred) for each in call.args):
        return given.get(name) if name in {keyword.arg for keyword in call.keywords} else None
    arguments = scope.function.args
    defaults: list[ast.expr | None] = [*arguments.defaults]
    by_name = dict(zip(reversed([each.arg for each in arguments.args]), reversed(defaults), strict=False))
    by_name |= dict(zip([each.arg for each in arguments.kwonlyargs], arguments.kw_defaults, strict=True))
    return given.get(name) or by_name.get(name)


# Names


def _name_of(node: ast.AST | None) -> str:
    match node:
        case ast.Name(name) | ast.Attribute(_, name):
            return name
    return ""


def says(text: str | None) -> bool:
    """Whether a template has a word of its own."""
    return re.search(r"\w", re.sub(f"{OPEN}.*?{CLOSE}", "", text or "")) is not None


def placeholder(node: ast.expr) -> str:
    """A template that may be anything, named after the expression."""
    return f"{OPEN}{_called(node)}{CLOSE}"


def _called(node: ast.expr) -> str:
    """A short name for the value of an expression.

    >>> [_called(ast.parse(text, mode="eval").body) for text in ("shorten(error)", "type(x).__name__", "len(a.b)")]
    ['error', 'type of x', 'number of b']
    """
    match node:
        case ast.Name(name) | ast.Attribute(_, name) if name[:2] != "__":
            return name.strip("_").replace("_", " ")
        case ast.Attribute(ast.Call(ast.Name("type"), [inner]), "__name__" | "__qualname__"):
            return f"type of {_called(inner)}"
        case ast.Attribute(inner):
            return f"name of {_called(inner)}"
        case ast.Call(ast.Name("len" | "sum"), [inner]):
            return f"number of {_called(inner)}"
        case ast.Call(function, [first, *_]) if _name_of(function) in _TRANSPARENT | {"join", "float", "int"}:
            return _called(node.args[-1] if _name_of(function) == "map" else first)
        case ast.Call(function) if _name_of(function) not in vars(builtins):
            return _called(function)
        case ast.GeneratorExp(inner) | ast.Starred(inner) | ast.Subscript(inner) | ast.IfExp(_, inner):
            return _called(inner)
        case ast.BoolOp(_, [inner, *_]):
            return _called(inner)
    text = ast.unparse(node)
    return text if len(text) < 20 else "value"
