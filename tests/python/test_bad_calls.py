"""Wrong calls, one a row: operator, what is wrong, exception, and what the message must say.

Every message names the argument and the value found. Types: wrong dtype, device or Python type is a
TypeError, a wrong value or shape a ValueError, valid but unsupported a NotImplementedError.
"""

import math

import pytest
import torch
from support import DEVICES, randn

import fsattn

F32 = torch.float32
TOKENS, ROWS = 64, 4


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


CU = _int32(0, 40, TOKENS)
CU_CMP = _int32(0, 1, 1)  # windows of sequences of 40 and 24 tokens


def _tensor(*shape):
    return randn(*shape, dtype=F32)


def valid_call(op):
    """Keyword arguments of a correct call."""
    seq = {"cu_seqlens_q": CU, "cu_seqlens_k": CU}
    qkv = {"q": _tensor(TOKENS, 4, 16), "k": _tensor(TOKENS, 2, 16), "v": _tensor(TOKENS, 2, 24)}
    cmp = {"k_cmp": _tensor(ROWS, 2, 16), "v_cmp": _tensor(ROWS, 2, 24)}
    windows = {"kernel_size": 32, "kernel_stride": 16}
    ids = torch.zeros(2, TOKENS, 3, dtype=torch.int32)
    blocks = {"block_size": 32, "topk": 3, "init_blocks": 1, "local_blocks": 1}
    branch = _tensor(TOKENS, 4, 24)
    return {
        "selected_attention": {**qkv, "topk_idx": ids, "block_size": 32, **seq},
        "window_attention": {**qkv, "window_size": 7, **seq},
        "build_block_index": {"topk_idx": ids, "block_size": 32, **seq},
        "compress_kv": {"x": _tensor(TOKENS, 2, 16), "cu_seqlens": CU, **windows},
        "compressed_attention": {
            "q": qkv["q"], **cmp, **seq, "cu_seqlens_cmp": CU_CMP, **windows,
        },
        "select_blocks": {
            "q": qkv["q"],
            "k_cmp": cmp["k_cmp"],
            "lse": _tensor(4, TOKENS),
            **seq,
            "cu_seqlens_cmp": CU_CMP,
            **windows,
            **blocks,
        },
        "gate": {
            "o_cmp": branch, "o_sel": branch, "o_win": branch, "gates": _tensor(TOKENS, 4, 3),
        },
        "native_sparse_attention": {
            **qkv,
            **cmp,
            "gates": _tensor(TOKENS, 4, 3),
            **seq,
            "cu_seqlens_cmp": CU_CMP,
            **windows,
            **blocks,
            "window_size": 7,
        },
    }[op]  # fmt: skip


SEL, WIN, IDX = "selected_attention", "window_attention", "build_block_index"
CMP, ATT, PICK = "compress_kv", "compressed_attention", "select_blocks"
GATE, NSA = "gate", "native_sparse_attention"
WEIGHT = {"kind": "weighted", "weight": _tensor(2, 32)}
NAN, INF = math.nan, math.inf
HALF = torch.float16

