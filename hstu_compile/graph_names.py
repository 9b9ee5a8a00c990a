"""Names that every ranking graph gives its own inputs and outputs, and no feature may have. Level 0, standard library.

A model's configuration and a bundle's manifest refuse the same names; this is where both read them.
"""

from __future__ import annotations

import re

RESERVED_NAMES = frozenset(
    {
        *("seq_offsets", "candidate_offsets", "cache_offsets"),
        *("request_timestamps", "num_candidates", "scaling_seq_lens"),
        *("preds", "logits"),
    }
)
# Keys and values of a layer.
_CACHED = re.compile(r"[kv]_\d+")


def is_reserved(name: str) -> bool:
    """Whether a graph's own input or output has that name.

    >>> is_reserved("seq_offsets"), is_reserved("k_11"), is_reserved("k_x")
    (True, True, False)
    """
    return name in RESERVED_NAMES or _CACHED.fullmatch(name) is not None
