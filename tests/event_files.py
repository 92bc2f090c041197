"""Reads TensorBoard's event files back without tensorboard, checking every record's checksums."""

import io
import os
import pathlib
import struct
import wave
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tensorboardX.proto import types_pb2
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import masked_crc32c

Logdir = str | os.PathLike[str]
Series = dict[str, list[tuple[int, Any]]]


def read_events(logdir: Logdir) -> list[Event]:
    """All events of the event files in a directory (not in those below it), file by file.

    A file may end within a record, where its process was killed.
    """
    paths = sorted(path for path in pathlib.Path(logdir).iterdir() if "tfevents" in path.name)
    return [Event.FromString(record) for path in paths for record in _records(path.read_bytes())]


def read_values(logdir: Logdir) -> Series:
    """`{tag: [(step, Summary.Value)]}` of everything written."""
    series: Series = defaultdict(list)
    for event in read_events(logdir):
        for value in event.summary.value:
            series[value.tag].append((event.step, value))
    return dict(series)


def read_scalars(logdir: Logdir) -> Series:
    """`{tag: [(step, float)]}`."""
    return _select(logdir, lambda value: value.WhichOneof("value") == "simple_value", lambda value: value.simple_value)


def read_histograms(logdir: Logdir) -> Series:
    """`{tag: [(step, float64 [buckets, 3])]}`; a row holds the edges of a bucket and its count."""

    def decode(value: Any) -> np.ndarray:
        shape = [dim.size for dim in value.tensor.tensor_shape.dim]
        assert value.tensor.dtype == types_pb2.DT_DOUBLE
        return np.frombuffer(value.tensor.tensor_content, np.float64).reshape(shape)

    return _select(logdir, _by_plugin("histograms"), decode)


def read_texts(logdir: Logdir) -> Series:
    """`{tag: [(step, str)]}`."""
    return _select(logdir, _by_plugin("text"), lambda value: value.tensor.string_val[0].decode())


def read_images(logdir: Logdir) -> Series:
    """`{tag: [(step, uint8 [N, H, W, C])]}`; the size that TensorBoard shows must be the pictures' own."""

    def decode(value: Any) -> np.ndarray:
        width, height, *pictures = value.tensor.string_val
        images = [decode_png(picture) for picture in pictures]
        assert all(image.shape[:2] == (int(height), int(width)) for image in images)
        assert [dim.size for dim in value.tensor.tensor_shape.dim] == [2 + len(pictures)]
        return np.stack(images)

    return _select(logdir, _by_plugin("images"), decode)


def read_audios(logdir: Logdir) -> Series:
    """`{tag: [(step, [(sample_rate, int16 [T, C])])]}`."""

    def decode(value: Any) -> list[tuple[int, np.ndarray]]:
        sounds = value.tensor.string_val[::2]  # each is followed by a label
        assert [dim.size for dim in value.tensor.tensor_shape.dim] == [len(sounds), 2]
        return [decode_wav(sound) for sound in sounds]

    return _select(logdir, _by_plugin("audio"), decode)


def read_tensors(logdir: Logdir, dtype: Any) -> Series:
    """`{tag: [(step, array)]}` of the raw tensors, read as `dtype`."""

    def decode(value: Any) -> np.ndarray:
        shape = [dim.size for dim in value.tensor.tensor_shape.dim]
        return np.frombuffer(value.tensor.tensor_content, dtype).reshape(shape)

    return _select(logdir, lambda value: value.tensor.tensor_content, decode)


def read_hparams(logdir: Logdir) -> dict[str, bool | float | str]:
    """Hyperparameters by name; numbers are floats."""
    [(step, start)] = read_session_starts(logdir)
    assert step == 0
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}


def read_session_starts(logdir: Logdir) -> list[tuple[int, Any]]:
    """`[(step, SessionStartInfo)]` of the HParams dashboard."""
    values = read_values(logdir).get("_hparams_/session_start_info", [])
    contents = [(step, value.metadata.plugin_data.content) for step, value in values]
    return [(step, HParamsPluginData.FromString(content).session_start_info) for step, content in contents]


def decode_png(data: bytes) -> np.ndarray:
    """An unfiltered 8-bit PNG as uint8 `[H, W, C]`, with the checksums of its chunks checked."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, position = {}, 8
    while position < len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        body = data[position + 8 : position + 8 + length]
        assert struct.unpack_from(">I", data, position + 8 + length) == (zlib.crc32(name + body),)
        chunks[name], position = body, position + 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, color, *methods = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, methods) == (8, [0, 0, 0])
    channels = {0: 1, 4: 2, 2: 3, 6: 4}[color]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, channels)


def decode_wav(data: bytes) -> tuple[int, np.ndarray]:
    """Sample rate and int16 `[T, C]`."""
    with wave.open(io.BytesIO(data)) as file:
        assert file.getsampwidth() == 2
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return file.getframerate(), samples.reshape(-1, file.getnchannels())


def _records(data: bytes) -> Iterator[bytes]:
    position = 0
    while position + 12 <= len(data):
        length, checksum = struct.unpack_from("<QI", data, position)
        _check(data[position : position + 8], checksum)
        if position + 16 + length > len(data):
            return
        record = data[position + 12 : position + 12 + length]
        _check(record, *struct.unpack_from("<I", data, position + 12 + length))
        yield record
        position += 16 + length


def _check(data: bytes, checksum: int) -> None:
    if masked_crc32c(data) != checksum:
        raise ValueError("a record of the event file is damaged")


def _by_plugin(name: str) -> Callable[[Any], bool]:
    return lambda value: value.metadata.plugin_data.plugin_name == name


def _select(logdir: Logdir, wanted: Callable[[Any], Any], decode: Callable[[Any], Any]) -> Series:
    series = {
        tag: [(step, decode(value)) for step, value in values if wanted(value)]
        for tag, values in read_values(logdir).items()
    }
    return {tag: values for tag, values in series.items() if values}
