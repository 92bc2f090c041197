"""The n-gram baseline, against counts and probabilities worked out one n-gram at a time."""

from __future__ import annotations

import collections
import importlib
import pathlib
import sys
from typing import Any

import numpy as np
import pytest

EXAMPLES = str(pathlib.Path(__file__).parents[1] / "examples")
sys.path.insert(0, EXAMPLES)
lm_ngram: Any = importlib.import_module("lm_ngram")
sys.path.remove(EXAMPLES)

TEXT = b"the cat sat on the mat; that cat ate the rat, and the rat ate at the mat. a cat, a rat, a hat that sat."


def array(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


class Slow:
    """Interpolated modified Kneser-Ney as its authors write it, with dicts."""

    def __init__(self, text: bytes, order: int, continuations: bool = True):
        padded = b"\0" * (order - 1) + text
        self.order = order
        grams = [padded[i : i + order] for i in range(len(text))]
        self.counts = [collections.Counter(grams)]  # from the longest n-grams to single bytes
        for _ in range(order - 1):
            shorter: collections.Counter[bytes] = collections.Counter()
            for gram, count in self.counts[-1].items():
                shorter[gram[1:]] += 1 if continuations else count
            self.counts.append(shorter)

    def probability(self, gram: bytes) -> float:
        if not gram:
            return 1 / 256
        counts = self.counts[self.order - len(gram)]
        discounts = [0.0, *lm_ngram.discounts(np.array(list(counts.values())))]
        after = {other: count for other, count in counts.items() if other[:-1] == gram[:-1]}
        lower = self.probability(gram[1:])
        if not after:
            return lower
        taken = {other: discounts[min(count, 3)] for other, count in after.items()}
        kept = after[gram] - taken[gram] if gram in after else 0.0
        return (kept + sum(taken.values()) * lower) / sum(after.values())


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
def test_bits_are_those_of_the_formula(order):
    held_out = b"the hat; a zebra ate that cat"
    slow = Slow(TEXT, order)
    padded = b"\0" * (order - 1) + held_out
    expected = [-np.log2(slow.probability(padded[i : i + order])) for i in range(len(held_out))]
    bits = lm_ngram.NGram.fit(array(TEXT), order).bits(array(held_out))
    np.testing.assert_allclose(bits, expected, rtol=1e-12)
    if 1 < order < 8:  # raw counts below the highest order are another model
        wrong = Slow(TEXT, order, continuations=False)
        others = [-np.log2(wrong.probability(padded[i : i + order])) for i in range(len(held_out))]
        assert np.abs(bits - others).max() > 0.1


@pytest.mark.parametrize("order", [2, 5])
def test_probabilities_of_all_next_bytes_sum_to_one(order):
    model = lm_ngram.NGram.fit(array(TEXT), order)
    for context in (b"the ", b" cat", b"zzzz", b"ize "):
        bits = [model.bits(array(context + bytes([byte])))[-1] for byte in range(256)]
        assert np.exp2(-np.array(bits)).sum() == pytest.approx(1, abs=1e-12)


def test_discounts_are_chen_and_goodmans():
    counts = np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 5, 7])
    ratio = 40 / 80
    expected = [1 - 2 * ratio * 20 / 40, 2 - 3 * ratio * 10 / 20, 3 - 4 * ratio * 5 / 10]
    np.testing.assert_allclose(lm_ngram.discounts(counts), expected)
    assert lm_ngram.discounts(np.array([1, 1, 5])).tolist() == [0.5, 0.5, 0.5]


def test_longer_contexts_help_on_text_and_not_on_noise():
    rng = np.random.default_rng(0)
    words = [b"alpha ", b"beta ", b"gamma ", b"delta "]
    text, more = (array(b"".join(words[i] for i in rng.integers(4, size=2_000))) for _ in range(2))
    found = {order: lm_ngram.NGram.fit(text, order).bits(more).mean() for order in (1, 2, 5)}
    assert found[5] < 0.4 < 0.8 < found[2] < found[1]  # 2 bits a word, of which there are 5.5 bytes: 0.36
    noise = rng.integers(256, size=20_000).astype(np.uint8)
    assert 8 <= lm_ngram.NGram.fit(noise[:10_000], 5).bits(noise[10_000:]).mean() < 8.3


@pytest.mark.parametrize("order", [0, 9])
def test_an_order_that_does_not_fit_is_an_error(order):
    with pytest.raises(ValueError, match=f"The order is 1 to 8, not {order}"):
        lm_ngram.NGram.fit(array(TEXT), order)
