"""What every quantization method starts from, and what it returns.

A method of the comparison is ``build(context, bits, *, softmax_quantizers=None) -> QuantizedNetwork``: it reads the
:class:`Calibration` (the float network and its values at the sites on the calibration images, in parallel mode), and
returns variables with rounded kernels and one quantizer for each site. What the methods share is here too.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from jaxvision.core import struct
from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit import channel_groups
from jaxvision.methods.igq_vit import sites as sites_lib
from jaxvision.methods.igq_vit.sites import ApplyFn, Site
from jaxvision.quant import activation, uniform, weights
from jaxvision.quant.weights import WeightPolicy

Quantizers = dict[str, Any]


@dataclass(frozen=True)
class Bits:
    """Widths of the kernels, of the activations, and of the input image (8 whatever the others are)."""

    weight: int = 4
    activation: int = 4
    image: int = 8

    def __post_init__(self) -> None:
        for name in ("weight", "activation", "image"):
            uniform.check_bits(getattr(self, name), f"bits.{name}")

    def of(self, site: Site) -> int:
        """The width of a site."""
        return self.image if site.kind == "image" else self.activation


@struct.dataclass
class QuantizedNetwork:
    """Variables with rounded kernels, and the quantizer of each site by name. A pytree: goes through ``jit``.

    Attributes:
      variables, quantizers: as said.
      layers: of ``integer.integer_layers``, for a network that is executed with integer products; None: simulated.
      one_product: whether these run as one product for all groups (power-of-two scales); static.
    """

    variables: Any
    quantizers: Quantizers
    layers: Any = None
    one_product: bool = struct.field(pytree_node=False, default=False)


@dataclass(frozen=True, eq=False)
class Calibration:
    """The float network on the calibration images; make it with :meth:`create`.

    Attributes:
      apply_fn, variables: the network, see ``sites``.
      sites: in the order of the forward pass.
      images: [n, H, W, C] float32.
      activations: by site, [n * windows, ...]; all methods calibrate in parallel mode, on the float values.
      weight_policy: how methods without a weight quantizer of their own round kernels; its width gives way to
        ``Bits.weight``.
      observer_batch: images that a batch observer sees at a time; None: all (EMA is then the same as min-max).
      head_groups: fixed groups of the channels of an FC input of one token (:func:`fixed_quantizer`); 0: none.
    """

    apply_fn: ApplyFn
    variables: Any
    sites: tuple[Site, ...]
    images: np.ndarray
    activations: Mapping[str, np.ndarray]
    weight_policy: WeightPolicy = field(default_factory=lambda: WeightPolicy(method="mse"))
    observer_batch: int | None = None
    head_groups: int = 0
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def create(
        cls,
        apply_fn: ApplyFn,
        variables: Any,
        images: Any,
        *,
        sites: Sequence[Site] | None = None,
        chunk: int = 32,
        **options: Any,
    ) -> "Calibration":
        """Runs the float network on ``images`` [n, H, W, C], ``chunk`` at a time, and keeps its values on the host.

        ``options`` are the last three attributes. Keeping everything takes 1.5 GB for 32 images and DeiT-S.
        """
        images = np.asarray(images, np.float32)
        if images.ndim != 4 or not len(images):
            raise ConfigError(f"calibration needs images [n, H, W, C], n at least 1, and got an array {images.shape}")
        found = tuple(sites_lib.list_sites(apply_fn, variables, images.shape[1:]) if sites is None else sites)
        values = sites_lib.collect(apply_fn, variables, images, found, chunk)
        return cls(apply_fn, variables, found, images, values, **options)

    def of_kind(self, kind: str) -> tuple[Site, ...]:
        """The sites of one kind, see ``sites.Site``."""
        return tuple(site for site in self.sites if site.kind == kind)

    def rows(self, name: str) -> np.ndarray:
        """The values at a site as [T, C]: all tokens of all images."""
        x = self.activations[name]
        return x.reshape(-1, x.shape[-1])

    def batches(self, name: str) -> list[np.ndarray]:
        """The values at a site, ``observer_batch`` images at a time."""
        x = self.activations[name]
        size = (self.observer_batch or len(self.images)) * (len(x) // len(self.images))
        return [x[start : start + size] for start in range(0, len(x), size)]

    def channel_extremes(self, name: str) -> np.ndarray:
        """Minimum and maximum of each channel over all images and tokens, [C, 2]."""
        return self.once(("channel_extremes", name), lambda: channel_extremes(self.activations[name]))

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """``make()`` the first time, the same object afterwards: what methods share is computed once."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


