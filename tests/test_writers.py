import ast
import copy
import importlib.util
import inspect
import logging as std_logging
import os
import pathlib
import subprocess
import sys
import threading
import time
import types

import event_files
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from absl import logging
from tensorboardX import record_writer
from tensorboardX.proto.summary_pb2 import SummaryMetadata

from flax_surgery_hooks import writers
from flax_surgery_hooks.errors import StepError, SurgeryError
from flax_surgery_hooks.writers import (
    AsyncWriter,
    EventFileWriter,
    LoggingWriter,
    MetricWriter,
    MultiWriter,
    WriterError,
    create_default_writer,
)

ROOT = pathlib.Path(__file__).parents[1]
OURS = [MetricWriter, EventFileWriter, LoggingWriter, MultiWriter, AsyncWriter]

# One call of every method that writes, as a caller of CLU's interface may spell it.
CALLS = {
    "write_summaries": ((1, {"a": np.arange(3)}, {"a": b""}), {}),
    "write_scalars": ((2, {"loss": 0.5}), {}),
    "write_images": ((3, {"a": np.zeros((1, 2, 2, 3), np.uint8)}), {}),
    "write_videos": ((4, {"a": np.zeros((1, 5, 2, 2, 3), np.uint8)}), {}),
    "write_audios": ((5, {"a": np.zeros((1, 4, 1), np.float32)}), {"sample_rate": 8000}),
    "write_texts": ((6, {"note": "grown\nby two"}), {}),
    "write_histograms": ((7, {"w": np.arange(4.0)}, {"w": 2}), {}),
    "write_hparams": (({"lr": 0.1},), {}),
}


class Recorder:
    """A writer that keeps its calls, and the thread of each; `fail` maps a method to what it raises."""

    def __init__(self, fail=None):
        self.calls = []
        self.threads = set()
        self.fail = fail or {}

    def _record(self, method, args, kwargs):
        self.threads.add(threading.get_ident())
        self.calls.append((method, args, kwargs))
        if method in self.fail:
            raise self.fail[method]

    @property
    def methods(self):
        return [method for method, _, _ in self.calls]


for _name in (*CALLS, "flush", "close"):
    setattr(Recorder, _name, lambda self, *args, _name=_name, **kwargs: self._record(_name, args, kwargs))


@pytest.fixture
def log():
    """The lines that absl logs at INFO and above."""
    lines = []
    handler = std_logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_logger().addHandler(handler)
    yield lines
    logging.get_absl_logger().removeHandler(handler)
    logging.set_verbosity(verbosity)


def run_python(code, *args):
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


def test_every_writer_has_the_methods_and_parameters_of_clus_interface():
    # Read, not imported: the package of CLU's interface imports TensorFlow.
    folder = importlib.util.find_spec("clu").submodule_search_locations[0]
    tree = ast.parse((pathlib.Path(folder) / "metric_writers" / "interface.py").read_text())
    [interface] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "MetricWriter"]
    methods = [node for node in interface.body if isinstance(node, ast.FunctionDef)]
    clus = {
        node.name: (
            [arg.arg for arg in node.args.args],
            len(node.args.defaults),
            [arg.arg for arg in node.args.kwonlyargs],
        )
        for node in methods
    }
    assert set(clus) == {*CALLS, "flush", "close"}
    for cls in OURS:
        ours = {}
        for name in clus:
            parameters = inspect.signature(getattr(cls, name)).parameters.values()
            positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
            keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
            optional = [p for p in positional if p.default is not p.empty]
            ours[name] = ([p.name for p in positional], len(optional), keywords)
        assert ours == clus, cls
        assert {name for name in vars(cls) if name.startswith("write_")} == set(CALLS), cls


def test_the_protocol_tells_writers_from_others(tmp_path):
    for writer in (EventFileWriter(tmp_path), LoggingWriter(), MultiWriter([]), AsyncWriter(Recorder()), Recorder()):
        assert isinstance(writer, MetricWriter)
    assert not isinstance(types.SimpleNamespace(write_scalars=print, flush=print), MetricWriter)


def test_importing_the_module_imports_nothing_optional():
    code = (
        "import sys, flax_surgery_hooks.writers\n"
        "print([name for name in ('tensorflow', 'tensorboard', 'tensorboardX', 'torch', 'clu.metric_writers')"
        " if name in sys.modules], 'flax_surgery_hooks.writers' in sys.modules)"
    )
    assert run_python(code).strip() == "[] True"