# (operator, changed arguments, exception, pattern)
BAD = [
    # Python types
    (SEL, {"q": [1.0]}, TypeError, r"q\b.*list"),
    (SEL, {"k": None}, TypeError, r"k\b.*None"),
    (SEL, {"topk_idx": None}, TypeError, r"topk_idx.*None"),
    (SEL, {"block_size": "32"}, TypeError, r"block_size.*(str|'32')"),
    (SEL, {"block_size": 32.0}, TypeError, r"block_size.*(float|32\.0)"),
    (SEL, {"cu_seqlens_q": [0, 40, 64]}, TypeError, r"cu_seqlens_q.*list"),
    (SEL, {"softmax_scale": "1"}, TypeError, r"softmax_scale.*(str|'1')"),
    (WIN, {"window_size": None}, TypeError, r"window_size.*None"),
    (WIN, {"window_size": 7.5}, TypeError, r"window_size.*(float|7\.5)"),
    (GATE, {"gates": 0.5}, TypeError, r"gates.*float"),
    (CMP, {"kernel_size": 32.0}, TypeError, r"kernel_size.*(float|32\.0)"),
    (PICK, {"topk": "16"}, TypeError, r"topk.*(str|'16')"),
    # dtypes
    (SEL, {"q": torch.zeros(TOKENS, 4, 16, dtype=torch.int32)}, TypeError, r"q\b.*(int32|Int)"),
    (SEL, {"q": torch.zeros(TOKENS, 4, 16, dtype=torch.complex64)}, TypeError, r"q\b.*[Cc]omplex"),
    (SEL, {"k": _tensor(TOKENS, 2, 16).half()}, TypeError, r"k\b.*(float16|fp16|[Hh]alf)"),
    (SEL, {"v": _tensor(TOKENS, 2, 24).bfloat16()}, TypeError, r"v\b.*(bfloat16|bf16)"),
    (SEL, {"topk_idx": torch.zeros(2, 64, 3, dtype=torch.int64)}, TypeError, r"topk_idx.*int64"),
    (SEL, {"cu_seqlens_q": CU.long()}, TypeError, r"cu_seqlens_q.*int64"),
    (SEL, {"cu_seqlens_k": CU.float()}, TypeError, r"cu_seqlens_k.*(float32|fp32)"),
    (SEL, {"q_offset": torch.zeros(2)}, TypeError, r"q_offset.*(float32|fp32)"),
    (WIN, {"k": _tensor(TOKENS, 2, 16).double()}, TypeError, r"k\b.*(float64|fp64)"),
    (CMP, {"cu_seqlens": CU.long()}, TypeError, r"cu_seqlens.*int64"),
    (CMP, {**WEIGHT, "weight": WEIGHT["weight"].half()}, TypeError, r"weight.*(float16|fp16)"),
    (CMP, {"pos_emb": _tensor(2, 32, 16).double()}, TypeError, r"pos_emb.*(float64|fp64)"),
    (ATT, {"cu_seqlens_cmp": CU_CMP.long()}, TypeError, r"cu_seqlens_cmp.*int64"),
    (PICK, {"lse": _tensor(4, TOKENS).half()}, TypeError, r"lse.*(float16|fp16)"),
    (GATE, {"o_sel": _tensor(TOKENS, 4, 24).half()}, TypeError, r"o_sel.*(float16|fp16)"),
    (GATE, {"gates": _tensor(TOKENS, 4, 3).double()}, TypeError, r"gates.*(float64|fp64)"),
    (NSA, {"v_cmp": _tensor(ROWS, 2, 24).half()}, TypeError, r"v_cmp.*(float16|fp16)"),
    # devices
    (SEL, {"k": _tensor(TOKENS, 2, 16).to("meta")}, TypeError, r"k\b.*meta"),
    (SEL, {"topk_idx": torch.zeros(2, TOKENS, 3, dtype=torch.int32, device="meta")}, TypeError,
     r"topk_idx.*meta"),
    (WIN, {"cu_seqlens_k": CU.to("meta")}, TypeError, r"cu_seqlens_k.*meta"),
    (GATE, {"o_win": _tensor(TOKENS, 4, 24).to("meta")}, TypeError, r"o_win.*meta"),
    # shapes
    (SEL, {"q": _tensor(TOKENS, 16)}, ValueError, r"q\b.*(2|\[64, 16\])"),
    (SEL, {"q": _tensor(TOKENS, 4, 12), "k": _tensor(TOKENS, 2, 12)}, ValueError, r"head_dim.*12"),
    (SEL, {"q": _tensor(64, 4, 264), "k": _tensor(64, 2, 264)}, ValueError, r"head_dim.*264"),
    (SEL, {"q": _tensor(TOKENS, 4, 0), "k": _tensor(TOKENS, 2, 0)}, ValueError, r"head_dim.*0"),
    (SEL, {"v": _tensor(TOKENS, 2, 20)}, ValueError, r"head_dim.*20"),
    (SEL, {"v": _tensor(TOKENS, 2, 264)}, ValueError, r"head_dim.*264"),
    (SEL, {"k": _tensor(TOKENS, 2, 24)}, ValueError, r"k\b.*24"),
    (SEL, {"k": _tensor(TOKENS, 3, 16)}, ValueError, r"(k|q|v|head).*3"),
    (SEL, {"q": _tensor(TOKENS, 5, 16)}, ValueError, r"q\b.*5"),
    (SEL, {"q": _tensor(TOKENS, 130, 16)}, ValueError, r"(group|q).*(65|130)"),
    (SEL, {"q": _tensor(TOKENS, 1, 16)}, ValueError, r"q\b.*1"),
    (SEL, {"q": _tensor(TOKENS, 0, 16)}, ValueError, r"q\b.*0"),
    (SEL, {"v": _tensor(TOKENS - 1, 2, 24)}, ValueError, r"v\b.*63"),
    (SEL, {"topk_idx": torch.zeros(4, TOKENS, 3, dtype=torch.int32)}, ValueError, r"topk_idx.*4"),
    (SEL, {"topk_idx": torch.zeros(2, 63, 3, dtype=torch.int32)}, ValueError, r"topk_idx.*63"),
    (SEL, {"topk_idx": torch.zeros(2, TOKENS, 0, dtype=torch.int32)}, ValueError, r"topk.*0"),
    (SEL, {"topk_idx": torch.zeros(2, TOKENS, 129, dtype=torch.int32)}, ValueError, r"topk.*129"),
    (SEL, {"topk_idx": torch.zeros(64, 3, dtype=torch.int32)}, ValueError, r"topk_idx.*(2|64)"),
    (SEL, {"cu_seqlens_q": _int32(0, TOKENS)}, ValueError, r"cu_seqlens.*(2|3)"),
    (SEL, {"cu_seqlens_q": CU[None]}, ValueError, r"cu_seqlens_q.*(2|\[1, 3\])"),
    (SEL, {"cu_seqlens_q": CU[:0], "cu_seqlens_k": CU[:0]}, ValueError, r"cu_seqlens.*(0|none)"),
    (SEL, {"q_offset": _int32(0, 0, 0)}, ValueError, r"q_offset.*3"),
    (SEL, {"out": _tensor(TOKENS, 4, 16)}, ValueError, r"(out|o)\b.*16"),
    (CMP, {"x": _tensor(TOKENS, 2, 20)}, ValueError, r"(x|head_dim).*20"),
    (CMP, {"kind": "weighted"}, ValueError, r"weight.*(None|absent|missing|none)"),
    (CMP, {"kind": "linear"}, ValueError, r"weight.*(None|absent|missing|none)"),
    (CMP, {"kind": "mean", "weight": _tensor(2, 32)}, ValueError, r"weight.*mean"),
    (CMP, {"kind": "weighted", "weight": _tensor(2, 31)}, ValueError, r"weight.*31"),
    (CMP, {"kind": "softmax", "weight": _tensor(3, 32)}, ValueError, r"weight.*3"),
    (CMP, {"kind": "softmax", "weight": _tensor(2, 512, 16)}, ValueError, r"weight.*(3|512)"),
    (CMP, {"kind": "linear", "weight": _tensor(2, 32)}, ValueError, r"weight.*(2|32)"),
    (CMP, {"kind": "linear", "weight": _tensor(2, 512, 8)}, ValueError, r"weight.*8"),
    (CMP, {"pos_emb": _tensor(2, 31, 16)}, ValueError, r"pos_emb.*31"),
    (ATT, {"v_cmp": _tensor(ROWS + 1, 2, 24)}, ValueError, r"(v|v_cmp)\b.*5"),
    (ATT, {"k_cmp": _tensor(ROWS, 2, 24)}, ValueError, r"(k|k_cmp)\b.*24"),
    (ATT, {"cu_seqlens_cmp": _int32(0, 2)}, ValueError, r"cu_seqlens.*(2|3)"),
    (PICK, {"lse": _tensor(TOKENS, 4)}, ValueError, r"lse.*64"),
    (GATE, {"gates": _tensor(TOKENS, 4, 2)}, ValueError, r"gates.*2"),
    (GATE, {"gates": _tensor(TOKENS, 3, 3)}, ValueError, r"gates.*3"),
    (GATE, {"gates": _tensor(TOKENS - 1, 3)}, ValueError, r"gates.*63"),
    (GATE, {"o_win": _tensor(TOKENS, 4, 16)}, ValueError, r"o_win.*16"),
    (NSA, {"gates": _tensor(TOKENS, 4)}, ValueError, r"gates.*4"),
    (NSA, {"k_cmp": _tensor(ROWS, 1, 16)}, ValueError, r"[kv]_cmp.*1"),
    # strides
    (SEL, {"q": _tensor(64, 16, 4).transpose(1, 2)}, ValueError, r"q\b.*(contiguous|stride).*4"),
    (GATE, {"o_cmp": _tensor(64, 24, 4).transpose(1, 2)}, ValueError, r"o_cmp.*(contig|stride).*4"),
    # values
    (SEL, {"block_size": 48}, ValueError, r"block_size.*48"),
    (SEL, {"block_size": 0}, ValueError, r"block_size.*0"),
    (SEL, {"block_size": -64}, ValueError, r"block_size.*-64"),
    (SEL, {"block_size": 512}, ValueError, r"block_size.*512"),
    (SEL, {"softmax_scale": NAN}, ValueError, r"softmax_scale.*nan"),
    (SEL, {"softmax_scale": INF}, ValueError, r"softmax_scale.*inf"),
    (SEL, {"softmax_scale": -0.5}, ValueError, r"softmax_scale.*-0\.5"),
    (SEL, {"max_seqlen_q": -1}, ValueError, r"max_seqlen_q.*-1"),
    (SEL, {"max_seqlen_k": -3}, ValueError, r"max_seqlen_k.*-3"),
    (SEL, {"max_seqlen_q": 2**40}, ValueError, r"max_seqlen_q.*1099511627776"),
    (SEL, {"cu_seqlens_q": _int32(0, 70, TOKENS)}, ValueError, r"cu_seqlens_q.*(70|64|-6)"),
    (SEL, {"cu_seqlens_k": _int32(0, 40, 63)}, ValueError, r"cu_seqlens_k.*63"),
    (SEL, {"cu_seqlens_k": _int32(0, 40, 65)}, ValueError, r"cu_seqlens_k.*65"),
    (SEL, {"cu_seqlens_q": _int32(1, 40, TOKENS)}, ValueError, r"cu_seqlens_q.*1"),
    (SEL, {"cu_seqlens_q": _int32(0, -5, TOKENS)}, ValueError, r"cu_seqlens_q.*-5"),
    (SEL, {"max_seqlen_q": 39}, ValueError, r"max_seqlen_q.*(39|40)"),
    (WIN, {"window_size": -1}, ValueError, r"window_size.*-1"),
    (WIN, {"max_seqlen_k": 10}, ValueError, r"max_seqlen_k.*(10|40)"),
    (IDX, {"block_size": 17}, ValueError, r"block_size.*17"),
    (IDX, {"cu_seqlens_q": _int32(0, 40, 63)}, ValueError, r"cu_seqlens_q.*63"),
    (CMP, {"kind": "median"}, ValueError, r"kind.*median"),
    (CMP, {"kernel_size": 0}, ValueError, r"kernel_size.*0"),
    (CMP, {"kernel_size": -32}, ValueError, r"kernel_size.*-32"),
    (CMP, {"kernel_stride": 0}, ValueError, r"kernel_stride.*0"),
    (CMP, {"kernel_stride": 12}, ValueError, r"kernel_(stride|size).*12"),
    (CMP, {"kernel_size": 16, "kernel_stride": 32}, ValueError, r"kernel_(stride|size).*(16|32)"),
    (CMP, {"cu_seqlens": _int32(0, 80, TOKENS)}, ValueError, r"cu_seqlens.*(80|64|-16)"),
    (CMP, {"max_seqlen": -1}, ValueError, r"max_seqlen.*-1"),
    (ATT, {"kernel_stride": 5}, ValueError, r"kernel_(stride|size).*5"),
    (ATT, {"cu_seqlens_cmp": _int32(0, 3, 9)}, ValueError, r"cu_seqlens_cmp.*(3|9)"),
    (ATT, {"cu_seqlens_cmp": _int32(0, 3, 2)}, ValueError, r"cu_seqlens_cmp.*(3|2|-1)"),
    (PICK, {"topk": 0}, ValueError, r"topk.*0"),
    (PICK, {"topk": 129}, ValueError, r"topk.*129"),
    (PICK, {"init_blocks": -1}, ValueError, r"init_blocks.*-1"),
    (PICK, {"local_blocks": -2}, ValueError, r"local_blocks.*-2"),
    (PICK, {"init_blocks": 2, "local_blocks": 2}, ValueError, r"(topk|_blocks).*(3|4)"),
    (PICK, {"block_size": 16, "kernel_stride": 32}, ValueError,
     r"(kernel_stride|block_size).*(32|16)"),
    (PICK, {"group_reduce": "mean"}, ValueError, r"group_reduce.*mean"),
    (PICK, {"score_dtype": "fp8"}, ValueError, r"score_dtype.*fp8"),
    (GATE, {"activation": "relu"}, ValueError, r"activation.*relu"),
    (NSA, {"activation": "tanh"}, ValueError, r"activation.*tanh"),
    (NSA, {"window_size": -2}, ValueError, r"window_size.*-2"),
    (NSA, {"group_reduce": "median"}, ValueError, r"group_reduce.*median"),
    (NSA, {"topk": 200}, ValueError, r"topk.*200"),
    # numbers beyond what the library counts or computes with
    (WIN, {"window_size": 2**70}, ValueError, rf"window_size.*{2**70}"),
    (WIN, {"max_seqlen_q": 2**70}, ValueError, rf"max_seqlen_q.*{2**70}"),
    (SEL, {"workspace_cap": 2**70}, ValueError, rf"workspace_cap.*{2**70}"),
    (WIN, {"softmax_scale": 1e300}, ValueError, r"softmax_scale.*1e\+300"),
    (WIN, {"softmax_scale": 1e-300}, ValueError, r"softmax_scale.*1e-300"),
    (WIN, {"cu_seqlens_q": CU.to(torch.uint32)}, TypeError, r"cu_seqlens_q.*int32"),
    # missing arguments
    (SEL, {"cu_seqlens_q": None, "cu_seqlens_k": None}, ValueError, r"cu_seqlens_q"),
    (SEL, {"cu_seqlens_k": None, "k": _tensor(63, 2, 16), "v": _tensor(63, 2, 24)}, ValueError,
     r"cu_seqlens_k"),
    (WIN, {"cu_seqlens_q": None, "cu_seqlens_k": None}, ValueError, r"cu_seqlens_q"),
    (CMP, {"cu_seqlens": None}, ValueError, r"cu_seqlens"),
    (ATT, {"cu_seqlens_cmp": None}, ValueError, r"cu_seqlens_cmp"),
    (IDX, {"cu_seqlens_q": None, "cu_seqlens_k": None}, ValueError, r"cu_seqlens_q"),
]  # fmt: skip


