"""Rotary position embedding for packed sequences.

Conventions of the published FSA and NSA modules, so that their checkpoints carry over: half-split
(GPT-NeoX) rotation of the whole head, cos and sin rounded to the dtype of x before the rotation,
and frequencies in a non-persistent buffer that follows ``module.to(dtype)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RopeConfig", "RotaryEmbedding", "rotate"]


def _llama3_scaling() -> dict[str, Any]:
    return {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


@dataclass
class RopeConfig:
    """Frequencies of a rotary embedding; the fields and defaults of the published module.

    ``head_dim`` and ``rope_theta`` set the frequencies, ``rope_scaling`` (a dict with the key
    ``rope_type`` or ``type``, or None for no scaling) changes them: "default", "linear" and
    "llama3". ``max_position_embeddings``, ``hidden_size`` and ``num_attention_heads`` change
    nothing here; they let the same object serve Hugging Face helpers.
    """

    max_position_embeddings: int = 131072
    head_dim: int = 128
    rope_theta: float = 500000
    rope_scaling: dict[str, Any] | None = field(default_factory=_llama3_scaling)
    hidden_size: int = 4096
    num_attention_heads: int = 32


def _plain_inv_freq(config: RopeConfig) -> Tensor:
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / config.rope_theta**exponent


def _linear_inv_freq(config: RopeConfig) -> Tensor:
    return _plain_inv_freq(config) / config.rope_scaling["factor"]


def _llama3_inv_freq(config: RopeConfig) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    scaling = config.rope_scaling
    factor, low, high = (scaling[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = scaling["original_max_position_embeddings"]
    inv_freq = _plain_inv_freq(config)
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, between)
    return torch.where(wavelength < original / high, inv_freq, scaled)


_INV_FREQ = {
    "default": _plain_inv_freq,
    "linear": _linear_inv_freq,
    "llama3": _llama3_inv_freq,
}
_SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": tuple(k for k in _llama3_scaling() if k != "rope_type"),
}


def _inv_freq(config: RopeConfig) -> Tensor:
    """fp32 [head_dim / 2]."""
    scaling = config.rope_scaling or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if config.head_dim % 2:
        raise ValueError(f"rope_config: head_dim must be even, found {config.head_dim}")
    if rope_type not in _INV_FREQ:
        known = ", ".join(_INV_FREQ)
        raise NotImplementedError(
            f"rope_config: rope_type must be one of {known}, found {rope_type!r}"
        )
    missing = [key for key in _SCALING_KEYS[rope_type] if key not in scaling]
    if missing:
        raise ValueError(
            f"rope_config: rope_scaling of type {rope_type} needs the keys "
            f"{', '.join(_SCALING_KEYS[rope_type])}, missing {', '.join(missing)}"
        )
    return _INV_FREQ[rope_type](config)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [total, heads, D] by cos, sin [total, D / 2]; the result has the dtype of x.

    With x0, x1 the two halves of a head: y0 = x0 cos - x1 sin, y1 = x1 cos + x0 sin, in fp32 (fp64
    for fp64 inputs) and rounded once.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    x0, x1 = x.to(compute).chunk(2, dim=-1)
    cos, sin = cos.to(compute).unsqueeze(1), sin.to(compute).unsqueeze(1)
    return torch.cat((x0 * cos - x1 * sin, x1 * cos + x0 * sin), dim=-1).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotates packed heads by their position in their own sequence.

    ``inv_freq`` [D / 2] is a non-persistent buffer that follows ``.to(dtype)``: a module cast to
    bf16 rounds its frequencies to bf16. The published module does so as well, so the weights of
    its checkpoints were trained with the rounded frequencies.
    """

    def __init__(self, config: RopeConfig, device: torch.device | str | None = None):
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", _inv_freq(config).to(device), persistent=False)

    def tables(
        self,
        cu_seqlens: Tensor,
        total: int,
        dtype: torch.dtype,
        start: int = 0,
        stride: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [total, D / 2] in `dtype`, row i of a sequence at start + i * stride.

        cu_seqlens: int32 [B + 1]. Rows behind the last sequence get some position; nothing is read
        back to the host.
        """
        row = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        # In the whole of cu_seqlens: Inductor of PyTorch 2.11 ignores the offset of cu_seqlens[1:].
        sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1
        sequence = sequence.clamp(max=cu_seqlens.shape[0] - 2)
        position = start + (row - cu_seqlens[sequence]) * stride
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        # An outer product by multiplication, not by matmul: TF32 would round positions above 2048.
        angle = position.to(compute).unsqueeze(1) * self.inv_freq.to(compute)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def forward(self, x: Tensor, cu_seqlens: Tensor, start: int = 0, stride: int = 1) -> Tensor:
        """x [total, heads, D], cu_seqlens int32 [B + 1] -> the same shape and dtype."""
        cos, sin = self.tables(cu_seqlens, x.shape[0], x.dtype, start, stride)
        return rotate(x, cos, sin)
