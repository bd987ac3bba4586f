"""Training, evaluation and sampling for the demo."""

from __future__ import annotations

import math
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ._demo_data import Text
from ._demo_model import LanguageModel


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train. Both models get the same."""

    steps: int = 220
    batch: int = 1
    learning_rate: float = 3e-3
    warmup: int = 20
    held_out_batches: int = 16

    def rate(self, step: int) -> float:
        """Linear warm-up, then a half cosine to a tenth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


class Progress:
    """A bar on a terminal; elsewhere one line for every tenth of the way."""

    def __init__(self, label: str, total: int, tokens_per_step: int, stream=None):
        self.label, self.total, self.tokens_per_step = label, total, tokens_per_step
        self.stream = sys.stderr if stream is None else stream
        self.begin = time.perf_counter()
        self.tenth = 0

    def update(self, done: int, loss: float) -> None:
        elapsed = time.perf_counter() - self.begin
        rate = done * self.tokens_per_step / elapsed
        left = elapsed / done * (self.total - done)
        text = f"{self.label:6} {done:4}/{self.total}  loss {loss:.3f}  {rate:7.0f} tokens/s"
        if self.stream.isatty():
            filled = 24 * done // self.total
            bar = "█" * filled + "·" * (24 - filled)
            end = "\n" if done == self.total else ""
            self.stream.write(f"\r{text}  {bar}  {left:4.0f} s left {end}")
        elif 10 * done // self.total > self.tenth:
            self.tenth = 10 * done // self.total
            self.stream.write(f"{text}  {left:4.0f} s left\n")
        self.stream.flush()


def precision(device: torch.device) -> AbstractContextManager:
    """fp32 on the CPU; on CUDA bf16 with fp32 parameters."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


def loss_of(model: LanguageModel, window: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte of window [B, T + 1]."""
    device = model.embedding.weight.device
    window = window.to(device)
    with precision(device):
        logits = model(window[:, :-1])
    return functional.cross_entropy(logits.float(), window[:, 1:].flatten())


def recent_mean(losses: list[float], count: int = 20) -> float:
    """Mean of the last `count` losses."""
    recent = losses[-count:]
    return sum(recent) / len(recent)


def smoothed(losses: list[float]) -> list[float]:
    """Mean over the neighbourhood of every step, a fifteenth of the run wide."""
    half = max(1, len(losses) // 30)
    windows = (losses[max(0, i - half) : i + half + 1] for i in range(len(losses)))
    return [sum(window) / len(window) for window in windows]


def train(
    model: LanguageModel, text: Text, schedule: Schedule, seed: int, label: str
) -> tuple[list[float], float]:
    """Returns the loss of every step and the seconds taken."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.95))
    length = model.shape.length
    progress = Progress(label, schedule.steps, schedule.batch * length)
    losses, begin = [], time.perf_counter()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_of(model, text.batch(generator, schedule.batch, length))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress.update(step + 1, recent_mean(losses))
    return losses, time.perf_counter() - begin


@torch.no_grad()
def held_out_loss(model: LanguageModel, text: Text, schedule: Schedule) -> float:
    """Mean loss over windows that neither model was trained on."""
    windows = text.held_out_batches(schedule.held_out_batches, schedule.batch, model.shape.length)
    return sum(loss_of(model, window).item() for window in windows) / len(windows)


@torch.no_grad()
def sample(
    model: LanguageModel, prompt: bytes, count: int, seed: int, temperature: float = 0.7
) -> bytes:
    """The `count` bytes after the prompt: one pass over it, then one byte a step from the cache."""
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # as precision() has it
    cache = model.make_cache(len(prompt) + count, dtype)
    sequence = cache.allocate()
    new, written = list(prompt), []
    for _ in range(count):
        step = cache.step([sequence], len(new))
        with precision(device):
            logits = model.next_logits(torch.tensor(new, device=device), step)
        chances = (logits.float().cpu() / temperature).softmax(-1)
        new = [int(torch.multinomial(chances, 1, generator=generator))]
        written += new
    return bytes(written)
