"""PagedCache: bookkeeping against a plain list of tokens a sequence, and the module over it."""

import random

import pytest
import torch
from support import DEVICES, assert_same_bits, check, cu_seqlens, randn

import fsattn

ROPE = fsattn.RopeConfig(head_dim=16, rope_scaling=None, rope_theta=1e4)
SMALL = {"num_kv_heads": 1, "head_dim": 8, "kernel_size": 4, "kernel_stride": 2}


def small_cache(num_pages=12, **options):
    options = {"layout": "NHD", "dtype": torch.float64, "cmp_page_size": 16} | options
    return fsattn.PagedCache(num_pages, 16, **SMALL, **options)


class Model:
    """A cache and, beside it, the tokens of every sequence as numbers in a list."""

    def __init__(self, cache):
        self.cache, self.tokens, self.next = cache, {}, 1.0

    def grow(self, sequences, counts):
        step = self.cache.step(sequences, counts)
        new = []
        for sequence, count in zip(sequences, counts):
            numbers = [self.next + i for i in range(count)]
            self.next += count
            self.tokens[sequence] += numbers
            new += numbers
        x = torch.tensor(new, dtype=torch.float64).reshape(-1, 1, 1).repeat(1, 1, 8)
        step.append(x, -x)

    def check(self):
        cache = self.cache
        for sequence, tokens in self.tokens.items():
            assert cache.length(sequence) == len(tokens)
            step = cache.step([sequence], 0)
            assert step.cache_seqlens.tolist() == [len(tokens)]
            k = cache.k[0][step.block_table[0].long()].flatten(0, 1)[: len(tokens), 0, 0]
            v = cache.v[0][step.block_table[0].long()].flatten(0, 1)[: len(tokens), 0, 0]
            assert k.tolist() == tokens and v.tolist() == [-x for x in tokens]
            windows = [sum(tokens[i : i + 4]) / 4 for i in range(0, len(tokens) - 3, 2)]
            k_cmp = cache.k_cmp[0][step.cmp_block_table[0].long()].flatten(0, 1)
            assert k_cmp[: len(windows), 0, 0].tolist() == windows


def test_random_histories():
    """Allocate, grow, fork, reorder, truncate and free in any order: every token stays in place."""
    for seed in range(25):
        rng = random.Random(seed)
        model = Model(small_cache())
        free = model.cache.num_free_pages
        num_full = 0
        for _ in range(60):
            live = sorted(model.tokens)
            action = rng.choice(["new", "grow", "grow", "fork", "truncate", "free", "reorder"])
            if action == "new" or not live:
                model.tokens[model.cache.allocate()] = []
            elif action == "grow":
                chosen = rng.sample(live, rng.randint(1, len(live)))
                counts = [rng.choice([0, 1, 1, 3, 20]) for _ in chosen]
                try:
                    model.grow(chosen, counts)
                except fsattn.CacheFullError:
                    num_full += 1
            elif action == "fork":
                parent = rng.choice(live)
                length = rng.choice([None, rng.randint(0, len(model.tokens[parent]))])
                child = model.cache.fork(parent, length)
                model.tokens[child] = model.tokens[parent][:length]
            elif action == "truncate":
                sequence = rng.choice(live)
                length = rng.randint(0, len(model.tokens[sequence]))
                model.cache.truncate(sequence, length)
                del model.tokens[sequence][length:]
            elif action == "free":
                sequence = rng.choice(live)
                model.cache.free(sequence)
                del model.tokens[sequence]
            elif action == "reorder":
                chosen = rng.sample(live, rng.randint(1, len(live)))
                parents = [rng.choice(live) for _ in chosen]
                before = {x: list(model.tokens[x]) for x in live}
                model.cache.reorder(chosen, parents)
                model.tokens |= {x: list(before[p]) for x, p in zip(chosen, parents)}
            model.check()
        for sequence in list(model.tokens):
            model.cache.free(sequence)
        assert model.cache.num_free_pages == free, "pages leaked"


def test_full_cache_changes_nothing():
    model = Model(small_cache(num_pages=3))
    for _ in range(2):
        model.tokens[model.cache.allocate()] = []
    a, b = model.tokens
    model.grow([a, b], [20, 5])
    with pytest.raises(fsattn.CacheFullError, match="1 pages .* are needed, 0 and .* free"):
        model.grow([b, a], [1, 20])
    model.check()
    model.grow([a, b], [12, 11])  # what is left in the last pages
    model.check()
    model.cache.free(a)
    model.tokens.pop(a)
    model.grow([b], [20])
    model.check()


