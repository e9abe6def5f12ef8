"""Diagnostics against counts and sums made by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.methods.trs import diagnostics
from jaxvision.quant.lsq import LSQ
from jaxvision.quant.trs import TRSWeight

ONE = TRSWeight(jnp.float32(2.0), 1)
TWO = TRSWeight(jnp.float32(1.0), 2)  # codes -2..1, v = 2 w, transitions at w = -.75, -.25, .25


def tree(weight, quantizer):
    return {"a": {"kernel": jnp.asarray(weight, jnp.float32), "bias": jnp.zeros(1)}}, {
        "a": {"kernel": quantizer, "bias": None}
    }


def computed(metrics):
    return {name: float(value.compute()) for name, value in metrics.items()}


def test_transitions_of_one_step():
    before, quantizers = tree([-1.0, -0.1, 0.1, 1.0], ONE)
    after, _ = tree([-1.0, 0.1, 0.2, -1.0], ONE)
    found = computed(diagnostics.transitions(before, quantizers, after, quantizers))
    assert found == pytest.approx(
        {"rate/a": 0.5, "weights/effective_step": (2 + 2) / 4, "weights/latent_step": (0.2 + 0.1 + 2) / 4}
    )


def test_a_moving_scale_makes_transitions_too():
    weights, quantizers = tree([0.3, 0.2], TWO)
    _, wider = tree([], TRSWeight(jnp.float32(0.5), 2))
    assert computed(diagnostics.transitions(weights, quantizers, weights, wider))["rate/a"] == 0.5


def test_the_mean_over_layers_counts_weights():
    params = {"a": {"kernel": jnp.full((3,), 0.1)}, "b": {"kernel": jnp.full((1,), 1.9)}}
    quantizers = {"a": {"kernel": ONE}, "b": {"kernel": ONE}}
    # (t, k') = (.525, 1): 1 - .475; (.975, 1): 1 - .025
    np.testing.assert_allclose(
        diagnostics.distance(params, quantizers)["weights/distance"].compute(), (3 * 0.525 + 0.975) / 4, rtol=1e-5
    )
    assert diagnostics.distance(*tree([0.1], LSQ(jnp.float32(1.0), 2))) == {}


@pytest.mark.parametrize(
    ("quantizer", "weights", "expected"),
    [
        (ONE, [-2.0, -0.2, 0.0, 1.0], [-1.0, -0.1, 0.0, 0.5]),
        (TWO, [-0.8, -0.25, -0.1, 0.24, 0.5], [-0.1, 0.0, 0.3, -0.02, 0.5]),
        (TWO, [-1.5, 2.0], [-1.5, 3.5]),  # beyond the outermost transitions
    ],
)
def test_position_relative_to_the_next_transition(quantizer, weights, expected):
    found = diagnostics.position(jnp.asarray(weights, jnp.float32), quantizer)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_histograms_count_every_weight():
    params, quantizers = tree([-9.0, -0.001, 0.0, 0.001, 1.0, 2.0], ONE)
    counts = diagnostics.histogram(params, quantizers)["a"]
    middle = diagnostics.BINS // 2
    assert counts.sum() == 6 and counts[0] == 1 and counts[-1] == 1
    assert counts[middle] == 3 and counts[diagnostics.bin_centres() > 0.5][0] + counts.tolist()[30] >= 1
    np.testing.assert_allclose(diagnostics.bin_centres()[middle], 0, atol=1e-12)
    assert diagnostics.histogram(*tree([0.1], LSQ(jnp.float32(1.0), 2))) == {}


def test_dampening_is_on_the_scale_of_the_weights():
    # one bit, |s| = 2: levels +-2; two bits, |s| = 1: levels -1, -.5, 0, .5
    one = diagnostics.dampening(*tree([0.5, -3.0], ONE))
    np.testing.assert_allclose(one, 1.5**2, rtol=1e-5)
    two = diagnostics.dampening(*tree([0.3, -2.0, 0.9], TWO))
    np.testing.assert_allclose(two, 0.2**2, rtol=1e-4)
    lsq = diagnostics.dampening(*tree([0.2, 5.0], LSQ(jnp.float32(0.25), 2)))
    np.testing.assert_allclose(lsq, 0.05**2, rtol=1e-4)
