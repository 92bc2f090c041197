"""The same metrics through CLU's own writers and through ours, read back by TensorBoard's own reader.

Runs where the extra `tensorflow` is installed. The folder is not named after the package: pytest puts its parent on the
path, where a folder `tensorflow` would pass for the package wherever it is not installed.
"""

import contextlib
import logging as std_logging
import os
import pathlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from absl import logging

import flax_surgery_hooks as fsh
from flax_surgery_hooks import writers

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read once, at the import: no word on which CPU or GPU is there
NEEDED = "the extra `tensorflow` is not installed"
tf = pytest.importorskip("tensorflow", reason=NEEDED)
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator", reason=NEEDED)
event_file_loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader", reason=NEEDED)
hparams_pb2 = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2", reason=NEEDED)
tensor_util = pytest.importorskip("tensorboard.util.tensor_util", reason=NEEDED)
clu_writers = pytest.importorskip("clu.metric_writers", reason=NEEDED)

Make = Callable[[Any], Any]
THEIRS: dict[str, Make] = {
    "SummaryWriter": lambda logdir: clu_writers.SummaryWriter(str(logdir)),
    "AsyncMultiWriter": lambda logdir: clu_writers.AsyncMultiWriter([clu_writers.SummaryWriter(str(logdir))]),
    "create_default_writer": clu_writers.create_default_writer,
    "create_default_writer, synchronous": lambda logdir: clu_writers.create_default_writer(logdir, asynchronous=False),
    "fsh.metrics.create_default_writer": fsh.metrics.create_default_writer,
}
OURS: dict[str, Make] = {
    "EventFileWriter": writers.EventFileWriter,
    "AsyncWriter": lambda logdir: writers.AsyncWriter(writers.EventFileWriter(logdir)),
    # What `create_default_writer` makes without TensorFlow.
    "MultiWriter": lambda logdir: writers.MultiWriter(
        [writers.AsyncWriter(one) for one in (writers.LoggingWriter(), writers.EventFileWriter(logdir))]
    ),
}


class Written(NamedTuple):
    """One value as TensorBoard reads it, once its reader has brought older layouts to the present one.

    Attributes:
      step: where it was written.
      plugin: the dashboard that shows it.
      name: under which it is shown.
      content: what the dashboard is told, times of the clock left out.
      data_class: TensorBoard's number for a scalar, a tensor or files.
      array: the numbers or strings; images and sounds decoded, as many files say the same.
    """

    step: int
    plugin: str
    name: str
    content: Any
    data_class: int
    array: np.ndarray


def read(logdir: pathlib.Path) -> dict[str, list[Written]]:
    """Everything in the event files of a directory by tag, in order."""
    found = defaultdict(list)
    for path in sorted(logdir.glob("*tfevents*")):
        for event in event_file_loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found[value.tag].append(written(event.step, value))
    return dict(found)


def written(step: int, value: Any) -> Written:
    plugin = value.metadata.plugin_data
    content, array = plugin.content, tensor_util.make_ndarray(value.tensor)
    if plugin.plugin_name == "hparams":
        content = hparams_pb2.HParamsPluginData.FromString(content)
        assert content.session_start_info.start_time_secs > 0
        content.session_start_info.ClearField("start_time_secs")
    elif plugin.plugin_name == "images":
        width, height, *pictures = array
        array = np.stack([tf.io.decode_png(picture).numpy() for picture in pictures])
        assert array.shape[1:3] == (int(height), int(width))
    elif plugin.plugin_name == "audio":
        array = np.stack([tf.audio.decode_wav(sound).audio.numpy() for sound in array])  # the reader drops the labels
    # A name left out is the tag.
    name = value.metadata.display_name or value.tag
    return Written(step, plugin.plugin_name, name, content, value.metadata.data_class, array)


def assert_same(theirs: dict[str, list[Written]], ours: dict[str, list[Written]]) -> None:
    """Tag by tag, value by value: steps, plugins and what they are told, dtypes, shapes and numbers."""
    assert theirs
    assert sorted(theirs) == sorted(ours)
    for tag in theirs:
        assert [one[:-1] for one in theirs[tag]] == [one[:-1] for one in ours[tag]]
        for their, our in zip(theirs[tag], ours[tag], strict=True):
            assert (tag, their.array.dtype, their.array.shape) == (tag, our.array.dtype, our.array.shape)
            if their.plugin == "histograms":
                assert our.array[:, 2].tolist() == their.array[:, 2].tolist(), tag
                # TensorFlow and NumPy space the edges with their own roundings.
                np.testing.assert_allclose(our.array[:, :2], their.array[:, :2], rtol=1e-12, atol=1e-300)
            else:
                np.testing.assert_array_equal(our.array, their.array, err_msg=tag)


