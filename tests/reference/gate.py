"""gate: the weighted sum of the three branches."""

import torch


def gate(o_cmp, o_sel, o_win, gates, *, activation="sigmoid"):
    """o = g0 * o_cmp + g1 * o_sel + g2 * o_win; gates [total_q, 3] or [total_q, Hq, 3]."""
    g = torch.sigmoid(gates) if activation == "sigmoid" else gates
    if g.ndim == o_cmp.ndim - 1:
        g = g.unsqueeze(-2)
    return g[..., 0:1] * o_cmp + g[..., 1:2] * o_sel + g[..., 2:3] * o_win
