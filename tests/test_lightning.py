"""Lightning trains an applied model as a plain loop does: accumulation, clipping, schedules, precision, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hbnn_plugin
from inplace_nets import agree, mapped, smooth
from tiny_hosts import BINARY_LAYERS, IrConv, TinyNet, points, same_state, state
from training_helpers import BATCHES, F64, applied, each_mode, loader, moved, steps

lightning = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec.* is deprecated:FutureWarning"),  # Lightning's use of torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Task(lightning.LightningModule):
    def __init__(self, net: nn.Module, optimizer: Any = "sgd") -> None:
        super().__init__()
        self.net = net
        self.kind = optimizer

    def training_step(self, xy: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = xy
        loss = F.cross_entropy(self.net(x), y)
        self.log("flipped", hbnn_plugin.flip_ratio(self.net).total)
        return loss

    def configure_optimizers(self) -> Any:
        return made(self.net, self.kind)


def made(net: nn.Module, kind: str) -> Any:
    """Lightning's answer to configure_optimizers."""
    if kind == "lbfgs":
        return LBFGS(net.parameters(), lr=0.1, max_iter=3)
    optimizer: Optimizer
    if kind == "sgd":
        optimizer = SGD(net.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
    else:
        optimizer = AdamW(net.parameters(), lr=0.01)
    return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, 3)}


def trainer(folder: Path, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def plain_loop(net: nn.Module, kind: str, epochs: int, accumulate: int = 1, clip: float | None = None) -> None:
    answer = made(net, kind)
    optimizer, scheduler = (answer, None) if kind == "lbfgs" else answer.values()
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader()):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = F.cross_entropy(net(x), y)
                (loss / accumulate).backward()
                return loss

            if kind == "lbfgs":

                def cleared(closure: Any = closure) -> Tensor:
                    optimizer.zero_grad()
                    return closure()

                optimizer.step(cleared)
                continue
            closure()
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


@each_mode
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sgd", {}),
        ("adamw", {}),
        ("lbfgs", {}),
        ("sgd", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    ],
    ids=["sgd", "adamw", "lbfgs", "accumulated and clipped"],
)
def test_lightning_trains_as_a_plain_loop(kind: str, options: dict[str, Any], mode: str, tmp_path: Path) -> None:
    net, reference = smooth(mode), smooth(mode)
    start = points(net)
    fit = trainer(tmp_path, max_epochs=3, precision="64-true", **options)
    fit.fit(Task(net, kind), loader())
    net.to(F64)
    plain_loop(reference, kind, 3, options.get("accumulate_grad_batches", 1), options.get("gradient_clip_val"))
    assert agree(net, reference, rtol=1e-6 if kind == "lbfgs" else 1e-9)
    count = 3 * BATCHES // options.get("accumulate_grad_batches", 1)
    assert steps(net) == [count, count]
    assert moved(net, start) == list(BINARY_LAYERS)
    assert float(fit.callback_metrics["flipped"]) > 0
    if mode == "inplace":
        assert mapped(net)


@each_mode
def test_a_run_that_continues_from_lightnings_checkpoint_ends_as_the_whole_one(mode: str, tmp_path: Path) -> None:
    def run(net: TinyNet, epochs: int, **options: Any) -> Any:
        fit = trainer(tmp_path, max_epochs=epochs)
        fit.fit(Task(net), loader(torch.float32), **options)
        return fit

    whole, first, second = (applied(IrConv, seed, mode=mode, point_momentum=0.5) for seed in (0, 0, 5))
    run(whole, 3)
    run(first, 1).save_checkpoint(tmp_path / "last.ckpt")
    assert not same_state(state(first), state(whole))
    run(second, 3, ckpt_path=tmp_path / "last.ckpt")
    assert same_state(state(second), state(whole))
    assert steps(second) == [3 * BATCHES] * 2
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    plain = hbnn_plugin.plain_state_dict({key.removeprefix("net."): value for key, value in content.items()})
    TinyNet(IrConv).load_state_dict(plain)


@each_mode
def test_bf16_mixed_precision_trains_near_single_precision(mode: str, tmp_path: Path) -> None:
    net, reference = (applied(IrConv, mode=mode) for _ in range(2))
    trainer(tmp_path, max_epochs=1, precision="bf16-mixed").fit(Task(net), loader(torch.float32))
    trainer(tmp_path, max_epochs=1).fit(Task(reference), loader(torch.float32))
    for name in BINARY_LAYERS:
        ours, theirs = points(net)[name], points(reference)[name]
        assert theirs.any() and not torch.equal(ours, theirs)
        assert float((ours - theirs).norm()) < 0.5 * float(theirs.norm())


@each_mode
def test_lightnings_own_weight_averaging(mode: str, tmp_path: Path) -> None:
    """The average stands in for the model while it is validated, and in the end; training does not notice."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("lightning has no EMAWeightAveraging yet")
    net, reference = smooth(mode), smooth(mode)
    average = AveragedModel(reference, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    optimizer = SGD(reference.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
    seen: list[dict[str, Tensor]] = []

    class Validated(Task):
        def validation_step(self, xy: tuple[Tensor, Tensor], index: int) -> None:
            seen.append(state(self.net))

    fit = trainer(
        tmp_path,
        max_epochs=1,
        precision="64-true",
        num_sanity_val_steps=0,
        callbacks=[callbacks.EMAWeightAveraging(decay=0.5, use_buffers=True)],
    )
    fit.fit(Validated(net), loader(), loader())
    for x, y in loader():
        F.cross_entropy(reference(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(reference)
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(state(net)[key].to(F64), value, rtol=1e-9, atol=1e-12)
            assert torch.equal(seen[-1][key], state(net)[key])
    assert not agree(average.module, reference)
