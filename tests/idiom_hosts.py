"""Tiny hosts that do to their weight, class and optimizer what public codebases do, each with its own training step.

They are written from what those codebases do, in our words. A codebase that clamps at 1 clamps here at ``BOUND``, which
the small weights of a tiny network do reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, StepLR

import hbnn_plugin
from hbnn_plugin.host.selection import Predicate
from tiny_hosts import HardBinaryConv, HostConv, ScaledConv, loss_of, ste_sign, tiny_net

BOUND = 0.1
FILTER = (1, 2, 3)


class Host:
    """A network and the training of its codebase: made, then applied or not, then ``ready``, then stepped."""

    conv: ClassVar[Callable[..., nn.Module]] = ScaledConv
    where: ClassVar[Predicate | None] = None

    def __init__(self) -> None:
        self.net = tiny_net(self.conv, dtype=torch.float64)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.net.parameters())}]

    def ready(self) -> None:
        """Once, after the model was applied."""
        self.optimizer = SGD(self.groups(), lr=0.1, momentum=0.9, weight_decay=1e-3)

    def step(self, seed: int) -> float:
        self.optimizer.zero_grad()
        loss = loss_of(self.net, seed)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def train(self, steps: int = 4) -> list[float]:
        self.ready()
        return [self.step(seed) for seed in range(steps)]


# -- the weight's data is written in every forward ---------------------------------------------------------------------


class ClippedConv(ScaledConv):
    def forward(self, x: Tensor) -> Tensor:
        bound = self.weight.data.abs().flatten().quantile(0.9)
        self.weight.data = self.weight.data.clamp(-bound, bound)
        return super().forward(x)


class CentredConv(ScaledConv):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.sub_(self.weight.data.mean(FILTER, keepdim=True))
        return super().forward(x)


class ClippedInForward(Host):
    """Like ReCU's authors."""

    conv = ClippedConv


class CentredInForward(Host):
    """Like SiMaN's authors."""

    conv = CentredConv


# -- the trainer, or an object of its, writes into the weight ----------------------------------------------------------


class OrgConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self.weight, "org"):
            self.weight.org = self.weight.data.clone()
        self.weight.data = self.weight.org.sign()
        return self._conv_forward(x, self.weight, self.bias)


class OrgKept(Host):
    """Like BinaryNet.pytorch: the real weights are an attribute of the binary ones."""

    conv = OrgConv

    def step(self, seed: int) -> float:
        loss = loss_of(self.net, seed)
        self.optimizer.zero_grad()
        loss.backward()
        for p in self.net.parameters():
            if hasattr(p, "org"):
                p.data.copy_(p.org)
        self.optimizer.step()
        for p in self.net.parameters():
            if hasattr(p, "org"):
                p.org.copy_(p.data.clamp_(-BOUND, BOUND))
        return loss.item()


