"""Networks (flax linen) with the arithmetic and the parameter names of their PyTorch originals.

``zoo.build(name, num_classes=...)`` makes one; ``weight_file`` and ``torch_import`` bring weights in and out.
"""
