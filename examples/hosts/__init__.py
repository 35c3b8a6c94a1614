"""Binary networks to train with and without HBNN, each written from its paper.

1/1 (binary weights, binary activations) are IR-Net, ReCU, SiMaN and the plain sign network; 1/32 (binary weights, real
activations) are BinaryConnect and MD-tanh-s.

A host is one module with two names in it:

* ``BinaryConv2d(in_channels, out_channels, kernel_size, stride, padding, bias)``: a convolution that binarizes its
  latent weight, and if it is 1/1 its input, in every forward; ``binary_weight()`` returns the tensor it convolves with;
* ``set_progress(model, progress)``: moves the host's schedule to ``progress`` = epoch / epochs, in [0, 1].

None of them knows about ``hbnn_plugin``: they are what a user brings along.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hosts import binaryconnect, irnet, mdtanh, plain, recu, siman
from hosts.common import BinaryConv, BinaryConvClass, binary_layers

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["HOSTS", "BinaryConv", "BinaryConvClass", "Host", "binary_layers", "get_host"]


@dataclass(frozen=True)
class Host:
    """What training needs to know of a host."""

    conv: BinaryConvClass
    set_progress: Callable[[nn.Module, float], None]
    decays_latent: bool
    """Whether weight decay acts on the latent weights of the binary layers."""


HOSTS = {
    "binaryconnect": Host(binaryconnect.BinaryConv2d, binaryconnect.set_progress, decays_latent=True),
    "irnet": Host(irnet.BinaryConv2d, irnet.set_progress, decays_latent=True),
    "mdtanh": Host(mdtanh.BinaryConv2d, mdtanh.set_progress, decays_latent=False),
    "plain": Host(plain.BinaryConv2d, plain.set_progress, decays_latent=True),
    "recu": Host(recu.BinaryConv2d, recu.set_progress, decays_latent=True),
    "siman": Host(siman.BinaryConv2d, siman.set_progress, decays_latent=False),
}


def get_host(name: str, arch: str) -> Host:
    """The host by name; IR-Net starts its estimator sharper on VGG-small (t = 0.1) than on residual networks."""
    host = HOSTS[name]
    if name == "irnet" and arch == "vgg_small":
        return Host(host.conv, partial(irnet.set_progress, t_min=0.1), host.decays_latent)
    return host
