"""The PyTorch peer of AZ-NAS computes what the oracle's networks have; skipped where PyTorch is not installed."""

import numpy as np
import pytest

from jaxvision.benchmarks import torch_nas_bench_201
from tests.methods.az_nas import networks

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("number", networks.NETS)
def test_entropies_are_the_official_ones_and_the_rest_is_near(number):
    """With the oracle's weights and images; the probes are fresh."""
    net = networks.oracle(number)
    blocks = torch_nas_bench_201._blocks(net["arch_ops"], int(net["C"]), int(net["N"]))
    kernels = [net[name] for name in net if name.startswith("w_") and net[name].ndim == 4]
    modules = [module for module in blocks.modules() if isinstance(module, torch.nn.Conv2d)]
    for module, kernel in zip(modules, kernels, strict=True):
        module.weight.data = torch.tensor(kernel.transpose(3, 2, 0, 1))
    found = torch_nas_bench_201.block_scores(blocks, torch.tensor(net["x"].transpose(0, 3, 1, 2)))
    for name in ("expressivity", "progressivity"):
        np.testing.assert_allclose(found[name], net[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["trainability"], net["trainability"], rtol=0.5)


def test_scores_are_finite_and_new_each_time():
    assert torch_nas_bench_201.available()
    score = torch_nas_bench_201.scorer(resolution=8, batch_size=4, width=4, cells=1)
    one, other = score([3, 1, 2, 4, 0, 1]), score([3, 1, 2, 4, 0, 1])
    assert np.isfinite(list(one.values())).all() and one != other
