"""AZ-NAS: training-free architecture search by four zero-cost proxies, beside other proxies.

    python -m jaxvision.main --config=configs/az_nas.py
        scores random NAS-Bench-201 networks by AZ-NAS and other proxies, trains a sample of them on handwritten digits,
        and compares the rankings with the accuracies
    python -m jaxvision.main --config=configs/az_nas.py --config.benchmark_table=FILE
        compares with the benchmark's accuracies instead; FILE is made by
        python -m jaxvision.tools.prepare_data nas_bench_201
    python -m jaxvision.main --config=configs/az_nas.py:official_sample --config.benchmark_table=FILE
        the 701 networks that the official code was run on, at its settings; ``same_size``: the 1,000 of that sample
        with AZ-NAS and the other proxies on images of one size; ``full``: all 15,625
    python -m jaxvision.main --config=configs/az_nas.py:mbv2_450m --workdir=RUN
    python -m jaxvision.main --config=RUN/found.py --config.data.path=DIR
        a search for an ImageNet network, then its training: two commands. The paper's search has 100,000 candidates;
        --config.search.count=2000 --config.search.population=128 is a short one

Presets: ``smoke`` (seconds), ``official_sample``, ``same_size``, ``full``, ``mbv2_{450m,600m,1g}``,
``autoformer_{t,s,b}``.

Fields beside those of ``configs/common.py``:

    space       name (spaces/catalog.py) and options, the space's own settings. nas_bench_201: width and num_cells of
                its networks, init of the weights (nb201_draws.py), resolution and num_classes that costs are counted
                for; mbv2: start, where evolution begins, uniform_types: mutation draws every block type as often,
                cost_resolution and num_classes; autoformer_*: patch_size, supernet_seed of the weights (-1: seed)
    search      method: random (draws), evolution (mutation of the best), sample (numpy's default_rng(sample_seed) draws
                sample_of without repetition, of which the first count), all. count: candidates; chunk: of a step.
                population: evolution takes parents from the best population - 1 (by one proxy: population). tries:
                draws until a candidate must be within the budget. rank_by: proxies, (): the space's; one alone is
                ZenNAS's search. once_per_function: networks that compute the same function are scored once
    budget      max_flops, min_params, max_params, max_layers (of mbv2 and autoformer_*, whose layers are blocks); 0: no
                limit
    scoring     of AZ-NAS: resolution and batch_size of the noise images, repeats: mean over draws, together: how many
                networks are computed at once (accelerators, candidates that don't depend on scores; 0: one after
                the other)
    baselines   names of other papers' proxies (methods/az_nas/baselines.py; te_nas stands for its two), resolution and
                batch_size of their noise images, gradsign_mean ("supernet" or "own"), data: the images of those that
                look at real ones; NAS-Bench-201 only
    benchmark_table  accuracies of NAS-Bench-201, or "": the run makes its own truth
    ground_truth    count: of the first candidates that are trained; picks: rankings whose best candidate is trained,
                too; on data, for epochs, with width and cells; lr, momentum, weight_decay of SGD; how: one after the
                other (map) or at once (vmap). Unused with a benchmark_table
    report      resamples of the bootstrap; pool and runs: small searches in the scores (pick one of pool, runs times)
"""

from ml_collections import ConfigDict

from configs import common
from jaxvision.models import mbv2_structure

# Name -> (FLOPs, layers), section 4.2 of the paper.
MBV2 = {"mbv2_450m": (450e6, 14), "mbv2_600m": (600e6, 14), "mbv2_1g": (1000e6, 16)}
# Name -> (least, most) parameters: AutoFormer's search.
AUTOFORMER = {"autoformer_t": (4e6, 6e6), "autoformer_s": (21e6, 23e6), "autoformer_b": (52e6, 54e6)}
# Space -> its options and their defaults.
OPTIONS = {
    "nas_bench_201": {
        "resolution": 32,
        "num_classes": 10,
        "width": 16,
        "num_cells": 5,
        "init": "kaiming_normal_in",
    },
    "mbv2": {
        "start": mbv2_structure.INITIAL,
        "uniform_types": False,
        "cost_resolution": 224,
        "num_classes": 1000,
    },
    **{name: {"patch_size": 16, "supernet_seed": -1} for name in AUTOFORMER},
}
# All but te_nas, whose kernel takes as long as all others together.
BASELINES = ("params", "grad_norm", "snip", "grasp", "synflow", "naswot", "zen", "gradsign", "zico")
PRESETS = ("smoke", "official_sample", "same_size", "full", *MBV2, *AUTOFORMER)


def get_config(preset: str = "") -> ConfigDict:
    """The configuration of a preset."""
    presets = {
        "": nas_bench_201,
        "smoke": smoke,
        "official_sample": official_sample,
        "same_size": same_size,
        "full": full,
    }
    if preset in presets:
        return common.finish(presets[preset]())
    if preset in MBV2:
        return common.finish(mbv2(*MBV2[preset]))
    if preset in AUTOFORMER:
        return common.finish(autoformer(preset, *AUTOFORMER[preset]))
    raise common.unknown_preset(preset, PRESETS)


