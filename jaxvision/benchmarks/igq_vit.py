"""IGQ-ViT at DeiT-S size: images/s of float, per-tensor and IGQ forwards, calibration time, the integer path.

    python -m jaxvision.benchmarks.igq_vit [--model deit_small_patch16_224] [--batch 8] [--rounds 5]

Random weights (the speed doesn't depend on them), everything in one run on one machine, PyTorch eager beside it where
it is installed. Simulated quantization is slower than float by nature; the integer path is timed on one layer.
"""

import argparse
import os
import platform
import resource
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvision.benchmarks import timing, torch_vit
from jaxvision.core import host_memory
from jaxvision.methods.igq_vit import groups, integer, quantizers, simulate
from jaxvision.methods.igq_vit.sites import ApplyFn, Site, collect_ranges, list_sites
from jaxvision.models import zoo
from jaxvision.models.vit import ViT
from jaxvision.quant import activation, weights
from jaxvision.quant.weights import WeightPolicy


def calibrate(apply_fn: ApplyFn, variables: Any, images: np.ndarray, sites: tuple[Site, ...], chunk: int) -> Any:
    """Everything IGQ needs from the calibration images: quantized weights, and a quantizer for every site."""
    params, _ = weights.quantize_params(variables["params"], WeightPolicy(bits=4))
    grouped = tuple(site for site in sites if site.grouped)
    ranges = collect_ranges(apply_fn, variables, images, grouped, chunk)
    bounds, _ = quantizers.calibrate_groups(ranges, sites, 8)
    intervals = quantizers.tensor_intervals(apply_fn, variables, images, sites, 4, chunk=chunk)
    made = quantizers.igq_quantizers(sites, bounds, intervals, 4)
    return jax.block_until_ready(({"params": params}, made, intervals))


def per_tensor(sites: tuple[Site, ...], ranges: Any, intervals: Any) -> dict[str, Any]:
    """One min-max quantizer a site: the plain fake-quantized network."""
    made = {}
    for site in sites:
        found = ranges.get(site.name)
        lower, upper = intervals[site.name] if found is None else (found[..., 0].min(), found[..., 1].max())
        made[site.name] = activation.AffineQuantizer.from_interval(jnp.float32(lower), jnp.float32(upper), 4)
    return made


def integer_layer(rounds: int) -> dict[str, float]:
    """Seconds of one (197, 768) x (768, 3072) layer in float, and as int8 products for 1, 4, 8 and 16 groups."""
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(1, 197, 768)), jnp.float32)
    kernel = jnp.asarray(generator.normal(size=(768, 3072)), jnp.float32)
    packed = weights.quantize_tensor(kernel, WeightPolicy(bits=4, method="minmax"))
    float_layer = jax.jit(lambda x: x @ kernel)
    candidates = {"float": lambda: float_layer(x).block_until_ready()}
    for count in (1, 4, 8, 16):
        bounds, _ = groups.calibrate_bounds(groups.channel_range(x).reshape(-1, 2), count)
        quantizer = groups.InstanceGroupQuantizer.create(bounds, 4, count)
        layer = jax.jit(partial(integer.linear_int, quantizer=quantizer, weight=packed, bias=None, batch_size=1))
        candidates[f"int8, {count} groups"] = lambda layer=layer: layer(x).block_until_ready()
    return timing.interleaved(candidates, rounds)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calibration_images", type=int, default=32)
    options = parser.parse_args()
    host_memory.keep_freed_memory()
    # Without XLA's experimental fusions through YNN a network of this size runs 6 % faster on CPU (jaxlib 0.10.2).
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_experimental_ynn_fusion_type="

    module = zoo.build(options.model, num_classes=1000)
    size = (*zoo.spec(options.model).input_size, 3)
    generator = np.random.default_rng(0)
    calibration = generator.normal(size=(options.calibration_images, *size)).astype(np.float32)
    images = jnp.asarray(generator.normal(size=(options.batch, *size)), jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(0), images[:1])
    sites = list_sites(module.apply, variables, size)
    print(f"{options.model}, batch {options.batch}, {jax.devices()[0].device_kind}, {platform.processor() or 'CPU'}")

    begin = time.perf_counter()
    w_hat, igq, intervals = calibrate(module.apply, variables, calibration, sites, options.batch)
    cold = time.perf_counter() - begin
    begin = time.perf_counter()
    calibrate(module.apply, variables, calibration, sites, options.batch)
    warm = time.perf_counter() - begin
    what = f"calibration, {len(calibration)} images, {len(sites)} sites"
    print(f"{what}: {cold:.1f} s with compiling, {warm:.1f} s without")

    grouped = tuple(site for site in sites if site.grouped)
    ranges = collect_ranges(module.apply, variables, calibration, grouped, options.batch)
    plain = per_tensor(sites, ranges, intervals)
    plain_forward = jax.jit(lambda v, x: module.apply(v, x))

    def quantized(made: dict[str, Any]):
        on = simulate.switches(made)
        return lambda: simulate.forward(module.apply, w_hat, made, on, images).block_until_ready()

    candidates = {
        "float": lambda: plain_forward(variables, images).block_until_ready(),
        "per tensor": quantized(plain),
        "igq, 8 groups": quantized(igq),
    }
    if isinstance(module, ViT) and not module.distilled:
        tokens = 1 + (size[0] // module.patch_size) ** 2
        sizes = {"width": module.width, "depth": module.depth, "num_heads": module.num_heads}
        sizes |= {"patch_size": module.patch_size, "tokens": tokens, "num_classes": 1000}
        peer = torch_vit.forward(np.asarray(images).transpose(0, 3, 1, 2), **sizes)
        if peer is not None:
            candidates["PyTorch eager float"] = peer
    seconds = timing.interleaved(candidates, options.rounds)
    for name, value in seconds.items():
        print(f"  {name:22s} {options.batch / value:8.2f} images/s   {value / seconds['float']:5.2f} x float")
    print(f"  igq / per tensor: {seconds['igq, 8 groups'] / seconds['per tensor']:.2f}")
    if "PyTorch eager float" in seconds:
        ratio = seconds["PyTorch eager float"] / seconds["float"]
        print(f"  jaxvision float is {ratio:.2f} x as fast as PyTorch eager")
    layer = integer_layer(options.rounds)
    print("one (197, 768) x (768, 3072) layer, W4A4:")
    for name, value in layer.items():
        print(f"  {name:22s} {1e3 * value:8.2f} ms   {value / layer['float']:5.2f} x float")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
