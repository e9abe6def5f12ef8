"""The rows of the comparison: what each method's name means, and how a quantized network is judged.

Every row is one (seed, bit setting, method). All methods see the same calibration images, the same sites and, for
group methods, the same quantizer for the rows of the softmax attention.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.core import struct
from jaxvision.core.errors import ConfigError, unknown
from jaxvision.engine.task import Batch, EvalData
from jaxvision.methods.igq_vit import allocation, baselines, bops, quantizers, simulate
from jaxvision.methods.igq_vit.calibration import (
    Bits,
    Calibration,
    QuantizedNetwork,
    common_quantizers,
    common_variables,
)
from jaxvision.methods.igq_vit.sites import ApplyFn, collect_ranges
from jaxvision.metrics import Mean, classification
from jaxvision.quant import weights

IGQ = re.compile(r"igq(_alloc)?(\d+)(_scale)?")
ROW_GROUPS = 8
"""Groups of softmax rows in the methods that group only the inputs of FC layers."""


@dataclass(frozen=True)
class Row:
    """One row: the index of its seed, the bit setting such as "W4A3", the method."""

    member: int
    bits: str
    method: str

    def __str__(self) -> str:
        return f"{self.method} {self.bits} seed {self.member}"


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
    fp_bits: int = 32


def rows(members: int, bits: Sequence[str], methods: Sequence[str]) -> tuple[Row, ...]:
    """All rows, one seed after the other, so that its calibration is collected once."""
    return tuple(Row(i, setting, method) for i in range(members) for setting in bits for method in methods)


def parse_bits(text: str, image_bits: int) -> Bits:
    """ "W4A3" -> 4-bit weights, 3-bit activations; raises ConfigError for any other form."""
    if not (found := re.fullmatch(r"W(\d+)A(\d+)", text)):
        raise ConfigError(f"config.bits has '{text}', which must read like W4A4")
    return Bits(int(found[1]), int(found[2]), image_bits)


def check_method(name: str, settings: Settings) -> None:
    """Raises ConfigError for a name that is neither a baseline nor igq<G>, igq<G>_scale or igq_alloc<G>."""
    if name in baselines.METHODS:
        return
    if not (found := IGQ.fullmatch(name)):
        raise unknown("config.methods", name, [*baselines.METHODS, "igq8", "igq12", "igq_alloc8", "igq8_scale"])
    groups = int(found[2])
    if not 1 <= groups <= settings.max_groups:
        raise ConfigError(f"config.methods has '{name}', but config.igq.max_groups={settings.max_groups}; raise it")
    if found[1] and groups not in settings.candidates:
        raise ConfigError(
            f"config.methods has '{name}', but config.igq.candidates={settings.candidates} lacks {groups}"
        )


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
            allocated, count, scaled = IGQ.fullmatch(method).groups()
            groups = self._allocate(int(count), bits) if allocated else dict.fromkeys(self._grouped, int(count))
            made = self.igq(groups, bits)
            if scaled:
                made, _ = quantizers.refine_layer_scale(
                    self.context.apply_fn, self.context.variables, made, self.context.images
                )
            network = QuantizedNetwork(common_variables(self.context, bits), made)
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
        s = self.settings
        grouped = [site for site in self.context.sites if site.grouped]
        options = {"max_groups": s.max_groups, "instance": s.instance, "clip_zero_point": s.clip_zero_point}
        made = quantizers.igq_quantizers(grouped, self.bounds(groups)[0], {}, bits.activation, **options)
        return common_quantizers(self.context, bits) | made

    def _cost(self, method: str, groups: dict[str, int] | None, bits: Bits) -> dict[str, int]:
        """BOPs of an image; of a baseline's grouped FC inputs the parts that its kind of grouping needs."""
        sites, widths = self.context.sites, (bits.weight, bits.activation, self.settings.fp_bits)
        if method not in FC_PARTS:
            return bops.summary(bops.network_bops(sites, groups, *widths))
        parts, count = FC_PARTS[method]
        counts = {site.name: ROW_GROUPS if site.kind == "rows" else count for site in sites if site.grouped}
        cost = bops.network_bops(sites, counts, *widths)
        for site in self.context.of_kind("channels"):
            cost[site.name] = {part: value if part in parts else 0 for part, value in cost[site.name].items()}
        return bops.summary(cost)

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