class BinBlock(nn.Module):
    """A plain convolution of signs; somebody else makes its weight binary."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*args, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(ste_sign(x))


class BinOp:
    """Like XNOR-Net-PyTorch: holds the weights of all convolutions but the first, binarizes and restores them."""

    def __init__(self, model: nn.Module) -> None:
        self.targets = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)][1:]
        self.saved = [w.data.clone() for w in self.targets]

    def binarization(self) -> None:
        for weight, saved in zip(self.targets, self.saved):
            weight.data = (weight.data - weight.data.mean(1, keepdim=True)).clamp(-BOUND, BOUND)
            saved.copy_(weight.data)
            weight.data = weight.data.sign() * weight.data.abs().mean(FILTER, keepdim=True)

    def restore(self) -> None:
        for weight, saved in zip(self.targets, self.saved):
            weight.data.copy_(saved)

    def update_gradients(self) -> None:
        for weight in self.targets:
            w, grad, n = weight.data, weight.grad.data, weight[0].numel()
            through_scale = w.sign() * (w.sign() * grad).sum(FILTER, keepdim=True) / n
            inside = w.abs().mean(FILTER, keepdim=True) * (w.abs() <= BOUND) * grad
            weight.grad.data = (inside + through_scale) * (1 - 1 / w.shape[1]) * n


class Captured(Host):
    """Like XNOR-Net-PyTorch: the object is built with the model."""

    conv = BinBlock
    where = staticmethod(hbnn_plugin.by_name(r"^conv\d\.conv$"))

    def __init__(self) -> None:
        super().__init__()
        self.bin_op = BinOp(self.net)

    def binarize(self) -> None:
        self.bin_op.binarization()

    def step(self, seed: int) -> float:
        self.binarize()
        self.optimizer.zero_grad()
        loss = loss_of(self.net, seed)
        loss.backward()
        self.bin_op.restore()
        self.bin_op.update_gradients()
        self.optimizer.step()
        return loss.item()


class CapturedLater(Captured):
    """The object is built after apply."""

    def __init__(self) -> None:
        Host.__init__(self)

    def ready(self) -> None:
        super().ready()
        self.bin_op = BinOp(self.net)


class ClampedByTrainer(Host):
    """The trainer clamps the weights after each step."""

    def step(self, seed: int) -> float:
        loss = super().step(seed)
        for m in self.net.modules():
            if isinstance(m, ScaledConv):
                m.weight.data.clamp_(-BOUND, BOUND)
        return loss


# -- where the weight is -----------------------------------------------------------------------------------------------


class OwnConv(_ConvNd):
    """Derived from torch's base, so not an nn.Conv2d."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        pairs = [(n, n) for n in (kernel, stride, padding, 1)]
        super().__init__(inputs, outputs, *pairs, False, (0, 0), 1, True, "zeros")

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.detach().abs().mean(FILTER, keepdim=True) * ste_sign(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class InContainer(nn.Module):
    """Holds its convolution in a container in a container."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"first": nn.ModuleList([nn.Identity(), ScaledConv(*args, **options)])})

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts["first"]:
            x = part(x)
        return x


class ThriceConv(HostConv):
    def binary_weight(self) -> Tensor:
        centred = self.weight - self.weight.mean(FILTER, keepdim=True)
        return self.weight.detach().abs().mean(FILTER, keepdim=True) * ste_sign(centred)


class ReadThrice(Host):
    conv = ThriceConv


class FlatWeights(Host):
    """Like ReActNet: ``weights`` of shape (N, 1), not an nn.Conv2d."""

    conv = HardBinaryConv


class DerivedFromConvNd(Host):
    conv = OwnConv


class Contained(Host):
    conv = InContainer


# -- what the trainer asks of classes, names and shapes ----------------------------------------------------------------


class ByGroup(Host):
    """The weights that ``chosen`` names learn more slowly and do not decay."""

    def chosen(self) -> Iterable[nn.Parameter]:
        raise NotImplementedError

    def groups(self) -> list[dict[str, Any]]:
        chosen = list(self.chosen())
        rest = [p for p in self.net.parameters() if all(p is not other for other in chosen)]
        return [{"params": rest}, {"params": chosen, "lr": 0.02, "weight_decay": 0.0}]


class ByExactType(ByGroup):
    def chosen(self) -> list[nn.Parameter]:
        return [p for m in self.net.modules() if type(m) is ScaledConv for p in m.parameters()]


class ByClassName(ByGroup):
    def chosen(self) -> list[nn.Parameter]:
        return [p for m in self.net.modules() if m.__class__.__name__ == "ScaledConv" for p in m.parameters()]


class ByName(ByGroup):
    def chosen(self) -> list[nn.Parameter]:
        return [p for name, p in self.net.named_parameters() if "conv" in name]


class ByEndOfName(ByGroup):
    def chosen(self) -> list[nn.Parameter]:
        return [p for name, p in self.net.named_parameters() if name.endswith(".weight")]


class ByDimensions(ByGroup):
    def chosen(self) -> list[nn.Parameter]:
        return [p for p in self.net.parameters() if p.ndim == 4]


class ByTableOfTypes(Host):
    rates: ClassVar[dict[type, float]] = {nn.Conv2d: 0.1, ScaledConv: 0.02, nn.BatchNorm2d: 0.1, nn.Linear: 0.05}

    def groups(self) -> list[dict[str, Any]]:
        own = [(type(m), list(m.parameters(recurse=False))) for m in self.net.modules()]
        return [{"params": params, "lr": self.rates[cls]} for cls, params in own if params]


# -- when the optimizer is built ---------------------------------------------------------------------------------------


class BuiltBefore(Host):
    """Optimizer and schedule are there before apply; the next step of the schedule counts the groups."""

    def __init__(self) -> None:
        super().__init__()
        super().ready()
        self.schedule = LambdaLR(self.optimizer, lambda epoch: 0.8**epoch)

    def ready(self) -> None:
        pass

    def step(self, seed: int) -> float:
        loss = super().step(seed)
        self.schedule.step()
        return loss


class AddedLater(Host):
    """Only the classifier learns at first; the rest joins after the schedule was built."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = SGD(self.net.fc.parameters(), lr=0.1, momentum=0.9)
        self.schedule = StepLR(self.optimizer, step_size=1, gamma=0.8)

    def ready(self) -> None:
        pass

    def step(self, seed: int) -> float:
        if seed == 1:
            rest = [p for name, p in self.net.named_parameters() if not name.startswith("fc.")]
            self.optimizer.add_param_group({"params": rest, "lr": 0.05})
        loss = super().step(seed)
        self.schedule.step()
        return loss


class RebuiltEachEpoch(Host):
    def step(self, seed: int) -> float:
        if seed % 2 == 0:
            self.ready()
        return super().step(seed)
