"""What a training step asks of XLA's CPU backend."""

import jax
import jax.numpy as jnp
import pytest

from jaxvision.engine import parallel

FLAG = "xla_cpu_experimental_ynn_fusion_type"


def column_sums(x):
    return jnp.sum(x, 0)


@pytest.mark.parametrize(("quickly", "by_library"), [(False, True), (True, False)])
def test_a_training_step_leaves_its_sums_to_the_library(monkeypatch, quickly, by_library):
    """XLA refuses an option or a value that it doesn't know, so this fails where a version drops it."""
    monkeypatch.setenv("XLA_FLAGS", "")
    step = parallel.create("jit").compile(column_sums, quickly=quickly)
    text = step.lower(jnp.ones((4096, 256))).compile().as_text()
    assert ("__ynn_fusion" in text) == by_library


def test_the_users_choice_and_an_accelerators_compiler_stay_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    assert parallel.training_options() == {FLAG: "LIBRARY_FUSION_TYPE_REDUCE"}
    monkeypatch.setenv("XLA_FLAGS", f"--{FLAG}=")
    assert parallel.training_options() == {}
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert parallel.training_options() == {}
