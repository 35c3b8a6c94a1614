"""Models side by side, in threads, copied and averaged: each one's points are its own."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import hbnn_plugin
from hbnn_plugin.cluster.epc import find
from tiny_hosts import (
    BINARY_LAYERS,
    TinyNet,
    batch,
    clusters,
    latents,
    loss_of,
    points,
    same_state,
    state,
    tiny_net,
    train,
)
from training_helpers import applied, each_mode, equal, moved, one_step


@pytest.mark.parametrize(
    "modes", [("parametrize", "parametrize"), ("inplace", "inplace"), ("inplace", "parametrize")], ids="-".join
)
def test_two_models_trained_in_turn_do_not_meet(modes: tuple[str, str]) -> None:
    alone = [applied(seed=s, mode=mode) for s, mode in enumerate(modes)]
    together = [applied(seed=s, mode=mode) for s, mode in enumerate(modes)]
    for net, lr in zip(alone, (0.1, 0.3)):
        train(net, SGD(net.parameters(), lr=lr), 3)
    optimizers = [SGD(net.parameters(), lr=lr) for net, lr in zip(together, (0.1, 0.3))]
    for seed in range(3):
        for net, optimizer in zip(together, optimizers):
            before = [points(other) for other in together if other is not net]
            train(net, optimizer, 1, first=seed)
            assert all(moved(o, b) == [] for o, b in zip((o for o in together if o is not net), before))
    assert all(same_state(state(a), state(b)) for a, b in zip(alone, together))


@pytest.mark.parametrize("one_optimizer", [False, True], ids=["", "optimizers from one thread"])
@each_mode
def test_threads(mode: str, one_optimizer: bool) -> None:
    references = [applied(seed=s, mode=mode) for s in range(4)]
    for net in references:
        train(net, SGD(net.parameters(), lr=0.1), 5)
    nets = [applied(seed=s, mode=mode) for s in range(4)]
    built = {net: SGD(net.parameters(), lr=0.1) for net in nets} if one_optimizer else {}
    failures: list[BaseException] = []

    def work(net: TinyNet) -> None:
        try:
            train(net, built.get(net) or SGD(net.parameters(), lr=0.1), 5)
        except BaseException as failure:  # a thread's exception would be lost
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(same_state(state(a), state(b)) for a, b in zip(references, nets))


@each_mode
def test_one_optimizer_for_two_models_of_either_mode(mode: str) -> None:
    alone = [applied(seed=0, mode=mode), applied(seed=1)]
    together = [applied(seed=0, mode=mode), applied(seed=1)]
    for net in alone:
        train(net, SGD(net.parameters(), lr=0.1), 3)
    optimizer = SGD([p for net in together for p in net.parameters()], lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        sum(loss_of(net, seed) for net in together).backward()
        optimizer.step()
    for one, other in zip(alone, together):
        for key, value in state(one).items():
            torch.testing.assert_close(state(other)[key], value)


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Also holds what workers should never need: the network."""

    def __init__(self, net: TinyNet) -> None:
        self.net = net

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = batch(index, n=1)
        return x[0] + 0 * self.net.conv1.weight.detach().sum(), y[0]


@each_mode
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_workers_that_load_data_change_nothing(mode: str) -> None:
    nets = []
    for workers in (0, 2):
        net = applied(mode=mode)
        optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
        context = "fork" if workers else None
        for x, y in DataLoader(Images(net), batch_size=6, num_workers=workers, multiprocessing_context=context):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        assert [int(epc.steps) for epc in clusters(net).values()] == [4, 4]
        nets.append(net)
    assert same_state(state(nets[0]), state(nets[1]))


@each_mode
def test_a_deepcopy_trains_by_itself(mode: str) -> None:
    net = applied(mode=mode)
    train(net, SGD(net.parameters(), lr=0.1), 1)
    other = copy.deepcopy(net)
    assert same_state(state(net), state(other))
    before = state(net)
    train(other, SGD(other.parameters(), lr=0.1), 2, first=1)
    assert same_state(state(net), before)
    assert moved(other, points(net)) == list(BINARY_LAYERS)
    train(net, SGD(net.parameters(), lr=0.1), 2, first=1)
    assert same_state(state(net), state(other))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models_under_a_parametrization(use_buffers: bool) -> None:
    """The latents are averaged; the points are the model's (or averaged too, where buffers are), its flips its own."""
    net = applied()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    optimizer = SGD(net.parameters(), lr=0.1)
    average.update_parameters(net)
    for seed in range(3):
        train(net, optimizer, 1, first=seed)
        old = latents(average)
        average.update_parameters(net)
        for name in BINARY_LAYERS:
            expected = 0.9 * old[f"module.{name}"] + 0.1 * latents(net)[name]
            torch.testing.assert_close(latents(average)[f"module.{name}"], expected)
    assert equal({f"module.{n}": p for n, p in points(net).items()}, points(average)) is not use_buffers
    for name, epc in clusters(net).items():
        assert torch.equal(clusters(average)[f"module.{name}"].flip_reference, epc.flip_reference)
    average.eval()
    assert average(batch()[0]).isfinite().all()


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models_in_place(use_buffers: bool) -> None:
    """The weights are averaged, as in the bare host, whatever becomes of the buffers, and that is what counts."""
    net = applied(mode="inplace")
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    optimizer = SGD(net.parameters(), lr=0.5)
    average.update_parameters(net)
    for seed in range(3):
        train(net, optimizer, 1, first=seed)
        old = average.module.conv1.weight.detach().clone()
        average.update_parameters(net)
        expected = 0.9 * old + 0.1 * net.conv1.weight.detach()
        torch.testing.assert_close(average.module.conv1.weight.detach(), expected)
    assert not torch.equal(average.module.conv1.weight, net.conv1.weight)
    x, averaged = batch()[0], average.module.conv1.weight.detach().clone()
    out = average.eval()(x)
    again = applied(seed=3, mode="inplace").eval()
    again.load_state_dict(average.module.state_dict())
    assert torch.equal(again(x), out)
    train(again.train(), SGD(again.parameters(), lr=0.0), 1)  # which takes the average into the latent
    torch.testing.assert_close(again.conv1.weight.detach(), averaged, rtol=1e-4, atol=1e-6)
    plain = tiny_net(seed=4).eval()
    plain.load_state_dict(hbnn_plugin.plain_state_dict(average.module.state_dict()))
    assert torch.equal(plain(x), out)
    assert torch.equal(hbnn_plugin.fuse(average.module)(x), out)


def test_models_can_be_copied_while_others_train() -> None:
    model, other = hbnn_plugin.apply(tiny_net(), rule="mobius"), hbnn_plugin.apply(tiny_net())
    stop, failures = threading.Event(), []

    def copying() -> None:
        try:
            while not stop.is_set():
                copy.deepcopy(other)
        except Exception as error:  # handed to the main thread
            failures.append(error)

    thread = threading.Thread(target=copying)
    thread.start()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(30):
        one_step(model, optimizer)
    stop.set()
    thread.join()
    assert not failures
    assert int(find(model.conv1)["weight"].steps) == 30
