"""Derivatives of the operators: which of them is the backward of which, and what it needs.

Under torch.no_grad(), and when no input requires a gradient, PyTorch does not come here and nothing
is kept alive.
"""

import torch
from torch import Tensor

from ._library import call, register_function

_ops = torch.ops.fsattn


def _no_grads(count: int) -> tuple[None, ...]:
    return (None,) * count


def _save(ctx, tensors, options) -> None:
    ctx.save_for_backward(*tensors)
    ctx.options = options
    # An output that nothing depends on has the gradient None, not a tensor of zeros.
    ctx.set_materialize_grads(False)


def _setup_branch(num_tensors: int):
    """For an attention branch, whose first `num_tensors` inputs are tensors or absent."""

    def setup_context(ctx, inputs, output):
        _save(ctx, (*inputs[:num_tensors], *output), inputs[num_tensors:])

    return setup_context


def _branch_backward(operator, num_tensors: int):
    """(dq, dk, dv) and no gradient for the others."""

    def backward(ctx, dout: Tensor | None, dlse: Tensor | None):
        *inputs, o, lse = ctx.saved_tensors
        q, k, v, *others = inputs
        if dout is None:
            dout = torch.zeros_like(o)
        gradients = call(operator, dout, dlse, q, k, v, o, lse, *others, *ctx.options)
        return *gradients, *_no_grads(num_tensors - 3 + len(ctx.options))

    return backward


def _setup_compress_kv(ctx, inputs, output):
    x, cu_seqlens, weight, pos_emb, *options = inputs
    _save(ctx, (x, cu_seqlens, output[1], weight, pos_emb), options)


def _compress_kv_backward(ctx, dx_cmp: Tensor | None, _dcu: None):
    x, cu_seqlens, cu_seqlens_cmp, weight, pos_emb = ctx.saved_tensors
    if dx_cmp is None:
        return _no_grads(4 + len(ctx.options))
    dx, dweight, dpos_emb = call(
        _ops.compress_kv_bwd.default,
        *(dx_cmp, x, cu_seqlens, cu_seqlens_cmp, weight, pos_emb, *ctx.options),
    )
    return (
        dx,
        None,
        None if weight is None else dweight,
        None if pos_emb is None else dpos_emb,
        *_no_grads(len(ctx.options)),
    )


def _setup_gate(ctx, inputs, output):
    _save(ctx, inputs[:4], inputs[4:])


def _gate_backward(ctx, dout: Tensor | None):
    if dout is None:
        return _no_grads(5)
    return *call(_ops.gate_bwd.default, dout, *ctx.saved_tensors, *ctx.options), None


# Inputs of native_sparse_attention_fwd: q, k, v, k_cmp, v_cmp, gates, topk_idx, cu_q, cu_k, cu_cmp,
# q_offset, then options, of which the backward has no use for those that rank blocks.
_NSA_DIFFERENTIABLE = 6
_NSA_TENSORS = 11


def _setup_native_sparse_attention(ctx, inputs, output):
    o, topk_idx, *branches = output
    ctx.mark_non_differentiable(topk_idx, *branches)
    if inputs[6] is not None:
        topk_idx = inputs[6]
    max_q, max_k, kernel_size, kernel_stride, block_size, topk, *more = inputs[_NSA_TENSORS:]
    _init, _local, window_size, softmax_scale, _reduce, _score, activation, cap, *flags = more
    adds_means = flags[1] if len(flags) > 1 else False
    tensors = (*inputs[:6], topk_idx, *branches, *inputs[7:_NSA_TENSORS])
    options = (max_q, max_k, kernel_size, kernel_stride, block_size, topk)
    _save(ctx, tensors, (*options, window_size, softmax_scale, activation, cap, adds_means))
    ctx.num_inputs = len(inputs)


def _native_sparse_attention_backward(ctx, dout: Tensor | None, *_others):
    if dout is None:
        return _no_grads(ctx.num_inputs)
    gradients = call(
        _ops.native_sparse_attention_bwd.default, dout, *ctx.saved_tensors, *ctx.options
    )
    return *gradients, *_no_grads(ctx.num_inputs - _NSA_DIFFERENTIABLE)


def _refuse_second_derivative(name: str):
    def backward(ctx, *_gradients):
        raise NotImplementedError(
            f"{name}: second derivatives are not implemented; call backward without create_graph"
        )

    return backward


def _refuse_vmap(name: str):
    def vmap(info, in_dims, *args):
        raise NotImplementedError(
            f"{name}: torch.vmap is not supported; batch with cu_seqlens or [B, T, H, D] tensors"
        )

    return vmap


def _register(name: str, backward, setup_context) -> None:
    """With the operator, for graphs and for callers of torch.ops, and for call()."""
    torch.library.register_autograd(f"fsattn::{name}_fwd", backward, setup_context=setup_context)
    operator = getattr(_ops, f"{name}_fwd").default

    def forward(ctx, *args):
        output = operator(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    register_function(operator, type(name, (torch.autograd.Function,), methods))


def _register_branch(name: str, num_tensors: int) -> None:
    backward = getattr(_ops, f"{name}_bwd").default
    _register(name, _branch_backward(backward, num_tensors), _setup_branch(num_tensors))


def register() -> None:
    """Registers derivatives and refusals, once the operator library is loaded."""
    # Tensor inputs: q, k, v, then compressed: cu_q, cu_k, cu_cmp, q_offset; selected: topk_idx,
    # block_start, block_entry, cu_q, cu_k, q_offset; window: cu_q, cu_k, q_offset.
    _register_branch("compressed_attention", 7)
    _register_branch("selected_attention", 9)
    _register_branch("window_attention", 6)
    others = {
        "compress_kv": (_compress_kv_backward, _setup_compress_kv),
        "gate": (_gate_backward, _setup_gate),
        "native_sparse_attention": (
            _native_sparse_attention_backward,
            _setup_native_sparse_attention,
        ),
    }
    for name, (backward, setup) in others.items():
        _register(name, backward, setup)
    branches = ["compressed_attention", "selected_attention", "window_attention"]
    for name in [*others, *branches]:
        torch.library.register_autograd(f"fsattn::{name}_bwd", _refuse_second_derivative(name))
        for direction in ("fwd", "bwd"):
            torch.library.register_vmap(f"fsattn::{name}_{direction}", _refuse_vmap(name))
    for name in ("select_blocks", "build_block_index"):
        torch.library.register_vmap(f"fsattn::{name}", _refuse_vmap(name))
