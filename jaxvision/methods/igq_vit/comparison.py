"""The rows of the comparison: what each method's name means, and the network that it makes.

Every row is one (seed, bit setting, method). All methods see the same calibration images, the same sites and, for
group methods, the same quantizer for the rows of the softmax attention.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.methods.igq_vit import allocation, baselines, bops, integer, integer_products, quantizers, simulate
from jaxvision.methods.igq_vit.calibration import (
    Bits,
    Calibration,
    QuantizedNetwork,
    common_codes,
    common_quantizers,
    common_variables,
    fixed_quantizer,
)
from jaxvision.methods.igq_vit.sites import RANGES, collect_ranges
from jaxvision.quant import weights

IGQ = re.compile(r"igq(_alloc)?(\d+)(_scale)?(_pow2)?(_int)?")
"""igq8 and its variants: allocated group counts, scaled bounds, power-of-two scales, integer products."""
ROW_GROUPS = 8
"""Groups of softmax rows in the methods that group only the inputs of FC layers."""


@dataclass(frozen=True)
class Row:
    """One row: the place of its seed among the seeds, the bit setting such as "W4A3", the method."""

    member: int
    bits: str
    method: str


@dataclass(frozen=True)
class Settings:
    """How IGQ is calibrated; the fields of ``config.igq`` (see ``configs/igq_vit.py``)."""

    max_groups: int = 16
    iters: int = 20
    m_step: str = "mean"
    per_head: bool = False
    instance: str = "image"
    clip_zero_point: bool = False
    candidates: tuple[int, ...] = allocation.CANDIDATES
    context: str = "float"
    sequential: bool = False
    fp_bits: int = 32

    def __post_init__(self) -> None:
        counts = self.candidates
        whole = all(isinstance(count, int) and not isinstance(count, bool) and count >= 1 for count in counts)
        if not counts or not whole or len(set(counts)) != len(counts):
            raise ConfigError(f"config.igq.candidates={counts} must be whole numbers of at least 1, each once")


def rows(members: int, bits: Sequence[str], methods: Sequence[str]) -> tuple[Row, ...]:
    """All rows, one seed after the other, so that its calibration is collected once."""
    return tuple(Row(i, setting, method) for i in range(members) for setting in bits for method in methods)


def parse_bits(text: str, image_bits: int) -> Bits:
    """ "W4A3" -> 4-bit weights, 3-bit activations; raises ConfigError for any other form or width."""
    if not isinstance(text, str) or not (found := re.fullmatch(r"W(\d+)A(\d+)", text)):
        raise ConfigError(f"config.bits has {text!r}, which must read like 'W4A4'")
    try:
        weights.WeightPolicy(bits=int(found[1]))
        return Bits(int(found[1]), int(found[2]), image_bits)
    except ConfigError as error:
        raise ConfigError(f"config.bits has '{text}': {error}") from error


def check_method(name: str, settings: Settings) -> None:
    """Raises ConfigError for a name that is neither a baseline nor of :data:`IGQ`, or that ``settings`` can't build."""
    found = IGQ.fullmatch(name) if isinstance(name, str) else None
    if name not in baselines.METHODS and not found:
        raise unknown("config.methods", name, [*baselines.METHODS, "igq8", "igq12", "igq_alloc8", "igq8_scale"])
    limit = f"config.igq.max_groups={settings.max_groups}; raise it"
    if not found:
        if name in FC_PARTS and settings.max_groups < ROW_GROUPS:
            raise ConfigError(
                f"config.methods has '{name}', whose attention rows have {ROW_GROUPS} groups, but {limit}"
            )
        return
    groups, allocated, snapped = int(found[2]), found[1], found[4]
    if not 1 <= groups <= settings.max_groups:
        raise ConfigError(f"config.methods has '{name}', but {limit}")
    if not allocated:
        return
    if groups not in settings.candidates:
        raise ConfigError(
            f"config.methods has '{name}', but config.igq.candidates={settings.candidates} lacks {groups}"
        )
    if max(settings.candidates) > settings.max_groups:
        raise ConfigError(f"config.igq.candidates={settings.candidates} go beyond {limit}")
    if snapped:
        raise ConfigError(
            f"config.methods has '{name}', but the budget of the allocation pays for rescaled partial sums, which "
            f"power-of-two scales don't need; use igq{groups}_pow2"
        )


