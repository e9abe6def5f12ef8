"""The report's numbers on arrays small enough to check by hand."""

import numpy as np

from jaxvision.methods.igq_vit import diagnostics


def test_variation_and_spread():
    # widths of two images: channel 0: 1, 3 (mean 2, std 1); channel 1: 4, 4; channel 2: 0, 0 (constant)
    ranges = np.zeros((2, 3, 2))
    ranges[0, :, 1], ranges[1, :, 1] = [1, 4, 0], [3, 4, 0]
    variation, spread = diagnostics.instance_variation(ranges)
    np.testing.assert_allclose(variation, (1 / 2 + 0 + 0) / 3)
    np.testing.assert_allclose(spread, 4 / 2)
    assert diagnostics.instance_variation(np.zeros((2, 3, 2))) == (0.0, float("inf"))


def test_group_histogram_and_reassignment():
    group = np.asarray([[0, 0, 2], [0, 1, 2], [0, 1, 2], [0, 1, 1]])
    np.testing.assert_allclose(diagnostics.group_histogram(group, 4), [5 / 4, 4 / 4, 3 / 4, 0])
    np.testing.assert_allclose(diagnostics.reassigned_fraction(group), 2 / 12)


def test_a_family_is_what_a_site_is_in_its_block():
    names = ["patch_embed.proj", "blocks.1.attn.qkv", "layers.0.blocks.1.mlp.fc1", "head"]
    assert [diagnostics.family(name) for name in names] == ["patch_embed.proj", "qkv", "fc1", "head"]
