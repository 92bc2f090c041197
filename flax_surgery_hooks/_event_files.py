"""Metrics into the event files that TensorBoard reads, over tensorboardX and without TensorFlow.

Only tensorboardX's protocol buffers and its record file are used. Its `SummaryWriter` renames tags (`kernel[3]` to
`kernel_3_`, so that two leaves may become one curve), its `flush` does not wait for what is still queued, and it opens
a second run for hyperparameters.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import operator
import os
import socket
import threading
import time
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from flax_surgery_hooks._encodings import (
    Array,
    Scalar,
    as_uint8_images,
    finite_elements,
    flatten_hparams,
    histogram,
    host_array,
    png,
    real_numbers,
    wav,
)
from flax_surgery_hooks.errors import StepError, WriterError

_file_numbers = itertools.count()


class EventFileWriter:
    """Writes metrics to an event file in `logdir`, under the tags and in the layout of CLU's TensorFlow writer.

    Several images or audios under one name are samples of one tag (a slider in TensorBoard), not tags of their own.
    Videos have no format in an event file and are dropped with one warning, as CLU does.

    Attributes:
      logdir: the directory, made if it is not there.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as logdir:
    ...     writer = EventFileWriter(logdir)
    ...     writer.write_scalars(3, {"loss": jnp.float32(0.5)})
    ...     writer.close()
    ...     print([path.name[:21] for path in pathlib.Path(logdir).iterdir()])
    ['events.out.tfevents.1']
    """

    def __init__(self, logdir: str | os.PathLike[str], *, flush_secs: float = 120.0):
        """Makes the directory and opens a file of its own in it.

        Args:
          logdir: where TensorBoard looks; a `gs://` or `s3://` address goes to tensorboardX as it is.
          flush_secs: a write this long after the last flush flushes, so that TensorBoard can follow a running job.

        Raises:
          WriterError: if tensorboardX is not installed, or `logdir` cannot be made or written.
        """
        self.logdir = os.fspath(logdir)
        self._flush_secs = flush_secs
        self._flushed_at = time.monotonic()
        self._warned_of_videos = False
        self._pb = _import_tensorboardx()
        # The last two parts are what keeps a writer from truncating the file of another one of this second.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(_file_numbers)}"
        with self._disk_errors():
            if "://" not in self.logdir:
                os.makedirs(self.logdir, exist_ok=True)
            records = self._pb.RecordWriter(os.path.join(self.logdir, name))
        self._records = records
        self._lock = threading.Lock()
        # Runs once: at close(), when the writer is collected, or at exit. A script without close() keeps its metrics.
        self._finish = weakref.finalize(self, _flush_and_close, records)
        self._write_event(self._pb.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def write_summaries(
        self, step: int, values: Mapping[str, Array], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Writes tensors as they are, for a TensorBoard plugin.

        Args:
          step: value of `state.step`, a Python int.
          values: tag to tensor (numbers, booleans or strings).
          metadata: tag to `SummaryMetadata`, of any library's proto class or serialized.

        Raises:
          WriterError: if a tensor's dtype has no TensorFlow counterpart, or metadata is neither proto nor bytes.
        """
        self._write(step, [self._raw(step, tag, array, (metadata or {}).get(tag)) for tag, array in values.items()])

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Writes one number per tag, in float32 as TensorBoard keeps them.

        Args:
          step: value of `state.step`, a Python int.
          scalars: tag to number; an array must have one element.

        Raises:
          WriterError: if a value is not one real number.
        """
        values = []
        for tag, scalar in scalars.items():
            array = real_numbers(scalar, step, tag)
            if array.size != 1:
                raise WriterError("a scalar must be one number.", found=array, write="its mean", step=step, path=tag)
            values.append(self._pb.Summary.Value(tag=tag, simple_value=array.astype(np.float64).item()))
        self._write(step, values)

    def write_images(self, step: int, images: Mapping[str, Array]) -> None:
        """Writes images as PNG.

        Args:
          step: value of `state.step`, a Python int.
          images: tag to `[N, H, W, C]` or `[H, W, C]` with 1 to 4 channels, uint8, or floats from 0 to 1 (clipped).

        Raises:
          WriterError: if shape or dtype is another.
        """
        values = []
        for tag, image in images.items():
            batch = as_uint8_images(real_numbers(image, step, tag), step, tag)
            # TensorBoard's layout: width and height as text, then the pictures.
            strings = [b"%d" % batch.shape[2], b"%d" % batch.shape[1], *map(png, batch)]
            values.append(self._strings(tag, "images", strings, (len(strings),)))
        self._write(step, values)

    def write_videos(self, step: int, videos: Mapping[str, Array]) -> None:
        """Drops the videos with one warning: a run that CLU's writer carries through must not die of a picture here."""
        if not self._warned_of_videos:
            self._warned_of_videos = True
            logging.warning("[%s] Event files hold no videos; dropped: %s.", step, ", ".join(videos))

    def write_audios(self, step: int, audios: Mapping[str, Array], *, sample_rate: int) -> None:
        """Writes sounds as 16-bit WAV.

        Args:
          step: value of `state.step`, a Python int.
          audios: tag to `[N, T, C]`, floats from -1 to 1 (clipped).
          sample_rate: samples per second.

        Raises:
          WriterError: if shape or dtype is another, or the rate is not positive.
        """
        if sample_rate < 1:
            raise WriterError("a sound needs samples.", found=sample_rate, write="sample_rate=16000", step=step)
        values = []
        for tag, audio in audios.items():
            batch = real_numbers(audio, step, tag)
            if batch.ndim != 3 or not batch.shape[2] or not jnp.issubdtype(batch.dtype, jnp.floating):
                raise WriterError(
                    "audio must be floats of shape [N, T, C].", found=batch, write="audio[None]", step=step, path=tag
                )
            # Each sound is followed by a label, which TensorBoard no longer shows but still expects.
            strings = [part for sound in batch for part in (wav(sound, sample_rate), b"")]
            # The content says version 0 and encoding WAV.
            values.append(self._strings(tag, "audio", strings, (len(batch), 2), content=b"\x10\x0b"))
        self._write(step, values)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts, which TensorBoard shows as Markdown.

        Args:
          step: value of `state.step`, a Python int.
          texts: tag to text.

        Raises:
          WriterError: if a value is not a string.
        """
        for tag, text in texts.items():
            if not isinstance(text, str):
                raise WriterError("a text must be a str.", found=text, write="str(text)", step=step, path=tag)
        self._write(step, [self._strings(tag, "text", [text.encode()], ()) for tag, text in texts.items()])

    def write_histograms(
        self, step: int, arrays: Mapping[str, Array], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Writes how the elements of each array are distributed; non-finite ones are left out with a warning.

        Args:
          step: value of `state.step`, a Python int.
          arrays: tag to array of real numbers, any shape.
          num_buckets: tag to number of buckets of equal width; 30 where a tag is missing or None.

        Raises:
          WriterError: if an array is not of real numbers, or a number of buckets is not positive.
        """
        values = []
        for tag, array in arrays.items():
            buckets = (num_buckets or {}).get(tag)
            if buckets is not None and buckets < 1:
                raise WriterError(
                    "a histogram needs a bucket.", found=buckets, write="a positive int", step=step, path=tag
                )
            array = real_numbers(array, step, tag)
            finite = finite_elements(array)
            if finite.size < array.size:
                missing = array.size - finite.size
                logging.warning("[%s] Histogram %s leaves out %d non-finite of %d.", step, tag, missing, array.size)
            counts, edges = histogram(finite, buckets)
            # TensorBoard's layout: a row per bucket. The older `HistogramProto` is cut to float32 and to its filled
            # buckets when read.
            rows = np.stack([edges[:-1], edges[1:], counts], axis=1)
            values.append(self._raw(step, tag, rows, self._metadata("histograms", b"")))
        self._write(step, values)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes hyperparameters for TensorBoard's HParams dashboard, as the start of a session in this very run.

        The dashboard then compares them with this run's own scalars. tensorboardX's `add_hparams` would instead open a
        second run in a sub-directory, and text would not be comparable.

        Args:
          hparams: name to value, nested as it may be (`flatten_hparams`).
        """
        flat = flatten_hparams(hparams)
        plugin_data = self._pb.HParamsPluginData()
        start = plugin_data.session_start_info
        start.start_time_secs = time.time()
        # Runs with equal hyperparameters share a row, whoever wrote them: TensorFlow's writer hashes the same text.
        text = json.dumps(flat, sort_keys=True, separators=(",", ":"))
        start.group_name = hashlib.sha256(text.encode()).hexdigest()
        for name, value in flat.items():
            kind = "string" if isinstance(value, str) else "bool" if isinstance(value, bool) else "number"
            setattr(start.hparams[name], f"{kind}_value", value)
        empty = self._pb.TensorProto(dtype="DT_FLOAT", tensor_shape=self._shape((0,)))
        metadata = self._metadata("hparams", plugin_data.SerializeToString())
        self._write(0, [self._pb.Summary.Value(tag="_hparams_/session_start_info", metadata=metadata, tensor=empty)])

    def flush(self) -> None:
        """Puts everything written so far on disk.

        Raises:
          WriterError: if the disk refuses.
        """
        if self._finish.alive:
            self._flushed_at = time.monotonic()
            with self._disk_errors(), self._lock:
                self._records.flush()

    def close(self) -> None:
        """Flushes and closes the file; a second call does nothing.

        Raises:
          WriterError: if the disk refuses.
        """
        with self._disk_errors(), self._lock:
            self._finish()

    def _write(self, step: int, values: list[Any]) -> None:
        if not self._finish.alive:
            raise WriterError(
                f"the writer of {self.logdir!r} is closed.", write="the metrics before close()", step=_index(step)
            )
        summary = self._pb.Summary(value=values)
        self._write_event(self._pb.Event(wall_time=time.time(), step=_index(step), summary=summary))
        if time.monotonic() - self._flushed_at >= self._flush_secs:
            self.flush()

    def _write_event(self, event: Any) -> None:
        with self._disk_errors(), self._lock:
            self._records.write(event.SerializeToString())

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriterError(
                f"no event file can be written to {self.logdir!r}.", found=error, write="a logdir with room and access"
            ) from error

    def _raw(self, step: int, tag: str, tensor: Array, metadata: Any) -> Any:
        array = host_array(tensor, step, tag)
        if array.dtype.kind in "SU":
            strings = np.char.encode(array, "utf-8") if array.dtype.kind == "U" else array
            proto = self._pb.TensorProto(
                dtype="DT_STRING", string_val=strings.ravel().tolist(), tensor_shape=self._shape(array.shape)
            )
        else:
            proto = self._pb.TensorProto(
                dtype=self._dtype(array, step, tag),
                tensor_content=array.astype(array.dtype.newbyteorder("<")).tobytes(),
                tensor_shape=self._shape(array.shape),
            )
        given = None if metadata is None else self._given_metadata(metadata, step, tag)
        return self._pb.Summary.Value(tag=tag, metadata=given, tensor=proto)

    def _given_metadata(self, metadata: Any, step: int, tag: str) -> Any:
        # Through bytes, since tensorboard's class and tensorboardX's are two; fields unknown to the latter survive.
        serialized = metadata.SerializeToString() if hasattr(metadata, "SerializeToString") else metadata
        try:
            return self._pb.SummaryMetadata.FromString(serialized)
        except (TypeError, self._pb.DecodeError) as error:
            raise WriterError(
                "metadata is neither a SummaryMetadata nor the bytes of one.",
                found=f"{metadata!r}",
                write="{tag: metadata.SerializeToString()}",
                step=step,
                path=tag,
            ) from error

    def _dtype(self, array: np.ndarray, step: int, tag: str) -> int:
        renamed = {"float32": "float", "float64": "double", "float16": "half"}
        name = "DT_" + renamed.get(array.dtype.name, array.dtype.name).upper()
        # tensorboardX's list of types ends at half; TensorFlow's goes on.
        numbers = {**dict(self._pb.DataType.items()), "DT_UINT32": 22, "DT_UINT64": 23}
        if name not in numbers:
            raise WriterError("TensorFlow has no such dtype.", found=array, write="a float32 copy", step=step, path=tag)
        return numbers[name]

    def _strings(
        self, tag: str, plugin: str, strings: list[bytes], shape: tuple[int, ...], content: bytes = b""
    ) -> Any:
        proto = self._pb.TensorProto(dtype="DT_STRING", string_val=strings, tensor_shape=self._shape(shape))
        return self._pb.Summary.Value(tag=tag, metadata=self._metadata(plugin, content), tensor=proto)

    def _metadata(self, plugin: str, content: bytes) -> Any:
        return self._pb.SummaryMetadata(plugin_data={"plugin_name": plugin, "content": content})

    def _shape(self, shape: tuple[int, ...]) -> Any:
        return self._pb.TensorShapeProto(dim=[{"size": size} for size in shape])


def _flush_and_close(records: Any) -> None:
    try:
        records.flush()
    finally:
        records.close()


def _import_tensorboardx() -> types.SimpleNamespace:
    try:
        protobuf = importlib.import_module("google.protobuf.message")  # by name: typed only where stubs are installed
        from tensorboardX import record_writer
        from tensorboardX.proto import (
            event_pb2,
            plugin_hparams_pb2,
            summary_pb2,
            tensor_pb2,
            tensor_shape_pb2,
            types_pb2,
        )
    except ImportError as error:
        raise WriterError(
            "event files need tensorboardX.", found=error, write="pip install tensorboardX, or just_logging=True"
        ) from error
    return types.SimpleNamespace(
        RecordWriter=record_writer.RecordWriter,
        Event=event_pb2.Event,
        Summary=summary_pb2.Summary,
        SummaryMetadata=summary_pb2.SummaryMetadata,
        HParamsPluginData=plugin_hparams_pb2.HParamsPluginData,
        TensorProto=tensor_pb2.TensorProto,
        TensorShapeProto=tensor_shape_pb2.TensorShapeProto,
        DataType=types_pb2.DataType,
        DecodeError=protobuf.DecodeError,
    )


def _index(step: Any) -> int:
    try:
        return operator.index(step)
    except TypeError as error:
        raise StepError("a step must be a Python int.", found=f"{step!r}", write="int(state.step)") from error