def label(row):
    op, changes, *_ = row
    parts = []
    for name, value in changes.items():
        if isinstance(value, torch.Tensor):
            small = value.dtype == torch.int32 and value.ndim == 1 and value.device.type == "cpu"
            kind = str(value.dtype).removeprefix("torch.")
            value = value.tolist() if small else f"{value.device.type}.{kind}{list(value.shape)}"
        parts.append(f"{name}={value}")
    return f"{op}:{';'.join(parts)}".replace(" ", "")


@pytest.mark.parametrize("op", [SEL, WIN, IDX, CMP, ATT, PICK, GATE, NSA])
def test_the_unchanged_call_is_valid(op):
    getattr(fsattn, op)(**valid_call(op))


@pytest.mark.parametrize("row", BAD, ids=[label(row) for row in BAD])
def test_bad_call(row):
    op, changes, exception, pattern = row
    with pytest.raises(exception, match=pattern) as caught:
        getattr(fsattn, op)(**{**valid_call(op), **changes})
    assert type(caught.value) is exception


def test_the_table_is_long_enough():
    assert len(BAD) >= 60


@pytest.mark.parametrize("device", [DEVICES[1]])
@pytest.mark.parametrize("argument", ["k", "v", "topk_idx", "cu_seqlens_q", "cu_seqlens_k"])
def test_mixed_devices(argument, device):
    """One argument left on the CPU."""
    arguments = valid_call(SEL)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and name != argument:
            value = value.to(device)
            arguments[name] = value.bfloat16() if value.is_floating_point() else value
    if arguments[argument].is_floating_point():
        arguments[argument] = arguments[argument].bfloat16()
    with pytest.raises(TypeError, match=rf"{argument}.*cpu"):
        fsattn.selected_attention(**arguments)


