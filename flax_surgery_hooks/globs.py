"""Globs on `/`-joined paths as regular expressions; see `select` for their syntax."""

from __future__ import annotations

import functools
import re

from flax_surgery_hooks.errors import SelectionError, quoted

# Braces multiply: a dozen pairs of them would be thousands of patterns, and surely not what was meant.
_MAX_ALTERNATIVES = 1000


def terminated(path: str) -> str:
    """Every name followed by a slash: the empty path has no names, and `**` needs no special cases at either end."""
    return f"{path}/" if path else ""


@functools.lru_cache(maxsize=1024)
def compile_glob(pattern: str) -> re.Pattern[str]:
    """A regular expression for `terminated` paths.

    Raises:
      SelectionError: the glob is malformed.
    """
    regexes = [_names_regex(terminated(alternative)) for alternative in _alternatives(pattern)]
    return re.compile("|".join(regexes))


def _names_regex(glob: str) -> str:
    """The regular expression of a terminated glob without braces."""
    # Several `**` in a row mean no more than one, and would backtrack exponentially.
    single = re.sub(r"(?<![^/])(\*\*/)+", "**/", glob)
    return "".join(r"(?:[^/]*/)*" if name == "**" else f"{_name_regex(name)}/" for name in single.split("/")[:-1])


def _name_regex(name: str) -> str:
    if "**" in name:
        raise SelectionError(
            "`**` stands for whole names, and must stand alone between slashes.",
            found=quoted(name),
            write=repr(re.sub(r"\*+", "*", name)),
        )
    wild = {"*": "[^/]*", "?": "[^/]"}
    return "".join(wild.get(character) or re.escape(character) for character in name)


def _alternatives(pattern: str) -> list[str]:
    """What the braces of a glob stand for, written out, without duplicates.

    >>> _alternatives("{a,b{c,d}}/e")
    ['a/e', 'bc/e', 'bd/e']
    """
    # One entry per open brace, outermost first: its finished alternatives, and what the unfinished one begins with.
    levels: list[tuple[list[str], list[str]]] = [([], [""])]
    for token in re.split(r"([{},])", pattern):
        done, current = levels.pop()
        if token == "{":
            levels += [(done, current), ([], [""])]
        elif token == "}" and levels:
            outer, heads = levels.pop()
            levels.append((outer, _crossed(heads, _checked(done + current, pattern), pattern)))
        elif token == "}":
            raise _brace_error("A brace is closed that was never opened.", pattern)
        elif token == "," and levels:
            levels.append((done + current, [""]))
        else:
            levels.append((done, [head + token for head in current]))
    if len(levels) > 1:
        raise _brace_error("A brace is opened and never closed.", pattern)
    return list(dict.fromkeys(levels[0][1]))


def _crossed(heads: list[str], tails: list[str], pattern: str) -> list[str]:
    if len(heads) * len(tails) > _MAX_ALTERNATIVES:
        raise _brace_error(f"Braces that stand for more than {_MAX_ALTERNATIVES} patterns.", pattern)
    return [head + tail for head in heads for tail in tails]


def _checked(alternatives: list[str], pattern: str) -> list[str]:
    """The alternatives of one pair of braces, unless they are a slip of the pen."""
    if alternatives == [""]:
        raise _brace_error("Braces with nothing in them.", pattern)
    if any(text != text.strip() for text in alternatives):
        raise _brace_error("Spaces within braces are taken as part of a name.", pattern)
    return alternatives


def _brace_error(problem: str, pattern: str) -> SelectionError:
    write = "{kernel,bias} without spaces, or a list of patterns; for a literal brace, a 're:' pattern"
    return SelectionError(problem, found=quoted(pattern), write=write)
