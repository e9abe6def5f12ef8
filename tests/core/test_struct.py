"""Dataclasses that are pytrees: what flax's promise, and classes are told apart."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import struct, trees
from jaxvision.quant.lbt import LBTActivation
from jaxvision.quant.trs import TRSActivation


@struct.dataclass
class Half:
    value: jax.Array
    signed: bool = struct.field(pytree_node=False, default=False)

    def __call__(self):
        return self.value / 2


@struct.dataclass
class Double:
    value: jax.Array
    signed: bool = struct.field(pytree_node=False, default=False)

    def __call__(self):
        return 2 * self.value


def test_classes_with_equal_fields_have_unequal_structures():
    """Equal ones let a jitted function take the program of the other class: see the module."""
    one, other = jax.tree.structure(Half(1.0)), jax.tree.structure(Double(1.0))
    assert one != other and one == jax.tree.structure(Half(3.0)) != jax.tree.structure(Half(1.0, True))
    call = jax.jit(lambda value: value())
    assert (call(Half(3.0)), call(Double(3.0))) == (1.5, 6.0)


def test_a_tree_of_its_fields():
    value = Half(jnp.arange(3.0), signed=True)
    assert list(trees.named_leaves({"a": value})) == ["a/value"]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, value)
    assert type(doubled) is Half and doubled.signed
    np.testing.assert_array_equal(doubled.value, [0, 2, 4])
    assert value.replace(signed=False).signed is False
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.signed = False


def test_no_class_of_the_package_is_registered_the_other_way():
    assert jax.tree.structure(LBTActivation(1.0, 2)) != jax.tree.structure(TRSActivation(1.0, 2))
    package = Path(__file__).parents[2] / "jaxvision"
    sources = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    found = {name for name, text in sources.items() if re.search("flax.struct|flax import struct|register_data", text)}
    assert found == {"core/struct.py"}
