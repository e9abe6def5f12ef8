"""Quantizers that stand on their own, one family: small pytrees that are called, ``x_hat = q(x)``.

``uniform`` has the arithmetic. Post-training: ``activation``, ``log``, ``observers``, ``weights``. Trained: ``ste``
(the straight-through building blocks), ``trainable`` (what the trained quantizers have in common), ``trs``, ``lbt``,
``lsq``, ``ewgs``, ``dorefa``, ``pact``, ``affine``, ``binary``, and ``families``, which has them by name.
"""
