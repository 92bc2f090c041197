"""What a writer gets of a fire beside scalars: a table of the leaves, histograms, the hooks as hyperparameters."""

from __future__ import annotations

import event_files
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny import MOMENTUM, halve, make_hooks, make_state

import flax_surgery_hooks as fsh
from flax_surgery_hooks import samples, settling
from flax_surgery_hooks.metrics import COLUMNS
from flax_surgery_hooks.writers import EventFileWriter

LEAVES = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.full(4, -2.0, np.float32)}


def make_writing(logdir, surgery=halve, **options):
    writer = EventFileWriter(logdir)
    hooks = make_hooks(surgery, fsh.at(1), params="**", options=options, writer=writer)
    return hooks, writer


def leaves():
    return make_state(1, MOMENTUM, **{name: jnp.asarray(leaf) for name, leaf in LEAVES.items()})


def rows(markdown):
    """The cells of a Markdown table below its head and rule."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()[2:]]


def test_the_table_tells_of_every_leaf_before_and_after(tmp_path):
    hooks, writer = make_writing(tmp_path, surgery=lambda w: jnp.where(w > 3, 0.0, w / 4))
    hooks(1, leaves())
    hooks.flush()
    writer.close()
    ((step, text),) = event_files.read_texts(tmp_path)["surgery/a/leaves"]
    assert step == 1
    assert text == hooks.ledger.records[-1].table()
    shown = {row[0]: row[1:] for row in rows(text)}
    for name, before in LEAVES.items():
        after = np.where(before > 3, 0, before / 4)
        assert shown[name] == [
            str(before.shape), "float32", str(before.size), f"{np.linalg.norm(before):.4g}",
            f"{np.linalg.norm(after):.4g}", f"{np.linalg.norm(after - before) / np.linalg.norm(before):.3g}",
            f"{100 * (after != before).mean():.3g} %", f"{100 * ((before > 3) | False).mean():.3g} %",
            f"{100 * (after == 0).mean():.3g} %",
        ]  # fmt: skip
    assert shown["a"][3:5] != shown["b"][3:5]


def test_the_table_tells_what_was_added_and_removed():
    state = leaves()
    _, record = fsh.operate(state, lambda leaves: {"c": leaves["a"] * 2, "b": leaves["b"]})
    by_name = {row[0]: row[1:] for row in rows(record.table())}
    assert list(by_name) == ["b", "c (added)", "a (removed)"]
    norm = np.linalg.norm(LEAVES["a"])
    assert by_name["c (added)"][2:6] == ["6", "", f"{2 * norm:.4g}", ""]
    assert by_name["a (removed)"] == ["", "", "0", f"{norm:.4g}", "", "", "", "", ""]


def test_a_long_table_is_cut_for_the_writer_only(tmp_path, monkeypatch):
    monkeypatch.setattr(settling, "MOST_ROWS", 1)
    hooks, writer = make_writing(tmp_path)
    hooks(1, leaves())
    hooks.flush()
    writer.close()
    ((_, text),) = event_files.read_texts(tmp_path)["surgery/a/leaves"]
    assert [row[0] for row in rows(text)] == ["a", "and 1 more"]
    assert [row[0] for row in rows(hooks.ledger.records[-1].table())] == ["a", "b"]


def test_the_table_of_a_traced_edit_is_there_when_its_record_is():
    host = fsh.operate(leaves(), halve)[1].table()
    assert jax.jit(lambda state: fsh.operate(state, halve)[1])(leaves()).table() == host


def test_without_figures_the_table_has_no_numbers(tmp_path):
    hooks, writer = make_writing(tmp_path, figures=False)
    hooks(1, leaves())
    hooks.flush()
    writer.close()
    assert "surgery/a/leaves" not in event_files.read_texts(tmp_path)
    assert rows(hooks.ledger.records[-1].table()) == [["a", "(2, 3)", "float32"], ["b", "(4,)", "float32"]]


def test_the_ledger_holds_no_table(tmp_path):
    _, record = fsh.operate(leaves(), halve)
    assert record.per_leaf.shape == (2, len(COLUMNS))
    assert "per_leaf" not in record.to_json()


def test_histograms_hold_the_elements_before_and_after_even_of_a_donated_state(tmp_path):
    hooks, writer = make_writing(tmp_path, histograms=True)
    state = hooks(1, leaves())
    jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    hooks.flush()
    writer.close()
    histograms = event_files.read_histograms(tmp_path)
    assert set(histograms) == {f"surgery/a/{when}/{path}" for when in ("before", "after") for path in "ab"}
    for name, leaf in LEAVES.items():
        for when, values in (("before", leaf), ("after", leaf / 2)):
            ((step, histogram),) = histograms[f"surgery/a/{when}/{name}"]
            left, right, counts = histogram.T
            assert (step, counts.sum()) == (1, leaf.size)
            inside = (values.ravel()[:, None] >= left) & (values.ravel()[:, None] <= right)
            assert (inside.sum(0) >= counts).all()
            assert (left[0], right[-1]) == (values.min(), values.max()) or np.ptp(values) == 0


def test_histograms_are_not_written_unasked_nor_of_a_refused_fire(tmp_path):
    for name, surgery, options in (("plain", halve, {}), ("refused", lambda w: w / 0, {"histograms": True})):
        hooks, writer = make_writing(tmp_path / name, surgery, **options)
        hooks(1, leaves())
        try:
            hooks.flush()
        except fsh.errors.RefusedError:
            assert name == "refused"
        writer.close()
        assert event_files.read_histograms(tmp_path / name) == {}


def test_of_a_large_leaf_evenly_spread_elements_are_kept(monkeypatch):
    monkeypatch.setattr(samples, "MOST", 5)
    params = {"w": jnp.arange(12, dtype=jnp.bfloat16), "count": jnp.arange(3)}
    kept = samples.sampled("before", params, ("w", "count", "gone"))
    assert {name: value.tolist() for name, value in kept.items()} == {"before/w": [0, 3, 6, 9]}
    assert kept["before/w"].dtype == jnp.float32


def test_the_hooks_are_written_once_as_hyperparameters(tmp_path):
    writer = EventFileWriter(tmp_path)
    hooks = fsh.SurgeryHooks(writer=writer)
    hooks.add("norm", fsh.surgeries.Normalize(to=2.0), params=["a", "b"], exclude="b", when=fsh.every(2))
    hooks.add("halve", halve, params="*", when=fsh.at(1) | fsh.every(3), opt_state={"grad": "reset"}, priority=2)
    state = leaves()
    for step in (1, 2, 3):
        state = hooks(step, state)
    hooks.flush()
    writer.close()
    held = event_files.read_hparams(tmp_path)
    expected = {
        "surgery/norm/surgery": "Normalize", "surgery/norm/surgery.to": 2.0, "surgery/norm/params": "a, b",
        "surgery/norm/exclude": "b", "surgery/norm/when": "every(2)", "surgery/norm/opt_state": "carry",
        "surgery/halve/surgery": "halve", "surgery/halve/when": "at(1) | every(3)",
        "surgery/halve/opt_state": "carry, grad=reset", "surgery/halve/priority": 2,
    }  # fmt: skip
    assert {name: held[name] for name in expected} == expected
    assert held.keys() == hooks.hparams().keys()
    assert len(event_files.read_session_starts(tmp_path)) == 1


@jax.jit
def slowly(w):
    return jax.lax.fori_loop(0, 60, lambda i, x: jnp.sin(x @ x) * 0.01, w)


def test_nothing_of_all_this_waits_for_the_device(tmp_path):
    hooks, writer = make_writing(tmp_path, histograms=True)
    w = jnp.eye(700)
    state = make_state(1, optax.adam(0.1), w=slowly(w))
    jax.block_until_ready(hooks.fire("a", state, 0).params)  # compiled, and nothing under way
    hooks.flush()
    state = state.replace(params={"w": slowly(slowly(w))})
    after = hooks.fire("a", state, 1)
    assert not state.params["w"].is_ready()
    hooks.flush()
    writer.close()
    np.testing.assert_array_equal(after.params["w"], state.params["w"] / 2)
    assert [step for step, _ in event_files.read_texts(tmp_path)["surgery/a/leaves"]] == [0, 1]