def content_of(make: Make, logdir: pathlib.Path, write: Callable[[Any], None]) -> dict[str, list[Written]]:
    writer = make(logdir)
    write(writer)
    writer.flush()
    writer.close()
    return read(logdir)


NORMAL = np.random.default_rng(0).normal(size=(20, 50))
LEVELS = np.random.default_rng(1).integers(-7, 8, size=1_000)
CONFIG = ml_collections.ConfigDict(
    {"lr": 0.1, "steps": 700, "layer": {"bias": True, "name": "conv"}, "betas": (0.9, 0.5), "warmup": None}
)
NOT_FOR_CLUS_LOG = "histograms at which CLU's LoggingWriter, thus its default writer, fails or warns"
CALLS: dict[str, Callable[[Any], None]] = {
    "scalars": lambda w: w.write_scalars(
        3, {"float": 0.1, "int": 7, "float32": np.float32(0.1), "jax": jnp.float32(0.3), "bf16": jnp.bfloat16(0.3)}
    ),
    "awkward scalars": lambda w: w.write_scalars(
        0, {"nan": np.nan, "inf": -np.inf, "bool": np.bool_(True), "large": 1e30, "jax int": jnp.int32(7)}
    ),
    "awkward tags": lambda w: w.write_scalars(2**40, {"a/b c[3]": 1.0, "ä/**": 2.0, "/lead": 3.0, "trail/": 4.0}),
    "several steps": lambda w: [w.write_scalars(step, {"up": step / 7, "down": -step}) for step in (1, 5, 3, 5)],
    "texts": lambda w: w.write_texts(3, {"t": "one **bold**", "table": "|a|b|\n|-|-|\n|ä|`*`|", "empty": ""}),
    "histograms": lambda w: w.write_histograms(
        4,
        {"w": NORMAL, "w/float32": np.float32(NORMAL), "w/jax": jnp.asarray(NORMAL), "seven": NORMAL, "one": NORMAL},
        {"seven": 7, "w": None, "one": 1},
    ),
    "awkward histograms": lambda w: w.write_histograms(
        4,
        {
            "same": np.full(5, 2.0),
            "same float32": np.full(5, 0.1, np.float32),
            "zeros": np.zeros((3, 4)),
            "empty": np.zeros((0, 3)),
            "scalar": np.float32(3.0),
            "int8": LEVELS.astype(np.int8),
            "levels": LEVELS / 7,
            "levels float32": (LEVELS / 7).astype(np.float32),
            "w/bf16": jnp.asarray(NORMAL, jnp.bfloat16),
            "outliers": np.array([1e-3] * 40 + [1e6]),
            "outer ones empty": np.array([-1e9, 0.25, 0.5, 3.0]),
            "tiny": NORMAL * 1e-40,
            "many": np.repeat(NORMAL.ravel(), 200),
        },
        {"outer ones empty": 3},
    ),
    NOT_FOR_CLUS_LOG: lambda w: w.write_histograms(
        4, {"adjacent": np.array([1.0, np.nextafter(1.0, 2.0)]), "flags": np.array([True, False, True])}
    ),
    "hparams": lambda w: w.write_hparams(CONFIG),
    "plain hparams": lambda w: w.write_hparams({"lr": 1e-3, "name": "a", "on": False, "n": 3}),
    "images": lambda w: w.write_images(
        5,
        {
            "batch": np.linspace(-0.1, 1.1, 2 * 4 * 5 * 3, dtype=np.float32).reshape(2, 4, 5, 3),
            "one": np.arange(20, dtype=np.uint8).reshape(4, 5, 1),
            "alpha": np.linspace(0, 1, 80, dtype=np.float32).reshape(4, 5, 4),
        },
    ),
    "audios": lambda w: w.write_audios(
        6, {"sound": np.sin(np.linspace(0, 9, 200, dtype=np.float32)).reshape(2, 50, 2)}, sample_rate=8_000
    ),
    "videos": lambda w: [w.write_videos(6, {"dropped": np.zeros((1, 2, 4, 5, 3))}), w.write_scalars(6, {"kept": 1.0})],
    "summaries": lambda w: w.write_summaries(
        7,
        {"raw": NORMAL.astype(np.float32), "raw/int64": LEVELS, "raw/bool": LEVELS > 0, "raw/half": np.float16(NORMAL)},
        {"raw/int64": tf.compat.v1.SummaryMetadata(plugin_data={"plugin_name": "mine", "content": b"\x01"})},
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_writes_the_same(tmp_path, call):
    theirs = content_of(THEIRS["SummaryWriter"], tmp_path / "theirs", CALLS[call])
    assert_same(theirs, content_of(OURS["EventFileWriter"], tmp_path / "ours", CALLS[call]))


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, list[Written]]:
    """All calls through CLU's writer, one event file."""
    return content_of(THEIRS["SummaryWriter"], tmp_path_factory.mktemp("reference"), all_calls)


def all_calls(writer: Any) -> None:
    for name, call in CALLS.items():
        if name != NOT_FOR_CLUS_LOG:
            call(writer)


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in (THEIRS | OURS).items()])
def test_each_writer_writes_the_same(tmp_path, reference, make):
    assert_same(reference, content_of(make, tmp_path, all_calls))


