"""What a metric writer is given, checked and turned into plain numbers and bytes."""

from __future__ import annotations

import io
import struct
import wave
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_surgery_hooks.errors import WriterError

Array = np.ndarray | jax.Array
Scalar = int | float | np.number | Array

_DEFAULT_BUCKETS = 30  # as in TensorFlow, so that a run looks the same with either writer
_PNG_COLORS = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> PNG colour type: grey, grey + alpha, RGB, RGBA


def flatten_hparams(hparams: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Nested hyperparameters as one level of `.`-joined names and values that TensorBoard can hold.

    Lists and tuples nest by index, `None` becomes the empty string, arrays of one element their number, and anything
    else its text.

    Args:
      hparams: a mapping or `ConfigDict`.

    >>> flatten_hparams({"optimizer": {"name": "adam", "betas": (0.9, np.float32(0.5))}, "warmup": None})
    {'optimizer.name': 'adam', 'optimizer.betas.0': 0.9, 'optimizer.betas.1': 0.5, 'warmup': ''}
    """
    flat: dict[str, bool | int | float | str] = {}
    for name, value in hparams.items():
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if hasattr(value, "items"):  # a ConfigDict is no Mapping
            flat |= {f"{name}.{rest}": leaf for rest, leaf in flatten_hparams(value).items()}
            continue
        if getattr(value, "size", None) == 1:
            value = np.asarray(value).item()
        known = isinstance(value, bool | int | float | str)
        flat[str(name)] = value if known else "" if value is None else str(value)
    return flat


def host_array(value: Any, step: int, tag: str) -> np.ndarray:
    """The value as a NumPy array, once the device has it.

    Raises:
      WriterError: if it is none, as a key or an array that was donated.

    >>> host_array([1, 2], step=3, tag="w")
    array([1, 2])
    """
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WriterError("this value has no numbers to write.", found=error, step=step, path=tag) from error


def real_numbers(value: Any, step: int, tag: str) -> np.ndarray:
    """The value as an array on the host.

    Raises:
      WriterError: if it does not hold real numbers (or booleans).

    >>> real_numbers(jnp.bfloat16(0.5), step=3, tag="loss")
    array(0.5, dtype=bfloat16)
    """
    array = host_array(value, step, tag)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise WriterError("only real numbers can be written here.", found=array, step=step, path=tag)
    return array


def finite_elements(array: np.ndarray) -> np.ndarray:
    """The finite elements as flat float64: no bucket of a histogram can hold the others.

    >>> finite_elements(np.array([[1.0, np.nan, 2.0]]))
    array([1., 2.])
    """
    flat = array.astype(np.float64).ravel()
    return flat[np.isfinite(flat)]


def histogram(finite: np.ndarray, num_buckets: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges (one more) of buckets of equal width from the least to the greatest element.

    By TensorFlow's rule, so that both writers count alike: equal elements are all in the last bucket, and without any
    all counts and edges are 0. One bucket holds all where floats have no such widths.

    >>> histogram(np.array([0.0, 1.0, 1.5, 2.0]), num_buckets=2)
    (array([1, 3]), array([0., 1., 2.]))
    """
    buckets = num_buckets or _DEFAULT_BUCKETS
    if finite.size == 0:
        return np.zeros(buckets, np.int64), np.zeros(buckets + 1)
    low, high = finite.min(), finite.max()
    with np.errstate(over="ignore", under="ignore"):
        width = (high - low) / buckets
    if low == high:
        index = np.full(finite.size, buckets - 1)
    elif width > 0 and np.isfinite(width):
        index = np.minimum(np.floor((finite - low) / width), buckets - 1).astype(np.int64)
    else:
        return np.array([finite.size]), np.array([low, high])
    return np.bincount(index, minlength=buckets), np.linspace(low, high, buckets + 1)


def as_uint8_images(array: np.ndarray, step: int, tag: str) -> np.ndarray:
    """Images as `[N, H, W, C]` in uint8; floats are clipped to 0 to 1, and NaN is black.

    Raises:
      WriterError: if shape or dtype is another.

    >>> as_uint8_images(np.array([[[0.0], [0.5], [2.0]]]), step=3, tag="mask").ravel()
    array([  0, 127, 255], dtype=uint8)
    """
    batch = array[None] if array.ndim == 3 else array
    floats = jnp.issubdtype(batch.dtype, jnp.floating)
    shape_fits = batch.ndim == 4 and batch.shape[3] in _PNG_COLORS and 0 not in batch.shape[1:]
    if not shape_fits or not (floats or batch.dtype == np.uint8):
        raise WriterError(
            "images must be [N, H, W, C] or [H, W, C] with 1 to 4 channels, in uint8 or floats from 0 to 1.",
            found=array,
            write="image[..., None] for one channel",
            step=step,
            path=tag,
        )
    # 255.5, cut off: TensorFlow's rule, under which multiples of 1/255 come back as they were.
    return np.nan_to_num(np.clip(batch, 0, 1).astype(np.float32) * 255.5).astype(np.uint8) if floats else batch


def png(image: np.ndarray) -> bytes:
    r"""A uint8 image `[H, W, C]` as a PNG file; Pillow comes with neither CLU nor tensorboardX.

    >>> png(np.zeros((2, 3, 1), np.uint8))[:8]
    b'\x89PNG\r\n\x1a\n'
    """
    height, width, channels = image.shape

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, _PNG_COLORS[channels], 0, 0, 0)
    rows = np.pad(image.reshape(height, width * channels), ((0, 0), (1, 0)))  # each row led by its filter: 0, none
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def wav(sound: np.ndarray, sample_rate: int) -> bytes:
    r"""Floats `[T, C]` from -1 to 1 (clipped) as a 16-bit WAV file; tensorboardX would need soundfile for it.

    >>> wav(np.array([[0.0], [0.5]]), sample_rate=8000)[-4:]
    b'\x00\x00\x00@'
    """
    samples = np.nan_to_num(np.clip(np.round(sound.astype(np.float64) * 2**15), -(2**15), 2**15 - 1)).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(sound.shape[1])
        out.setsampwidth(2)
        out.setframerate(sample_rate)
        out.writeframes(samples.tobytes())
    return file.getvalue()
