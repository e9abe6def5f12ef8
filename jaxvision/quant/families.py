"""The trainable quantizers by the names that configurations use."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxvision.core.errors import unknown
from jaxvision.quant.affine import Affine
from jaxvision.quant.binary import BinaryActivation, BinaryWeight
from jaxvision.quant.dorefa import DoReFaActivation, DoReFaWeight
from jaxvision.quant.ewgs import EWGSActivation, EWGSWeight
from jaxvision.quant.lbt import LBTActivation, LBTWeight
from jaxvision.quant.lsq import LSQ
from jaxvision.quant.pact import PACT
from jaxvision.quant.trainable import Trainable
from jaxvision.quant.trs import TRSActivation, TRSWeight


@dataclass(frozen=True)
class Family:
    """The quantizers of kernels and of inputs that belong together.

    Attributes:
      weight, activation: classes (see ``trainable.py``).
      needs_norm: the kernel's quantizer drops the scale of the kernel, so that a normalisation or a learned scale of
        the output must follow the layer.
      output_scale: the method learns such a scale.
      any_sign: inputs that can be negative need no setting.
      weight_settings, activation_settings: static fields, for both ``fit`` and the class itself, that make the class
        the kernel's or the input's.
    """

    weight: type[Trainable]
    activation: type[Trainable]
    needs_norm: bool = False
    output_scale: bool = False
    any_sign: bool = False
    weight_settings: Mapping[str, Any] = field(default_factory=dict)
    activation_settings: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "trs": Family(TRSWeight, TRSActivation, needs_norm=True),
    "lbt": Family(LBTWeight, LBTActivation),
    "lsq": Family(LSQ, LSQ, weight_settings={"signed": True}, activation_settings={"signed": False}),
    "ewgs": Family(EWGSWeight, EWGSActivation, needs_norm=True, output_scale=True),
    "dorefa": Family(DoReFaWeight, DoReFaActivation, needs_norm=True),
    "pact": Family(DoReFaWeight, PACT, needs_norm=True),
    "affine": Family(
        Affine, Affine, any_sign=True, weight_settings={"symmetric": True}, activation_settings={"symmetric": False}
    ),
    "binary": Family(BinaryWeight, BinaryActivation),
    "reactnet": Family(BinaryWeight, BinaryActivation, weight_settings={"scaled_gradient": False}),
}


def family(name: str, key: str = "quantizer") -> Family:
    """The family of that name; raises ConfigError, with ``key`` for the configuration's key, where there is none."""
    if name not in FAMILIES:
        raise unknown(key, name, FAMILIES)
    return FAMILIES[name]
