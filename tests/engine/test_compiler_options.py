"""What a training step asks of XLA's CPU backend."""

import jax
import jax.numpy as jnp
import pytest

from jaxvision.engine import parallel

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
FLAG = "xla_cpu_experimental_ynn_fusion_type"


def convolution(x):
    return jax.lax.conv_general_dilated(x, jnp.ones((3, 3, 32, 32)), (1, 1), "SAME", dimension_numbers=DIMENSIONS)


def column_sums(x):
    return jnp.sum(x, (0, 1, 2))


@pytest.mark.parametrize(
    ("function", "quickly", "by_library"),
    [(convolution, True, True), (convolution, False, False), (column_sums, False, True)],
)
def test_a_training_step_leaves_sums_to_the_library_but_no_convolution(monkeypatch, function, quickly, by_library):
    """XLA refuses an option or a value that it doesn't know, so this fails where a version drops it.

    The first case fails where XLA's own choice has changed: then measure whether the option still gains.
    """
    monkeypatch.setenv("XLA_FLAGS", "")
    step = parallel.create("jit").compile(function, quickly=quickly)
    text = step.lower(jnp.ones((8, 16, 16, 32))).compile().as_text()
    assert ("__ynn_fusion" in text) == by_library


def test_the_users_choice_and_an_accelerators_compiler_stay_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    assert parallel.training_options() == {FLAG: "LIBRARY_FUSION_TYPE_REDUCE"}
    monkeypatch.setenv("XLA_FLAGS", f"--{FLAG}=")
    assert parallel.training_options() == {}
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert parallel.training_options() == {}
