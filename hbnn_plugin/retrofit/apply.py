"""apply: put the exponential parametrization cluster on the binary layers of an existing model."""

from __future__ import annotations

import warnings
from typing import Literal, TypeVar

from torch import Tensor, nn

from ..cluster.batching import install_batching
from ..cluster.epc import EPC
from ..cluster.inplace import InPlace
from ..cluster.parametrization import Parametrized
from ..cluster.reference import binary_bits
from ..cluster.settings import Mode, Order, Per, Rule, SpaceName, make_settings
from ..host.bits import is_two_valued, pack_bits
from ..host.convolved import convolved_weight
from ..host.idioms import held_elsewhere
from ..host.selection import Predicate, Selected, binary_convolutions
from ..optimizer.hooking import install
from .binarize import binarize_model, plan_binarization
from .loading import install_hooks
from .planning import Plan, check_model, check_where, make_plan

__all__ = ["Binarize", "apply", "plan"]

M = TypeVar("M", bound=nn.Module)
Binarize = Literal["1/1", "1/32"]


def plan(
    model: nn.Module,
    *,
    space: SpaceName = "ball",
    radius: float | None = None,
    per: Per = "filter",
    where: Predicate | None = None,
    binarize: Binarize | None = None,
    mode: Mode | None = None,
    rule: Rule | None = None,
    order: Order = "simultaneous",
    relative: bool = False,
    start: float | None = None,
    point_lr: float | None = None,
    point_lr_power: float | None = None,
    point_momentum: float | None = None,
    point_decay: float | None = None,
) -> Plan:
    """What :func:`apply` would do with the same arguments, and all that would stop it; nothing is changed.

    Returns:
        The layers; its repr is a table.

    Raises:
        ValueError, TypeError: as :func:`apply`.
    """
    settings = make_settings(
        space,
        rule,
        per,
        order,
        relative,
        radius=radius,
        start=start,
        point_lr=point_lr,
        point_lr_power=point_lr_power,
        point_momentum=point_momentum,
        point_decay=point_decay,
    )
    check_where(where)
    if binarize is None:
        return make_plan(model, settings, where or binary_convolutions, mode, by_default=where is None)
    check_model(model, mode)
    names = plan_binarization(model, binarize, where)
    return make_plan(model, settings, lambda module, name: name in names, mode, binarize, by_default=where is None)


