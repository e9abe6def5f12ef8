"""The report's numbers on arrays small enough to check by hand."""

import numpy as np
import pytest

from jaxvision.core.errors import ConfigError
from jaxvision.methods.igq_vit import diagnostics
from jaxvision.methods.igq_vit.sites import Site


def test_variation_and_spread():
    # widths of two images: channel 0: 1, 3 (mean 2, std 1); channel 1: 4, 4; channel 2: 0, 0 (constant)
    ranges = np.zeros((2, 3, 2))
    ranges[0, :, 1], ranges[1, :, 1] = [1, 4, 0], [3, 4, 0]
    variation, spread = diagnostics.instance_variation(ranges)
    np.testing.assert_allclose(variation, (1 / 2 + 0 + 0) / 3)
    np.testing.assert_allclose(spread, 4 / 2)
    assert diagnostics.instance_variation(np.zeros((2, 3, 2))) == (0.0, float("inf"))
    sites = (Site("blocks.0.mlp.fc1", "channels", (1, 5, 3), None, 0), Site("head", "tensor", (1, 3), None, 0))
    assert list(diagnostics.variation_table(sites, {"blocks.0.mlp.fc1": ranges})) == ["blocks.0.mlp.fc1"]


def test_sqnr():
    np.testing.assert_allclose(diagnostics.sqnr_db(100.0, 1.0), 20)
    assert diagnostics.sqnr_db(1.0, 0.0) == float("inf")
    assert diagnostics.sqnr_db(0.0, 1.0) == float("-inf")
    with pytest.raises(ConfigError, match="negative"):
        diagnostics.sqnr_db(-1.0, 1.0)


def test_group_histogram_and_reassignment():
    group = np.asarray([[0, 0, 2], [0, 1, 2], [0, 1, 2], [0, 1, 1]])
    np.testing.assert_allclose(diagnostics.group_histogram(group, 4), [5 / 4, 4 / 4, 3 / 4, 0])
    np.testing.assert_allclose(diagnostics.reassigned_fraction(group), 2 / 12)


def test_families_average_over_blocks():
    names = ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.mlp.fc1", "head"]
    found = diagnostics.by_family(dict(zip(names, [1.0, 2.0, 4.0, 5.0, 6.0])))
    assert found == {"patch_embed.proj": 1.0, "qkv": 3.0, "fc1": 5.0, "head": 6.0}