def test_tensorboard_itself_lists_the_same(tmp_path):
    """What its dashboards ask for: tags by kind and by plugin."""
    listed = []
    for name, make in (("theirs", THEIRS["SummaryWriter"]), ("ours", OURS["EventFileWriter"])):
        content_of(make, tmp_path / name, all_calls)
        events = event_accumulator.EventAccumulator(str(tmp_path / name))
        events.Reload()
        plugins = ("scalars", "histograms", "text", "images", "audio", "hparams", "mine")
        tags = {kind: sorted(tags) if isinstance(tags, list) else tags for kind, tags in events.Tags().items()}
        listed.append((tags, {plugin: sorted(events.PluginTagToContent(plugin)) for plugin in plugins}))
    assert listed[0] == listed[1]
    assert listed[0][1]["histograms"]


# Hooks


class Model(nn.Module):
    """Two layers."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(4)(x)))


def make_hooks(writer: Any) -> fsh.SurgeryHooks:
    """The hooks under test: whatever a fire writes is compared, tag by tag."""
    hooks = fsh.SurgeryHooks(seed=0, writer=writer, on_error="skip")
    hooks.add("norm", fsh.surgeries.Normalize(), params="Dense_0/kernel", when=fsh.every(2), histograms=True)
    hooks.add("noise", fsh.surgeries.Noise(0.1), params="Dense_*/kernel", when=fsh.every(3))
    hooks.add(
        "reinit",
        fsh.surgeries.Reinit(initializer=nn.initializers.ones),
        params="**/bias",
        when=fsh.at(4),
        histograms=True,
    )
    hooks.add("refused", lambda kernel: kernel * jnp.nan, params="Dense_1/kernel", when=fsh.at(5), histograms=True)
    return hooks


def run(writer: Any) -> fsh.SurgeryHooks:
    """Six train steps with hooks, and what the train loop writes beside them."""
    model, batch = Model(), jnp.ones((2, 5))
    params = model.init(jax.random.key(0), batch)["params"]
    state = fsh.TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(0.01))
    grad = jax.jit(jax.value_and_grad(lambda params: jnp.mean((model.apply({"params": params}, batch) - 1) ** 2)))
    hooks = make_hooks(writer)
    writer.write_hparams(CONFIG)
    for step in range(1, 7):
        loss, grads = grad(state.params)
        state = hooks(step, state.apply_gradients(grads=grads))
        writer.write_scalars(step, {"loss": loss})
    writer.write_texts(6, {"summary": "six | steps\n-|-\nof | training"})
    writer.write_histograms(6, {"kernel": state.params["Dense_0"]["kernel"]})
    hooks.flush()
    return hooks


class Everywhere(NamedTuple):
    """What each event file holds, and the lines of each log without its name."""

    files: dict[str, dict[str, list[Written]]]
    logs: dict[str, list[str]]


LOGS: dict[str, Make] = {
    "CLU's": clu_writers.LoggingWriter,
    "CLU's, asynchronous": lambda name: clu_writers.AsyncWriter(clu_writers.LoggingWriter(name)),
    "ours": writers.LoggingWriter,
    "ours, asynchronous": lambda name: writers.AsyncWriter(writers.LoggingWriter(name)),
}


@contextlib.contextmanager
def absl_log() -> Iterator[list[str]]:
    """The messages of absl's log, INFO and above."""
    lines: list[str] = []

    class Handler(std_logging.Handler):
        def emit(self, record: Any) -> None:
            lines.append(record.getMessage())

    handler, verbosity = Handler(), logging.get_verbosity()
    logging.get_absl_logger().addHandler(handler)
    logging.set_verbosity(logging.INFO)
    try:
        yield lines
    finally:
        logging.set_verbosity(verbosity)
        logging.get_absl_logger().removeHandler(handler)


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory) -> Everywhere:
    """One run whose hooks write to all writers at once."""
    folder = tmp_path_factory.mktemp("everywhere")
    files = {name: make(folder / str(i)) for i, (name, make) in enumerate((THEIRS | OURS).items())}
    logs = {name: make(f"log{i}") for i, (name, make) in enumerate(LOGS.items())}
    with absl_log() as lines:
        writer = writers.MultiWriter([*files.values(), *logs.values()])
        run(writer)
        writer.close()
    marks = {name: f" collection=log{i}" for i, name in enumerate(LOGS)}
    return Everywhere(
        {name: read(folder / str(i)) for i, name in enumerate(files)},
        {name: [line.replace(mark, "") for line in lines if mark in line] for name, mark in marks.items()},
    )