def check_widths(method: str, text: str, bits: Bits) -> None:
    """Raises ConfigError where a method (of :func:`check_method`) doesn't exist for the bit setting ``text``."""
    width, found, why = bits.activation, IGQ.fullmatch(method), ""
    if method == "ptq4vit" and width < 2:
        why = "its twin quantizers need 2 bits or more"
    elif found and found[4] and width > integer_products.MAX_SHIFTED_BITS:
        why = f"its shifted codes fit int8 up to {integer_products.MAX_SHIFTED_BITS} bits"
    elif found and found[5] and width > 8:
        why = "its codes are int8"
    if why:
        raise ConfigError(f"config.methods has '{method}' and config.bits '{text}', but {why}; leave one of them out")


@dataclass(frozen=True)
class Built:
    """A method's network: what to run, the group count of each grouped site (None: not grouped), its BOPs."""

    network: QuantizedNetwork
    groups: dict[str, int] | None
    bops: dict[str, int]


@dataclass(frozen=True, eq=False)
class Bench:
    """One float network on its calibration images, from which every method's quantized network is built.

    Attributes:
      context: values at the sites.
      settings: of IGQ.
    """

    context: Calibration
    settings: Settings = field(default_factory=Settings)

    def build(self, method: str, bits: Bits) -> Built:
        """Calibrates one method."""
        if method in baselines.METHODS:
            softmax = self._softmax(bits) if method in FC_PARTS else None
            network = baselines.METHODS[method](self.context, bits, softmax_quantizers=softmax)
            groups = None
        else:
            allocated, count, scaled, snapped, products = IGQ.fullmatch(method).groups()
            groups = self._allocate(int(count), bits) if allocated else dict.fromkeys(self._grouped, int(count))
            made = self._sequential(groups, bits) if self.settings.sequential else self.igq(groups, bits)
            if scaled:
                made, _ = quantizers.refine_layer_scale(
                    self.context.apply_fn, self.context.variables, made, self.context.images
                )
            if snapped:
                made = {name: integer.snapped(quantizer, bits.activation) for name, quantizer in made.items()}
            network = QuantizedNetwork(common_variables(self.context, bits), made)
            if products:
                layers = integer.integer_layers(self.context.sites, network.variables, common_codes(self.context, bits))
                network = network.replace(layers=layers, one_product=bool(snapped))
        return Built(jax.block_until_ready(network), groups, self._cost(method, groups, bits))

    @property
    def _grouped(self) -> list[str]:
        return [site.name for site in self.context.sites if site.grouped]

    @property
    def ranges(self) -> dict[str, np.ndarray]:
        """Minimum and maximum of each calibration image's channels and rows, by grouped site."""
        c = self.context
        sites = tuple(site for site in c.sites if site.grouped)
        return c.once(
            "ranges", lambda: collect_ranges(c.apply_fn, c.variables, c.images, sites, instance=self.settings.instance)
        )

    def bounds(self, groups: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """IGQ's bounds (Hq, G, 2) and the history of the objective, by site. They don't depend on the bits."""
        s, ranges = self.settings, self.ranges
        options = {"iters": s.iters, "m_step": s.m_step, "per_head": s.per_head}

        def uniform(count: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
            sites = self.context.sites
            return self.context.once(
                ("bounds", count), lambda: quantizers.calibrate_groups(ranges, sites, count, **options)
            )

        # A layer's bounds depend on its own count alone: every choice of counts is put together from these.
        found = {name: uniform(count) for name, count in groups.items()}
        return {name: pair[0][name] for name, pair in found.items()}, {
            name: pair[1][name] for name, pair in found.items()
        }

    def igq(self, groups: Mapping[str, int], bits: Bits) -> dict[str, Any]:
        """IGQ's quantizer of every site with these group counts."""
        grouped = [site for site in self.context.sites if site.grouped]
        made = quantizers.igq_quantizers(grouped, self.bounds(groups)[0], {}, bits.activation, **self._options)
        return common_quantizers(self.context, bits) | made

    @property
    def _options(self) -> dict[str, Any]:
        s = self.settings
        return {"max_groups": s.max_groups, "instance": s.instance, "clip_zero_point": s.clip_zero_point}

    def _sequential(self, groups: Mapping[str, int], bits: Bits) -> dict[str, Any]:
        """As :meth:`igq`, each site calibrated on the network whose kernels and earlier sites are quantized."""
        c, s = self.context, self.settings
        sites = {site.name: site for site in c.sites}

        def make(name: str, x: jax.Array) -> Any | None:
            site = sites.get(name)
            if site is None:
                return None
            if not site.grouped:
                return fixed_quantizer(site, x, bits, c.head_groups)
            ranges = {name: np.asarray(RANGES[s.instance](site.kind, x, len(c.images)))}
            options = {"iters": s.iters, "m_step": s.m_step, "per_head": s.per_head}
            bounds, _ = quantizers.calibrate_groups(ranges, (site,), groups[name], **options)
            return quantizers.igq_quantizers((site,), bounds, {}, bits.activation, **self._options)[name]

        return quantizers.calibrate_sequentially(c.apply_fn, common_variables(c, bits), c.images, make)

    def _cost(self, method: str, groups: dict[str, int] | None, bits: Bits) -> dict[str, int]:
        """BOPs of an image; of grouped FC inputs the parts that the method's kind of grouping needs."""
        sites, parts = self.context.sites, None
        if method in FC_PARTS:
            parts, count = FC_PARTS[method]
            groups = {site.name: ROW_GROUPS if site.kind == "rows" else count for site in sites if site.grouped}
        elif groups is not None and IGQ.fullmatch(method)[4]:
            parts = ONE_PRODUCT_PARTS
        cost = bops.network_bops(
            sites,
            groups,
            bits.weight,
            bits.activation,
            self.settings.fp_bits,
            image_bits=bits.image,
            head_groups=0 if method in OWN_HEAD else self.context.head_groups,
        )
        for site in self.context.of_kind("channels") if parts is not None else ():
            cost[site.name] = {part: value if part in parts else 0 for part, value in cost[site.name].items()}
        total = bops.summary(cost)
        return {"bops/base": total["bops/base"]} if method in BOUNDS else total

    def _softmax(self, bits: Bits) -> dict[str, Any]:
        made = self.igq(dict.fromkeys(self._grouped, ROW_GROUPS), bits)
        return {site.name: made[site.name] for site in self.context.of_kind("rows")}

    def perturbations(self, bits: Bits, reference: int) -> np.ndarray:
        """Psi of each grouped site (rows) for each candidate count (columns); see ``allocation``.

        The other sites have ``reference`` groups, which matters in the context "quantized" alone.
        """
        c, s = self.context, self.settings

        def find() -> np.ndarray:
            tables = [self.igq(dict.fromkeys(self._grouped, count), bits) for count in s.candidates]
            start = tables[s.candidates.index(reference)]
            logits = simulate.predict(c.apply_fn, c.variables, start, simulate.switches(start, False), c.images)
            variables = c.variables if s.context == "float" else common_variables(c, bits)
            return allocation.perturbation_table(
                c.apply_fn, variables, start, tables, self._grouped, c.images, logits, context=s.context
            )

        return c.once(("perturbations", bits, reference if s.context == "quantized" else None), find)

    def _allocate(self, reference: int, bits: Bits) -> dict[str, int]:
        """The counts of least perturbation whose BOPs stay within those of ``reference`` groups everywhere."""
        s = self.settings
        cost = bops.cost_table(self.context.sites, s.candidates, bits.weight, bits.activation, s.fp_bits)
        budget = int(cost[:, s.candidates.index(reference)].sum())
        choice = allocation.allocate(self.perturbations(bits, reference), cost, budget)
        return {name: int(s.candidates[index]) for name, index in zip(self._grouped, choice)}


FC_PARTS: dict[str, tuple[tuple[str, ...], int]] = {
    "repq_rows": (("base",), 1),
    "consecutive8": (("base", "combine"), 8),
    "peg8": (("base", "combine"), 8),
    "kmeans8": (("base", "combine"), 8),
    "vsquant8": (("base", "range", "combine", "zero_point"), 8),
    "dynamic_tensor": (("base", "range"), 1),
}
"""Methods that take IGQ's quantizer of softmax rows, so that they differ in the inputs of FC layers alone, each with
the parts of :data:`bops.PARTS` that its grouping of those inputs costs, and its number of groups."""
OWN_HEAD = ("ptq4vit",)
"""Methods that quantize the classifier's input in their own way."""
ONE_PRODUCT_PARTS = ("base", "range", "distance")
"""What grouped FC inputs cost with power-of-two scales: zero points are taken off the codes, which are then shifted,
before the one product (neither is counted)."""
BOUNDS = ("upper", "upper_static")
"""No kernel could run these (each channel has a scale of its own inside the sum), so only their base BOPs are known."""


def choose_epsilon(context: Calibration, bits: Bits) -> Calibration:
    """The context with the weight percentile of least KL divergence on the calibration images (section 2.5)."""
    variables, images = context.variables, jnp.asarray(context.images)

    def predict(params: Any) -> jax.Array:
        return simulate.float_forward(context.apply_fn, {**variables, "params": params}, images)

    reference = predict(variables["params"])

    def error(params: Any) -> float:
        return float(jnp.mean(allocation.kl_divergence(reference, predict(params))))

    policy = replace(context.weight_policy, bits=bits.weight)
    chosen, _ = weights.choose_epsilon(variables["params"], policy, error)
    return replace(context, weight_policy=replace(context.weight_policy, epsilon=chosen))
