"""The commands of `python -m fsattn`, as a user calls them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fsattn
from fsattn import __main__, _demo_data, _demo_train, demo
from fsattn._demo_model import Shape, make_models

SOURCES = str(Path(fsattn.__file__).resolve().parents[1])


def command(*arguments):
    paths = [SOURCES, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return subprocess.run(
        [sys.executable, "-m", "fsattn", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("demo")
    return folder, command("demo", "--quick", "--device", "cpu", "--out", folder)


def test_info_names_the_versions():
    done = command("info")
    assert done.returncode == 0, done.stderr
    assert f"fsattn {fsattn.__version__}" in done.stdout
    assert f"torch {torch.__version__}" in done.stdout
    assert "cpu: " in done.stdout


@pytest.mark.parametrize("arguments", [[], ["train"]])
def test_without_a_known_command_the_usage_is_shown(arguments, capsys):
    assert __main__.main(arguments) == 2
    shown = "".join(capsys.readouterr())
    assert all(name in shown for name in ("info", "demo", "bench"))


def test_demo_reports_both_losses_and_passes(quick):
    folder, done = quick
    assert done.returncode == 0, done.stderr
    assert "PASS: the sparse model's held-out loss" in done.stdout
    result = json.loads((folder / "result.json").read_text())
    assert set(result) == {"sparse", "dense"}
    for run in result.values():
        assert len(run["losses"]) == demo.QUICK_SCHEDULE.steps
        assert run["held_out"] < 0.75 * run["losses"][0]


def test_demo_draws_and_writes(quick):
    folder, done = quick
    for name in ("loss.png", "selection.png"):
        content = (folder / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000
    shape = demo.QUICK_SHAPE
    prompt_length = int(demo.PROMPT_BLOCKS * shape.topk) * shape.block_size
    assert len((folder / "sample.txt").read_bytes()) == prompt_length + 32
    assert str(folder) in done.stdout


def test_progress_shows_loss_and_speed_without_a_terminal(quick):
    lines = [line for line in quick[1].stderr.splitlines() if "tokens/s" in line]
    assert len(lines) == 20 and all("loss" in line for line in lines)


def test_demo_fails_when_the_sparse_model_is_worse(capsys):
    run = {"losses": [2.0], "tokens_per_second": 1.0, "seconds": 1.0}
    passed = {"dense": {**run, "held_out": 2.0}, "sparse": {**run, "held_out": 2.09}}
    failed = {"dense": {**run, "held_out": 2.0}, "sparse": {**run, "held_out": 2.11}}
    assert demo.report(passed) and "PASS" in capsys.readouterr().out
    assert not demo.report(failed) and "FAIL" in capsys.readouterr().out


def test_own_text_and_its_errors(tmp_path, capsys):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(100)) * 10)
    text = _demo_data.load_text(path, 64)
    assert (len(text.train), len(text.held_out)) == (900, 100)
    with pytest.raises(ValueError, match="at least 202 bytes, found 100"):
        _demo_data.load_text(path, 200)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="found 0"):
        _demo_data.load_text(path, 64)
    assert demo.main(["--quick", "--data", str(tmp_path / "missing")]) == 2
    assert "missing" in capsys.readouterr().err


def test_training_repeats_bit_by_bit():
    shape = Shape(layers=1, hidden_size=32, mlp_size=32, num_q_heads=2, head_dim=16, length=128)
    schedule = _demo_train.Schedule(steps=3, batch=1)
    text = _demo_data.standard_library()
    losses = [
        _demo_train.train(make_models(shape, 1)[0], text, schedule, 1, "test")[0] for _ in range(2)
    ]
    assert losses[0] == losses[1]


def test_both_models_start_with_the_same_weights():
    sparse, dense = make_models(Shape(layers=2), 3)
    weights = sparse.state_dict()
    for name, value in dense.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_the_cache_writes_what_full_passes_write():
    """sample() against one forward pass over the whole text for every byte."""
    torch.manual_seed(0)
    model = make_models(demo.QUICK_SHAPE, 1)[0]
    prompt = bytes(range(40, 140))
    with torch.no_grad():
        ids, generator = list(prompt), torch.Generator().manual_seed(5)
        for _ in range(20):
            chances = (model(torch.tensor([ids]))[-1] / 0.7).softmax(-1)
            ids.append(int(torch.multinomial(chances, 1, generator=generator)))
    assert _demo_train.sample(model, prompt, 20, 5) == bytes(ids[100:])
