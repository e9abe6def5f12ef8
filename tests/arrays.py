"""Reading arrays that a file holds."""

import numpy as np


def load(path):
    """The arrays of an npz file by name; the file is closed again."""
    with np.load(path) as data:
        return dict(data)
