"""jaxvision: ten published computer-vision methods as one JAX/Flax package.

Importing this package starts no JAX backend and imports neither TensorFlow nor PyTorch.
Import what you need from the layer it lives in, for example ``from jaxvision.quant import uniform``.
"""

__version__ = "0.1.0"
