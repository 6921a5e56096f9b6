"""Rotations of a tool: Dobot's Rx, Ry, Rz and rotation vectors. Called by env.py for end-effector control.

Dobot's three angles turn about the base's fixed axes, x first: R = Rz·Ry·Rx.
"""

import numpy as np


def matrix_of_angles(angles: np.ndarray) -> np.ndarray:
    """float64[3], rad (Rx, Ry, Rz) -> float64[3, 3]."""
    (sx, sy, sz), (cx, cy, cz) = np.sin(angles), np.cos(angles)
    return np.array([
        [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
        [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
        [-sy, cy * sx, cy * cx],
    ])  # fmt: skip


def angles_of(matrix: np.ndarray) -> np.ndarray:
    """float64[3, 3] -> float64[3], rad (Rx, Ry, Rz)."""
    across = np.hypot(matrix[0, 0], matrix[1, 0])
    if across < 1e-9:  # Ry = ±90°: only Rx ∓ Rz is defined
        return np.array([np.arctan2(-matrix[1, 2], matrix[1, 1]), np.arctan2(-matrix[2, 0], across), 0.0])
    return np.array([
        np.arctan2(matrix[2, 1], matrix[2, 2]),
        np.arctan2(-matrix[2, 0], across),
        np.arctan2(matrix[1, 0], matrix[0, 0]),
    ])  # fmt: skip


def matrix_of_vector(vector: np.ndarray) -> np.ndarray:
    """float64[3], axis times angle in rad -> float64[3, 3] (Rodrigues)."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * cross @ cross


def vector_of(matrix: np.ndarray) -> np.ndarray:
    """float64[3, 3] -> float64[3], axis times angle in rad, the angle below π."""
    skew = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    sine, cosine = np.linalg.norm(skew) / 2.0, (np.trace(matrix) - 1.0) / 2.0
    return skew / 2.0 if sine < 1e-9 else skew / (2.0 * sine) * np.arctan2(sine, cosine)
