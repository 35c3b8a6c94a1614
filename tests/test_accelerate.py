"""Accelerate trains an applied model as a plain loop does: accumulation, clipping, schedules, precision, saving."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import hbnn_plugin
from inplace_nets import agree, mapped, smooth
from tiny_hosts import BINARY_LAYERS, ScaledConv, points, same_state, state, tiny_net
from training_helpers import BATCHES, F64, applied, each_mode, loader, moved, output, steps

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Accelerate keeps what it was told for the process."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


def optimizer_of(net: nn.Module, kind: str = "sgd") -> Optimizer:
    if kind == "sgd":
        return SGD(net.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
    return AdamW(net.parameters(), lr=0.01)


class Run:
    """Accelerate's own example."""

    def __init__(self, net: nn.Module, kind: str = "sgd", dtype: torch.dtype = F64, **options: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        optimizer = optimizer_of(net, kind)
        self.net, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            net, optimizer, loader(dtype), CosineAnnealingLR(optimizer, 6)
        )

    def train(self, epochs: int, clip: float | None = None) -> None:
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.net):
                    self.accelerator.backward(F.cross_entropy(self.net(x), y))
                    if clip is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.net.parameters(), clip)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()


def plain(net: nn.Module, kind: str, epochs: int = 2, accumulate: int = 1, clip: float | None = None) -> None:
    optimizer = optimizer_of(net, kind)
    scheduler = CosineAnnealingLR(optimizer, 6)
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader()):
            (F.cross_entropy(net(x), y) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


@each_mode
@pytest.mark.parametrize(
    ("kind", "accumulate", "clip"),
    [("sgd", 1, None), ("adamw", 1, None), ("sgd", 2, 0.1)],
    ids=["sgd", "adamw", "accumulated and clipped"],
)
def test_accelerate_trains_as_a_plain_loop(kind: str, accumulate: int, clip: float | None, mode: str) -> None:
    net, reference = smooth(mode), smooth(mode)
    start = points(net)
    Run(net, kind, gradient_accumulation_steps=accumulate).train(2, clip)
    plain(reference, kind, accumulate=accumulate, clip=clip)
    assert agree(net, reference)
    assert steps(net) == [2 * BATCHES // accumulate] * 2
    assert moved(net, start) == list(BINARY_LAYERS)
    assert hbnn_plugin.flip_ratio(net).total > 0
    if mode == "inplace":
        assert mapped(net)


@each_mode
def test_bf16_trains_near_single_precision(mode: str) -> None:
    nets = []
    for precision in ("bf16", "no"):
        accelerate.state.AcceleratorState._reset_state(True)
        net = applied(ScaledConv, mode=mode)
        Run(net, dtype=torch.float32, mixed_precision=precision).train(2)
        nets.append(net)
    for name in BINARY_LAYERS:
        ours, theirs = points(nets[0])[name], points(nets[1])[name]
        assert theirs.any() and not torch.equal(ours, theirs)
        assert float((ours - theirs).norm()) < 0.5 * float(theirs.norm())


@each_mode
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_a_saved_state_continues_as_the_whole_run(safe: bool, mode: str, tmp_path: Path) -> None:
    whole, first, second = (applied(ScaledConv, seed, mode=mode, point_momentum=0.5) for seed in (0, 0, 5))
    Run(whole, dtype=torch.float32).train(2)
    run = Run(first, dtype=torch.float32)
    run.train(1)
    run.accelerator.save_state(str(tmp_path), safe_serialization=safe)
    again = Run(second, dtype=torch.float32)
    again.accelerator.load_state(str(tmp_path))
    assert same_state(state(second), state(first))
    again.train(1)
    assert same_state(state(second), state(whole))
    assert steps(second) == [2 * BATCHES] * 2


@each_mode
def test_a_saved_model_loads_into_an_applied_one_and_made_plain_into_the_host(mode: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    run = Run(applied(ScaledConv, mode=mode), dtype=torch.float32)
    run.train(1)
    run.accelerator.save_model(run.net, str(tmp_path))
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    net, plain = applied(ScaledConv, 5, mode=mode), tiny_net(ScaledConv, 6)
    net.load_state_dict(saved)
    assert same_state(state(net), state(run.accelerator.unwrap_model(run.net)))
    plain.load_state_dict(hbnn_plugin.plain_state_dict(saved))
    assert torch.equal(output(plain), output(net))