def base(space: str, *, count: int, resolution: int, batch_size: int, **engine) -> ConfigDict:
    """All fields: a random search without limits."""
    config = common.engine(**{"save_every": 1, **engine})
    config.method = "az_nas"
    config.space = ConfigDict({"name": space, "options": OPTIONS.get(space, {})})
    config.search = ConfigDict(
        {
            "method": "random",
            "count": count,
            "chunk": 25,
            "population": 1024,
            "tries": 10_000,
            "rank_by": (),
            "sample_of": 1000,
            "sample_seed": 2024,
            "once_per_function": False,
        }
    )
    config.budget = ConfigDict({"max_flops": 0.0, "min_params": 0.0, "max_params": 0.0, "max_layers": 0})
    config.scoring = ConfigDict({"resolution": resolution, "batch_size": batch_size, "repeats": 1, "together": 0})
    config.benchmark_table = ""
    config.report = ConfigDict({"resamples": 1000, "pool": 300, "runs": 200})
    return config


def with_truth(config: ConfigDict, count: int, epochs: float, width: int, cells: int) -> ConfigDict:
    """Candidates trained as the benchmark trains, on 8 x 8 digits under noise: without it all are right in the end."""
    config.data = common.digits(batch_size=32, eval_batch_size=250, options={"noise": 0.5})
    config.ground_truth = ConfigDict(
        {
            "count": count,
            "picks": ("az_nas", "az_nas_linear", "complexity", "synflow"),
            "epochs": epochs,
            "width": width,
            "cells": cells,
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 5e-4,
            "how": "map",
        }
    )
    return config


def with_baselines(config: ConfigDict, names: tuple[str, ...], *, resolution: int = 8) -> ConfigDict:
    """The other proxies, on digits of 8 x 8 pixels and noise of that size, which costs a quarter of 16 x 16."""
    data = common.digits(batch_size=16)
    if resolution == 16:
        data = common.data("digits16", mean=(0.0,), std=(1.0,), batch_size=16)
    config.baselines = ConfigDict(
        {"names": names, "resolution": resolution, "batch_size": 16, "gradsign_mean": "supernet", "data": data}
    )
    return config


def nas_bench_201() -> ConfigDict:
    """1,000 draws, on as few and small noise images as keep the order of the proxies."""
    config = base("nas_bench_201", count=1000, resolution=16, batch_size=16, save_every=20)
    config.search.chunk = 10
    return with_truth(with_baselines(config, BASELINES), count=96, epochs=3.0, width=8, cells=1)


def smoke() -> ConfigDict:
    """Every part on a few networks of a few channels."""
    config = base("nas_bench_201", count=12, resolution=8, batch_size=4, save_every=1, tensorboard=False)
    config.search.chunk = 4
    config.space.options.update(width=4, num_cells=1)
    config.report = ConfigDict({"resamples": 20, "pool": 4, "runs": 5})
    config = with_truth(with_baselines(config, ("params", "naswot")), count=4, epochs=0.1, width=4, cells=1)
    config.ground_truth.picks = ("az_nas", "naswot")
    return config


def official_sample() -> ConfigDict:
    """The first 701 of numpy's sample of 1,000, for which the official code's scores are known."""
    config = with_baselines(base("nas_bench_201", count=701, resolution=32, batch_size=64), ())
    config.search.method = "sample"
    return config


def same_size() -> ConfigDict:
    """Numpy's sample of 1,000 with AZ-NAS and the other proxies alike on 16 images of 16 x 16."""
    config = base("nas_bench_201", count=1000, resolution=16, batch_size=16, save_every=20)
    config.search.method, config.search.chunk = "sample", 10
    return with_baselines(config, BASELINES, resolution=16)


def full() -> ConfigDict:
    """All 15,625 architectures at the paper's setting, and its searches: five times the best of 3,000."""
    config = with_baselines(base("nas_bench_201", count=0, resolution=32, batch_size=64), ())
    config.search.method, config.search.chunk = "all", 125
    config.report.pool, config.report.runs = 3000, 5
    return config


def mbv2(max_flops: float, max_layers: int) -> ConfigDict:
    """The paper's evolutionary search of MobileNetV2-type networks for ImageNet: 1e5 candidates, seed 123."""
    config = base("mbv2", count=100_000, resolution=224, batch_size=64, seed=123)
    config.search.method, config.search.chunk = "evolution", 16
    config.budget.max_flops, config.budget.max_layers = max_flops, max_layers
    return config


def autoformer(name: str, min_params: float, max_params: float) -> ConfigDict:
    """The paper's random search of vision transformers: 10,000 candidates within AutoFormer's limits, seed 123."""
    config = base(name, count=10_000, resolution=224, batch_size=64, seed=123)
    config.search.chunk = 16
    config.budget.min_params, config.budget.max_params = min_params, max_params
    return config