def choose_epsilon(context: Calibration, bits: Bits) -> Calibration:
    """The context with the weight percentile of least KL divergence on the calibration images (section 2.5)."""
    images, apply_fn = jnp.asarray(context.images), context.apply_fn
    predict = jax.jit(lambda params: apply_fn({**context.variables, "params": params}, images))
    reference = predict(context.variables["params"])

    def error(params: Any) -> float:
        return float(jnp.mean(allocation.kl_divergence(reference, predict(params))))

    policy = replace(context.weight_policy, bits=bits.weight)
    chosen, _ = weights.choose_epsilon(context.variables["params"], policy, error)
    return replace(context, weight_policy=replace(context.weight_policy, epsilon=chosen))


@struct.dataclass
class Power:
    """Signal and noise power at one site, float32 (); merges by addition, computes to the SQNR in dB."""

    signal: jax.Array
    noise: jax.Array

    def merge(self, other: "Power") -> "Power":
        return Power(self.signal + other.signal, self.noise + other.noise)

    def compute(self) -> jax.Array:
        """10 log10(signal / noise)."""
        return 10 * jnp.log10(self.signal / self.noise)


class WithReference:
    """Evaluation batches with the float network's logits: leaf ``reference``, float32 (B, K), computed once.

    Args:
      data: the batches.
      predict: images (B, H, W, C) -> logits (B, K) of the float network.
    """

    def __init__(self, data: EvalData, predict: Callable[[Any], jax.Array]):
        self._data, self._predict = data, predict
        self.num_batches, self.batch_size = data.num_batches, data.batch_size
        self._logits: dict[tuple[int, int, int], np.ndarray] = {}

    def batch_at(self, index: int, shard_index: int = 0, shard_count: int = 1) -> Batch:
        batch = self._data.batch_at(index, shard_index, shard_count)
        key = (index, shard_index, shard_count)
        if key not in self._logits:
            self._logits[key] = np.asarray(self._predict(batch["image"]))
        return {**batch, "reference": self._logits[key]}


def judge(apply_fn: ApplyFn) -> Callable[[QuantizedNetwork, Batch], dict[str, Any]]:
    """The evaluation ``(network, batch) -> metrics``: the quantized network against the float one.

    Metrics over the rows with mask 1: ``accuracy`` against the labels; ``kl``, KL(softmax reference || softmax
    quantized) in nats; ``agreement`` of the two argmaxes. ``reference``: see :class:`WithReference`.
    """

    def update(network: QuantizedNetwork, batch: Batch) -> dict[str, Any]:
        on = simulate.switches(network.quantizers)
        logits = simulate.forward(apply_fn, network.variables, network.quantizers, on, batch["image"])
        reference, mask = batch["reference"], batch["mask"]
        return {
            "accuracy": classification.accuracy(logits, batch["label"], mask),
            "kl": Mean.of(allocation.kl_divergence(reference, logits), mask),
            "agreement": Mean.of(jnp.argmax(reference, -1) == jnp.argmax(logits, -1), mask),
        }

    return update


def sqnr(apply_fn: ApplyFn) -> Callable[[QuantizedNetwork, Batch], dict[str, Power]]:
    """The evaluation ``(network, batch) -> {"sqnr/<site>": Power}``.

    The noise is that of quantizing the value which reaches a site when no activation is quantized (kernels are), so
    one site's error doesn't reach another.
    """

    def update(network: QuantizedNetwork, batch: Batch) -> dict[str, Power]:
        off = simulate.switches(network.quantizers, False)
        _, powers = simulate.forward_with_noise(apply_fn, network.variables, network.quantizers, off, batch["image"])
        real = batch["mask"] > 0
        return {
            f"sqnr/{name}": Power(jnp.sum(jnp.where(real, signal, 0)), jnp.sum(jnp.where(real, noise, 0)))
            for name, (signal, noise) in powers.items()
        }

    return update
