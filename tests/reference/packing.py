"""How sequences lie in the token axis."""

import torch


def as_list(cu_seqlens):
    """cu_seqlens as a list of Python integers."""
    return [int(x) for x in cu_seqlens]


def spans(cu_seqlens):
    """(start, end) of every sequence."""
    cu = as_list(cu_seqlens)
    return list(zip(cu[:-1], cu[1:], strict=True))


def query_positions(len_q, len_k, offset=None):
    """Position of every query inside its own sequence; bottom-right alignment without an offset."""
    return torch.arange(len_q) + (len_k - len_q if offset is None else int(offset))


def sequences(cu_seqlens_q, cu_seqlens_k, q_offset=None):
    """Yields (slice of queries, slice of keys, positions of the queries) for every sequence."""
    pairs = zip(spans(cu_seqlens_q), spans(cu_seqlens_k), strict=True)
    for b, ((q0, q1), (k0, k1)) in enumerate(pairs):
        offset = None if q_offset is None else q_offset[b]
        yield slice(q0, q1), slice(k0, k1), query_positions(q1 - q0, k1 - k0, offset)