def test_freed_pages_are_used_again():
    """A sequence in pages that others have used has the bits of one in fresh pages."""
    layer = make_module().double()
    x = randn(90, 32)

    def generate(cache):
        sequence = cache.allocate()
        with torch.no_grad():
            y = [layer(x[:70], cache=cache.step([sequence], 70))]
            y += [layer(x[t : t + 1], cache=cache.step([sequence])) for t in range(70, 90)]
        return sequence, torch.cat(y)

    used = module_cache(num_pages=2, dtype=torch.float64)
    with torch.no_grad():
        for poison in (torch.inf, torch.nan):
            sequence = used.allocate()
            layer(torch.full((128, 32), poison).double(), cache=used.step([sequence], 128))
            used.free(sequence)
    fresh = module_cache(num_pages=2, dtype=torch.float64)
    assert_same_bits("y", generate(used)[1], generate(fresh)[1])


def make_module(**options):
    torch.manual_seed(0)
    options = {"rope_config": ROPE, "topk": 4, "window_size": 40} | options
    return fsattn.NativeSparseAttention(32, 4, 2, 16, **options)


def module_cache(num_pages=24, **options):
    options = {"rope": True, "cmp_page_size": 16} | options
    return fsattn.PagedCache(num_pages, 64, 2, 16, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rope_config": None, "compress": "softmax"},
        {"compress": "mean", "gate_per_head": False, "group_reduce": "max"},
    ],
    ids=str,
)
def test_module_decodes_as_it_trains(options, device):
    """Prefill, chunks and single tokens of a batch: the rows of one full forward."""
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    layer = make_module(**options).to(device, dtype)
    lens = [150, 40, 97]
    x = randn(sum(lens), 32, dtype=dtype, device=device)
    starts = cu_seqlens(lens).tolist()
    with torch.no_grad():
        truth = layer(x, cu_seqlens(lens, device))
        cache = module_cache(rope=layer.rope is not None, dtype=dtype, device=device)
        sequences = [cache.allocate() for _ in lens]
        found = torch.empty_like(truth)
        counts = [[100, 30, 1], [1, 1, 63], [7, 0, 2], [1, 1, 1]]
        for step in range(100):
            wanted = counts[min(step, 3)]
            at = [cache.length(s) for s in sequences]
            new = [min(n, end - a) for n, end, a in zip(wanted, lens, at)]
            if not any(new):
                break
            rows = torch.cat([torch.arange(o + a, o + a + n) for o, a, n in zip(starts, at, new)])
            rows = rows.to(device)
            found[rows] = layer(x[rows], cache=cache.step(sequences, new))
    assert [cache.length(s) for s in sequences] == lens
    if dtype == torch.float64:
        check("y", found, truth)
    else:
        torch.testing.assert_close(found, truth, atol=0.03, rtol=0.03)


def test_published_module_and_layers():
    """FlashSparseAttention, two layers in one cache, compressed cache pages of their own."""
    torch.manual_seed(1)
    layers = [
        fsattn.FlashSparseAttention(32, 4, 2, 16, 32, 16, 32, 4, 1, 2, 40, ROPE).double()
        for _ in range(2)
    ]
    x, cu = randn(130, 32), cu_seqlens([130])
    cache = module_cache(num_layers=2, raw_size=32, dtype=torch.float64)
    sequence = cache.allocate()
    with torch.no_grad():
        truth = layers[1](layers[0](x, cu), cu)
        found = []
        for start, end in [(0, 90), *((t, t + 1) for t in range(90, 130))]:
            step = cache.step([sequence], end - start)
            hidden = layers[0](x[start:end], cache=step, layer=0)
            found.append(layers[1](hidden, cache=step, layer=1))
    check("y", torch.cat(found), truth)


def test_beams():
    """fork and reorder: every beam goes on as if it had been computed alone."""
    layer = make_module().double()
    prompt = randn(70, 32, seed=1)
    cache = module_cache(dtype=torch.float64, raw_size=32)
    first = cache.allocate()
    beams = [first]
    history = [prompt]
    rng = random.Random(0)
    with torch.no_grad():
        layer(prompt, cache=cache.step([first], 70))
        for _ in range(2):
            beams.append(cache.fork(first))
            history.append(prompt)
        assert cache.num_free_pages == 24 - 2  # all beams share the pages of the prompt
        for step in range(40):
            x = randn(3, 32, seed=100 + step)
            y = layer(x, cache=cache.step(beams))
            history = [torch.cat([old, row[None]]) for old, row in zip(history, x)]
            for i, tokens in enumerate(history):
                if step % 8 == 7:
                    truth = layer(tokens, cu_seqlens([len(tokens)]))[-1]
                    check(f"beam {i}", y[i], truth)
            parents = [rng.randrange(3) for _ in beams]
            cache.reorder(beams, [beams[p] for p in parents])
            history = [history[p] for p in parents]