def test_scalars_come_back_with_their_tags_and_steps(tmp_path):
    scalars = {
        "float": 0.1,
        "int": 7,
        "bool": True,
        "numpy": np.float32(-2.5),
        "numpy/0d": np.array(3.0),
        "one element": np.array([[4.0]]),
        "jax/0d": jnp.float32(0.25),
        "bfloat16": jnp.bfloat16(1.5),
        "int32": jnp.int32(-3),
        "decoder/layers/kernel[3] ü": 1e-30,
        "too large": 1e300,
        "inf": -jnp.inf,
    }
    writer = EventFileWriter(tmp_path)
    writer.write_scalars(3, scalars)
    writer.write_scalars(np.int64(2**40), {"float": jnp.nan})
    writer.close()

    read = event_files.read_scalars(tmp_path)
    [(step, first), (last_step, nan)] = read.pop("float")
    assert (step, first, last_step) == (3, np.float32(0.1), 2**40)
    assert np.isnan(nan)
    assert read == {
        "int": [(3, 7.0)],
        "bool": [(3, 1.0)],
        "numpy": [(3, -2.5)],
        "numpy/0d": [(3, 3.0)],
        "one element": [(3, 4.0)],
        "jax/0d": [(3, 0.25)],
        "bfloat16": [(3, 1.5)],
        "int32": [(3, -3.0)],
        "decoder/layers/kernel[3] ü": [(3, np.float32(1e-30))],
        "too large": [(3, np.inf)],
        "inf": [(3, -np.inf)],
    }


def test_events_are_dated_and_the_file_says_its_version(tmp_path):
    before = time.time()
    writer = EventFileWriter(tmp_path)
    writer.write_scalars(1, {"loss": 0.5})
    writer.close()
    version, event = event_files.read_events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert before <= event.wall_time <= time.time()


def test_the_directory_is_made(tmp_path):
    logdir = tmp_path / "runs" / "first"
    EventFileWriter(logdir).close()
    assert [path.name.startswith("events.out.tfevents.") for path in logdir.iterdir()] == [True]


def test_two_writers_of_one_directory_keep_each_others_metrics(tmp_path):
    first, second = EventFileWriter(tmp_path), EventFileWriter(os.fspath(tmp_path))
    first.write_scalars(1, {"a": 1.0})
    second.write_scalars(2, {"a": 2.0})
    first.close()
    second.close()
    assert sorted(event_files.read_scalars(tmp_path)["a"]) == [(1, 1.0), (2, 2.0)]


def test_flush_puts_on_disk_what_was_written(tmp_path):
    writer = EventFileWriter(tmp_path)
    writer.write_scalars(1, {"loss": 0.5})
    assert event_files.read_scalars(tmp_path) == {}
    writer.flush()
    assert event_files.read_scalars(tmp_path) == {"loss": [(1, 0.5)]}


def test_a_write_flushes_when_the_last_flush_is_long_ago(tmp_path):
    writer = EventFileWriter(tmp_path, flush_secs=0.0)
    writer.write_scalars(1, {"loss": 0.5})
    assert event_files.read_scalars(tmp_path) == {"loss": [(1, 0.5)]}


def test_a_second_close_and_a_late_flush_do_nothing(tmp_path):
    writer = EventFileWriter(tmp_path)
    writer.write_scalars(1, {"loss": 0.5})
    for call in (writer.close, writer.close, writer.flush):
        call()
    assert event_files.read_scalars(tmp_path) == {"loss": [(1, 0.5)]}


def test_an_address_is_left_to_tensorboardx(tmp_path, monkeypatch):
    opened = []

    class Factory:
        def open(self, path):
            opened.append(path)
            return open(tmp_path / path.rsplit("/", 1)[1], "wb")

    monkeypatch.setitem(record_writer.REGISTERED_FACTORIES, "memory", Factory())
    monkeypatch.chdir(tmp_path)
    EventFileWriter("memory://bucket/run").close()
    assert [path.startswith("memory://bucket/run/events.out.tfevents.") for path in opened] == [True]
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_a_script_that_never_closes_keeps_its_metrics_and_its_atexit_functions_may_write(tmp_path):
    code = """
import atexit, sys
sys.modules["tensorflow"] = None  # were it installed, its writer is not what is tested here
from flax_surgery_hooks.writers import create_default_writer
writers = {name: create_default_writer(f"{sys.argv[1]}/{name}") for name in ("left", "closed")}
@atexit.register
def late():
    for writer in writers.values():
        writer.write_scalars(99, {"loss": 99.0})
        writer.flush()
    writers["closed"].close()
for step in range(50):
    for writer in writers.values():
        writer.write_scalars(step, {"loss": step})
"""
    run_python(code, tmp_path)
    for name in ("left", "closed"):
        losses = event_files.read_scalars(tmp_path / name)["loss"]
        assert losses == [(step, float(step)) for step in (*range(50), 99)]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_come_back(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 5, channels), np.uint8)
    writer = EventFileWriter(tmp_path)
    writer.write_images(3, {"batch": jnp.asarray(images), "one": images[1]})
    writer.write_images(4, {"batch": images[:1]})
    writer.close()
    read = event_files.read_images(tmp_path)
    assert [step for step, _ in read["batch"]] == [3, 4]
    np.testing.assert_array_equal(read["batch"][0][1], images)
    np.testing.assert_array_equal(read["batch"][1][1], images[:1])
    [(step, one)] = read["one"]
    assert step == 3
    np.testing.assert_array_equal(one, images[1:])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_float_images_are_scaled_and_clipped(tmp_path, dtype):
    image = np.array([0.0, 0.5, 0.999, 1.0, -3.0, 2.0, 1e30, np.nan]).astype(dtype)[None, :, None]
    writer = EventFileWriter(tmp_path)
    writer.write_images(0, {"mask": image})
    writer.close()
    [(_, read)] = event_files.read_images(tmp_path)["mask"]
    assert read.ravel().tolist() == [0, 127, 255, 255, 0, 255, 255, 0]


