"""One folder a paper: the mathematics as pure functions, and ``task.py``, which turns a config into a Task.

Methods don't import each other; what two of them need lies in ``engine``, ``optim``, ``losses`` or ``metrics``.
"""