def channel_extremes(x: np.ndarray) -> np.ndarray:
    """Minimum and maximum of each channel of [..., C] over everything else, [C, 2]."""
    rows = x.reshape(-1, x.shape[-1])
    return np.stack([rows.min(0), rows.max(0)], -1)


def fixed_quantizer(site: Site, x: Any, bits: Bits, head_groups: int = 0) -> activation.AffineQuantizer:
    """One quantizer for the whole tensor, its interval the best of RepQ-ViT's three percentile pairs.

    With ``head_groups`` of 2 or more the input of an FC layer that sees one token (the classifier's), which has no
    minimum and maximum of an image's own, has that many for its channels, grouped by their range over the images
    ``x`` [n, ..., C] (:func:`channel_groups.peg_bounds`).
    """
    width = bits.of(site)
    if head_groups > 1 and site.one_token:
        interval = channel_groups.peg_bounds(channel_extremes(np.asarray(x)), head_groups).T
    else:
        interval = weights.tensor_interval(x, width)
    return activation.AffineQuantizer.from_interval(*interval, width)


def common_quantizers(context: Calibration, bits: Bits, kinds: Sequence[str] = ("image", "tensor")) -> Quantizers:
    """The shared policy: image, q, k, v and head each with a :func:`fixed_quantizer`; the image at its own width.

    Args:
      context, bits: see there.
      kinds: sites to make quantizers for; add "channels" or "rows" to treat those per tensor too.
    """

    def find(site: Site) -> activation.AffineQuantizer:
        make = partial(fixed_quantizer, site, context.activations[site.name], bits, context.head_groups)
        return context.once(("fixed_quantizer", site.name, bits.of(site), context.head_groups), make)

    return {site.name: find(site) for site in context.sites if site.kind in kinds}


def common_variables(context: Calibration, bits: Bits) -> Any:
    """The network's variables, every kernel rounded under the context's weight policy at ``bits.weight``."""
    policy, (params, _) = _common_kernels(context, bits)
    return context.once(("variables", policy), lambda: {**context.variables, "params": params})


def common_codes(context: Calibration, bits: Bits) -> dict[str, weights.QuantizedTensor]:
    """The integer form, by name, of the kernels of :func:`common_variables`."""
    return _common_kernels(context, bits)[1][1]


def _common_kernels(context: Calibration, bits: Bits) -> tuple[WeightPolicy, tuple[Any, dict[str, Any]]]:
    policy = replace(context.weight_policy, bits=bits.weight)
    make = partial(weights.quantize_params, context.variables["params"], policy)
    return policy, context.once(("kernels", policy), make)


def with_rounded(variables: Any, policy: WeightPolicy) -> Any:
    """``variables`` with the kernels of ``params`` replaced by w_hat."""
    return {**variables, "params": weights.quantize_params(variables["params"], policy)[0]}


def given_softmax(context: Calibration, given: Mapping[str, Any] | None, method: str) -> Quantizers:
    """The quantizers of the attention sites out of the caller's; raises ConfigError where one is missing."""
    wanted = [site.name for site in context.of_kind("rows")]
    missing = [name for name in wanted if name not in (given or {})]
    if missing:
        raise ConfigError(
            f"method {method!r} has no quantizer for softmax attention of its own; pass softmax_quantizers with one "
            f"for {missing[0]!r}"
        )
    return {name: given[name] for name in wanted}