def test_step_in_place():
    """out= keeps every address; another form of step is refused."""
    cache = small_cache()
    a, b = cache.allocate(), cache.allocate()
    step = cache.step([a, b], [3, 2], max_seqlen_k=50)
    names = ("block_table", "cmp_block_table", "cache_seqlens", "cu_seqlens_q", "positions")
    addresses = [getattr(step, name).data_ptr() for name in names]
    assert cache.step([b, a], [2, 3], out=step) is step
    assert [getattr(step, name).data_ptr() for name in names] == addresses
    assert step.cache_seqlens.tolist() == [2, 3] and step.max_seqlen_k == 50
    assert step.positions.tolist() == [2, 3, 3, 4, 5]
    for sequences, new in [([a], 5), ([a, b], [4, 1]), ([a, b], [3, 3])]:
        with pytest.raises(ValueError, match="out: must be a step of"):
            cache.step(sequences, new, out=step)
    with pytest.raises(ValueError, match="max_seqlen_k: must be at least 56, found 50"):
        cache.step([a], [50], max_seqlen_k=50)
    assert cache.length(a) == 6


BAD = [
    (lambda c, s: c.step([s, s]), ValueError, "sequences: must be distinct"),
    (lambda c, s: c.step([s], [1, 2]), ValueError, "sequences: must be distinct"),
    (lambda c, s: c.step([s + 9]), ValueError, "sequence: .* is not in the cache"),
    (lambda c, s: c.step([s], -1), ValueError, "new: must not be negative, found -1"),
    (lambda c, s: c.step([s], 200), ValueError, "max_seqlen of the cache is 192, found 250"),
    (lambda c, s: c.step([s], 100), fsattn.CacheFullError, "the cache is full"),
    (lambda c, s: c.truncate(s, 51), ValueError, "length: must be between 0 and 50, found 51"),
    (lambda c, s: c.fork(s, -1), ValueError, "length: must be between 0 and 50, found -1"),
    (lambda c, s: c.reorder([s], []), ValueError, "sequences: must be distinct and as many"),
    (lambda c, s: c.free(77), ValueError, "sequence: 77 is not in the cache"),
    (
        lambda c, s: c.step([s]).append(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8), rope=(1, 2)),
        ValueError,
        "rope: a cache with rope=False must not be given",
    ),
]


@pytest.mark.parametrize(("action", "error", "message"), BAD)
def test_bad_use(action, error, message):
    cache = small_cache()
    sequence, other = cache.allocate(), cache.allocate()
    cache.step([sequence, other], [50, 60])
    with pytest.raises(error, match=message):
        action(cache, sequence)


def test_raw_keys_that_are_gone():
    """A fork into the middle of a page needs the keys before their rotation."""
    cache = small_cache(rope=True, raw_size=4)
    sequence = cache.allocate()
    cache.step([sequence], 30)
    for length in (0, 16, 29, 30):
        cache.free(cache.fork(sequence, length))
    for length in (10, 17, 28):
        with pytest.raises(ValueError, match="raw_size=4 does not remember"):
            cache.fork(sequence, length)
    # Tokens that were taken back had replaced older ones: it is their end that counts.
    back = small_cache(rope=True, raw_size=8)
    sequence = back.allocate()
    back.step([sequence], 30)
    for length in (27, 25):
        back.truncate(sequence, length)
    for find in (lambda: back.fork(sequence, 24), lambda: back.truncate(back.fork(sequence), 24)):
        with pytest.raises(ValueError, match="raw_size=8 does not remember"):
            find()
    back.step([sequence], 2)
    with pytest.raises(ValueError, match="raw_size=8 does not remember"):
        back.truncate(sequence, 24)
    back.truncate(sequence, 16)
    back.step([sequence], 4)
    back.truncate(sequence, 19)
    whole = small_cache(rope=True)
    sequence = whole.allocate()
    whole.step([sequence], 30)
    assert whole.length(whole.fork(sequence, 20)) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "NDH"}, "layout: must be one of"),
        ({"page_size": 24}, "page_size: must be a positive multiple of 16, found 24"),
        ({"cmp_page_size": 0}, "cmp_page_size: must be a positive multiple of 16, found 0"),
        ({"num_pages": 0}, "num_pages: must be positive, found 0"),
        ({"kernel_size": 24}, "kernel_size: must be a multiple of kernel_stride"),
    ],
)
def test_bad_caches(options, message):
    sizes = {"num_pages": 2, "page_size": 16, "num_kv_heads": 1, "head_dim": 8}
    with pytest.raises(ValueError, match=message):
        fsattn.PagedCache(**(sizes | options))


def test_module_refuses():
    layer = make_module()
    cache = module_cache(dtype=torch.float32)
    step = cache.step([cache.allocate()], 3)
    x = torch.zeros(3, 32)
    with pytest.raises(ValueError, match="cache: has no gradients"):
        layer(x, cache=step)
    with torch.no_grad():
        with pytest.raises(ValueError, match="cu_seqlens: must not be given with a cache"):
            layer(x, cu_seqlens([3]), cache=step)
        with pytest.raises(ValueError, match="x: must have the 3 tokens of the step, found 2"):
            layer(x[:2], cache=step)
        with pytest.raises(ValueError, match="cache: must have .* rope=False"):
            make_module(rope_config=None)(x, cache=step)
        with pytest.raises(NotImplementedError, match="shared_kv"):
            make_module(shared_kv=False)(x, cache=step)
