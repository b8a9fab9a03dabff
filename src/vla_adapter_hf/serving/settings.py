"""The settings of `vla-adapter serve`, checked before a model is loaded."""

from __future__ import annotations

import ipaddress
import math
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vla_adapter_hf.checkpoints.quantization import KINDS
from vla_adapter_hf.modeling.inference_vla_adapter import OUT_OF_RANGE
from vla_adapter_hf.robots import ROBOTS
from vla_adapter_hf.utils.devices import check_device


API_KEY_VARIABLE = "VLA_ADAPTER_API_KEY"
SHORTEST_KEY = 16
RESIZE_MODES = ("stretch", "pad")
PHYSICAL = "none"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How a server listens, what it loads and what it refuses.

    Args:
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: port to listen on; 0 takes a free one.
        without_key: allow a host that is not loopback without an API key.
        tls_certificate: PEM file, for https and wss. Its key must be given too.
        tls_key: PEM file of the certificate's key.
        device: `cpu`, `cuda`, `cuda:1`, ...
        dtype: `float32`, `bfloat16` or `float16`; by default float32 on the CPU and the checkpoint's own on a GPU.
        threads: CPU threads, by default as many as torch chooses.
        attention: transformers' attention: `sdpa`, `eager`, ..., or by part, as in dinov2=eager,siglip=eager. By
            default the quicker one is measured for a model in bfloat16 on a CPU.
        compiled: predict after `compile_for_inference`.
        quantize: weights in `int8` or `int4`; needs the extra quantization.
        unnorm_key: which of the checkpoint's statistics to use.
        robot: preset whose gripper convention the answers follow; `"none"` answers physical units, as `predict_action`
            does. By default it is found from the name of the statistics.
        cameras: the client's name of a camera and the checkpoint's, as in front=image.
        resize: `"stretch"` scales a frame to the model's square as it is, `"pad"` adds black borders first.
        max_batch: observations that are predicted at once.
        max_wait_ms: how long a batch waits for observations that are being prepared. A lone robot never waits.
        max_queue: observations that may wait; more are refused.
        out_of_range: what to do about a state far outside the range of the training data: `"warn"` in the log,
            `"error"` or `"ignore"`.
        clip: limit actions to the range of the training data.
        max_age: seconds; an observation that is older when its prediction begins is refused.
        max_frame_mb: limit of one decoded frame, in MB (10^6 bytes).
        max_message_mb: limit of one message, in MB.
        max_connections: websockets that may be open at once.
        max_seconds: from a message's arrival to its answer, and for the arrival of a request's body.
        ping_seconds: a websocket that does not answer a ping for so long is closed.

    Raises:
        ValueError: a value that is out of range or unknown, a device that is not there, or certificate files that
            cannot be used; the message names the option.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    without_key: bool = False
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None
    attention: str | Mapping[str, str] | None = None
    compiled: bool = False
    quantize: str | None = None
    unnorm_key: str | None = None
    robot: str | None = None
    cameras: Mapping[str, str] = field(default_factory=dict)
    resize: str = "stretch"
    max_batch: int = 8
    max_wait_ms: float = 5.0
    max_queue: int = 64
    out_of_range: str = "warn"
    clip: bool = False
    max_age: float | None = None
    max_frame_mb: float = 8.0
    max_message_mb: float = 32.0
    max_connections: int = 64
    max_seconds: float = 10.0
    ping_seconds: float = 60.0

    @property
    def max_frame_bytes(self) -> int:
        return int(self.max_frame_mb * 1e6)

    @property
    def max_message_bytes(self) -> int:
        return int(self.max_message_mb * 1e6)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the host."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __post_init__(self) -> None:
        for option, value, choices in (
            ("--resize", self.resize, RESIZE_MODES),
            ("--quantize", self.quantize, (None, *KINDS)),
            ("--dtype", self.dtype, (None, *DTYPES)),
            ("--out-of-range", self.out_of_range, OUT_OF_RANGE),
            ("--robot", self.robot, (None, PHYSICAL, *ROBOTS)),
        ):
            if value not in choices:
                names = ", ".join(str(choice) for choice in choices if choice is not None)
                raise ValueError(f"{option} must be one of {names}, got {value!r}.")
        for option in ("max_batch", "max_queue", "max_connections"):
            if getattr(self, option) < 1:
                raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(self, option)}.")
        for option in ("max_frame_mb", "max_message_mb", "max_seconds", "ping_seconds"):
            if not 0 < getattr(self, option) < math.inf:
                raise ValueError(f"--{option.replace('_', '-')} must be above 0, got {getattr(self, option)}.")
        if not 0 <= self.max_wait_ms < math.inf:
            raise ValueError(f"--max-wait-ms must be at least 0, got {self.max_wait_ms}.")
        if self.max_age is not None and not 0 < self.max_age < math.inf:
            raise ValueError(f"--max-age must be a number of seconds above 0, got {self.max_age}.")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {self.threads}.")
        if not self.host or not 0 <= self.port <= 65535:
            raise ValueError(
                f"--host and --port must be such as 127.0.0.1 and 8000, got {self.host!r} and {self.port}."
            )
        check_device(self.device, "--device")
        self.ssl_context()

    def check_access(self, api_key: str | None) -> None:
        """Refuse to let other machines in without a key, unless the settings say so.

        Raises:
            ValueError: the message says what to do.
        """
        if not self.is_loopback and api_key is None and not self.without_key:
            raise ValueError(
                f"--host {self.host} lets other machines in, and {API_KEY_VARIABLE} is not set. Set a key of at least "
                f"{SHORTEST_KEY} characters, or add --without-key if everybody on the network may ask for actions."
            )

    def ssl_context(self) -> ssl.SSLContext | None:
        """The TLS context of the certificate files, or None without any.

        Raises:
            ValueError: one of the two files is missing, cannot be read, or does not belong to the other.
        """
        if self.tls_certificate is None and self.tls_key is None:
            return None
        if self.tls_certificate is None or self.tls_key is None:
            raise ValueError("--tls-certificate and --tls-key belong together; give both.")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.tls_certificate, self.tls_key)
        except OSError as error:  # ssl.SSLError is one
            raise ValueError(
                f"--tls-certificate {self.tls_certificate} with --tls-key {self.tls_key} cannot be used: {error}"
            ) from error
        return context


def api_key_from_environment() -> str | None:
    """The key that clients must give; None if the variable is not set.

    Raises:
        ValueError: the key is short or has characters that a header cannot carry.
    """
    key = os.environ.get(API_KEY_VARIABLE)
    if key is None:
        return None
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{API_KEY_VARIABLE} must be at least {SHORTEST_KEY} printable ASCII characters without spaces, got "
            f"{len(key)} characters."
        )
    return key
