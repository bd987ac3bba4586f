"""Checks a selection against the definition: only near ties may be decided another way."""

import reference
import torch
from support import convert, cu_seqlens, randn

import fsattn

# Two scores closer than this share of the larger one may swap: fp32 statistics of the score and of
# the lse that it subtracts; one unit in the last place of bf16.
CLOSE = {"fp32": 2e-5, "bf16": 2.0**-7}


class Selection:
    """Inputs of one select_blocks call; `found` calls the library, `truth` the definition."""

    def __init__(self, lens_q, lens_k=None, *, dtype=torch.float32, device="cpu", **options):
        lens_k = lens_q if lens_k is None else lens_k
        self.heads_kv = options.pop("heads_kv", 2)
        self.group = options.pop("group", 2)
        self.dim = options.pop("dim", 16)
        offset = options.pop("q_offset", None)
        seed = options.pop("seed", 0)
        scale = options.pop("scale", 2.0)
        defaults = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "topk": 4}
        self.options = {**defaults, **options}
        self.offset = offset
        self.cu_q, self.cu_k = cu_seqlens(lens_q), cu_seqlens(lens_k)
        stride = self.options["kernel_stride"]
        cmp = reference.compressed_cu_seqlens(self.cu_k, self.options["kernel_size"], stride)
        self.cu_cmp = torch.tensor(cmp, dtype=torch.int32)
        like = {"dtype": dtype, "device": device}
        heads = self.heads_kv * self.group
        self.q = randn(sum(lens_q), heads, self.dim, seed=seed, scale=scale, **like)
        rows = max(sum(lens_k) // stride, int(self.cu_cmp[-1]))
        self.k_cmp = randn(rows, self.heads_kv, self.dim, seed=seed + 1, **like)

    def found(self):
        """topk_idx of the library on the CPU."""
        device = self.q.device
        cus = [x.to(device) for x in (self.cu_q, self.cu_k, self.cu_cmp)]
        q_offset = None
        if self.offset is not None:
            q_offset = torch.tensor(self.offset, dtype=torch.int32, device=device)
        sizes = {x: self.options[x] for x in ("kernel_size", "kernel_stride")}
        scale = self.options.get("softmax_scale")
        _, lse = fsattn.compressed_attention(
            self.q,
            self.k_cmp,
            self.k_cmp,
            *cus,
            return_lse=True,
            q_offset=q_offset,
            softmax_scale=scale,
            **sizes,
        )
        ids = fsattn.select_blocks(self.q, self.k_cmp, lse, *cus, q_offset=q_offset, **self.options)
        assert ids.dtype == torch.int32 and ids.device == device
        return ids.cpu()

    def truth(self):
        """topk_idx and score tables by definition."""
        inputs = convert([self.q, self.k_cmp], torch.float64)
        cus = (self.cu_q, self.cu_k, self.cu_cmp)
        return reference.select_blocks(*inputs, *cus, q_offset=self.offset, **self.options)

    def check(self):
        """Asserts form and content of every row; returns (found, truth)."""
        found, (truth, tables) = self.found(), self.truth()
        assert found.shape == truth.shape
        close = CLOSE[self.options.get("score_dtype", "fp32")]
        walk = zip(zip(self.cu_q[:-1], self.cu_q[1:], strict=True), tables, strict=True)
        for (start, end), table in walk:
            for t in range(int(start), int(end)):
                for head in range(self.heads_kv):
                    scores = table[head, t - int(start)]
                    check_row(f"[{head}, {t}]", found[head, t], truth[head, t], scores, close)
        return found, truth


def random_selection(shape, dtype, init, local, group_reduce, score_dtype, device="cpu"):
    """The selection of a generated Shape, with room for its forced blocks."""
    return Selection(
        shape.lens_q,
        shape.lens_k,
        dtype=dtype,
        device=device,
        heads_kv=shape.heads_kv,
        group=shape.group,
        dim=shape.dim,
        kernel_size=shape.kernel_size,
        kernel_stride=shape.kernel_stride,
        block_size=shape.block_size,
        topk=max(shape.topk, init + local),
        init_blocks=init,
        local_blocks=local,
        group_reduce=group_reduce,
        score_dtype=score_dtype,
        q_offset=shape.q_offset,
        softmax_scale=shape.softmax_scale,
    )


def check_row(where, found, truth, scores, close):
    """Ascending, -1 behind, as many blocks as defined, and equal up to swaps of close scores."""
    found, truth = found.tolist(), truth.tolist()
    valid = [b for b in found if b != -1]
    assert found == sorted(set(valid)) + [-1] * (len(found) - len(valid)), f"{where}: {found}"
    assert all(0 <= b < len(scores) for b in valid), f"{where}: {found} of {len(scores)} blocks"
    wanted = [b for b in truth if b != -1]
    assert len(valid) == len(wanted), f"{where}: found {found}, truth {truth}"
    extra, missing = sorted(set(valid) - set(wanted)), sorted(set(wanted) - set(valid))
    for a in extra:
        for b in missing:
            gap, size = abs(float(scores[a] - scores[b])), float(max(scores[a], scores[b]))
            assert gap <= close * size, (
                f"{where}: took block {a} (score {scores[a]:.9g}), not {b} ({scores[b]:.9g}); "
                f"found {found}, truth {truth}"
            )
