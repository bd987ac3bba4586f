"""The benchmark: its counts against the masks, its selections, and one run from end to end."""

import json
import time

import pytest
import torch

from fsattn import _bench_counts as counts
from fsattn import _bench_decode, _bench_measure, bench
from fsattn._bench_configs import CONFIGS, PUBLISHED, Config
from fsattn._bench_measure import Effort, Rates, measure
from fsattn._bench_report import speedup_over_dense, table
from fsattn._bench_selection import Selection, make_selection, selected_pairs

SMALL = Config(
    "tiny", 4, 2, 8, 8, block_size=16, topk=4, kernel_size=8, kernel_stride=4, window_size=20
)


def count_pairs(tokens, is_visible):
    return sum(is_visible(t, j) for t in range(tokens) for j in range(t + 1))


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 20, 21, 22, 150])
def test_pairs_are_those_of_the_masks(tokens):
    assert counts.dense_pairs(tokens) == count_pairs(tokens, lambda t, j: True)
    assert counts.window_pairs(SMALL, tokens) == count_pairs(tokens, lambda t, j: j >= t - 20)
    windows = [i for i in range(tokens) if i * 4 + 8 <= tokens]
    assert counts.num_windows(SMALL, tokens) == len(windows)
    visible = sum(t >= i * 4 + 7 for t in range(tokens) for i in windows)
    assert counts.compressed_pairs(SMALL, tokens) == visible


def test_attention_flops_of_a_known_case():
    # One head, two tokens: three pairs, 2 (D + Dv) = 32 each; backward 2 (3 D + 2 Dv) = 80.
    config = Config("one", 1, 1, 8, 8)
    assert counts.dense(config, 4, False, 2).flops == 3 * 32
    assert counts.dense(config, 4, True, 2).flops == 3 * 80


