"""How many bits PDQ hashes are apart, of an image and of its mirror image."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

HASH_BITS = 256
WORD_BITS = 64  # a hash is four words
MAX_COPY_BITS = 20  # recompressed, halved, brighter and gray copies are within (docs/experiments/curation.md)
# PDQ's bits say which of 16 x 16 coefficients of a cosine transform are above their median, which is near 0. Mirroring an image
# negates those of the odd columns, and so turns these bits: of 29 photos, at most 20 bits were other than that.
MIRRORED_BITS = np.uint64(0x5555_5555_5555_5555)

Hashes = npt.NDArray[np.uint64]  # [P, 4]: one row a page
Bits = npt.NDArray[np.uint8 | np.uint16]


def as_hashes(pdq_hashes: Sequence[bytes]) -> Hashes:
    """Return PDQ hashes, none of them empty, as rows of four 64-bit words, [P, 4]."""
    return np.frombuffer(b"".join(pdq_hashes), dtype=np.uint64).reshape(-1, 4)


def image_distances(rows: Hashes, columns: Hashes, *, mirrored: bool) -> Bits:
    """Return the bits apart of each pair, [len(rows), len(columns)].

    With `mirrored`: of the one image and the other one mirrored, where that is less. A mirrored photo is never a copy: it is
    more than MAX_COPY_BITS apart.
    """
    if not mirrored:
        return hamming_distances(rows, columns)
    turned = hamming_distances(rows & MIRRORED_BITS, columns & MIRRORED_BITS)
    return _nearer(turned, hamming_distances(rows & ~MIRRORED_BITS, columns & ~MIRRORED_BITS))


def row_distances(rows: Hashes, others: Hashes, *, mirrored: bool) -> Bits:
    """Return the bits apart of each row and the row of `others` in its place, [len(rows)]; see `image_distances`."""
    apart = rows ^ others
    return _nearer(_count(apart & MIRRORED_BITS), _count(apart & ~MIRRORED_BITS)) if mirrored else _count(apart)


def hamming_distances(rows: Hashes, columns: Hashes) -> Bits:
    """Return the number of differing bits of each pair, [len(rows), len(columns)]."""
    distances = np.zeros((len(rows), len(columns)), np.uint16)
    for word in range(rows.shape[1]):
        distances += np.bitwise_count(rows[:, word, None] ^ columns[None, :, word])
    return distances


def _nearer(turned: Bits, others: Bits) -> Bits:
    """Return the bits apart of images, or of one and the other mirrored, by what differs in the bits that mirroring turns."""
    half = turned.dtype.type(HASH_BITS // 2)
    nearer: Bits = np.minimum(others + turned, np.maximum(others + (half - turned), turned.dtype.type(MAX_COPY_BITS + 1)))
    return nearer


def _count(words: Hashes) -> Bits:
    """Return the number of bits that are set in each row, as 16-bit numbers: all 256 may be."""
    counts = np.bitwise_count(words).astype(np.uint16)
    total: Bits = counts[:, 0] + counts[:, 1] + counts[:, 2] + counts[:, 3]  # np.sum over so short an axis is ten times slower
    return total
