"""The name of a block's content: a hash of its tokens, of everything before them, and of the token behind them.

A block may be reused exactly where its hash is equal. The token behind is part of it because the MTP layer's row at a
position is made from the following token too: without it, the last row of a shared block could be another text's.
Knows neither blocks nor torch.
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Sequence

from router.block_pool import BLOCK_SIZE


def extend_block_hashes_(hashes: list[bytes], token_ids: Sequence[int], salt: str) -> None:
    """Append the hashes of the whole blocks of token_ids, behind which a token is known, that hashes lacks.

    salt: sequences with different ones have no hash in common. SHA-256: nobody finds two texts with one hash.
    """
    for index in range(len(hashes), (len(token_ids) - 1) // BLOCK_SIZE):
        parent = hashes[-1] if hashes else hashlib.sha256(salt.encode()).digest()
        start = index * BLOCK_SIZE
        tokens = array.array("q", token_ids[start : start + BLOCK_SIZE + 1])
        hashes.append(hashlib.sha256(parent + tokens.tobytes()).digest())
