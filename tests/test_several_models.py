"""Models side by side, in threads, copied and averaged: each one's points are its own."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tiny_hosts import BINARY_LAYERS, TinyNet, batch, clusters, latents, points, same_state, state, train
from training_helpers import applied, equal, moved


def test_two_models_trained_in_turn_do_not_meet() -> None:
    alone = [applied(seed=s) for s in range(2)]
    together = [applied(seed=s) for s in range(2)]
    for net, lr in zip(alone, (0.1, 0.3)):
        train(net, SGD(net.parameters(), lr=lr), 3)
    optimizers = [SGD(net.parameters(), lr=lr) for net, lr in zip(together, (0.1, 0.3))]
    for seed in range(3):
        for net, optimizer in zip(together, optimizers):
            before = [points(other) for other in together if other is not net]
            train(net, optimizer, 1, first=seed)
            assert all(moved(o, b) == [] for o, b in zip((o for o in together if o is not net), before))
    assert all(same_state(state(a), state(b)) for a, b in zip(alone, together))


def test_threads() -> None:
    references = [applied(seed=s) for s in range(4)]
    for net in references:
        train(net, SGD(net.parameters(), lr=0.1), 5)
    nets = [applied(seed=s) for s in range(4)]
    failures: list[BaseException] = []

    def work(net: TinyNet) -> None:
        try:
            train(net, SGD(net.parameters(), lr=0.1), 5)
        except BaseException as failure:  # a thread's exception would be lost
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(same_state(state(a), state(b)) for a, b in zip(references, nets))


def test_a_deepcopy_trains_by_itself() -> None:
    net = applied()
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
def test_averaged_models(use_buffers: bool) -> None:
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
