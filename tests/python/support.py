"""What every test of the Python API shares: devices, input makers, gradients and one comparison."""

import itertools

import pytest
import torch

import fsattn

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


def _cuda_skip_reason():
    """Why the GPU variants cannot run here; None when they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if "cuda: not in this build" in fsattn.explain():
        return "fsattn was built without CUDA"
    return None


_REASON = _cuda_skip_reason()
CPU_TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CUDA_TYPES = [torch.bfloat16, torch.float16]
_CUDA_MARK = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
DEVICES = ["cpu", pytest.param("cuda", marks=_CUDA_MARK)]


def name_of(dtype):
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def device_types(cpu_types=CPU_TYPES):
    """Every pair (device, dtype) that the library serves."""
    pairs = [pytest.param("cpu", t, id=f"cpu-{name_of(t)}") for t in cpu_types]
    pairs += [
        pytest.param("cuda", t, id=f"cuda-{name_of(t)}", marks=_CUDA_MARK) for t in CUDA_TYPES
    ]
    return pairs


def cu_seqlens(lengths, device="cpu"):
    """int32 [B + 1] from the lengths of the sequences."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def randn(*shape, dtype=torch.float64, device="cpu", seed=0, scale=1.0):
    """Normal numbers that are the same on every device and exactly representable in dtype."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return values.to(dtype).to(device)


STRIDE_STYLES = ["contiguous", "heads_first", "sliced", "fused"]


def restride(x, style):
    """The same values in another memory layout; memory that no view may read holds NaN.

    heads_first: stored [H, T, D]. sliced: every row is a slice of a longer one. fused: x is one of
    three parts of a common buffer, as after a fused projection.
    """
    if style == "contiguous":
        return x.detach().clone()
    tokens, heads, dim = x.shape
    if style == "heads_first":
        return x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    if style == "sliced":
        buffer = x.new_full((tokens, heads + 1, dim + 16), float("nan"))
        view = buffer[:, 1:, 8 : 8 + dim]
    elif style == "fused":
        buffer = x.new_full((tokens, 3, heads, dim), float("nan"))
        view = buffer[:, 1]
    else:
        raise ValueError(style)
    view.copy_(x.detach())
    return view


def random_topk_idx(heads_kv, lens_q, lens_k, block_size, topk, seed=0, wild=True):
    """Random rows of block ids: causal ids, and if wild also repeats, -1 and ids out of range."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for len_q, len_k in zip(lens_q, lens_k, strict=True):
        blocks = max(1, -(-len_k // block_size))
        ids = torch.randint(0, blocks, (heads_kv, len_q, topk), generator=generator)
        if wild:
            odd = torch.tensor([-1, -1, -2, blocks, blocks + 7, INT_MAX, INT_MIN])
            pick = torch.randint(0, len(odd), ids.shape, generator=generator)
            take = torch.rand(ids.shape, generator=generator) < 0.3
            ids = torch.where(take, odd[pick], ids)
        rows.append(ids)
    return torch.cat(rows, 1).to(torch.int32)


def grads_of(outputs, inputs, douts):
    """Gradients of sum(out * dout) for every input; zeros where an input has no influence."""
    pairs = [(o, d) for o, d in zip(outputs, douts, strict=True) if d is not None]
    used = [(o, d) for o, d in pairs if o.requires_grad]
    if not used:
        return [torch.zeros_like(x) for x in inputs]
    outs, ds = zip(*used, strict=True)
    found = torch.autograd.grad(outs, inputs, ds, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def run_with_grads(fn, inputs, douts):
    """fn(*inputs) -> tuple of outputs. Returns (detached outputs, gradients). Keeps the strides."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = fn(*leaves)
    grads = grads_of(outputs, leaves, douts)
    return [o.detach() for o in outputs], grads


def convert(tensors, dtype):
    """The tensors on the CPU in dtype."""
    return [None if x is None else x.detach().cpu().to(dtype) for x in tensors]


def _worst(error):
    flat = int(error.flatten().argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))


def _rms(x):
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def check(name, found, truth, same=None, *, unit=None, slack=0.0, factor=2.0):
    """Asserts that `found` is as close to the fp64 `truth` as the contract asks.

    fp64: 1e-10 of the largest value. Other dtypes: at most `factor` times the error of `same`, the
    same computation done by PyTorch in the same dtype, plus the rounding of the result itself.
    `unit` is the size of the terms that were added up where they may cancel; default: the largest
    result. `slack` is an absolute error that no arithmetic on these inputs avoids.
    Infinities must agree, NaN is never right. Says where the worst value is.
    """
    assert found.shape == truth.shape, (
        f"{name}: shape {tuple(found.shape)}, not {tuple(truth.shape)}"
    )
    eps = torch.finfo(found.dtype).eps
    found64, truth = found.detach().cpu().double(), truth.detach().cpu().double()
    assert not found64.isnan().any(), (
        f"{name}: {int(found64.isnan().sum())} NaN of {found64.numel()}"
    )
    infinite = truth.isinf()
    assert torch.equal(found64[infinite], truth[infinite]), f"{name}: infinities differ"
    assert torch.equal(found64.isinf(), infinite), f"{name}: not finite where the truth is"
    if truth.numel() == 0 or bool(infinite.all()):
        return
    truth = torch.where(infinite, 0.0, truth)
    error = (torch.where(infinite, 0.0, found64) - truth).abs()
    unit = float(truth.abs().max()) if unit is None else float(unit)
    if found.dtype == torch.float64:
        allowed, allowed_rms, same_error = 1e-10 * max(unit, 1.0), float("inf"), None
    else:
        same_error = (torch.where(infinite, 0.0, same.detach().cpu().double()) - truth).abs()
        same_error = torch.where(same_error.isfinite(), same_error, 0.0)
        # fp32: the largest error is the luck of the order of summation, so a few units in the last
        # place (1e-6 of the largest value) are free there, and the rms carries the factor.
        ulps, rms_ulps = (8, 1) if found.dtype == torch.float32 else (0.5, 0.5)
        allowed = factor * float(same_error.max()) + ulps * eps * unit + slack
        allowed_rms = factor * _rms(same_error) + rms_ulps * eps * max(_rms(truth), unit / 4)
        allowed_rms += slack / 32
    at = _worst(error)
    report = (
        f"{name} [{name_of(found.dtype)}] at {at}: found {found64[at]:.9g}, truth {truth[at]:.9g}, "
        f"error {error[at]:.3g}, allowed {allowed:.3g}, ratio {float(error[at]) / max(allowed, 1e-300):.3g}"
    )
    if same_error is not None:
        report += f"; PyTorch's largest error {float(same_error.max()):.3g}; rms {_rms(error):.3g}"
        report += f" of {allowed_rms:.3g}"
    assert float(error[at]) <= allowed, report
    assert _rms(error) <= allowed_rms, report


def assert_same_bits(name, a, b):
    """Equal shape, dtype and bits (NaN equals NaN, -0 differs from 0)."""
    assert a.shape == b.shape and a.dtype == b.dtype, (
        f"{name}: {a.shape} {a.dtype}, {b.shape} {b.dtype}"
    )
    if not a.is_floating_point():
        assert torch.equal(a, b), f"{name}: integers differ"
        return
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    differs = a.contiguous().view(bits) != b.contiguous().view(bits)
    if bool(differs.any()):
        at = _worst(differs.int())
        raise AssertionError(
            f"{name}: {int(differs.sum())} bits differ, at {at}: {a[at]} and {b[at]}"
        )
