"""Compiling for a program that runs once: a third of the time. Only float32 oracles run what users run."""

import functools

import jax

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""``jax.jit`` without LLVM's optimisations, on CPU."""