def test_hooks_write_something_for_each_fire(everywhere):
    by_clu = everywhere.files["SummaryWriter"]
    fires = {(one.step, tag.split("/")[1]) for tag in by_clu if tag.startswith("surgery/") for one in by_clu[tag]}
    assert {(2, "norm"), (6, "norm"), (3, "noise"), (4, "reinit"), (5, "refused")} <= fires
    [refused] = by_clu["surgery/refused/refused"]
    assert (refused.step, float(refused.array)) == (5, 1.0)


@pytest.mark.parametrize("name", THEIRS | OURS)
def test_hooks_write_the_same_through_each_writer(everywhere, name):
    assert_same(everywhere.files["SummaryWriter"], everywhere.files[name])


def test_hooks_write_the_same_where_clus_writer_is_the_only_one(tmp_path, everywhere):
    assert_same(content_of(THEIRS["SummaryWriter"], tmp_path, run), everywhere.files["EventFileWriter"])


@pytest.mark.parametrize("name", LOGS)
def test_the_log_of_a_run_says_what_its_event_file_says(everywhere, name):
    log = everywhere.logs[name]
    for tag, values in everywhere.files["EventFileWriter"].items():
        for one in values:
            lines = [line for line in log if line.startswith(f"[{one.step}] ")]
            if one.plugin == "scalars":
                [number] = [match[1] for line in lines if (match := re.search(rf" {re.escape(tag)}=([^,]+)", line))]
                assert float(number) == pytest.approx(float(one.array), rel=1e-5, nan_ok=True)
            elif one.plugin == "hparams":
                lines = [line for line in log if line.startswith(("[hparams]", "[Hyperparameters]"))]
                for hparam in one.content.session_start_info.hparams:
                    assert any(hparam.split(".")[-1] in line for line in lines)  # nested in one, joined in the other
            else:
                assert any(tag in line for line in lines)


def test_scalars_of_fires_are_logged_alike(everywhere):
    start = re.compile(r"\[\d+\] surgery/[^ ]+=")
    scalars = [[line for line in lines if start.match(line)] for lines in everywhere.logs.values()]
    assert scalars[0]
    assert all(lines == scalars[0] for lines in scalars)


def test_the_default_writer_is_clus_own(tmp_path):
    for asynchronous, kind in ((True, clu_writers.AsyncMultiWriter), (False, clu_writers.MultiWriter)):
        writer = fsh.metrics.create_default_writer(tmp_path, asynchronous=asynchronous, collection="eval")
        assert type(writer) is kind
        writer.write_scalars(1, {"a": 1.0})
        writer.close()
    assert type(fsh.metrics.create_default_writer(just_logging=True)) is clu_writers.AsyncMultiWriter
    assert [one.step for one in read(tmp_path / "eval")["a"]] == [1, 1]


def test_clus_writers_are_metric_writers(tmp_path):
    for make in THEIRS.values():
        writer = make(tmp_path)
        assert isinstance(writer, fsh.metrics.MetricWriter)
        writer.close()