def test_every_multiple_of_1_255_is_its_own_gray(tmp_path):
    image = (np.arange(256, dtype=np.float32) / 255).reshape(16, 16, 1)
    writer = EventFileWriter(tmp_path)
    writer.write_images(0, {"ramp": image})
    writer.close()
    [(_, read)] = event_files.read_images(tmp_path)["ramp"]
    assert read.ravel().tolist() == list(range(256))


def test_audios_come_back(tmp_path):
    sounds = np.array([[[0.0, 0.5], [-0.25, 1.0]], [[-1.0, 2.0], [0.7 * 2**-15, -5.0]]], np.float32)
    writer = EventFileWriter(tmp_path)
    writer.write_audios(3, {"hum": jnp.asarray(sounds)}, sample_rate=8000)
    writer.close()
    [(step, [(rate, first), (_, second)])] = event_files.read_audios(tmp_path)["hum"]
    assert (step, rate) == (3, 8000)
    assert first.tolist() == [[0, 2**14], [-(2**13), 2**15 - 1]]
    assert second.tolist() == [[-(2**15), 2**15 - 1], [1, -(2**15)]]
    [(_, value)] = event_files.read_values(tmp_path)["hum"]
    assert value.metadata.plugin_data.content == b"\x10\x0b"  # encoding WAV; else TensorBoard offers a download


def test_texts_come_back(tmp_path):
    writer = EventFileWriter(tmp_path)
    writer.write_texts(3, {"note": "**grew** to 128 units, ü", "other": ""})
    writer.close()
    assert event_files.read_texts(tmp_path) == {"note": [(3, "**grew** to 128 units, ü")], "other": [(3, "")]}


def test_histograms_come_back(tmp_path):
    values = np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32)
    writer = EventFileWriter(tmp_path)
    writer.write_histograms(3, {"w": jnp.asarray(values), "v": values, "u": values}, {"w": 7, "u": None})
    writer.write_histograms(4, {"w": values})
    writer.close()
    read = event_files.read_histograms(tmp_path)
    [(step, rows), (later, default)] = read["w"]
    assert (step, later) == (3, 4)
    counts, edges = np.histogram(values.astype(np.float64), 7)
    assert rows[:, 2].tolist() == counts.tolist()
    np.testing.assert_allclose(rows[:, 0], edges[:-1], rtol=1e-12)
    np.testing.assert_allclose(rows[:, 1], edges[1:], rtol=1e-12)
    assert (rows[0, 0], rows[-1, 1]) == (values.min(), values.max())
    assert len(default) == len(read["v"][0][1]) == len(read["u"][0][1]) == 30


@pytest.mark.parametrize(
    ("values", "limits", "counts"),
    [
        ([2.0, 2.0, 2.0], [2.0, 2.0], [0, 3]),
        ([], [0.0, 0.0], [0, 0]),
        ([1.0, np.nextafter(1.0, 2.0)], [1.0, np.nextafter(1.0, 2.0)], [1, 1]),
        ([-1e308, 1e308], [1e308], [2]),
        ([0.0, 5e-324], [5e-324], [2]),
        ([True, False, True], [0.5, 1.0], [1, 2]),
        (np.array([-3, 5], np.int8), [1.0, 5.0], [1, 1]),
        (np.array([0.0, 1.0], jnp.bfloat16), [0.5, 1.0], [1, 1]),
    ],
)
def test_histograms_of_awkward_values(tmp_path, values, limits, counts):
    writer = EventFileWriter(tmp_path)
    writer.write_histograms(0, {"w": np.asarray(values)}, {"w": 2})
    writer.close()
    [(_, rows)] = event_files.read_histograms(tmp_path)["w"]
    assert (rows[:, 1].tolist(), rows[:, 2].tolist()) == (limits, counts)