@pytest.mark.parametrize(
    "selection", [Selection(), Selection(0.9), Selection(0.0, 1.0), Selection(0.5, 1.3)]
)
def test_selections_are_valid_rows(selection):
    tokens = 150
    topk_idx = make_selection(selection, SMALL, tokens, seed=1)
    assert topk_idx.shape == (2, tokens, 4) and topk_idx.dtype == torch.int32
    for head in topk_idx.tolist():
        for t, row in enumerate(head):
            blocks = [block for block in row if block >= 0]
            assert row == sorted(set(blocks)) + [-1] * (4 - len(blocks))
            assert {0, t // 16, max(t // 16 - 1, 0)} <= set(blocks) and blocks[-1] == t // 16


def test_selected_pairs_are_those_of_the_rows():
    topk_idx = make_selection(Selection(0.5), SMALL, 150, seed=3)
    rows = topk_idx.tolist()
    pairs = sum(count_pairs(150, lambda t, j: j // 16 in rows[h][t]) for h in range(2)) / 2
    assert selected_pairs(topk_idx, 16) == pairs


def test_full_selection_is_the_most_that_topk_allows():
    rows = [[max(t // 16 - i, 0) for i in range(4)] for t in range(150)]
    pairs = count_pairs(150, lambda t, j: j // 16 in rows[t])
    assert counts.full_selection_pairs(SMALL, 150) == pairs


def test_persistent_selections_keep_their_blocks():
    def shared(selection):
        head = make_selection(selection, CONFIGS["small"], 4096, seed=0)[0, 3000:3100].tolist()
        return sum(len(set(a) & set(b)) for a, b in zip(head, head[1:]))

    assert shared(Selection(0.95)) > shared(Selection(0.5)) > shared(Selection())


def test_a_run_writes_lines_that_stand_on_their_own(tmp_path, capsys):
    arguments = "--device cpu --lengths 128 --runs 1 --warmups 0 --persistence 0 --out"
    assert bench.main([*arguments.split(), str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    measured = {(r["operator"], r["pass"]) for r in records}
    assert {("whole", "fwd"), ("whole", "bwd"), ("select", "fwd"), ("dense", "bwd")} <= measured
    for record in records:
        assert record["error"] is None and record["ms"] > 0 and record["bytes"] > 0
        for field in ("device", "date", "threads", "fsattn", "torch", "floor_share", "runs"):
            assert record[field] is not None
        assert (record["workspace_bytes"] is None) == (record["implementation"] != "fsattn")
    backward = [r for r in records if r["pass"] == "bwd" and r["implementation"] == "fsattn"]
    assert backward and all("bwd" in r["plan"] for r in backward)
    assert table(records) in capsys.readouterr().out


@pytest.fixture
def known_rates(monkeypatch):
    """1 TFLOP/s and 100 GB/s, known instead of measured: that takes longer than these tests."""
    monkeypatch.setattr(bench, "measure_rates", lambda *_: Rates(1e12, 1e11))


def _records(folder, arguments):
    status = bench.main([*f"--device cpu --runs 1 --warmups 0 {arguments} --out {folder}".split()])
    lines = (folder / "bench.jsonl").read_text().splitlines()
    return status, [json.loads(line) for line in lines]


def test_a_spent_budget_and_a_case_too_long_are_named(tmp_path, known_rates, capsys):
    status, records = _records(tmp_path, "--lengths 128 --operators window dense --budget 0")
    assert status == 0 and [r["skipped"] for r in records] == ["the budget of the run is spent"] * 2
    status, records = _records(tmp_path, "--lengths 128 --operators window --seconds 1e-9")
    assert "one run takes at least" in records[-1]["skipped"] and records[-1]["ms"] is None
    status, records = _records(tmp_path, "--lengths 128 --operators dense --max-dense 64")
    assert records[-1]["skipped"] == "longer than --max-dense 64"
    assert "128 dense fwd any: skipped, longer than --max-dense 64" in capsys.readouterr().err


def test_too_little_memory_ends_a_case_and_not_the_run(tmp_path, known_rates, monkeypatch):
    def no_memory(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench.make_cases.__globals__["functional"], "window_attention", no_memory)
    status, records = _records(tmp_path, "--lengths 128 --operators window gate")
    found = [(r["operator"], r["pass"], r["skipped"]) for r in records]
    assert status == 0 and found[:2] == [
        (w, p, "out of memory") for w, p in (("window", "fwd"), ("window", "bwd"))
    ]
    assert found[2:] == [("gate", "fwd", None), ("gate", "bwd", None)]


def test_a_failure_is_named_and_decides_the_exit_status(tmp_path, known_rates, monkeypatch, capsys):
    def broken(*_arguments, **_options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bench.make_cases.__globals__["functional"], "gate", broken)
    status, records = _records(tmp_path, "--lengths 128 --operators gate --passes fwd")
    assert status == 1 and records[0]["error"] == "RuntimeError: no such kernel"
    assert "gate fwd fsattn: RuntimeError: no such kernel" in capsys.readouterr().err


def test_a_first_run_that_the_host_spends_on_setting_up_does_not_count(monkeypatch):
    """On CUDA a library may compile its kernels in the first call."""
    runs = iter([_bench_measure._Run(1300.0, 1299.0)] + [_bench_measure._Run(0.05, 0.04)] * 9)
    monkeypatch.setattr(_bench_measure, "_runner", lambda _: lambda *_arguments: next(runs))
    monkeypatch.setattr(_bench_measure, "_peak_of", lambda function, _device: function())
    found = measure(lambda: None, torch.device("cuda"), Effort(warmups=1, runs=3, seconds=0.5))
    assert found.runs == 3 and found.median == 0.05
    slow = iter([_bench_measure._Run(1300.0, 0.2)])
    monkeypatch.setattr(_bench_measure, "_runner", lambda _: lambda *_arguments: next(slow))
    found = measure(lambda: None, torch.device("cuda"), Effort(warmups=1, runs=3, seconds=0.5))
    assert found.runs == 1 and found.median == 1300.0


def test_a_long_call_runs_once_and_a_short_one_as_often_as_asked():
    calls = []

    def call():
        calls.append(time.sleep(0.02))

    found = measure(call, torch.device("cpu"), Effort(warmups=3, runs=5, seconds=0.01))
    assert len(calls) == found.runs == 1 and found.median >= 20
    calls.clear()
    found = measure(call, torch.device("cpu"), Effort(warmups=2, runs=3, seconds=5.0))
    # One for the memory, two warm-ups, three timed ones, one for the memory again.
    assert len(calls) == 7 and found.runs == 3 and found.fastest <= found.median


def test_all_stands_for_every_published_configuration():
    names = {"nsa", "llama", "mha", "fsa128", "m3", "minicpm", "moba", "qsa", "nsa192", "d64"}
    assert names <= set(PUBLISHED) and "small" not in PUBLISHED
    options = bench._parser().parse_args(["--device", "cpu", "--configs", "all"])
    bench._fill_defaults(options)
    assert options.configs == list(PUBLISHED)


def test_speedup_compares_equal_shapes():
    def record(operator, tokens, ms):
        fields = {"config": "c", "dtype": "float32", "pass": "fwd"}
        return dict(fields, operator=operator, tokens=tokens, ms=ms)

    records = [record("whole", 8, 2.0), record("dense", 8, 6.0), record("whole", 16, 2.0)]
    assert speedup_over_dense(records[0], records) == 3.0
    assert speedup_over_dense(records[1], records) is None
    assert speedup_over_dense(records[2], records) is None


def test_decode_counts_what_a_query_must_read():
    shape = _bench_decode.Shape(
        CONFIGS["llama"], 16, 65536, 1, torch.bfloat16, torch.device("cuda")
    )
    # 4095 windows; 14 of 16 blocks beside the local two, which lie in the window of 513 keys.
    assert shape.windows == 4095
    assert shape.sparse_bytes() == 16 * (4095 + 14 * 64 + 513) * 8 * 256 * 2
    assert shape.dense_bytes() == 16 * 65536 * 8 * 256 * 2


def test_bench_decode_from_end_to_end(tmp_path, capsys):
    arguments = "decode --device cpu --configs d64 m3_shard --contexts 300 --batches 2 --runs 1"
    assert bench.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines()]
    wanted = {"decode", "append", "append + decode", "dense decode"}
    assert {r["operator"] for r in records} == wanted
    assert all(r["us"] > 0 and r["error"] is None and r["device"] for r in records)
    shown = capsys.readouterr().out
    assert "m3_shard" in shown and "over dense" in shown
    arguments = "decode --device cpu --configs d64 --contexts 256 --batches 1 --runs 1 --chunk 64"
    assert bench.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    assert "prefill in chunks" in capsys.readouterr().out
