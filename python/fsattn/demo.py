"""python -m fsattn demo: a small language model learns with sparse attention, and with dense.

Two byte-level transformers start from the same weights and see the same text; one attends with
fsattn, the other to every earlier token. The command prints and plots both losses, shows which
blocks the sparse model chose, lets it write some text, and fails if its held-out loss is more than
5 % above that of the dense model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import torch

from . import _demo_train
from ._demo_data import Text, load_text
from ._demo_model import LanguageModel, Shape, make_models
from ._demo_train import Schedule
from .info import cuda_is_usable

TOLERANCE = 0.05
PROMPT_BLOCKS = 1.5  # length of the prompt, in units of the blocks that a query attends to
QUICK_SHAPE = Shape(
    layers=2, hidden_size=64, mlp_size=128, num_q_heads=4, head_dim=16, length=256, topk=4,
    window_size=32,
)  # fmt: skip
QUICK_SCHEDULE = Schedule(steps=20, batch=2, warmup=5, held_out_batches=2)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fsattn demo",
        description=__doc__.split("\n")[0].partition(": ")[2],
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results")
    parser.add_argument("--data", type=Path, help="a text file; default: Python's own library")
    parser.add_argument("--steps", type=int, help=f"training steps, default {Schedule.steps}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if it can be used")
    parser.add_argument("--quick", action="store_true", help="a tiny model for a few seconds")
    return parser.parse_args(argv)


def choose_device(wanted: str | None) -> torch.device:
    """CUDA if a device is there and this build has kernels for it, unless told otherwise."""
    usable = cuda_is_usable()
    if wanted == "cuda" and not usable:
        raise ValueError("device: cuda needs a CUDA device and a build with its kernels")
    return torch.device(wanted or ("cuda" if usable else "cpu"))


def train_both(
    models: dict[str, LanguageModel], text: Text, schedule: Schedule, seed: int
) -> dict[str, dict]:
    """Trains every model on the same batches; returns what is written to result.json."""
    results = {}
    for name, model in models.items():
        losses, seconds = _demo_train.train(model, text, schedule, seed, name)
        results[name] = {
            "losses": losses,
            "held_out": _demo_train.held_out_loss(model, text, schedule),
            "seconds": seconds,
            "tokens_per_second": schedule.steps * schedule.batch * model.shape.length / seconds,
        }
    return results


def report(results: dict[str, dict]) -> bool:
    """Prints both outcomes; True if the sparse model learned as well as the dense one."""
    print(f"\n{'':8}{'training loss':>15}{'held-out loss':>15}{'tokens/s':>12}{'seconds':>10}")
    for name, result in results.items():
        final = _demo_train.recent_mean(result["losses"])
        print(
            f"{name:8}{final:15.3f}{result['held_out']:15.3f}"
            f"{result['tokens_per_second']:12.0f}{result['seconds']:10.0f}"
        )
    excess = results["sparse"]["held_out"] / results["dense"]["held_out"] - 1
    passed = excess <= TOLERANCE
    verdict = "PASS" if passed else "FAIL"
    print(
        f"\n{verdict}: the sparse model's held-out loss is {100 * excess:+.1f} % of the dense one's "
        f"(at most {100 * TOLERANCE:+.0f} %)"
    )
    return passed


def save_pictures(
    folder: Path,
    results: dict[str, dict],
    sparse: LanguageModel,
    text: Text,
    subtitle: str,
) -> None:
    from . import _demo_plots

    losses = {name: result["losses"] for name, result in results.items()}
    held_out = {name: result["held_out"] for name, result in results.items()}
    _demo_plots.plot_losses(folder / "loss.png", losses, held_out, subtitle)
    window = text.held_out_batches(3, 1, sparse.shape.length)[1]
    ids = window[:, :-1].to(sparse.embedding.weight.device)
    with torch.no_grad(), _demo_train.precision(ids.device):
        selections = sparse.selections(ids)
    _demo_plots.plot_selections(folder / "selection.png", selections, sparse.shape)


def indented(text: bytes) -> str:
    return textwrap.indent(text.decode("utf-8", "replace"), "    ", lambda line: True)


def show_writing(path: Path, model: LanguageModel, text: Text, count: int, seed: int) -> None:
    """Prints and saves how the model continues a text with more blocks than a query can choose."""
    length = int(PROMPT_BLOCKS * model.shape.topk) * model.shape.block_size
    prompt = bytes(text.held_out_batches(3, 1, length)[1][0, :-1].tolist())
    written = _demo_train.sample(model, prompt, count, seed)
    path.write_bytes(prompt + written)
    print(f"\nfrom {len(prompt)} bytes of held-out text, which end in\n")
    print(indented(b"\n".join(prompt.split(b"\n")[-4:])))
    print("\nthe sparse model continues, byte by byte,\n")
    print(indented(written))


def introduce(
    text: Text, subtitle: str, device: torch.device, sparse: LanguageModel, dense: LanguageModel
) -> None:
    """Says what is compared before the long wait."""
    print(f"{text.name}: {len(text.train):,} bytes to learn from, {len(text.held_out):,} held out")
    print(f"{subtitle}, on {device.type} with {torch.get_num_threads()} CPU threads")
    counts = [sum(p.numel() for p in model.parameters()) for model in (sparse, dense)]
    print(
        f"parameters: sparse {counts[0]:,} (compression and gates included), dense {counts[1]:,}",
        flush=True,
    )


def main(argv: list[str]) -> int:
    """Returns 0 if the sparse model's held-out loss is within 5 % of the dense one's, else 1."""
    options = parse(argv)
    if importlib.util.find_spec("matplotlib") is None:
        print("the demo draws with matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    shape, schedule = (QUICK_SHAPE, QUICK_SCHEDULE) if options.quick else (Shape(), Schedule())
    if options.steps is not None:
        schedule = replace(schedule, steps=options.steps)
    try:
        device = choose_device(options.device)
        text = load_text(options.data, shape.length)
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    sparse, dense = (model.to(device) for model in make_models(shape, options.seed))
    subtitle = (
        f"{shape.layers} layers, {shape.num_q_heads}/{shape.num_kv_heads} heads of "
        f"{shape.head_dim}, {schedule.batch} x {shape.length} bytes a step"
    )
    introduce(text, subtitle, device, sparse, dense)
    results = train_both({"dense": dense, "sparse": sparse}, text, schedule, options.seed)
    passed = report(results)

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "result.json").write_text(json.dumps(results))
    save_pictures(options.out, results, sparse, text, subtitle)
    show_writing(
        options.out / "sample.txt", sparse, text, 32 if options.quick else 200, options.seed
    )
    names = ", ".join(sorted(path.name for path in options.out.iterdir()))
    print(f"\n{options.out}: {names}")
    return 0 if passed else 1
