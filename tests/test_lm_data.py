"""The language model's loader: against the files themselves, and against an epoch laid out in memory."""

from __future__ import annotations

import importlib
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

EXAMPLES = str(pathlib.Path(__file__).parents[1] / "examples")
sys.path.insert(0, EXAMPLES)
lm_data: Any = importlib.import_module("lm_data")
sys.path.remove(EXAMPLES)

LENGTH = 8


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Sources of many lengths, one of them empty, and folders to leave out."""
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / ("package" if i % 3 else ".") / f"m{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(rng.integers(1, 256, 0 if i == 5 else 3 + 7 * i).astype(np.uint8)))
    for skipped in ("test", "package/tests", "site-packages", "encodings"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "left_out.py").write_text("x")
    (tmp_path / "notes.txt").write_text("x")
    return tmp_path


@pytest.fixture
def corpus(folder: pathlib.Path) -> Any:
    return lm_data.Corpus(folder, tuple(lm_data.list_files(folder)))


def test_files_are_the_sources_without_tests_and_packages(folder):
    files = lm_data.list_files(folder)
    names = [f"package/m{i}.py" if i % 3 else f"m{i}.py" for i in range(12)]
    assert [file.path for file in files] == sorted(names)
    assert {file.path: file.size for file in files}["package/m7.py"] == 52
    few = lm_data.list_files(folder, 4)
    assert len(few) == 4
    assert set(few) < set(files)


def test_the_split_is_by_file_and_stable(folder):
    train, held_out = lm_data.split(folder, 0.3)
    assert not set(train.files) & set(held_out.files)
    assert sorted(train.files + held_out.files) == lm_data.list_files(folder)
    assert lm_data.hash_of("json/decoder.py") == pytest.approx(0.2312, abs=5e-5)  # the same on every machine
    more = lm_data.split(folder, 0.6)[1]
    assert set(held_out.files) <= set(more.files)  # a file does not move because another one is there
    with pytest.raises(ValueError, match=r"12 files in .* give 12 to train on and 0 held out"):
        lm_data.split(folder, 0.0)


def test_parts_of_documents_are_their_bytes_behind_a_separator(corpus):
    whole = [b"\0" + (corpus.root / file.path).read_bytes() for file in corpus.files]
    assert corpus.stream().tobytes() == b"".join(whole)
    assert corpus.lengths.tolist() == [len(document) for document in whole]
    for document, expected in enumerate(whole):
        for start in range(len(expected)):
            for stop in range(start + 1, len(expected) + 1):
                assert corpus.read(document, start, stop) == expected[start:stop]


def test_a_file_that_shrank_is_an_error(corpus):
    (corpus.root / corpus.files[-1].path).write_text("")
    with pytest.raises(OSError, match="bytes when it was listed"):
        corpus.stream()


def expected_epoch(loader: Any, number: int) -> list[bytes]:
    """All windows of an epoch, from its documents laid end to end in memory."""
    epoch = loader.epoch(number)
    stream = b"".join(loader.corpus.read(i, 0, int(loader.corpus.lengths[i])) for i in epoch.order)
    starts = [epoch.offset + int(window) * LENGTH for window in epoch.windows]
    assert max(starts) + LENGTH + 1 <= len(stream)
    return [stream[start : start + LENGTH + 1] for start in starts]


def test_windows_are_those_of_the_epoch_laid_out_in_memory(corpus):
    loader = lm_data.Loader(corpus, 3, 4, LENGTH)
    count = loader.windows_per_epoch
    found = [loader.window(number).tobytes() for number in range(3 * count)]
    assert found == [window for number in range(3) for window in expected_epoch(loader, number)]


def test_every_epoch_sees_its_bytes_once_in_another_order(corpus):
    loader = lm_data.Loader(corpus, 3, 4, LENGTH)
    epochs = [loader.epoch(number) for number in range(4)]
    for epoch in epochs:
        assert sorted(epoch.windows) == list(range(loader.windows_per_epoch))
        assert sorted(epoch.order) == list(range(12))
        assert 0 <= epoch.offset < LENGTH
    assert len({tuple(epoch.windows) for epoch in epochs}) == len({tuple(epoch.order) for epoch in epochs}) == 4


def test_a_batch_depends_on_seed_and_step_alone(corpus):
    first, later = (lm_data.Loader(corpus, 3, 4, LENGTH) for _ in range(2))
    batches = [first.rows(step) for step in range(40)]  # over several epochs
    for step in (39, 17, 0, 38):  # in any order, as after a resume
        np.testing.assert_array_equal(later.rows(step), batches[step])
    assert batches[0].shape == (4, LENGTH + 1)
    assert batches[0].dtype == np.int32
    assert any((lm_data.Loader(corpus, 4, 4, LENGTH).rows(step) != batches[step]).any() for step in range(3))
    np.testing.assert_array_equal(first.rows(5, 1, 3), batches[5][1:3])


@pytest.mark.parametrize("parts", [1, 2])
def test_devices_get_their_rows_of_the_batch(corpus, parts):
    loader = lm_data.Loader(corpus, 0, 8, LENGTH)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    batch = loader.batch(7, NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), None)), parts)
    assert batch.shape == (parts, 8 // parts, LENGTH + 1)
    np.testing.assert_array_equal(np.asarray(batch).reshape(8, -1), loader.rows(7))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(parts, 2 // parts, LENGTH + 1)}


def test_too_few_bytes_are_an_error(corpus):
    with pytest.raises(ValueError, match="bytes are too few for windows of 100000"):
        lm_data.Loader(corpus, 0, 1, 100_000)


@pytest.mark.parametrize("count", [None, 3])
def test_held_out_windows_predict_each_byte_once(count):
    stream = np.arange(43, dtype=np.uint8)
    tokens, places = lm_data.held_out_windows(stream, 5, count)
    assert tokens.shape == (len(places), 6)
    np.testing.assert_array_equal(tokens[:, 1:], places)
    np.testing.assert_array_equal(tokens[:, :-1], places - 1)
    if count is None:
        assert places.ravel().tolist() == list(range(1, 41))  # the last two bytes are no whole window
    else:
        assert places[:, 0].tolist() == [1, 21, 36]
