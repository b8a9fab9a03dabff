"""Single frames out of MP4 files, in order or at random, with PyAV or torchcodec.

Datasets written for training have a key frame every few frames. A random frame takes a seek and two or three decoded
frames. Frames in order are decoded one after the other, without a seek.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from vla_adapter_hf.utils.extras import install_hint


# A jump of up to this many frames is decoded; a seek is faster for longer ones.
_MAX_DECODE_AHEAD = 4


def import_av() -> Any:
    """PyAV, or an ImportError that says how to install it."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"this dataset stores its camera frames as MP4, reading them needs PyAV: {install_hint('video')}"
        ) from error
    return av


def import_torchcodec() -> Any:
    """torchcodec's decoders, or an ImportError that says how to install it."""
    try:
        from torchcodec import decoders
    except (ImportError, OSError, RuntimeError) as error:  # of the release for another torch, or without FFmpeg
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ImportError(
            "video_backend='torchcodec' needs torchcodec, in the release for this torch, and FFmpeg's libraries: "
            f"{install_hint('torchcodec')}, and apt-get install ffmpeg; or leave video_backend out to read with PyAV. "
            f"Importing it failed: {reason}"
        ) from error
    return decoders


class VideoError(ValueError):
    """A video that cannot be opened or has no frame at the time asked for."""


class OpenVideo(Protocol):
    """An open file of either library."""

    def read(self, frame_number: int, fps: float) -> np.ndarray:
        """See `VideoFile.read`."""

    def close(self) -> None:
        """Close the file."""


class VideoFile:
    """One open MP4 file, read with PyAV.

    Raises:
        VideoError: the file is missing, empty, damaged or has no video in it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        av = import_av()
        self.path = path
        self._decode_errors = av.error.FFmpegError
        try:
            self._container = av.open(os.fspath(path))
            self._stream = self._container.streams.video[0]
        except (OSError, ValueError, IndexError) as error:  # av's errors derive from the first two
            raise VideoError(f"video {path} cannot be opened: {error}") from error
        # One thread per decoder: workers already run in parallel, and threads do not survive a fork.
        self._stream.thread_count = 1
        self._time_base = Fraction(self._stream.time_base)
        self._first = self._stream.start_time or 0
        rate = self._stream.average_rate
        self._own_step = 1 / Fraction(rate) / self._time_base if rate else None  # between the file's frames
        self._frames = None
        self._frame = None

    def read(self, frame_number: int, fps: float) -> np.ndarray:
        """Frame number `frame_number` at `fps` frames per second, uint8 (height, width, 3), RGB.

        Raises:
            VideoError: there is no frame within half a frame's time of it.
        """
        rate = Fraction(fps).limit_denominator(100000)
        target = self._first + round(frame_number / rate / self._time_base)
        step = 1 / rate / self._time_base  # one frame, in units of the stream
        try:
            frame = self._decode_until(target, min(step, self._own_step or step))
        except self._decode_errors as error:
            self._frames = self._frame = None
            raise VideoError(f"video {self.path} cannot be decoded at frame {frame_number}: {error}") from error
        if frame is None or abs(frame.pts - target) > step / 2:
            self._frames = self._frame = None
            raise VideoError(f"video {self.path} has no frame {frame_number} (at {float(frame_number / rate):.3f} s)")
        return frame.to_ndarray(format="rgb24")

    def _decode_until(self, target: int, step: Fraction) -> Any:
        earliest = target - step / 2
        if self._frame is not None:
            ahead = (target - self._frame.pts) / step
            if abs(ahead) < Fraction(1, 2):
                return self._frame
            if ahead < 0 or ahead > _MAX_DECODE_AHEAD:
                self._frames = None
        if self._frames is None:
            self._container.seek(max(target, self._first), stream=self._stream, backward=True)
            self._frames = self._container.decode(self._stream)
        for frame in self._frames:
            if frame.pts is not None and frame.pts >= earliest:
                self._frame = frame
                return frame
        return None

    def close(self) -> None:
        """Close the file."""
        self._frames = self._frame = None
        self._container.close()


class TorchcodecFile:
    """One open MP4 file, read with torchcodec. Its frames are those of `VideoFile`.

    Raises:
        VideoError: the file is missing, empty, damaged or has no video in it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        decoders = import_torchcodec()
        self.path = path
        try:
            # The exact mode reads the times of all frames first; the other one guesses them from the header.
            self._decoder = decoders.VideoDecoder(
                os.fspath(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise VideoError(f"video {path} cannot be opened: {error}") from error
        self._first = self._decoder.metadata.begin_stream_seconds
        rate = self._decoder.metadata.average_fps
        self._own_step = 1 / rate if rate else None  # between the file's frames

    def read(self, frame_number: int, fps: float) -> np.ndarray:
        """See `VideoFile.read`."""
        seconds, step = frame_number / fps, 1 / fps
        target = self._first + seconds
        try:
            # The frame that is shown half a frame later begins within half a frame of the target.
            frame = self._decoder.get_frame_played_at(target + min(step, self._own_step or step) / 2)
        except IndexError:
            frame = None
        except (RuntimeError, ValueError) as error:
            raise VideoError(f"video {self.path} cannot be decoded at frame {frame_number}: {error}") from error
        if frame is None or abs(frame.pts_seconds - target) > step / 2:
            raise VideoError(f"video {self.path} has no frame {frame_number} (at {seconds:.3f} s)")
        return frame.data.numpy()

    def close(self) -> None:
        """Close the file."""
        del self._decoder


# By the names that LeRobot gives them.
VIDEO_BACKENDS: dict[str, Callable[[str], OpenVideo]] = {"pyav": VideoFile, "torchcodec": TorchcodecFile}


class VideoCache:
    """The last `max_open` files used, kept open, per process.

    A forked worker opens its own files. It neither uses nor closes the parent's decoders. A spawned worker gets an
    empty cache.

    Args:
        max_open: how many files.
        backend: which library decodes, `"pyav"` or `"torchcodec"`.

    Raises:
        ValueError: no file, or a library that is not known.
    """

    def __init__(self, max_open: int = 16, backend: str = "pyav") -> None:
        if max_open < 1:
            raise ValueError(f"max_open={max_open} video files; at least 1 is needed")
        if backend not in VIDEO_BACKENDS:
            raise ValueError(f"video_backend={backend!r} is not known; use one of {', '.join(VIDEO_BACKENDS)}")
        self.max_open, self.backend = max_open, backend
        self._inherited: list[OrderedDict[str, OpenVideo]] = []
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[str, OpenVideo] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"max_open": self.max_open, "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def read(self, path: str | os.PathLike, frame_number: int, fps: float) -> np.ndarray:
        """See `VideoFile.read`."""
        if os.getpid() != self._process:
            # Processes share the file position: closing the parent's decoder here could move it there.
            self._inherited.append(self._files)
            self._reset()
        with self._lock:
            key = os.fspath(path)
            file = self._files.pop(key, None) or VIDEO_BACKENDS[self.backend](key)
            self._files[key] = file
            while len(self._files) > self.max_open:
                self._files.popitem(last=False)[1].close()
            return file.read(frame_number, fps)

    def __len__(self) -> int:
        return len(self._files)
