"""A keyed permutation of ``range(n)`` in constant memory: which sample of the dataset comes i-th in an epoch."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from forgather_fn import random

ROUNDS: Final = 6
"""Rounds of the Feistel network. Fewer, or a weaker mixer, leave neighbours visibly correlated."""

FEW: Final = 32
"""Up to so many elements are sorted by random keys: a network of so few bits favours some orders."""

# Every constant is an uint64: numpy turns an int64 scalar times an uint64 array into float64, which loses indices.
_SHIFT: Final = np.uint64(33)
_FIRST_FACTOR: Final = np.uint64(0xFF51AFD7ED558CCD)
_SECOND_FACTOR: Final = np.uint64(0xC4CEB9FE1A85EC53)


def permuted(indices: npt.NDArray[Any], *, n: int, key: int) -> npt.NDArray[np.int64]:
    """Map indices through the permutation of ``range(n)`` that a key names.

    Nothing is stored and nothing is drawn: any index is looked up on its own, so that an epoch of any length can be
    entered anywhere. The permutation is a Feistel network on the smallest power of two that holds ``n``; an index that
    it sends past ``n`` is sent on until it falls inside (less than twice through the network on average).

    The network is that of Luby and Rackoff (1988), the walk that of Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains" (2002), the round function the finaliser of MurmurHash3 (Appleby), on an index xored with the round's key.
    It shuffles well; it hides nothing. Up to 32 elements are sorted by random keys instead.

    Args:
        indices: Integers in ``[0, n)``, of any shape and any integer dtype.
        n: How many elements are permuted, from 1 to 2**63.
        key: Which permutation, any integer; :func:`forgather_fn.random.key` makes good ones.

    Returns:
        The images, int64, in the shape of ``indices``: a permutation of ``range(n)`` for ``np.arange(n)``.

    Raises:
        ValueError: ``n`` or an index is out of range, or the indices are not integers.

    Example:
        >>> permuted(np.arange(10), n=10, key=0).tolist()
        [0, 6, 4, 7, 8, 1, 2, 3, 5, 9]
        >>> permuted(np.array([7, 8]), n=2**40, key=0).tolist()
        [126997868309, 452537853112]
    """
    if not 1 <= n <= 2**63:
        raise ValueError(f"cannot permute range({n}): n must lie between 1 and 2**63")
    if indices.dtype.kind not in "iu":
        raise ValueError(f"cannot permute indices of dtype {indices.dtype}: expected integers, such as np.arange({n})")
    if indices.size and (indices.min() < 0 or indices.max() >= n):
        raise ValueError(f"indices from {indices.min()} to {indices.max()} do not lie in range({n})")
    if n <= FEW:
        order = np.array(sorted(range(n), key=lambda element: random.key(key, "few", element)), np.int64)
        return np.asarray(order[indices], np.int64)
    bits = (n - 1).bit_length()
    keys = [np.uint64(random.key(key, "feistel", number)) for number in range(ROUNDS)]
    images = _network(indices.astype(np.uint64).reshape(-1), bits, keys)
    outside = np.flatnonzero(images >= np.uint64(n))
    while outside.size:
        walked = _network(images[outside], bits, keys)
        images[outside] = walked
        outside = outside[walked >= np.uint64(n)]
    return images.astype(np.int64).reshape(indices.shape)


def _network(values: npt.NDArray[np.uint64], bits: int, keys: list[np.uint64]) -> npt.NDArray[np.uint64]:
    """Permute ``[0, 2**bits)``: an even number of rounds, so that halves of unequal width end where they began."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left_mask, right_mask = np.uint64(2**left_bits - 1), np.uint64(2**right_bits - 1)
    shift = np.uint64(right_bits)
    left, right = values >> shift, values & right_mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & left_mask)
        left_mask, right_mask = right_mask, left_mask
    return (left << shift) | right


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spread every bit over all 64 (fmix64 of MurmurHash3). Products wrap, as uint64 arrays do."""
    values = values ^ (values >> _SHIFT)
    values *= _FIRST_FACTOR
    values ^= values >> _SHIFT
    values *= _SECOND_FACTOR
    values ^= values >> _SHIFT
    return values
