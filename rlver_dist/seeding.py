"""Seeds for named things, equal on every machine and in every process."""

from __future__ import annotations

import hashlib


def derive_seed(*names: object, bits: int = 63) -> int:
    """A seed for what `names` say together, such as (dialogue seed, turn index).

    It is the first `bits` (1 to 256) of the SHA-256 of the names, joined by "/". `hash()` would differ from
    process to process, and a sum or a product of seeds would give equal seeds to different things. The
    default fits a signed 64-bit integer, which is what vLLM and torch take.
    """
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return int.from_bytes(digest, "big") >> (8 * len(digest) - bits)
