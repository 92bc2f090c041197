"""Where metrics go: CLU's `MetricWriter` interface, and writers of it that need no TensorFlow.

`clu.metric_writers` imports TensorFlow and tensorboard as soon as it is imported, and CLU installs neither. Any writer
of its interface is a `MetricWriter` here, ours and theirs alike.
"""

from __future__ import annotations

import collections
import importlib.util
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging

from flax_surgery_hooks._encodings import Array as Array
from flax_surgery_hooks._encodings import Scalar as Scalar
from flax_surgery_hooks._encodings import finite_elements, flatten_hparams, histogram, real_numbers
from flax_surgery_hooks._event_files import EventFileWriter as EventFileWriter
from flax_surgery_hooks.errors import WriterError, shorten


@runtime_checkable
class MetricWriter(Protocol):
    """The methods of `clu.metric_writers.MetricWriter`; every `step` is the value of `state.step`, a Python int.

    >>> isinstance(LoggingWriter(), MetricWriter)
    True
    """

    def write_summaries(
        self, step: int, values: Mapping[str, Array], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Writes tensors for a TensorBoard plugin; `metadata` maps a tag to its `SummaryMetadata`."""

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Writes one number per name."""

    def write_images(self, step: int, images: Mapping[str, Array]) -> None:
        """Writes images `[N, H, W, C]` or `[H, W, C]`."""

    def write_videos(self, step: int, videos: Mapping[str, Array]) -> None:
        """Writes videos `[N, T, H, W, C]` or `[T, H, W, C]`."""

    def write_audios(self, step: int, audios: Mapping[str, Array], *, sample_rate: int) -> None:
        """Writes sounds `[N, T, C]` from -1 to 1 with `sample_rate` samples per second."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts."""

    def write_histograms(
        self, step: int, arrays: Mapping[str, Array], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Writes how the elements of arrays are distributed."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the hyperparameters of the run, once."""

    def flush(self) -> None:
        """Waits until everything is written."""

    def close(self) -> None:
        """Flushes and closes; no other call may follow."""


class LoggingWriter:
    """Writes one line per call to absl's INFO log, `[step] name=value, ...`; arrays show as dtype and shape.

    absl shows INFO lines under `app.run`, or after `logging.set_verbosity(logging.INFO)`.

    >>> LoggingWriter(collection="train").write_scalars(3, {"loss": 0.5})  # [3] collection=train loss=0.5
    """

    def __init__(self, collection: str | None = None):
        """Names the collection that each line mentions, or none."""
        self._collection = f" collection={collection}" if collection else ""

    def write_summaries(
        self, step: int, values: Mapping[str, Array], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Logs dtypes and shapes."""
        self._log(step, f"summaries: {_pairs(values)}")

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Logs the numbers, sorted by name, floats with six digits."""
        self._log(step, _pairs(dict(sorted(scalars.items()))))

    def write_images(self, step: int, images: Mapping[str, Array]) -> None:
        """Logs dtypes and shapes."""
        self._log(step, f"images: {_pairs(images)}")

    def write_videos(self, step: int, videos: Mapping[str, Array]) -> None:
        """Logs dtypes and shapes."""
        self._log(step, f"videos: {_pairs(videos)}")

    def write_audios(self, step: int, audios: Mapping[str, Array], *, sample_rate: int) -> None:
        """Logs dtypes, shapes and the sample rate."""
        self._log(step, f"audios at {sample_rate} Hz: {_pairs(audios)}")

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Logs the texts, quoted so that each call stays one line."""
        self._log(step, f"texts: {_pairs({name: repr(text) for name, text in texts.items()})}")

    def write_histograms(
        self, step: int, arrays: Mapping[str, Array], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Logs a line per array: the non-empty buckets, the last one closed, and how many elements are not finite.

        Raises:
          WriterError: if an array is not of real numbers.
        """
        for name, values in arrays.items():
            array = real_numbers(values, step, name)
            finite = finite_elements(array)
            counts, edges = histogram(finite, (num_buckets or {}).get(name))
            closing = ")" * (len(counts) - 1) + "]"
            buckets = [
                f"[{low:.3g}, {high:.3g}{end} {count}"
                for low, high, end, count in zip(edges[:-1], edges[1:], closing, counts, strict=True)
                if count
            ]
            missing = [f"non-finite {array.size - finite.size}"] if finite.size < array.size else []
            self._log(step, f"histogram {name}: {', '.join(buckets + missing) or 'empty'}")

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Logs the hyperparameters, nested names joined by dots."""
        self._log("hparams", _pairs(flatten_hparams(hparams)))

    def flush(self) -> None:
        """Flushes the log."""
        logging.flush()

    def close(self) -> None:
        """Flushes the log, which stays open for others."""
        logging.flush()

    def _log(self, step: int | str, text: str) -> None:
        logging.info("[%s]%s %s", step, self._collection, text)


class MultiWriter:
    """Writes to several writers; one that raises does not keep the call from the others.

    >>> MultiWriter([LoggingWriter(), LoggingWriter()]).write_texts(3, {"note": "grown"})
    """

    def __init__(self, writers: Sequence[MetricWriter]):
        """Takes the writers, called in this order."""
        self._writers = tuple(writers)

    def write_summaries(
        self, step: int, values: Mapping[str, Array], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Calls each writer; raises the first error when all were called, as do all methods here."""
        self._each(lambda writer: writer.write_summaries(step, values, metadata))

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Calls each writer."""
        self._each(lambda writer: writer.write_scalars(step, scalars))

    def write_images(self, step: int, images: Mapping[str, Array]) -> None:
        """Calls each writer."""
        self._each(lambda writer: writer.write_images(step, images))

    def write_videos(self, step: int, videos: Mapping[str, Array]) -> None:
        """Calls each writer."""
        self._each(lambda writer: writer.write_videos(step, videos))

    def write_audios(self, step: int, audios: Mapping[str, Array], *, sample_rate: int) -> None:
        """Calls each writer."""
        self._each(lambda writer: writer.write_audios(step, audios, sample_rate=sample_rate))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Calls each writer."""
        self._each(lambda writer: writer.write_texts(step, texts))

    def write_histograms(
        self, step: int, arrays: Mapping[str, Array], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Calls each writer."""
        self._each(lambda writer: writer.write_histograms(step, arrays, num_buckets))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Calls each writer."""
        self._each(lambda writer: writer.write_hparams(hparams))

    def flush(self) -> None:
        """Flushes each writer."""
        self._each(lambda writer: writer.flush())

    def close(self) -> None:
        """Closes each writer."""
        self._each(lambda writer: writer.close())

    def _each(self, call: Callable[[MetricWriter], None]) -> None:
        errors = []
        for writer in self._writers:
            try:
                call(writer)
            except Exception as error:
                errors.append(error)
        _raise_first(errors)


class AsyncWriter:
    """Makes a writer's calls, in order, on one thread of its own, so that the train loop does not wait for them.

    A call that fails there is logged, and raised by the next call here; that call is still made. NumPy arrays are
    copied, so they may be overwritten at once. JAX arrays are not (waiting for them is what this saves): do not donate
    one to a later computation before `flush()`.

    >>> writer = AsyncWriter(LoggingWriter())
    >>> writer.write_scalars(3, {"loss": np.float32(0.5)})
    >>> writer.close()
    """

    def __init__(self, writer: MetricWriter, *, max_pending: int = 100):
        """Starts no thread until the first call.

        Args:
          writer: called on the thread only.
          max_pending: calls that may wait; one more waits here until there is room, so that memory stays bounded.

        Raises:
          WriterError: if `max_pending` is less than 1.
        """
        if max_pending < 1:
            raise WriterError("nothing could ever be written.", found=max_pending, write="max_pending=100")
        self._writer = writer
        self._room = threading.BoundedSemaphore(max_pending)
        self._executor = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="AsyncWriter")
        self._errors: collections.deque[Exception] = collections.deque()
        self._closed = False

    def write_summaries(
        self, step: int, values: Mapping[str, Array], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Queues the call; raises the `WriterError` of an earlier one, as do all methods here."""
        self._queue("write_summaries", step, _snapshot(values), None if metadata is None else dict(metadata))

    def write_scalars(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Queues the call."""
        self._queue("write_scalars", step, _snapshot(scalars))

    def write_images(self, step: int, images: Mapping[str, Array]) -> None:
        """Queues the call."""
        self._queue("write_images", step, _snapshot(images))

    def write_videos(self, step: int, videos: Mapping[str, Array]) -> None:
        """Queues the call."""
        self._queue("write_videos", step, _snapshot(videos))

    def write_audios(self, step: int, audios: Mapping[str, Array], *, sample_rate: int) -> None:
        """Queues the call."""
        self._queue("write_audios", step, _snapshot(audios), sample_rate=sample_rate)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Queues the call."""
        self._queue("write_texts", step, _snapshot(texts))

    def write_histograms(
        self, step: int, arrays: Mapping[str, Array], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Queues the call."""
        self._queue("write_histograms", step, _snapshot(arrays), None if num_buckets is None else dict(num_buckets))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Queues the call, with nested hyperparameters flattened, which also copies them."""
        self._queue("write_hparams", None, flatten_hparams(hparams))

    def flush(self) -> None:
        """Waits until every queued call is made, then flushes the writer.

        Raises:
          WriterError: if one of them failed, or the flush did.
        """
        if not self._closed:
            futures.wait([self._submit(self._call, "flush", None)])
        _raise_first(self._take_errors())

    def close(self) -> None:
        """Waits until every queued call is made, then closes the writer and ends the thread.

        Raises:
          WriterError: if one of them failed, or the closing did.
        """
        if not self._closed:
            self._closed = True
            self._executor.shutdown(wait=True)
            self._call("close", None)
        _raise_first(self._take_errors())

    def _queue(self, method: str, step: int | None, *args: Any, **kwargs: Any) -> None:
        if self._closed:
            raise WriterError("the writer is closed.", write="the metrics before close()", step=step)
        earlier = self._take_errors()  # before the call is made: its own error belongs to the next
        self._room.acquire()
        steps = () if step is None else (step,)
        call = self._submit(self._call, method, step, *steps, *args, **kwargs)
        call.add_done_callback(lambda _: self._room.release())
        _raise_first(earlier)

    def _submit(self, call: Callable[..., None], *args: Any, **kwargs: Any) -> futures.Future[None]:
        try:
            return self._executor.submit(call, *args, **kwargs)
        except RuntimeError:
            # In an atexit function the thread has made all its calls and is gone: this one is made here.
            call(*args, **kwargs)
            done: futures.Future[None] = futures.Future()
            done.set_result(None)
            return done

    def _call(self, method: str, step: int | None, *args: Any, **kwargs: Any) -> None:
        try:
            getattr(self._writer, method)(*args, **kwargs)
        except Exception as error:
            wrapped = WriterError(
                f"{method} failed in the background.",
                found=f"{type(error).__name__}: {error}".rstrip("."),
                write="asynchronous=False to see where",
                step=step,
                path=getattr(error, "path", None),
            )
            wrapped.__cause__ = error
            self._errors.append(wrapped)
            # Logged too, since there may be no later call.
            logging.exception("%s failed in the background.", method)

    def _take_errors(self) -> list[Exception]:
        # As many as there are now: the thread may append meanwhile.
        return [self._errors.popleft() for _ in range(len(self._errors))]


def create_default_writer(
    logdir: str | os.PathLike[str] | None = None,
    *,
    just_logging: bool = False,
    asynchronous: bool = True,
    collection: str | None = None,
) -> MetricWriter:
    """CLU's `create_default_writer` where TensorFlow and tensorboard are installed, and the same without them.

    Args:
      logdir: where the event file goes, or None to write none.
      just_logging: write to the log alone, as all hosts but the first should.
      asynchronous: write on a thread of each writer's own (`AsyncWriter`).
      collection: named on each line of the log, and the sub-directory of `logdir` for the event file.

    Returns:
      A writer to the log and to the event file.

    Raises:
      WriterError: if `logdir` cannot be written.

    >>> create_default_writer(just_logging=True).write_scalars(3, {"loss": 0.5})
    """
    if all(map(_is_installed, ("tensorflow", "tensorboard"))):
        try:
            from clu import metric_writers
        except ImportError as error:  # found but broken, such as tensorboard without its own dependencies
            logging.warning("CLU's writers do not import (%s); metrics are written without TensorFlow.", error)
        else:
            return metric_writers.create_default_writer(
                logdir, just_logging=just_logging, asynchronous=asynchronous, collection=collection
            )
    writers: list[MetricWriter] = [LoggingWriter(collection)]
    if logdir is not None and not just_logging:
        writers.append(EventFileWriter(os.path.join(logdir, collection) if collection is not None else logdir))
    return MultiWriter([AsyncWriter(writer) for writer in writers] if asynchronous else writers)


def _is_installed(package: str) -> bool:
    """Without importing it; a folder of that name in the working directory (logs, often) does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _raise_first(errors: Sequence[Exception]) -> None:
    for other in errors[1:]:
        errors[0].add_note(f"Also failed, {type(other).__name__}: {other}")
    if errors:
        raise errors[0]


def _snapshot(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_brief(value)}" for name, value in values.items())


def _brief(value: Any) -> str:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        if value.size != 1:
            return f"{value.dtype}{list(value.shape)}"
        value = np.asarray(value).item()
    return f"{value:.6g}" if isinstance(value, float) else shorten(value)
