"""The page of all error messages: `python docs/errors_page.py` writes docs/errors.md from the source of the package."""

from __future__ import annotations

import inspect
import pathlib
import re
from collections.abc import Iterable
from typing import NamedTuple

import error_sites
from error_sites import CLASSES, CLOSE, OPEN

PAGE = pathlib.Path(__file__).with_name("errors.md")
_HEAD = """# Error messages

Every error that a mistake of yours can cause, by its message. Search this page for a few words of yours.

*Generated from the code by `python docs/errors_page.py`.* What differs from one error to the next stands as `<name>`.

## How to read one

```pycon
>>> import jax.numpy as jnp, optax, flax_surgery_hooks as fsh
>>> state = fsh.TrainState.create(apply_fn=None, params={"w": jnp.ones(4)}, tx=optax.adam(0.1))
>>> hooks = fsh.SurgeryHooks()
>>> hooks.add("average", lambda w: jnp.cumsum(w), params="w", when=fsh.at(1_000), opt_state="transport")
>>> try:
...     state = hooks(0, state)
... except fsh.SurgeryError as error:
...     print(error)
...     print("The fields:", error.hook, error.path, error.found, sep=" | ")
hook 'average', path 'w': The surgery <lambda> computes new elements from several old ones, so that no optimizer slot
can follow them by lineage. Found: 3 such elements. Write instead: `jax.lax.stop_gradient` around a statistic ...
The fields: | average | w | 3 such elements

```

A message says, in this order:

| part | field | |
|---|---|---|
| `hook 'average', step 1000, path 'w':` | `hook`, `step`, `path` | where; what is not known is left out |
| The surgery ... by lineage. | `problem` | what is wrong |
| `Found:` ... | `found` | what was there instead of what was expected; arrays as dtype and shape |
| `Write instead:` ... | `write` | the remedy, or the remedies |

All are `fsh.SurgeryError`, and of one of the classes below, which `flax_surgery_hooks.errors` holds. Almost every
mistake is noticed when a hook is added or at the first call of the hooks, for all of them, long before their steps.

**The state is untouched.** An error is raised before anything is put into the state: the one that you passed has all
its values, also if it was the last of several hooks that failed. In the example, training can go on with `state` as if
the call had not been made. (What JAX raises while a fire runs that had to take the memory of the old leaves, as
`SurgeryHooks(donate=...)` allows, is another matter: these leaves are gone then, as they are in a donating train step.)

## The classes
"""
_CONFIG = """A `ConfigError` about the values of a config lists all its problems at once (`problems`), a line each,
beginning with the key: `- surgery.prune.every: wants int, found 10.0 (float)`. What is wrong with a pattern, a
schedule, a rule or a surgery is told there in the words of the other sections.
"""


class Entry(NamedTuple):
    """One message.

    Attributes:
      error: name of its class.
      problem: the template of what is wrong.
      found: templates of what can stand after "Found:".
      write: those of the remedies.
    """

    error: str
    problem: str
    found: tuple[str | None, ...]
    write: tuple[str | None, ...]

    @property
    def anchor(self) -> str:
        """The name of its place on the page.

        >>> Entry("StepError", "Steps go forward.", (), ()).anchor
        'steperror-steps-go-forward'
        """
        return "-".join([self.error.lower(), *re.findall(r"\w+", self.problem.lower())])

    def matches(self, error: str, problem: str, found: object = None, write: str | None = None) -> bool:
        """Whether an error that was raised is one of these."""
        return (
            error == self.error
            and _matches((self.problem,), problem)
            and _matches(self.found, found)
            and _matches(self.write, write)
        )

    def says(self, message: str) -> bool:
        """Whether a whole message, as it is printed without a place, is one of these."""
        for found in self.found:
            for write in self.write:
                template = self.problem + ("" if found is None else f" Found: {found}.")
                if _is_like(template + ("" if write is None else f" Write instead: {write}."), message):
                    return True
        return False


def entries() -> list[Entry]:
    """All messages, by class and then by their words."""
    by_message: dict[tuple[str, str], Entry] = {}
    for site in error_sites.sites():
        for problem in filter(None, site.problems):
            key = site.error, re.sub(f"{OPEN}.*?{CLOSE}", OPEN, problem)
            same = by_message.get(key, Entry(site.error, problem, (), ()))
            found, write = _distinct(same.found + site.found), _distinct(same.write + site.write)
            by_message[key] = same._replace(found=found, write=write)
    order = list(CLASSES)
    return sorted(
        by_message.values(), key=lambda entry: (order.index(entry.error), _words(entry.problem), entry.problem)
    )


def page() -> str:
    """The page, in Markdown."""
    found = entries()
    by_class = {name: [entry for entry in found if entry.error == name] for name in CLASSES}
    by_class = {name: group for name, group in by_class.items() if group}
    rows = [f"| [`{name}`](#{name.lower()}) | {len(group)} | {_about(name)} |" for name, group in by_class.items()]
    table = "\n".join(["| class | messages | |", "|---|---|---|", *rows])
    sections = []
    for name, group in by_class.items():
        about = f"{_about(name)}\n\n{_CONFIG}" if name == "ConfigError" else f"{_about(name)}\n"
        sections.append(f"## {name}\n\n{about}\n" + "\n".join(map(_item, group)))
    return f"{_HEAD}\n{table}\n\n" + "\n".join(sections)


def _item(entry: Entry) -> str:
    """A message as an item of a list; a backslash at the end of a line breaks it."""
    lines = [f'- <a id="{entry.anchor}"></a>{_code(entry.problem)}']
    for title, texts in (("Found", entry.found), ("Write instead", entry.write)):
        given = [text for text in texts if text]
        if given:
            or_none = " (or nothing)" if None in texts else ""
            lines.append(f"  {title}: {' or '.join(map(_code, given))}{or_none}")
    return "\\\n".join(lines) + "\n"


def _code(template: str) -> str:
    """A template as inline code, where Markdown leaves `<`, `*` and `|` alone."""
    text = _shown(template)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _shown(template: str) -> str:
    return template.replace(OPEN, "<").replace(CLOSE, ">")


def _about(name: str) -> str:
    """The docstring of a class, up to its sections."""
    return " ".join((inspect.getdoc(CLASSES[name]) or "").split("\n\n")[0].split())


def _words(template: str) -> str:
    return " ".join(re.findall(r"\w+", re.sub(f"{OPEN}.*?{CLOSE}", " ", template).lower()))


def _distinct(texts: Iterable[str | None]) -> tuple[str | None, ...]:
    return tuple(sorted(set(texts), key=lambda text: (text is None, text or "")))


def _matches(templates: Iterable[str | None], value: object) -> bool:
    return any(value is None if one is None else _is_like(one, value) for one in templates)


def _is_like(template: str, value: object) -> bool:
    """Whether a text is what a template can become; repeated placeholders need not agree."""
    parts = re.split(f"{OPEN}.*?{CLOSE}", template)
    return value is not None and re.fullmatch(".*".join(map(re.escape, parts)), str(value), re.DOTALL) is not None


if __name__ == "__main__":
    PAGE.write_text(page())
