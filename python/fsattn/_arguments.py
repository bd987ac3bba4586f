"""Arguments of the public functions on their way to the packed operators.

Here are the Python types checked, which the operators' schemas would reject in PyTorch's words, and
[B, T, H, D] tensors folded into packed ones. Every rule about values is the library's.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_WORKSPACE_CAP = 1 << 30  # bytes; as in include/fsattn/ops.h

COMPRESS_KINDS = {"mean": 0, "weighted": 1, "softmax": 2, "linear": 3}
GROUP_REDUCES = {"sum": 0, "max": 1, "first_head": 2}
SCORE_DTYPES = {"fp32": 0, "bf16": 1}
ACTIVATIONS = {"sigmoid": 0, None: 1}


def _wrong_type(name: str, rule: str, value: object) -> TypeError:
    return TypeError(f"{name}: must be {rule}, found {type(value).__name__}")


def check_tensors(**tensors: object) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise _wrong_type(name, "a torch.Tensor", value)


def check_optional_tensors(**tensors: object) -> None:
    for name, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            raise _wrong_type(name, "a torch.Tensor or None", value)


def check_ints(**values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise _wrong_type(name, "an int", value)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}: must fit 64 bits, found {value}")


def check_optional_ints(**values: object) -> None:
    check_ints(**{name: value for name, value in values.items() if value is not None})


def choose(name: str, value: object, choices: dict) -> int:
    """The number that the operator knows `value` by."""
    if value is not None and not isinstance(value, str):
        raise _wrong_type(name, "a string", value)
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: must be one of {allowed}, found {value!r}")
    return choices[value]


def resolve_scale(softmax_scale: object) -> float:
    """The operators take 0 for the default, head_dim ** -0.5; here None means that."""
    if softmax_scale is None:
        return 0.0
    if isinstance(softmax_scale, bool) or not isinstance(
        softmax_scale, (float, int, torch.SymFloat, torch.SymInt)
    ):
        raise _wrong_type("softmax_scale", "a float or None", softmax_scale)
    if softmax_scale == 0:
        raise ValueError("softmax_scale: must be finite and positive, found 0")
    try:
        return float(softmax_scale)
    except OverflowError:
        raise ValueError("softmax_scale: must be finite, found an int beyond float64") from None


def resolve_cap(workspace_cap: object) -> int:
    if workspace_cap is None:
        return DEFAULT_WORKSPACE_CAP
    check_ints(workspace_cap=workspace_cap)
    if workspace_cap < 0:
        raise ValueError(f"workspace_cap: must not be negative, found {workspace_cap}")
    return workspace_cap


class Sequences(NamedTuple):
    """How sequences lie in the packed tensors."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    batch: int | None  # of [B, T, H, D] tensors; None when the caller packed them
    q_offset: Tensor | None

    def operator_args(self) -> tuple:
        return self.cu_q, self.cu_k, self.q_offset, self.max_q, self.max_k


def longest(cu_seqlens: Tensor, given: int | None, total: int) -> int:
    """An upper bound of the sequence lengths: `given`, else the longest, else all tokens.

    Lengths are read on the CPU alone. On CUDA, and while tracing, that would stop the program to
    wait for the device, or cannot be done.
    """
    if given is not None:
        return given
    if torch.compiler.is_compiling() or type(cu_seqlens) is not Tensor or cu_seqlens.is_cuda:
        return total
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_meta:
        return total
    if cu_seqlens.dtype != torch.int32:
        return total  # the library names the mistake
    return max(int(cu_seqlens.diff().max()), min(total, 1))


def is_batched(name: str, x: Tensor, dims: int = 4) -> bool:
    """Whether x is [B, T, ...] rather than packed."""
    if x.dim() not in (dims - 1, dims):
        raise ValueError(
            f"{name}: must have {dims - 1} (packed) or {dims} (batched) dimensions, found {x.dim()}"
        )
    return x.dim() == dims