def test_histograms_leave_out_what_is_not_finite_and_say_so(tmp_path, log):
    writer = EventFileWriter(tmp_path)
    writer.write_histograms(3, {"w": np.array([[1.0, np.nan], [np.inf, 2.0]])}, {"w": 1})
    writer.close()
    [(_, rows)] = event_files.read_histograms(tmp_path)["w"]
    assert rows.tolist() == [[1.0, 2.0, 2.0]]
    assert log == ["[3] Histogram w leaves out 2 non-finite of 4."]


def test_hparams_come_back_in_this_run(tmp_path):
    config = ml_collections.ConfigDict({"lr": 0.1, "model": {"width": 64, "bias": True, "name": "mlp"}})
    config.betas = (np.float32(0.5), jnp.float32(0.25))
    config.warmup = None
    config.dtype = jnp.float32
    writer = EventFileWriter(tmp_path)
    writer.write_hparams(config)
    writer.close()
    assert event_files.read_hparams(tmp_path) == {
        "lr": 0.1,
        "model.width": 64.0,
        "model.bias": True,
        "model.name": "mlp",
        "betas.0": 0.5,
        "betas.1": 0.25,
        "warmup": "",
        "dtype": str(jnp.float32),
    }
    assert all(path.is_file() for path in tmp_path.iterdir())


def test_runs_with_equal_hparams_are_one_group_as_with_tensorflow(tmp_path):
    for name, hparams in (("a", {"lr": 0.1, "seed": 1}), ("b", {"seed": 1, "lr": 0.1}), ("c", {"lr": 0.2})):
        writer = EventFileWriter(tmp_path / name)
        writer.write_hparams(hparams)
        writer.close()
    groups = [event_files.read_session_starts(tmp_path / name)[0][1].group_name for name in "abc"]
    assert groups[0] == groups[1] != groups[2]
    # What TensorFlow 2.21 wrote for {"lr": 0.2}.
    assert groups[2] == "d719c908f8bd139b3041a66deb271f79a9029ea6ff3edad705cb722cb61e22fe"


@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        (np.float32, 1),
        (np.float64, 2),
        (np.int32, 3),
        (np.uint8, 4),
        (np.complex64, 8),
        (np.int64, 9),
        (np.bool_, 10),
        (jnp.bfloat16, 14),
        (np.float16, 19),
        (np.uint32, 22),
        (np.uint64, 23),
    ],
)
def test_raw_tensors_come_back(tmp_path, dtype, number):
    tensor = np.array([[1, 0, 3], [4, 5, 6]]).astype(dtype)
    writer = EventFileWriter(tmp_path)
    writer.write_summaries(3, {"a": tensor, "b": np.asarray(tensor, tensor.dtype.newbyteorder(">"))})
    writer.close()
    read = event_files.read_tensors(tmp_path, dtype)
    for tag in ("a", "b"):
        [(step, array)] = read[tag]
        assert step == 3
        np.testing.assert_array_equal(array, tensor)
        [(_, value)] = event_files.read_values(tmp_path)[tag]
        assert value.tensor.dtype == number
        assert not value.HasField("metadata")


def test_raw_strings_come_back(tmp_path):
    writer = EventFileWriter(tmp_path)
    writer.write_summaries(0, {"text": np.array(["ü", "b"]), "bytes": np.array(b"raw")})
    writer.close()
    values = event_files.read_values(tmp_path)
    [(_, text)], [(_, raw)] = values["text"], values["bytes"]
    assert (list(text.tensor.string_val), [dim.size for dim in text.tensor.tensor_shape.dim]) == (
        [b"\xc3\xbc", b"b"],
        [2],
    )
    assert (list(raw.tensor.string_val), list(raw.tensor.tensor_shape.dim), raw.tensor.dtype) == ([b"raw"], [], 7)


def test_metadata_of_raw_tensors_comes_back_from_proto_and_bytes(tmp_path):
    metadata = SummaryMetadata(plugin_data={"plugin_name": "mine", "content": b"\x01"})
    newer = metadata.SerializeToString() + b"\x20\x03"  # data_class, a field that tensorboardX's copy lacks
    writer = EventFileWriter(tmp_path)
    writer.write_summaries(0, {"a": np.ones(1), "b": np.ones(1), "c": np.ones(1)}, {"a": metadata, "b": newer})
    writer.close()
    read = {tag: value.metadata.SerializeToString() for tag, [(_, value)] in event_files.read_values(tmp_path).items()}
    assert read == {"a": metadata.SerializeToString(), "b": newer, "c": b""}


