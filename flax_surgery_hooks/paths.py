"""Key paths as the strings people write: `Dense_1/kernel`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from flax_surgery_hooks.errors import SelectionError, shorten

KeyPath = tuple[Any, ...]


class Leaves(NamedTuple):
    """A flattened tree of parameters.

    Attributes:
      paths: `/`-joined path of each leaf, in tree order, unique.
      keys: typed key path of each leaf, as `jax.tree_util` gives it.
      values: the leaves.
      treedef: what rebuilds the tree from `values`.
    """

    paths: tuple[str, ...]
    keys: tuple[KeyPath, ...]
    values: tuple[Any, ...]
    treedef: Any


def flatten(params: Any) -> Leaves:
    """Flattens a tree of parameters; the fields of boxes and variables are not part of a path.

    The paths are those of `flax.traverse_util.flatten_dict(params, sep="/")`; a single bare array has the path "".

    Raises:
      SelectionError: two leaves have the same joined path.

    >>> flatten({"Dense_0": {"kernel": 1.0, "bias": 0.0}}).paths
    ('Dense_0/bias', 'Dense_0/kernel')
    """
    items, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = tuple(join(keys) for keys, _ in items)
    if [keys for keys, _ in items] == [(GetAttrKey("value"),)]:  # one bare box: a bare array in all but the wrapping
        paths = ("",)
    if len(set(paths)) < len(paths):
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise SelectionError(
            "Two parameters have the same joined path, so that a pattern cannot tell them apart.",
            found=twice,
            write="parameter names without '/'",
        )
    return Leaves(paths, tuple(keys for keys, _ in items), tuple(leaf for _, leaf in items), treedef)


def join(keys: KeyPath) -> str:
    """The `/`-joined name of a typed key path, without the fields of boxes (such as `nn.Partitioned.value`)."""
    named = list(keys)
    while len(named) > 1 and _is_box_field(named[-1]):
        named.pop()
    return "/".join(_name(key) for key in named)


def _is_box_field(key: Any) -> bool:
    """Whether a key is where boxes and NNX's variables keep their array; other attributes are names of parameters."""
    return key == GetAttrKey("value") or isinstance(key, FlattenedIndexKey)


def _name(key: Any) -> str:
    match key:
        case DictKey(key=name) | GetAttrKey(name=name) | FlattenedIndexKey(key=name) | SequenceKey(idx=name):
            return str(name)
    return str(getattr(key, "key", key))


def close_matches(word: str, known: Iterable[str], count: int = 5) -> list[str]:
    """The names in `known` that are most like `word`, best first.

    >>> close_matches("Dense_1/kernal", ["Dense_1/kernel", "Conv_0/bias"])
    ['Dense_1/kernel']
    """
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)


def listed(names: Iterable[str], limit: int = 12) -> str:
    """Names for an error message: at most `limit` of them, and how many more there are."""
    names = list(names)
    text = ", ".join(shorten(name, 80) for name in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"