def _make_seqlens(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


@functools.lru_cache(maxsize=256)
def _known_seqlens(
    batch: int, length: int, device: torch.device, _stream: int, _is_inference: bool
) -> Tensor:
    return _make_seqlens(batch, length, device)


def batch_seqlens(batch: int, length: int, like: Tensor) -> Tensor:
    """cu_seqlens of `batch` sequences of one length, made on the device of `like`.

    The same tensor in the next call of this stream, which spares the device two launches. A graph
    that is being captured or traced gets its own, as do transforms of functions: it may outlive
    what is kept here, and a tensor of theirs would not outlive them.
    """
    device = like.device
    is_traced = type(like) is not Tensor or torch.compiler.is_compiling()
    if is_traced or torch._C._are_functorch_transforms_active():
        return _make_seqlens(batch, length, device)
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _make_seqlens(batch, length, device)
        stream = torch.cuda.current_stream(device).cuda_stream
    # Autograd does not take a tensor that was made in inference mode.
    return _known_seqlens(batch, length, device, stream, torch.is_inference_mode_enabled())


def _refuse(why: str, **values: object) -> None:
    for name, value in values.items():
        if value is not None:
            raise ValueError(f"{name}: must not be given with {why}")


def make_sequences(
    q: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    q_offset: Tensor | None,
    *,
    rows_k: int | None,
    length_k: int | None = None,
    query_axis: int = 0,
    name: str = "q",
    bound_k: int | None = None,
) -> Sequences:
    """The Sequences of a call with queries q.

    rows_k: rows of a packed k, None when the call has none. length_k: T of a batched k; without it
    max_seqlen_k, and without that T of q. query_axis: where q has its packed tokens; for batched q
    axis 0 is B and the tokens follow at query_axis + 1. bound_k: stands in for max_seqlen_k where
    there is no k.
    """
    check_optional_tensors(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, q_offset=q_offset)
    check_optional_ints(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    if is_batched(name, q):
        _refuse(f"a batched {name}", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
        batch, length_q = q.shape[0], q.shape[query_axis + 1]
        if length_k is None:
            length_k = length_q if max_seqlen_k is None else max_seqlen_k
        cu_q = batch_seqlens(batch, length_q, q)
        cu_k = cu_q if length_k is length_q else batch_seqlens(batch, length_k, q)
        return Sequences(cu_q, cu_k, length_q, length_k, batch, q_offset)
    if cu_seqlens_q is None:
        raise ValueError(f"cu_seqlens_q: must be given with a packed {name}, found None")
    total_q = q.shape[query_axis]
    if cu_seqlens_k is None:
        if rows_k is not None and rows_k != total_q:
            raise ValueError(
                f"cu_seqlens_k: must be given when k has other rows ({rows_k}) than q ({total_q})"
            )
        cu_seqlens_k = cu_seqlens_q
        max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    max_q = longest(cu_seqlens_q, max_seqlen_q, total_q)
    if rows_k is None:
        rows_k = total_q if cu_seqlens_k is cu_seqlens_q else bound_k
    max_k = longest(cu_seqlens_k, max_seqlen_k, rows_k)
    return Sequences(cu_seqlens_q, cu_seqlens_k, max_q, max_k, None, q_offset)


def check_same_layout(lead_name: str, lead: Tensor, **tensors: Tensor) -> None:
    """All batched or all packed; batched ones with the same B."""
    is_batched(lead_name, lead)
    for name, x in tensors.items():
        if x.dim() != lead.dim():
            raise ValueError(
                f"{name}: must have {lead.dim()} dimensions as {lead_name} has, found {x.dim()}"
            )
        if lead.dim() == 4 and x.shape[0] != lead.shape[0]:
            raise ValueError(
                f"{name}: must have the batch size of {lead_name} ({lead.shape[0]}), "
                f"found {x.shape[0]}"
            )


def fold(x: Tensor) -> Tensor:
    """[B, T, ...] -> [B * T, ...]; packed tensors stay as they are."""
    return x.flatten(0, 1) if x.dim() == 4 else x


def unfold(x: Tensor, batch: int | None) -> Tensor:
    """[B * T, ...] -> [B, T, ...] if the call was batched."""
    if batch is None:
        return x
    length = x.shape[0] // batch if batch else 0
    return x.reshape(batch, length, *x.shape[1:])


def fold_heads_first(x: Tensor, batch: int | None) -> Tensor:
    """[B, H, T, ...] -> [H, B * T, ...] if the call is batched: lse and topk_idx."""
    return x if batch is None else x.transpose(0, 1).flatten(1, 2)


def unfold_heads_first(x: Tensor, batch: int | None) -> Tensor:
    """[H, B * T, ...] -> [B, H, T, ...] if the call was batched."""
    if batch is None:
        return x
    length = x.shape[1] // batch if batch else 0
    return x.reshape(x.shape[0], batch, length, *x.shape[2:]).transpose(0, 1)


def key_rows(k: Tensor) -> dict:
    """The key length that make_sequences takes: T of a batched k, the rows of a packed one."""
    return {"rows_k": None, "length_k": k.shape[1]} if k.dim() == 4 else {"rows_k": k.shape[0]}


def check_cu_cmp(cu_seqlens_cmp: Tensor | None, k_cmp: Tensor, batch: int | None) -> Tensor:
    """cu_seqlens_cmp of a call, made here for a batched one."""
    check_optional_tensors(cu_seqlens_cmp=cu_seqlens_cmp)
    if batch is not None:
        if cu_seqlens_cmp is not None:
            raise ValueError("cu_seqlens_cmp: must not be given with a batched q")
        return batch_seqlens(batch, k_cmp.shape[1], k_cmp)
    if cu_seqlens_cmp is None:
        raise ValueError("cu_seqlens_cmp: must be given with a packed q, found None")
    return cu_seqlens_cmp


def compressed_sequences(
    q, k_cmp, cu_seqlens_q, cu_seqlens_k, cu_seqlens_cmp, max_seqlen_q, max_seqlen_k, q_offset,
    kernel_size, kernel_stride,
):  # fmt: skip
    """(Sequences, cu_seqlens_cmp) of a call whose keys are compressed."""
    check_ints(kernel_size=kernel_size, kernel_stride=kernel_stride)
    seq = make_sequences(
        q,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        q_offset,
        rows_k=None,
        # C windows come from fewer than C * d + l tokens.
        bound_k=k_cmp.shape[0] * kernel_stride + kernel_size,
    )
    return seq, check_cu_cmp(cu_seqlens_cmp, k_cmp, seq.batch)


def fold_gates(gates: Tensor, batch: int | None) -> Tensor:
    """[B, T, 3] -> [B * T, 3] and [B, T, Hq, 3] -> [B * T, Hq, 3] if the call is batched."""
    if batch is None:
        return gates
    if gates.dim() not in (3, 4) or gates.shape[0] != batch:
        raise ValueError(
            f"gates: must be [{batch}, T, 3] or [{batch}, T, Hq, 3], found {list(gates.shape)}"
        )
    return gates.flatten(0, 1)
