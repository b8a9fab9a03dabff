"""Rotation conventions of states: numbers -> rotation matrices, and the turn between two of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def from_axis_angle(vectors: np.ndarray) -> np.ndarray:
    """Axis times angle (n, 3) in radians -> rotation matrices (n, 3, 3)."""
    angle = np.linalg.norm(vectors, axis=-1)[:, None, None]
    x, y, z = (vectors / np.maximum(angle[:, 0], 1e-12)).T
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def from_euler(angles: np.ndarray, order: str) -> np.ndarray:
    """Euler angles (n, 3) in radians, extrinsic -> rotation matrices (n, 3, 3).

    Angle i turns about the axis `order[i]` of the base. Intrinsic angles are extrinsic ones in reverse order.
    """
    total = np.broadcast_to(np.eye(3), (len(angles), 3, 3))
    for place, axis in enumerate(order):
        vector = np.zeros((len(angles), 3))
        vector[:, "xyz".index(axis)] = angles[:, place]
        total = from_axis_angle(vector) @ total
    return total


def from_intrinsic_euler(angles: np.ndarray, order: str) -> np.ndarray:
    """Euler angles (n, 3) in radians, each about an axis of the turned frame -> rotation matrices (n, 3, 3)."""
    return from_euler(angles[:, ::-1], order[::-1])


def from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    """Quaternions (n, 4) as x, y, z, w, of any length -> rotation matrices (n, 3, 3)."""
    quaternion = quaternion / np.maximum(np.linalg.norm(quaternion, axis=-1, keepdims=True), 1e-12)
    quaternion = quaternion * np.where(quaternion[:, 3:] < 0, -1.0, 1.0)
    sine = np.linalg.norm(quaternion[:, :3], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, quaternion[:, 3:])
    return from_axis_angle(quaternion[:, :3] / np.maximum(sine, 1e-12) * angle)


def to_axis_angle(rotations: np.ndarray) -> np.ndarray:
    """Rotation matrices (n, 3, 3) -> axis times angle (n, 3). Meant for turns well below pi."""
    skew = np.stack(
        [
            rotations[:, 2, 1] - rotations[:, 1, 2],
            rotations[:, 0, 2] - rotations[:, 2, 0],
            rotations[:, 1, 0] - rotations[:, 0, 1],
        ],
        -1,
    )
    sine = np.linalg.norm(skew, axis=-1, keepdims=True) / 2
    cosine = (np.trace(rotations, axis1=1, axis2=2)[:, None] - 1) / 2
    return skew / 2 / np.maximum(sine, 1e-12) * np.arctan2(sine, cosine)


# By name: how many state values make an orientation, and how they become a matrix. One order and its reverse,
# intrinsic or extrinsic, are the same rotation with the numbers in reverse order.
ENCODINGS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "axis-angle": (3, from_axis_angle),
    "Euler angles, extrinsic xyz (roll, pitch, yaw)": (3, lambda values: from_euler(values, "xyz")),
    "Euler angles, intrinsic xyz": (3, lambda values: from_intrinsic_euler(values, "xyz")),
    "Euler angles, intrinsic zyx (yaw, pitch, roll)": (3, lambda values: from_intrinsic_euler(values, "zyx")),
    "Euler angles in degrees, extrinsic xyz (roll, pitch, yaw)": (3, lambda v: from_euler(np.radians(v), "xyz")),
    "Euler angles in degrees, intrinsic xyz": (3, lambda v: from_intrinsic_euler(np.radians(v), "xyz")),
    "Euler angles in degrees, intrinsic zyx (yaw, pitch, roll)": (
        3,
        lambda v: from_intrinsic_euler(np.radians(v), "zyx"),
    ),
    "quaternion x, y, z, w": (4, from_quaternion),
    "quaternion w, x, y, z": (4, lambda values: from_quaternion(values[:, [1, 2, 3, 0]])),
}
