"""Networks (flax linen) with the arithmetic and the parameter names of their PyTorch originals.

``zoo.build(name, num_classes=...)`` makes one; ``torch_import`` brings weights in and out.
"""
