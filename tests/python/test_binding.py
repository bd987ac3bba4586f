"""The binding: types, errors, layouts, out=, explain, and one library file under every PyTorch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import DEVICES, assert_same_bits, cu_seqlens, randn, random_topk_idx

import fsattn

LENS = [40, 0, 23]
TOTAL = sum(LENS)


def qkv(device="cpu", dtype=torch.float32, total=TOTAL):
    like = {"device": device, "dtype": dtype}
    q = randn(total, 4, 16, seed=1, **like)
    return q, randn(total, 2, 16, seed=2, **like), randn(total, 2, 8, seed=3, **like)


def window(q, k, v, cu=None, **changes):
    options = {"window_size": 8, **changes}
    return fsattn.window_attention(q, k, v, cu_seqlens(LENS) if cu is None else cu, **options)


def selected(q, k, v, topk_idx, **changes):
    options = {"block_size": 16, **changes}
    return fsattn.selected_attention(q, k, v, topk_idx, cu_seqlens(LENS), **options)


def ids():
    return random_topk_idx(2, LENS, LENS, 16, 3)


def select(q, k, **changes):
    cu = cu_seqlens(LENS)
    k_cmp, cu_cmp = fsattn.compress_kv(k, cu, kernel_size=16, kernel_stride=16)
    _, lse = fsattn.compressed_attention(
        q, k_cmp, k_cmp, cu, cu, cu_cmp, kernel_size=16, kernel_stride=16, return_lse=True
    )
    options = {"kernel_size": 16, "kernel_stride": 16, "block_size": 16, "topk": 4, **changes}
    return fsattn.select_blocks(q, k_cmp, lse, cu, cu, cu_cmp, **options)


# What is wrong, the exception, and words that its message must have: the argument and the value.
WRONG = {
    "list for a tensor": (lambda q, k, v: window(q.tolist(), k, v), TypeError, ["q:", "list"]),
    "float window_size": (
        lambda q, k, v: window(q, k, v, window_size=1.5),
        TypeError,
        ["window_size:", "float"],
    ),
    "bool window_size": (
        lambda q, k, v: window(q, k, v, window_size=True),
        TypeError,
        ["window_size:", "bool"],
    ),
    "negative window_size": (
        lambda q, k, v: window(q, k, v, window_size=-1),
        ValueError,
        ["window_size:", "-1"],
    ),
    "int64 cu_seqlens": (
        lambda q, k, v: window(q, k, v, cu_seqlens(LENS).long()),
        TypeError,
        ["cu_seqlens_q:", "int32", "int64"],
    ),
    "no cu_seqlens": (
        lambda q, k, v: fsattn.window_attention(q, k, v, window_size=8),
        ValueError,
        ["cu_seqlens_q:", "None"],
    ),
    "cu_seqlens for a batch": (
        lambda q, k, v: window(q[None], k[None], v[None]),
        ValueError,
        ["cu_seqlens_q:", "batched"],
    ),
    "mixed layouts": (lambda q, k, v: window(q[None], k, v), ValueError, ["k:", "4", "3"]),
    "two dimensions": (
        lambda q, k, v: window(q[0], k[0], v[0]),
        ValueError,
        ["q:", "dimensions", "2"],
    ),
    "cu_seqlens past the end": (
        lambda q, k, v: window(q, k, v, cu_seqlens([40, 30])),
        ValueError,
        ["cu_seqlens_q:", "70", str(TOTAL)],
    ),
    "softmax_scale of zero": (
        lambda q, k, v: window(q, k, v, softmax_scale=0.0),
        ValueError,
        ["softmax_scale:", "0"],
    ),
    "negative softmax_scale": (
        lambda q, k, v: window(q, k, v, softmax_scale=-1.0),
        ValueError,
        ["softmax_scale:", "-1"],
    ),
    "softmax_scale as text": (
        lambda q, k, v: window(q, k, v, softmax_scale="1"),
        TypeError,
        ["softmax_scale:", "str"],
    ),
    "mixed dtypes": (lambda q, k, v: window(q, k.half(), v), TypeError, ["k:", "float16"]),
    "integer q": (lambda q, k, v: window(q.int(), k, v), TypeError, ["q:", "int32"]),
    "complex q": (
        lambda q, k, v: window(q.to(torch.complex64), k, v),
        TypeError,
        ["q:", "complex64"],
    ),
    "head_dim of 12": (
        lambda q, k, v: window(q[..., :12], k[..., :12], v),
        ValueError,
        ["q:", "head_dim", "12"],
    ),
    "last dimension strided": (
        lambda q, k, v: window(q.repeat(1, 1, 2)[..., ::2], k, v),
        ValueError,
        ["q:", "contiguous", "2"],
    ),
    "three heads for two": (lambda q, k, v: window(q[:, :3], k, v), ValueError, ["q:", "3"]),
    "int64 topk_idx": (
        lambda q, k, v: selected(q, k, v, ids().long()),
        TypeError,
        ["topk_idx:", "int32", "int64"],
    ),
    "float topk_idx": (
        lambda q, k, v: selected(q, k, v, ids().float()),
        TypeError,
        ["topk_idx:", "int32", "float32"],
    ),
    "block_size of 24": (
        lambda q, k, v: selected(q, k, v, ids(), block_size=24),
        ValueError,
        ["block_size:", "24"],
    ),
    "block_index of one tensor": (
        lambda q, k, v: selected(q, k, v, ids(), block_index=ids()),
        TypeError,
        ["block_index:", "Tensor"],
    ),
    "negative workspace_cap": (
        lambda q, k, v: selected(q, k, v, ids(), workspace_cap=-1),
        ValueError,
        ["workspace_cap:", "-1"],
    ),
    "float topk": (lambda q, k, v: select(q, k, topk=4.0), TypeError, ["topk:", "float"]),
    "topk of 0": (lambda q, k, v: select(q, k, topk=0), ValueError, ["topk:", "0"]),
    "unknown group_reduce": (
        lambda q, k, v: select(q, k, group_reduce="mean"),
        ValueError,
        ["group_reduce:", "'sum'", "'mean'"],
    ),
    "numeric group_reduce": (
        lambda q, k, v: select(q, k, group_reduce=0),
        TypeError,
        ["group_reduce:", "int"],
    ),
    "unknown kind": (
        lambda q, k, v: fsattn.compress_kv(
            k, cu_seqlens(LENS), kernel_size=16, kernel_stride=16, kind="max"
        ),
        ValueError,
        ["kind:", "'mean'", "'max'"],
    ),
    "weight for the mean": (
        lambda q, k, v: fsattn.compress_kv(
            k, cu_seqlens(LENS), kernel_size=16, kernel_stride=16, weight=torch.ones(2, 16)
        ),
        ValueError,
        ["weight:"],
    ),
    "unknown activation": (
        lambda q, k, v: fsattn.gate(q, q, q, torch.ones(TOTAL, 3), activation="tanh"),
        ValueError,
        ["activation:", "'tanh'"],
    ),
    "two gates": (
        lambda q, k, v: fsattn.gate(q, q, q, torch.ones(TOTAL, 2)),
        ValueError,
        ["gates:", "2"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_argument_the_rule_and_the_value(case):
    call, kind, words = WRONG[case]
    with pytest.raises(kind) as caught:
        call(*qkv())
    text = str(caught.value)
    assert type(caught.value) is kind
    assert all(word in text for word in words), text
    assert "\n" not in text and ".cpp" not in text and "fsattn::" not in text, text


def test_the_errors_of_others_keep_their_type():
    """An error that is not the library's is passed on, also when it follows one that is."""
    q, k, v = qkv()
    with pytest.raises(ValueError):
        window(q, k, v, window_size=-1)
    with pytest.raises(RuntimeError) as caught:
        fsattn._library.call(torch.ops.aten.mm.default, q[:, 0], q[:, 0])
    assert "window_size" not in str(caught.value)


