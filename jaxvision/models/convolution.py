"""How a convolution reads its input, so that XLA's CPU backend doesn't compute it again for the gradient."""

import jax
import jax.numpy as jnp


@jax.custom_jvp
def kept(x: jax.Array) -> jax.Array:
    """``x`` bit for bit (a NaN as the standard NaN), in a form that XLA stores once; its derivative is the identity.

    For the gradient of a kernel XLA's CPU backend transposes the layer's input, one number at a time. It fuses into
    that loop whatever made the input, as long as each operation reads one array: normalisation, rectifier, quantizer,
    and across shortcuts those of the layers before, all computed again in the slowest order of memory. An
    operation that reads two arrays isn't computed twice, hence a choice between NaN and x that always gives x;
    ``optimization_barrier`` is gone before XLA (jaxlib 0.10.2) fuses. For an accelerator it is one more elementwise
    operation of the kernel that makes x (not measured: none was at hand).

    Args:
      x: floats of any shape.
    """
    return jnp.where(jnp.isnan(x), jnp.asarray(jnp.nan, x.dtype), x)


@kept.defjvp
def _kept_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return kept(*primals), *tangents