def apply(
    model: M,
    *,
    space: SpaceName = "ball",
    radius: float | None = None,
    per: Per = "filter",
    where: Predicate | None = None,
    binarize: Binarize | None = None,
    mode: Mode | None = None,
    rule: Rule | None = None,
    order: Order = "simultaneous",
    relative: bool = False,
    start: float | None = None,
    point_lr: float | None = None,
    point_lr_power: float | None = None,
    point_momentum: float | None = None,
    point_decay: float | None = None,
) -> M:
    r"""Write each binary layer's weight as exp_p(v), in place, and return the model ([HBNN] Eq. 6).

    The weight Parameter itself becomes the latent v, so an optimizer built before stays right. From here on the points
    p move by themselves whenever a torch optimizer that holds the latents steps, at a rate that follows the learning
    rate of the latent's parameter group (``point_lr``). Every layer's binary weight is at first what it was.

    What the paper leaves open is an option here, and the default is our reading, chosen by measurement (README).

    Args:
        model: any model with binary layers; on any device, not yet sharded.
        space: ``"ball"`` (HBNN) or ``"sphere"`` (SBNN).
        radius: r > 0; the ball ends at ‖x‖ = 1/√r. Default 0.05 for the ball, 1.0 for the sphere (Table I).
        per: one point per output unit (``"filter"``) or one per ``"layer"``.
        where: predicate ``(module, qualified_name) -> bool``; default: convolutions of a class of the model's own that
            are not frozen. See :func:`by_name` and :func:`by_class`.
        binarize: for a full-precision model: ``"1/1"`` (weights/activations) or ``"1/32"`` binarizes its convolutions
            first. For ``"1/1"`` every ``nn.ReLU`` outside the classifier becomes ``nn.Hardtanh``.
        mode: ``"parametrize"``: the weight becomes a torch parametrization of its latent; ``"inplace"``: the host keeps
            its weight and class, its keys beside new ones, and only an optimizer's step sees the latent. By default
            parametrize, unless something is seen that requires in-place mode (``host/idioms.py``, a model in DDP);
            ``plan`` tells.
        rule: how points move: ``"spectral"`` (beyond the paper, ``optimizer/rules.py``; the ball's default, because
            it did best on IR-Net, see the README), ``"mobius"`` (the paper's Eq. 9; the sphere's
            default), ``"riemannian"`` or ``"riemannian-adam"`` (geoopt's), or ``"fixed"``: not at all, which is the
            plain Riemannian exponential map. On the sphere all but the last follow the geodesic.
        order: ``"simultaneous"``: point and latent from one gradient; ``"alternating"``: the point first, the latent's
            gradient then re-evaluated at the new point (Algorithm 1).
        relative: measure the radius in units of each weight's own norm at apply, x = s·EPC(v/s): every layer sits at
            the same place in its ball, and a pretrained host's output is kept itself, not only its binary weights.
        start: the point's start on the geodesic from the origin (0, the ball's default) to the weight (1, the
            sphere's).
        point_lr, point_lr_power: the point's learning rate is ``point_lr * lr**point_lr_power``, lr its weight's: 1 and
            1; for the spectral rule 0.15 and 0.75 (``optimizer/moves.py`` says why). Under Adam's kind of optimizer
            the power has no effect on spectral points: their coordinates move by about ``point_lr * lr``. A parameter
            group's ``"point_lr"`` overrides the option.
        point_momentum: heavy-ball momentum of the point, 0; for the spectral rule Nesterov's, 0.95.
        point_decay: decay of the point towards the origin, p ← (1 − η·point_decay) ⊗ p; 0, for the spectral rule
            in the ball 0.02.

    Raises:
        ValueError: an option out of range; nothing to select; weights that are not floating, finite, initialized, or
            that are parametrized already; a sharded model, or one in DDP with ``mode="parametrize"``. The message names
            each layer; nothing was changed.
        TypeError: not a module, or an option that is not a number.

    Warns:
        UserWarning: weights lay outside the ball; a selected layer does not convolve with a two-valued weight, or could
            not be run on a small input to see what it convolves with.
    """
    made = plan(
        model,
        space=space,
        radius=radius,
        per=per,
        where=where,
        binarize=binarize,
        mode=mode,
        rule=rule,
        order=order,
        relative=relative,
        start=start,
        point_lr=point_lr,
        point_lr_power=point_lr_power,
        point_momentum=point_momentum,
        point_decay=point_decay,
    )
    names = [layer.name for layer in made.layers]
    if binarize is not None:
        binarize_model(model, binarize, set(names))
        made = make_plan(model, made.settings, lambda module, name: name in names, made.mode)
    keys = [id(s.weight) for s in made.layers]  # tied weights have one
    convolved = {s.label: convolved_weight(s.module, s.shape, s.weight) for s in made.layers}
    make = InPlace if made.mode == "inplace" else Parametrized
    epcs: dict[int, EPC] = {}
    outside: dict[str, int] = {}
    for key, s in zip(keys, made.layers):
        if key in epcs:
            epcs[key].tied_layers += 1
        else:
            epc = make(s.weight, made.settings, shape=s.shape, unit_dims=s.unit_dims, name=s.label)
            epc.flip_reference = pack_bits(binary_bits(s.weight, convolved[s.label], s.shape, s.unit_dims))
            outside[s.label] = epc.latent_of(s.weight)[1]
            epcs[key] = epc
    # All that can be checked has been.
    for key, s in zip(keys, made.layers):
        epcs[key].attach(s.module, s.tensor_name)
    install_hooks(model, [s.module for s in made.layers])
    if made.mode == "parametrize":
        install_batching(model)
    install()
    _warn_about(made, outside, convolved)
    return model


def _two_valued(layer: Selected, weight: Tensor) -> bool:
    return is_two_valued(weight.reshape(layer.shape), layer.unit_dims)


def _two_valued_later(layer: Selected) -> bool:
    """Whether the layer convolves with two values in evaluation: some hosts train with a weight that becomes binary."""
    weight = getattr(layer.module, layer.tensor_name)
    convolved = convolved_weight(layer.module, layer.shape, weight, evaluating=True)
    return convolved is not None and _two_valued(layer, convolved)


def _warn_about(made: Plan, outside: dict[str, int], convolved: dict[str, Tensor | None]) -> None:
    displaced = {name: n for name, n in outside.items() if n}
    if displaced and made.settings.space == "ball":
        finer = "So does per='filter'." if made.settings.per == "layer" else ""
        warnings.warn(
            f"{sum(displaced.values())} point(s) of {', '.join(displaced)} start at the edge of the ball: the weight's "
            f"norm is beyond 1/√radius = {made.settings.radius**-0.5:.3g}. Its direction, so its binary value, is "
            f"kept; its gradient is small there. A smaller radius, or relative=True, avoids that. {finer}",
            stacklevel=3,
        )
    seen = [(s, weight) for s in made.layers if (weight := convolved[s.label]) is not None]
    not_binary = [s for s, weight in seen if not (_two_valued(s, weight) or _two_valued_later(s))]
    in_place = made.mode == "inplace"
    elsewhere = held_elsewhere(not_binary) if in_place else {}  # by an object that binarizes it, in all likelihood
    unexplained = [s.label for s in not_binary if s.label not in elsewhere]
    if unexplained:
        note = "If your trainer makes it binary around the forward, in-place mode honours that. " if in_place else ""
        warnings.warn(
            f"{', '.join(unexplained)}: the forward does not convolve with a two-valued weight. {note}A layer that is "
            "to stay real-valued can be left out with where=...",
            stacklevel=3,
        )
    unseen = [label for label, weight in convolved.items() if weight is None]
    if unseen:
        warnings.warn(
            f"{', '.join(unseen)}: what it convolves with could not be seen on a small input, so its flips are counted "
            "on the sign of its weight.",
            stacklevel=3,
        )