def test_meta_and_other_devices_are_refused_or_traced():
    q, k, v = (x.to("meta") for x in qkv())
    o = fsattn.window_attention(q, k, v, cu_seqlens(LENS).to("meta"), window_size=8)
    assert o.is_meta and o.shape == (TOTAL, 4, 8)


def test_out_is_refused_when_a_gradient_is_needed():
    q, k, v = qkv()
    out = torch.empty(TOTAL, 4, 8)
    with pytest.raises(ValueError, match="out:"):
        selected(q.requires_grad_(), k, v, ids(), out=out)
    with torch.no_grad():
        assert selected(q, k, v, ids(), out=out) is out


def test_out_of_a_wrong_shape_or_type():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="out"):
        selected(q, k, v, ids(), out=torch.empty(TOTAL, 4, 16))
    with pytest.raises(TypeError, match="out"):
        selected(q, k, v, ids(), out=torch.empty(TOTAL, 4, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="out"):
        selected(q, k, v, ids(), out=q[..., :8])


@pytest.mark.parametrize("device", DEVICES)
def test_out_strided_and_batched(device):
    """out= may be a view; the memory around it stays."""
    q, k, v = (x[:40].unflatten(0, (2, 20)) for x in qkv(device, torch.bfloat16))
    rows = random_topk_idx(2, [20, 20], [20, 20], 16, 2).to(device)
    rows = rows.unflatten(1, (2, 20)).transpose(0, 1)
    want, want_lse = fsattn.selected_attention(q, k, v, rows, block_size=16, return_lse=True)
    buffer = torch.full((2, 20, 5, 16), 7.0, dtype=torch.bfloat16, device=device)
    out = buffer[:, :, 1:, :8]
    got, lse = fsattn.selected_attention(q, k, v, rows, block_size=16, out=out, return_lse=True)
    assert got is out
    assert_same_bits("out", out, want)
    assert_same_bits("lse", lse, want_lse)
    assert (buffer[:, :, 0] == 7).all() and (buffer[..., 8:] == 7).all()


@pytest.mark.parametrize("device", DEVICES)
def test_batched_tensors_equal_packed_ones(device):
    """Every function, [B, T, H, D] against packed, bit for bit."""
    batch, length = 3, 50
    total = batch * length
    cu = cu_seqlens([length] * batch, device)
    q, k, v = qkv(device, torch.bfloat16, total)
    logits = randn(total, 4, 3, device=device, dtype=torch.bfloat16, seed=4)
    sizes = {"kernel_size": 16, "kernel_stride": 8}
    blocks = {"block_size": 16, "topk": 3}

    def run(q, k, v, logits, cus=(), **cmp):
        k_cmp, cu_cmp = fsattn.compress_kv(k, *cus[:1], **sizes)
        v_cmp, _ = fsattn.compress_kv(v, *cus[:1], **sizes)
        cmp_cus = (*cus, cu_cmp) if cus else ()
        o_cmp, lse = fsattn.compressed_attention(
            q, k_cmp, v_cmp, *cmp_cus, **sizes, return_lse=True
        )
        rows = fsattn.select_blocks(q, k_cmp, lse, *cmp_cus, **sizes, **blocks)
        index = fsattn.build_block_index(rows, *cus, block_size=16)
        o_sel = fsattn.selected_attention(q, k, v, rows, *cus, block_size=16, block_index=index)
        o_win = fsattn.window_attention(q, k, v, *cus, window_size=9)
        o = fsattn.gate(o_cmp, o_sel, o_win, logits)
        whole, found = fsattn.native_sparse_attention(
            q, k, v, k_cmp, v_cmp, logits, *cmp_cus, **sizes, **blocks,
            window_size=9, return_topk_idx=True,
        )  # fmt: skip
        return o, lse, rows, whole, found

    packed = run(q, k, v, logits, (cu, cu))
    batched = run(*(x.unflatten(0, (batch, length)) for x in (q, k, v, logits)))
    for name, axis, a, b in zip(
        ["o", "lse", "topk_idx", "nsa", "nsa topk_idx"],
        [0, 1, 1, 0, 1],
        packed,
        batched,
        strict=True,
    ):
        a = a.unflatten(axis, (batch, length))
        assert_same_bits(name, b, a.transpose(0, 1) if axis else a)


def test_native_returns_what_is_asked_for():
    q, k, v = qkv()
    cu = cu_seqlens(LENS)
    sizes = {"kernel_size": 16, "kernel_stride": 16}
    k_cmp, cu_cmp = fsattn.compress_kv(k, cu, **sizes)
    v_cmp, _ = fsattn.compress_kv(v, cu, **sizes)
    gates = torch.rand(TOTAL, 3)

    def run(**options):
        return fsattn.native_sparse_attention(
            q, k, v, k_cmp, v_cmp, gates, cu, cu, cu_cmp, **sizes, block_size=16, topk=3,
            window_size=4, **options,
        )  # fmt: skip

    o, rows, lses = run(return_topk_idx=True, return_lse=True)
    assert_same_bits("o", run(), o)
    assert rows.shape == (2, TOTAL, 3) and [x.shape for x in lses] == [(4, TOTAL)] * 3
    mine = ids()
    brought, same = run(topk_idx=mine, return_topk_idx=True)
    assert same is mine and not torch.equal(brought, o)
    assert_same_bits("brought its own", run(topk_idx=rows), o)


def test_explain_tells_without_running():
    q, k, v = qkv()
    text = fsattn.explain(fsattn.window_attention, q, k, v, cu_seqlens(LENS), window_size=8)
    assert text and text == fsattn.explain(
        "window_attention", q, k, v, cu_seqlens(LENS), window_size=8
    )
    # The backward is explained when it would run; a composition is explained step by step.
    longer = fsattn.explain(lambda: window(q.requires_grad_(), k, v))
    assert longer.startswith(text)
    with_grad = fsattn.explain(window, q, k, v)
    assert with_grad.startswith(text) and len(with_grad) > len(text)
    # compress_kv, compressed_attention and select_blocks, of which the last two read unset memory.
    steps = fsattn.explain(select, q.detach(), k)
    assert len(steps.splitlines()) >= 3
    # Nothing is left switched on.
    assert_same_bits("o", window(q.detach(), k, v), window(q.detach(), k, v))
    assert window(q.detach(), k, v).abs().sum() > 0


def test_explain_of_nothing_and_of_the_unknown():
    assert fsattn.__version__ in fsattn.explain()
    with pytest.raises(ValueError, match="fn_or_name"):
        fsattn.explain(lambda: 1)
    with pytest.raises(ValueError, match="'dense'"):
        fsattn.explain("dense")
    with pytest.raises(TypeError, match="fn_or_name"):
        fsattn.explain(3)


def test_explain_reports_errors_and_recovers():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="window_size"):
        fsattn.explain(window, q, k, v, window_size=-1)
    assert window(q, k, v).isfinite().all()