def test_videos_are_dropped_with_one_warning_per_writer(tmp_path, log):
    video = np.zeros((2, 4, 4, 3), np.uint8)
    for name in ("first", "second"):
        writer = EventFileWriter(tmp_path / name)
        writer.write_videos(3, {"walk": video, "run": video})
        writer.write_videos(4, {"walk": video})
        writer.close()
        assert event_files.read_values(tmp_path / name) == {}
    assert log == ["[3] Event files hold no videos; dropped: walk, run."] * 2


def donated():
    array = jnp.ones(3)
    array.delete()
    return array


WRONG = {
    "scalar of many": ("write_scalars", (3, {"w": np.ones((2, 3))}), {}, "one number", "ndarray float64[2, 3]"),
    "complex scalar": ("write_scalars", (3, {"w": 1j}), {}, "only real numbers", "ndarray complex128[]"),
    "text for a scalar": ("write_scalars", (3, {"w": "0.5"}), {}, "only real numbers", "ndarray <U3[]"),
    "key": ("write_scalars", (3, {"w": jax.random.key(0)}), {}, "no numbers", "PRNGKey"),
    "donated": ("write_histograms", (3, {"w": donated()}), {}, "no numbers", "deleted"),
    "ragged": ("write_summaries", (3, {"w": [[1.0], [2.0, 3.0]]}), {}, "no numbers", "inhomogeneous"),
    "flat image": ("write_images", (3, {"w": np.ones((4, 4))}), {}, "images must be", "ndarray float64[4, 4]"),
    "five channels": ("write_images", (3, {"w": np.ones((4, 4, 5))}), {}, "images must be", "[4, 4, 5]"),
    "no pixels": ("write_images", (3, {"w": np.ones((0, 4, 3))}), {}, "images must be", "[0, 4, 3]"),
    "image of ints": ("write_images", (3, {"w": np.ones((4, 4, 3), np.int32)}), {}, "images must be", "int32"),
    "flat audio": ("write_audios", (3, {"w": np.ones((9, 1))}), {"sample_rate": 8}, "[N, T, C]", "float64[9, 1]"),
    "no channel": ("write_audios", (3, {"w": np.ones((1, 9, 0))}), {"sample_rate": 8}, "[N, T, C]", "[1, 9, 0]"),
    "audio of ints": ("write_audios", (3, {"w": np.ones((1, 9, 1), int)}), {"sample_rate": 8}, "floats", "int64"),
    "no rate": ("write_audios", (3, {"w": np.ones((1, 9, 1))}), {"sample_rate": 0}, "needs samples", "0"),
    "no text": ("write_texts", (3, {"w": b"bytes"}), {}, "must be a str", "b'bytes'"),
    "no buckets": ("write_histograms", (3, {"w": np.ones(3)}, {"w": 0}), {}, "needs a bucket", "0"),
    "unknown dtype": ("write_summaries", (3, {"w": np.ones(3, object)}), {}, "no such dtype", "object"),
    "float8": ("write_summaries", (3, {"w": np.ones(3, jnp.float8_e4m3fn)}), {}, "no such dtype", "float8_e4m3fn"),
    "no metadata": ("write_summaries", (3, {"w": np.ones(3)}, {"w": "mine"}), {}, "neither a SummaryMet", "'mine'"),
    "bad metadata": ("write_summaries", (3, {"w": np.ones(3)}, {"w": b"\xff"}), {}, "neither a SummaryMet", "xff"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_written_is_an_error_that_says_where(tmp_path, case):
    method, args, kwargs, problem, found = WRONG[case]
    writer = EventFileWriter(tmp_path)
    with pytest.raises(WriterError) as caught:
        getattr(writer, method)(*args, **kwargs)
    assert isinstance(caught.value, SurgeryError)
    assert problem in caught.value.problem
    assert found in str(caught.value)
    assert (caught.value.step, caught.value.path) == (3, None if case == "no rate" else "w")
    writer.close()
    assert event_files.read_values(tmp_path) == {}


@pytest.mark.parametrize("step", [3.0, "3", None])
def test_a_step_must_be_an_int(tmp_path, step):
    with pytest.raises(StepError, match="must be a Python int") as caught:
        EventFileWriter(tmp_path).write_scalars(step, {"loss": 0.5})
    assert caught.value.found == repr(step)


@pytest.mark.parametrize("where", ["file", "below"])
def test_a_directory_that_cannot_be_made_is_an_error(tmp_path, where):
    (tmp_path / "file").write_text("in the way")
    logdir = tmp_path / "file" / ("" if where == "file" else "below")
    with pytest.raises(WriterError, match="no event file can be written") as caught:
        EventFileWriter(logdir)
    assert isinstance(caught.value.__cause__, OSError)
    assert str(logdir) in str(caught.value)


@pytest.mark.parametrize("method", ["write", "flush", "close"])
def test_a_full_disk_is_an_error(tmp_path, monkeypatch, method):
    def full(self, *args):
        raise OSError(28, "No space left on device")

    writer = EventFileWriter(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(record_writer.RecordWriter, "write" if method == "write" else "flush", full)
        with pytest.raises(WriterError, match="No space left on device"):
            writer.write_scalars(1, {"loss": 0.5}) if method == "write" else getattr(writer, method)()


def test_writing_after_close_is_an_error(tmp_path):
    writer = EventFileWriter(tmp_path)
    writer.close()
    with pytest.raises(WriterError, match="is closed") as caught:
        writer.write_scalars(3, {"loss": 0.5})
    assert caught.value.step == 3


def test_a_missing_tensorboardx_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(WriterError, match="pip install tensorboardX"):
        EventFileWriter(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_log_gets_a_line_per_call(log):
    writer = LoggingWriter()
    for method, (args, kwargs) in CALLS.items():
        getattr(writer, method)(*args, **kwargs)
    writer.flush()
    writer.close()
    assert log == [
        "[1] summaries: a=int64[3]",
        "[2] loss=0.5",
        "[3] images: a=uint8[1, 2, 2, 3]",
        "[4] videos: a=uint8[1, 5, 2, 2, 3]",
        "[5] audios at 8000 Hz: a=float32[1, 4, 1]",
        "[6] texts: note='grown\\nby two'",
        "[7] histogram w: [0, 1.5) 2, [1.5, 3] 2",
        "[hparams] lr=0.1",
    ]


def test_scalars_in_the_log_are_sorted_and_short(log):
    scalars = {
        "b": 1 / 3,
        "a": 7,
        "d": np.float32(0.1),
        "c": jnp.float32(1e-9),
        "e": jnp.bfloat16(2.5),
        "f": np.ones(3),
    }
    LoggingWriter(collection="train").write_scalars(3, scalars)
    assert log == ["[3] collection=train a=7, b=0.333333, c=1e-09, d=0.1, e=2.5, f=float64[3]"]


def test_histograms_in_the_log(log):
    arrays = {"gap": [0.0, 9.0], "same": [2.0, 2.0], "nan": [np.nan, 1.0], "none": []}
    LoggingWriter().write_histograms(3, {name: np.array(values) for name, values in arrays.items()}, {"gap": 3})
    assert log == [
        "[3] histogram gap: [0, 3) 1, [6, 9] 1",
        "[3] histogram same: [2, 2] 2",
        "[3] histogram nan: [1, 1] 1, non-finite 1",
        "[3] histogram none: empty",
    ]


def test_a_histogram_of_no_numbers_in_the_log_is_an_error():
    with pytest.raises(WriterError, match="only real numbers") as caught:
        LoggingWriter().write_histograms(3, {"w": np.array(["a"])})
    assert (caught.value.step, caught.value.path) == (3, "w")


def spelled_out(calls):
    """Calls with arrays as lists, so that they compare."""
    return [jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), (args, kwargs)) for _, args, kwargs in calls]


EXPECTED = [(method, args, kwargs) for method, (args, kwargs) in CALLS.items()]


def test_several_writers_all_get_every_call():
    recorders = Recorder(), Recorder()
    writer = MultiWriter(recorders)
    for method, (args, kwargs) in CALLS.items():
        getattr(writer, method)(*args, **kwargs)
    writer.flush()
    writer.close()
    for recorder in recorders:
        assert recorder.methods == [*CALLS, "flush", "close"]
        assert spelled_out(recorder.calls[:-2]) == spelled_out(EXPECTED)


@pytest.mark.parametrize("method", [*CALLS, "flush", "close"])
def test_a_writer_that_fails_does_not_keep_the_call_from_the_others(method):
    first, last = OSError("first"), ValueError("last")
    recorders = Recorder({method: first}), Recorder(), Recorder({method: last})
    args, kwargs = CALLS.get(method, ((), {}))
    with pytest.raises(OSError, match="first") as caught:
        getattr(MultiWriter(recorders), method)(*args, **kwargs)
    assert [recorder.methods for recorder in recorders] == [[method]] * 3
    assert caught.value.__notes__ == ["Also failed, ValueError: last"]


def test_asynchronous_calls_are_made_in_order_on_one_other_thread():
    recorder = Recorder()
    writer = AsyncWriter(recorder)
    for step in range(300):
        writer.write_scalars(step, {"loss": step})
    writer.flush()
    assert [args for _, args, _ in recorder.calls[:-1]] == [(step, {"loss": step}) for step in range(300)]
    writer.write_texts(300, {"note": "more"})
    writer.close()
    writer.close()
    assert recorder.methods[-3:] == ["flush", "write_texts", "close"]


def test_writes_stay_on_one_thread_that_is_not_the_callers():
    recorder = Recorder()
    writer = AsyncWriter(recorder)
    for method, (args, kwargs) in CALLS.items():
        getattr(writer, method)(*args, **kwargs)
    writer.flush()
    assert len(recorder.threads) == 1
    assert threading.get_ident() not in recorder.threads
    assert recorder.methods == [*CALLS, "flush"]
    assert spelled_out(recorder.calls[:-1]) == spelled_out(EXPECTED)
    writer.close()


@pytest.mark.parametrize("method", CALLS)
def test_an_error_in_the_background_is_raised_by_the_next_call(method, log):
    original = ValueError("no room")
    recorder = Recorder({method: original})
    writer = AsyncWriter(recorder)
    args, kwargs = CALLS[method]
    getattr(writer, method)(*args, **kwargs)
    deadline = time.monotonic() + 30
    while not log and time.monotonic() < deadline:
        time.sleep(0.001)
    following = next(name for name in CALLS if name != method)
    with pytest.raises(WriterError, match=f"{method} failed in the background.*no room") as caught:
        getattr(writer, following)(*CALLS[following][0])
    assert caught.value.__cause__ is original
    assert caught.value.step == (None if method == "write_hparams" else args[0])
    assert log == [f"{method} failed in the background."]
    writer.close()  # said once
    assert recorder.methods == [method, following, "close"]


@pytest.mark.parametrize("ending", ["flush", "close"])
def test_an_error_in_the_background_is_raised_by_flush_and_close(ending, log):
    recorder = Recorder({"write_scalars": ValueError("no room"), ending: OSError("no disk")})
    writer = AsyncWriter(recorder)
    writer.write_scalars(3, {"loss": 0.5})
    with pytest.raises(WriterError, match="write_scalars failed in the background") as caught:
        getattr(writer, ending)()
    assert caught.value.step == 3
    assert "no disk" in caught.value.__notes__[0]
    assert recorder.methods == ["write_scalars", ending]
    assert log == ["write_scalars failed in the background.", f"{ending} failed in the background."]


def test_calls_wait_when_too_many_are_pending():
    started, go_on = threading.Event(), threading.Event()

    class Slow(Recorder):
        def write_scalars(self, step, scalars):
            started.set()
            assert go_on.wait(30)
            self._record("write_scalars", (step, scalars), {})

    recorder = Slow()
    writer = AsyncWriter(recorder, max_pending=3)
    for step in range(3):
        writer.write_scalars(step, {})
    assert started.wait(30)
    fourth = threading.Thread(target=writer.write_scalars, args=(3, {}))
    fourth.start()
    fourth.join(0.05)
    assert fourth.is_alive()
    go_on.set()
    fourth.join(30)
    assert not fourth.is_alive()
    writer.close()
    assert [args[0] for _, args, _ in recorder.calls[:-1]] == [0, 1, 2, 3]


def test_a_failing_call_makes_room_for_another():
    writer = AsyncWriter(Recorder({"write_scalars": ValueError("no")}), max_pending=1)
    raised = 0
    for step in range(5):
        try:
            writer.write_scalars(step, {})
        except WriterError:
            raised += 1
    with pytest.raises(WriterError):
        writer.close()
    assert raised


@pytest.mark.parametrize("method", CALLS)
def test_what_was_handed_over_may_be_overwritten_at_once(method):
    started, go_on = threading.Event(), threading.Event()
    recorder = Recorder()
    inner = types.SimpleNamespace(**{name: getattr(recorder, name) for name in (*CALLS, "flush", "close")})
    inner.flush = lambda: started.set() or go_on.wait(30)
    writer = AsyncWriter(inner)
    blocked = threading.Thread(target=writer.flush)
    blocked.start()
    assert started.wait(30)

    args, kwargs = copy.deepcopy(CALLS[method])
    if method == "write_hparams":
        args = ({"model": {"width": 64}},)
    getattr(writer, method)(*args, **kwargs)
    for leaf in jax.tree.leaves(args):
        if isinstance(leaf, np.ndarray):
            leaf[...] = 77
    for mapping in args:
        if isinstance(mapping, dict):
            for nested in [mapping, *mapping.values()]:
                if isinstance(nested, dict):
                    nested["new"] = nested.pop(next(iter(nested)))
    go_on.set()
    blocked.join(30)
    writer.close()
    expected = (({"model.width": 64},), {}) if method == "write_hparams" else CALLS[method]
    assert spelled_out(recorder.calls[:-1]) == spelled_out([(method, *expected)])


def test_writing_after_an_asynchronous_close_is_an_error():
    recorder = Recorder()
    writer = AsyncWriter(recorder)
    writer.close()
    writer.flush()
    with pytest.raises(WriterError, match="is closed") as caught:
        writer.write_scalars(3, {"loss": 0.5})
    assert caught.value.step == 3
    assert recorder.methods == ["close"]


def test_no_room_at_all_is_an_error():
    with pytest.raises(WriterError, match="max_pending=100") as caught:
        AsyncWriter(Recorder(), max_pending=0)
    assert caught.value.found == 0


@pytest.fixture
def no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)


@pytest.mark.usefixtures("no_tensorflow")
@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_default_writer_writes_to_the_log_and_to_an_event_file(tmp_path, log, asynchronous):
    writer = create_default_writer(tmp_path, asynchronous=asynchronous)
    writer.write_scalars(3, {"loss": 0.5})
    writer.close()
    assert log == ["[3] loss=0.5"]
    assert event_files.read_scalars(tmp_path) == {"loss": [(3, 0.5)]}


@pytest.mark.usefixtures("no_tensorflow")
def test_the_default_writer_raises_at_once_only_without_a_thread(tmp_path):
    wrong = (3, {"loss": np.ones(2)})
    with pytest.raises(WriterError, match="must be one number"):
        create_default_writer(tmp_path, asynchronous=False).write_scalars(*wrong)
    writer = create_default_writer(tmp_path)
    writer.write_scalars(*wrong)
    with pytest.raises(WriterError, match=r"failed in the background.*WriterError: .*must be one number") as caught:
        writer.flush()
    assert (caught.value.step, caught.value.path) == (3, "loss")


@pytest.mark.usefixtures("no_tensorflow")
def test_a_collection_is_a_directory_and_a_word_in_the_log(tmp_path, log):
    writer = create_default_writer(tmp_path, collection="eval")
    writer.write_scalars(3, {"loss": 0.5})
    writer.close()
    assert log == ["[3] collection=eval loss=0.5"]
    assert [path.name for path in tmp_path.iterdir()] == ["eval"]
    assert event_files.read_scalars(tmp_path / "eval") == {"loss": [(3, 0.5)]}


@pytest.mark.usefixtures("no_tensorflow")
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("just_logging", [True, False])
def test_the_default_writer_may_only_log(tmp_path, log, just_logging, asynchronous):
    logdir = tmp_path if just_logging else None
    writer = create_default_writer(logdir, just_logging=just_logging, asynchronous=asynchronous)
    writer.write_scalars(3, {"loss": 0.5})
    writer.close()
    assert log == ["[3] loss=0.5"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_tensorflow")
def test_the_default_writers_directory_must_be_writable(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WriterError, match="no event file can be written"):
        create_default_writer(tmp_path / "file")


def test_where_tensorflow_is_installed_clus_own_writer_is_returned(tmp_path, monkeypatch):
    asked, given = [], Recorder()
    clu = types.SimpleNamespace(create_default_writer=lambda *args, **kwargs: asked.append((args, kwargs)) or given)
    monkeypatch.setitem(sys.modules, "clu.metric_writers", clu)
    monkeypatch.setattr("clu.metric_writers", clu, raising=False)
    monkeypatch.setattr(writers, "_is_installed", lambda package: package in ("tensorflow", "tensorboard"))
    assert create_default_writer(tmp_path, just_logging=True, asynchronous=False, collection="eval") is given
    assert asked == [((tmp_path,), {"just_logging": True, "asynchronous": False, "collection": "eval"})]


@pytest.mark.parametrize("missing", ["tensorflow", "tensorboard"])
def test_tensorflow_without_tensorboard_is_not_enough(monkeypatch, log, missing):
    monkeypatch.setitem(sys.modules, "clu.metric_writers", None)
    monkeypatch.setattr(writers, "_is_installed", lambda package: package != missing)
    assert isinstance(create_default_writer(), MultiWriter)
    assert log == []


def test_a_broken_tensorflow_is_done_without_and_logged(monkeypatch, log):
    monkeypatch.setitem(sys.modules, "clu.metric_writers", None)
    monkeypatch.delattr("clu.metric_writers", raising=False)
    monkeypatch.setattr(writers, "_is_installed", lambda package: True)
    assert isinstance(create_default_writer(), MultiWriter)
    [line] = log
    assert "metrics are written without TensorFlow" in line


def test_a_folder_of_logs_is_not_a_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "logs_of_mine").mkdir()
    (tmp_path / "package_of_mine").mkdir()
    (tmp_path / "package_of_mine" / "__init__.py").write_text("raise ImportError('imported')")
    found = {name: writers._is_installed(f"{name}_of_mine") for name in ("logs", "package", "nothing")}
    assert found == {"logs": False, "package": True, "nothing": False}
    assert "package_of_mine" not in sys.modules


def test_the_reader_of_these_tests_notices_damage(tmp_path):
    writer = EventFileWriter(tmp_path)
    writer.write_scalars(3, {"loss": 0.5})
    writer.close()
    [path] = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        event_files.read_scalars(tmp_path)
