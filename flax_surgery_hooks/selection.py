"""Which leaves a hook edits: globs on `/`-joined paths, regular expressions, predicates, unions and exclusions."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, TypeAlias

import numpy as np

from flax_surgery_hooks.errors import SelectionError, UserCodeError, quoted, shorten, typed
from flax_surgery_hooks.globs import compile_glob, terminated
from flax_surgery_hooks.layer_index import LayerIndex, without_index
from flax_surgery_hooks.layers import Layer
from flax_surgery_hooks.paths import Leaves, close_matches, listed

Patterns: TypeAlias = "str | Callable[[str, Any], bool] | Sequence[Patterns] | Selection"
"""What selects leaves: a glob, a `re:` pattern, a predicate of (path, leaf), a list of these, or a `Selection`."""


class Pick(NamedTuple):
    """What a selection takes of one leaf.

    Attributes:
      place: place of the leaf in tree order.
      layer: the one layer that is taken of a stacked leaf, or None for the whole leaf.
    """

    place: int
    layer: Layer | None = None

    def path(self, leaves: Leaves) -> str:
        """Its path, with the layer's index at the end."""
        path = leaves.paths[self.place]
        return path if self.layer is None else self.layer.path(path)


class Term(Protocol):
    """One part of a selection: a `Glob`, a `Regex`, a `Predicate` or a whole `Selection`."""

    def picks(self, leaves: Leaves) -> tuple[Pick, ...]:
        """The leaves or layers that match, at least one."""

    def describe(self) -> Any:
        """A JSON-able description that is the same in every process."""


@dataclasses.dataclass(frozen=True)
class Glob:
    """A glob on joined paths; see `select` for its syntax."""

    pattern: str

    def __post_init__(self):
        compile_glob(self._split[0])

    @property
    def _split(self) -> tuple[str, LayerIndex | None]:
        return without_index(self.pattern)

    def picks(self, leaves: Leaves) -> tuple[Pick, ...]:
        """The leaves whose path matches, or the layers that the index takes of them."""
        index = self._split[1]
        places = self._matches(leaves) or _raise_no_match(f"The pattern {self.pattern!r}", leaves, self._hints(leaves))
        if index is None:
            return tuple(map(Pick, places))
        return tuple(Pick(place, layer) for place in places for layer in index.of(leaves, place))

    def describe(self) -> str:
        """The pattern as written."""
        return self.pattern

    def _matches(self, leaves: Leaves) -> tuple[int, ...]:
        regex = compile_glob(self._split[0])
        return tuple(i for i, path in enumerate(leaves.paths) if regex.fullmatch(terminated(path)))

    def _hints(self, leaves: Leaves) -> list[str]:
        """A module named without what is in it, a name without its module, or a misspelling."""
        stem, index = self._split[0], self._split[1] or ""
        wider = [f"{stem}/**{index}", f"**/{stem}{index}", f"**/{stem}/**{index}"]
        found = [pattern for pattern in wider if Glob(pattern)._matches(leaves)]
        return found[:1] or close_matches(self.pattern, leaves.paths)


@dataclasses.dataclass(frozen=True)
class Regex:
    """A regular expression, without its `re:`, that must match a whole joined path."""

    pattern: str

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise SelectionError(
                f"Not a regular expression: {error}.",
                found=self.describe(),
                write=r"for example 're:Dense_[0-3]/kernel'; a backslash before a character meant literally",
            ) from error

    def picks(self, leaves: Leaves) -> tuple[Pick, ...]:
        """The leaves whose path matches."""
        regex = re.compile(self.pattern)
        matched = tuple(Pick(i) for i, path in enumerate(leaves.paths) if regex.fullmatch(path))
        return matched or _raise_no_match(f"The pattern {self.describe()!r}", leaves, self._hints(leaves))

    def describe(self) -> str:
        """The pattern as written."""
        return f"re:{self.pattern}"

    def _hints(self, leaves: Leaves) -> list[str]:
        """A pattern that matches a part of a path, where it must match all of it, or a misspelling."""
        partial = any(re.search(self.pattern, path) for path in leaves.paths)
        return [f"re:.*({self.pattern}).*"] if partial else close_matches(self.pattern, leaves.paths)