OTHER = os.environ.get("FSATTN_OTHER_PYTHON")

OTHER_PROGRAM = """
import torch, fsattn
torch.manual_seed(0)
cu = torch.tensor([0, 40, 63], dtype=torch.int32)
q = torch.randn(63, 4, 16, dtype=torch.float64, requires_grad=True)
k, v = torch.randn(63, 2, 16, dtype=torch.float64), torch.randn(63, 2, 8, dtype=torch.float64)
o = torch.compile(lambda: fsattn.window_attention(q, k, v, cu, window_size=8), fullgraph=True)()
o.square().sum().backward()
try:
    fsattn.window_attention(q, k, v.half(), cu, window_size=8)
except TypeError as error:
    assert "v:" in str(error), error
else:
    raise AssertionError("no error")
print(f"{float(o.sum()):.12f} {float(q.grad.sum()):.12f}")
"""


def _run_program(python):
    package = str(Path(fsattn.__file__).resolve().parent.parent)
    done = subprocess.run(
        [python, "-c", OTHER_PROGRAM],
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-2:]


@pytest.mark.skipif(OTHER is None, reason="FSATTN_OTHER_PYTHON names no other interpreter")
def test_the_same_file_loads_under_another_pytorch():
    assert _run_program(OTHER) == _run_program(sys.executable)