@pytest.mark.parametrize("device", [DEVICES[1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_serves_16_bit_only(dtype, device):
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in valid_call(WIN).items()
    }
    for name in ("q", "k", "v"):
        arguments[name] = arguments[name].to(dtype)
    with pytest.raises((TypeError, NotImplementedError), match=r"q.*(float|fp)(32|64)"):
        fsattn.window_attention(**arguments)


def test_scales_at_the_ends_of_the_range():
    """float64 has no use for a limit; an int beyond every float is refused like infinity."""
    call = valid_call(WIN)
    for scale in (1e-37, 1e38):
        fsattn.window_attention(**call, softmax_scale=scale)
    wide = {name: x.double() if name in ("q", "k", "v") else x for name, x in call.items()}
    for scale in (1e-300, 1e300):
        assert fsattn.window_attention(**wide, softmax_scale=scale).isfinite().all()
    with pytest.raises(ValueError, match="softmax_scale"):
        fsattn.window_attention(**call, softmax_scale=10**400)


def test_unknown_keyword():
    with pytest.raises(TypeError, match="blocksize"):
        fsattn.selected_attention(**valid_call(SEL), blocksize=3)


def test_block_index_of_another_call():
    """An index whose shape does not fit is refused."""
    arguments = valid_call(SEL)
    for index in [(_int32(0), _int32(0)), (torch.zeros(2, 3, dtype=torch.int32),) * 2]:
        with pytest.raises((ValueError, TypeError), match=r"block_(index|start|entry)"):
            fsattn.selected_attention(**arguments, block_index=index)


def test_batched_layout_needs_equal_batches():
    q, k = _tensor(2, 8, 4, 16), _tensor(3, 8, 2, 16)
    ids = torch.zeros(2, 2, 8, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"k\b.*3"):
        fsattn.selected_attention(q, k, k, ids, block_size=16)


def test_batched_layout_takes_no_cu_seqlens():
    q, k = _tensor(1, 64, 4, 16), _tensor(1, 64, 2, 16)
    ids = torch.zeros(1, 2, 64, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens_q"):
        fsattn.selected_attention(q, k, k, ids, CU, CU, block_size=16)


def test_wrong_gradient_shape_is_refused():
    """torch.ops.fsattn checks what autograd would not: dout of the backward operator.

    PyTorch turns every exception of an operator that is called directly into a RuntimeError.
    """
    a = valid_call(SEL)
    o, lse = fsattn.selected_attention(**a, return_lse=True)
    call = torch.ops.fsattn.selected_attention_bwd
    tail = (None, None, CU, CU, None, 40, 40, 32, 0.25, 1 << 30)
    inputs = (a["q"], a["k"], a["v"], o, lse, a["topk_idx"])
    call(torch.ones_like(o), None, *inputs, *tail)
    with pytest.raises(RuntimeError, match=r"dout.*16"):
        call(torch.ones_like(o)[..., :16], None, *inputs, *tail)
    with pytest.raises(RuntimeError, match=r"dlse.*63"):
        call(torch.ones_like(o), lse[:, :63], *inputs, *tail)
    with pytest.raises(RuntimeError, match=r"dout.*(float64|fp64)"):
        call(torch.ones_like(o).double(), None, *inputs, *tail)


def test_a_refused_call_leaves_the_library_usable():
    for op, changes, exception, _ in BAD[:20]:
        with pytest.raises(exception):
            getattr(fsattn, op)(**{**valid_call(op), **changes})
    for op in (SEL, WIN, CMP, ATT, PICK, GATE):
        getattr(fsattn, op)(**valid_call(op))
