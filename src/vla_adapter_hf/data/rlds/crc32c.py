"""CRC-32C (Castagnoli) of a byte string with NumPy: the checksum in front of and behind every TFRecord.

A CRC is linear over GF(2): the checksums of many blocks can run side by side as one vector and be joined afterwards.
That makes a table lookup per word of a *row of blocks* out of one per byte, some hundred megabytes per second.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


_POLYNOMIAL = 0x82F63B78  # reflected
_BLOCK = 1024  # bytes per lane; a multiple of four
_PIECE = 1 << 22  # bytes handled at once, so that a record of any size needs little memory


def _table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1).astype(np.uint32)
    return table


_BYTE = _table()


@lru_cache(maxsize=1)
def _word_tables() -> tuple[np.ndarray, np.ndarray]:
    """Two tables of 65536: what the low and the high half of a 32-bit word leave behind after four zero bytes."""
    low = np.arange(65536, dtype=np.uint32)
    high = low << np.uint32(16)
    for _ in range(4):
        low = _BYTE[low & 255] ^ (low >> np.uint32(8))
        high = _BYTE[high & 255] ^ (high >> np.uint32(8))
    return low, high


def _apply(columns: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """GF(2) matrix (its 32 columns as words) times every word of `vector`."""
    out = np.zeros_like(vector)
    for bit in range(32):
        out ^= np.where(vector >> np.uint32(bit) & np.uint32(1), columns[bit], np.uint32(0))
    return out


@lru_cache(maxsize=64)
def _zeros_operator(doublings: int) -> np.ndarray:
    """The matrix that moves a checksum over 2**doublings zero bytes."""
    if doublings == 0:
        unit = np.uint32(1) << np.arange(32, dtype=np.uint32)
        return _BYTE[unit & 255] ^ (unit >> np.uint32(8))
    half = _zeros_operator(doublings - 1)
    return _apply(half, half)


def _shift(crc: np.ndarray, nbytes: int) -> np.ndarray:
    doublings = 0
    while nbytes:
        if nbytes & 1:
            crc = _apply(_zeros_operator(doublings), crc)
        nbytes >>= 1
        doublings += 1
    return crc


def _raw(data: np.ndarray) -> np.ndarray:
    """Checksum of uint8 data (n,) with a zero start and no final inversion, as an array of one word."""
    lanes = max(1, -(-len(data) // _BLOCK))
    # Zeros in front leave a checksum that starts at zero unchanged.
    padded = np.zeros(lanes * _BLOCK, np.uint8)
    padded[lanes * _BLOCK - len(data) :] = data
    words = np.ascontiguousarray(padded.view("<u4").reshape(lanes, _BLOCK // 4).T)
    low, high = _word_tables()
    crc = np.zeros(lanes, np.uint32)
    for row in words:
        crc = crc ^ row
        crc = low[crc & np.uint32(0xFFFF)] ^ high[crc >> np.uint32(16)]
    doublings = _BLOCK.bit_length() - 1
    while len(crc) > 1:
        if len(crc) % 2:
            crc = np.concatenate([np.zeros(1, np.uint32), crc])
        crc = _apply(_zeros_operator(doublings), crc[0::2]) ^ crc[1::2]
        doublings += 1
    return crc


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """CRC-32C of `data`: `crc32c(b"123456789") == 0xE3069283`."""
    view = np.frombuffer(data, np.uint8)
    if len(view) < 64:
        crc = 0xFFFFFFFF
        for byte in view.tolist():
            crc = int(_BYTE[(crc ^ byte) & 255]) ^ (crc >> 8)
        return crc ^ 0xFFFFFFFF
    crc = np.zeros(1, np.uint32)
    for start in range(0, len(view), _PIECE):
        piece = view[start : start + _PIECE]
        if start == 0:
            # Starting at all ones is the same as inverting the first four bytes.
            piece = piece.copy()
            piece[:4] ^= 255
        crc = _shift(crc, len(piece)) ^ _raw(piece)
    return int(crc[0]) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | bytearray | memoryview) -> int:
    """The form stored in a TFRecord: rotated by 15 bits and moved by a constant."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
