"""FSDP2 on two ranks: sharded latents train as whole ones do. This file is also the script that the ranks run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hbnn_plugin
from hbnn_plugin.host.sharding import whole
from tiny_hosts import IrConv, TinyNet, clusters, latents, loss_of, tiny_net
from torch_version import since
from training_helpers import each_mode
from two_ranks import torchrun

pytestmark = since(2, 5, "fully_shard without a GPU")

OPTIONS = [
    {"per": per, "order": order, "mode": mode}
    for per, order, mode in [
        ("filter", "simultaneous", "parametrize"),
        ("layer", "alternating", "parametrize"),
        ("filter", "alternating", "inplace"),
        ("layer", "simultaneous", "inplace"),
    ]
]


def steps(net: nn.Module, first: int, count: int, optimizer: torch.optim.Optimizer) -> None:
    for seed in range(first, first + count):
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def result(net: TinyNet) -> dict[str, torch.Tensor]:
    found = {name: whole(p.detach()).clone() for name, p in net.named_parameters()}
    found |= {f"{name}.latent": whole(v) for name, v in latents(net).items()}
    flips = {f"{name}.flips": torch.tensor(ratio) for name, ratio in hbnn_plugin.flip_ratio(net).items()}
    return found | flips | {f"{name}.point": epc.point.clone() for name, epc in clusters(net).items()}


def fully_shard_of(net: TinyNet) -> TinyNet:
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415
    except ImportError:  # torch < 2.6
        from torch.distributed._composable.fsdp import fully_shard  # noqa: PLC0415
    for layer in (net.conv1, net.conv2):
        fully_shard(layer)
    return fully_shard(net)


def sharded(options: dict[str, str]) -> TinyNet:
    return fully_shard_of(hbnn_plugin.apply(tiny_net(IrConv, dtype=torch.float64), **options))


def main(out: Path) -> None:
    """Train four steps; once more with the sharded state saved and loaded in between."""
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict  # noqa: PLC0415

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for i, options in enumerate(OPTIONS):
        net = sharded(options)
        optimizer = optimizer_of(net)
        steps(net, 0, 2, optimizer)
        model_state, optimizer_state = get_state_dict(net, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=out / f"saved{i}")
        steps(net, 2, 2, optimizer)
        torch.save(result(net), out / f"trained{i}-{rank}.pt")

        again = sharded(options)
        optimizer = optimizer_of(again)
        model_state, optimizer_state = get_state_dict(again, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=out / f"saved{i}")
        set_state_dict(again, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        steps(again, 2, 2, optimizer)
        torch.save(result(again), out / f"resumed{i}-{rank}.pt")
    torch.distributed.barrier()  # see World.close in examples/distributed.py
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fsdp")
    done = torchrun(__file__, str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("i", range(len(OPTIONS)), ids=lambda i: "-".join(OPTIONS[i].values()))
def test_two_ranks_train_as_one(i: int, ranks: Path) -> None:
    net = hbnn_plugin.apply(tiny_net(IrConv, dtype=torch.float64), **OPTIONS[i])
    start = result(net)
    steps(net, 0, 4, optimizer_of(net))
    expected = result(net)
    assert not torch.allclose(expected["conv1.point"], start["conv1.point"])
    for name in ("trained", "resumed"):
        for rank in (0, 1):
            found = torch.load(ranks / f"{name}{i}-{rank}.pt", weights_only=True)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.allclose(found[key], value, rtol=1e-9, atol=1e-12), (name, key)


@pytest.mark.usefixtures("one_rank")
@each_mode
def test_what_is_sharded_is_neither_applied_to_nor_fused_and_the_message_tells_the_way(mode: str) -> None:
    net = sharded({"mode": mode})
    plain = tiny_net(IrConv)
    sharded_plain = fully_shard_of(tiny_net(IrConv))
    with pytest.raises(ValueError, match=r"is sharded by .*call hbnn_plugin\.apply first, shard afterwards"):
        hbnn_plugin.apply(sharded_plain, mode=mode)
    assert not clusters(sharded_plain)
    steps(net, 0, 2, optimizer_of(net))
    with pytest.raises(ValueError, match=r"conv1: its latent is sharded; gather .* hbnn_plugin\.plain_state_dict"):
        hbnn_plugin.fuse(net)
    gathered = {key: whole(value) for key, value in net.state_dict().items()}
    plain.double().load_state_dict(hbnn_plugin.plain_state_dict(gathered))
    again = hbnn_plugin.apply(tiny_net(IrConv, 3, torch.float64), mode=mode)
    again.load_state_dict(gathered)
    assert torch.equal(hbnn_plugin.fuse(again).conv1.weight, plain.conv1.weight)
    assert torch.equal(plain.conv1.weight, whole(net.conv1.weight))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # torch's device meshes keep gloo's threads, at which an interpreter that ends aborts now and then