@dataclasses.dataclass(frozen=True)
class Predicate:
    """A user's function of (path, leaf) that says whether the leaf is selected."""

    fn: Callable[[str, Any], bool]

    def picks(self, leaves: Leaves) -> tuple[Pick, ...]:
        """The leaves for which the function is true."""
        pairs = zip(leaves.paths, leaves.values, strict=True)
        matched = tuple(Pick(i) for i, (path, leaf) in enumerate(pairs) if self._call(path, leaf))
        return matched or _raise_no_match(f"The predicate {self.describe()}", leaves, [])

    def describe(self) -> str:
        """The qualified name: a repr would hold an address, another one in every process."""
        fn = self.fn
        while isinstance(fn, functools.partial):
            fn = fn.func
        named = fn if hasattr(fn, "__qualname__") else type(fn)
        return f"{getattr(named, '__module__', None)}.{named.__qualname__}"

    def _call(self, path: str, leaf: Any) -> bool:
        try:
            answer = self.fn(path, leaf)
        except Exception as error:
            raise UserCodeError(
                f"The predicate {self.describe()}, called with (path, leaf), raised {type(error).__name__}: "
                f"{shorten(error)}",
                path=path,
            ) from error
        # Strings and None are what a forgotten comparison or `return` gives; an array would wait for the device.
        if not isinstance(answer, bool | np.bool_):
            raise SelectionError(
                f"The predicate {self.describe()} must return True or False.",
                found=typed(answer),
                write="a function of (path, leaf) such as lambda path, leaf: leaf.ndim == 2",
                path=path,
            )
        return bool(answer)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which leaves of a tree are selected; made by `select`, an immutable value.

    Attributes:
      include: what selects; a leaf that any of these matches is selected.
      exclude: what takes leaves away again.
      expect: how many leaves must be selected, or None for any number.
    """

    include: tuple[Term, ...]
    exclude: tuple[Term, ...] = ()
    expect: int | None = None

    def resolve(self, leaves: Leaves) -> tuple[int, ...]:
        """Indices of the selected leaves, in tree order; there is at least one.

        Raises:
          SelectionError: as for `picks`, or layers of a leaf are selected.
          UserCodeError: a predicate raises.

        >>> from flax_surgery_hooks import paths
        >>> leaves = paths.flatten({"Dense_0": {"bias": 0.0, "kernel": 1.0}, "Dense_1": {"kernel": 2.0}})
        >>> select("**/kernel").resolve(leaves)
        (1, 2)
        """
        picks = self.picks(leaves)
        layers = [pick.path(leaves) for pick in picks if pick.layer is not None]
        if layers:
            raise SelectionError(
                "Only whole leaves can be selected here, no layers.", found=listed(layers), write="no index"
            )
        return tuple(pick.place for pick in picks)

    def picks(self, leaves: Leaves) -> tuple[Pick, ...]:
        """The selected leaves and layers, in tree order, layers by index; there is at least one.

        Raises:
          SelectionError: a pattern (each one, also among the excluded) matches nothing or has an index that a leaf has
            not, a leaf is selected as a whole and by layers, everything is excluded, the count differs from `expect`,
            or a predicate returns something else than a bool.
          UserCodeError: a predicate raises.

        >>> from flax_surgery_hooks import paths
        >>> leaves = paths.flatten({"layers": {"kernel": np.ones((3, 2, 2))}})
        >>> [pick.path(leaves) for pick in select("layers/**", exclude="**/kernel[0]").picks(leaves)]
        ['layers/kernel[1]', 'layers/kernel[2]']
        """
        included = {pick for term in self.include for pick in term.picks(leaves)}
        excluded = {pick for term in self.exclude for pick in term.picks(leaves)}
        selected = _remaining(leaves, included, excluded)
        if not selected:
            raise SelectionError(
                "Everything that was selected is also excluded.",
                found=listed(pick.path(leaves) for pick in _in_order(included)),
                write="a narrower exclude=",
            )
        if self.expect is not None and len(selected) != self.expect:
            raise SelectionError(
                f"Expected {self.expect} leaves, but {len(selected)} are selected.",
                found=listed(pick.path(leaves) for pick in selected),
                write=f"expect={len(selected)}, or another pattern",
            )
        return selected

    def describe(self) -> dict[str, Any]:
        """A JSON-able description: patterns as written, predicates by qualified name.

        >>> select("**/kernel", exclude="Dense_0/*").describe()
        {'params': ['**/kernel'], 'exclude': ['Dense_0/*'], 'expect': None}
        """
        return {
            "params": [term.describe() for term in self.include],
            "exclude": [term.describe() for term in self.exclude],
            "expect": self.expect,
        }


def select(params: Patterns, exclude: Patterns | None = None, expect: int | None = None) -> Selection:
    """Makes a `Selection` of leaves, by their path, by a predicate, or both.

    In a glob, `*` stands for any characters and `?` for one, within one name between slashes; `**` stands for any
    number of whole names, also none: `**/kernel` matches `kernel` and `a/b/kernel`. `{a,b}` stands for `a` or `b`, and
    may be nested. The path of a single bare array is empty, and `**` matches it.

    An index or slice at the very end, as Python has them, takes layers of a stacked leaf, such as `nn.scan` makes:
    `layers/**/kernel[3]`, `[-1]`, `[2:4]`. Each layer is a leaf of its own to the surgery, with this path and without
    the stacked axis: the first, or the one that the leaf's box names "layers". `exclude=` takes layers out of leaves
    that are selected as a whole; to select a leaf as a whole and by layers is an error, as a norm or a mean of it would
    not say of what.

    Args:
      params: a glob, a regular expression such as `"re:Dense_[0-3]/kernel"` that must match the whole path, a predicate
        called with (path, leaf), a list or tuple of these (all that any of them matches), or another `Selection`.
      exclude: what to leave out, in the same forms.
      expect: how many leaves must be selected.

    Raises:
      SelectionError: a malformed or empty pattern, an empty list, a wrong type, or an `expect` that is not positive.

    >>> from flax_surgery_hooks import paths
    >>> leaves = paths.flatten({"Dense_0": {"bias": 0.0, "kernel": 1.0}, "Dense_1": {"kernel": 2.0}})
    >>> select("**/kernel", exclude="Dense_0/**", expect=1).resolve(leaves)
    (2,)
    """
    if isinstance(params, Selection) and exclude is None and expect is None:
        return params
    excluded = () if exclude is None else tuple(_terms(exclude, "exclude="))
    return Selection(tuple(_terms(params, "params=")), excluded, None if expect is None else _as_count(expect))


def _in_order(picks: Iterable[Pick]) -> tuple[Pick, ...]:
    return tuple(sorted(picks, key=lambda pick: (pick.place, -1 if pick.layer is None else pick.layer.index)))


def _remaining(leaves: Leaves, included: set[Pick], excluded: set[Pick]) -> tuple[Pick, ...]:
    """What is left of the included; a whole leaf of which layers are excluded is its other layers."""
    gone = {pick.place for pick in excluded if pick.layer is None}
    held = {pick for pick in included if pick.place not in gone}
    both = {pick.place for pick in held if pick.layer is not None} & {pick.place for pick in held if pick.layer is None}
    if both:
        raise SelectionError(
            "A leaf is selected as a whole and by layers.",
            path=leaves.paths[min(both)],
            found=listed(pick.path(leaves) for pick in _in_order(held) if pick.place in both),
            write="one of them; exclude= with an index takes layers out of the whole leaf",
        )
    cut = {pick.place for pick in excluded if pick.layer is not None}
    apart = {
        part
        for pick in held
        for part in (
            [Pick(pick.place, layer) for layer in _EVERY.of(leaves, pick.place)]
            if pick.layer is None and pick.place in cut
            else [pick]
        )
    }
    return _in_order(apart - excluded)


_EVERY = LayerIndex(":")


def _terms(patterns: Any, argument: str) -> Iterator[Term]:
    """The terms of `patterns`, lists flattened; `argument` is how the caller wrote it."""
    if isinstance(patterns, list | tuple):
        if not patterns:
            raise SelectionError(f"{argument} is an empty list.", found=patterns, write=f"{argument}{_OPEN[argument]}")
        yield from itertools.chain.from_iterable(_terms(pattern, argument) for pattern in patterns)
    elif isinstance(patterns, str):
        yield _pattern(patterns, argument)
    elif isinstance(patterns, Selection):
        yield patterns
    elif callable(patterns):
        yield Predicate(patterns)
    else:
        raise SelectionError(
            f"{argument} cannot be of type {type(patterns).__name__}.",
            write="a glob, a 're:' pattern, a function of (path, leaf), a list of these, or a Selection",
        )


# What stands for "all" in `params=` and for "none" in `exclude=`.
_OPEN = {"params=": "'**'", "exclude=": "None"}


def _pattern(text: str, argument: str) -> Term:
    is_regex = text.startswith("re:")
    if not text.removeprefix("re:").strip():
        raise SelectionError(
            f"{argument} holds an empty pattern.", found=quoted(text), write=f"{argument}{_OPEN[argument]}"
        )
    return Regex(text.removeprefix("re:")) if is_regex else Glob(text)


def _as_count(expect: Any) -> int:
    try:
        count = 0 if isinstance(expect, bool) else operator.index(expect)
    except TypeError:
        count = 0
    if count < 1:
        raise SelectionError(
            "expect= is how many leaves must be selected, a positive integer.",
            found=typed(expect),
            write="expect=2",
        )
    return count


def _raise_no_match(what: str, leaves: Leaves, hints: list[str]) -> NoReturn:
    raise SelectionError(
        f"{what} matches none of the {len(leaves.paths)} parameters.",
        found=listed(map(repr, leaves.paths)) if leaves.paths else "no parameters at all",
        write=" or ".join(map(repr, hints)) or None,
    )
