"""Resizing of float images as two small matrix products."""

import numpy as np

from jaxvision.core.errors import ConfigError

METHODS = ("nearest", "bilinear", "bicubic")


def resize_matrix(size_in: int, size_out: int, method: str = "bilinear", antialias: bool = False) -> np.ndarray:
    """The matrix that resizes one axis, float32 ``[size_out, size_in]``, with half-pixel centres.

    Output sample ``i`` sits at ``(i + 0.5) * size_in / size_out - 0.5`` of the input (``align_corners=False``).

    Without ``antialias`` as ``torch.nn.functional.interpolate``: the border pixel repeats, bicubic has a = -0.75.
    With ``antialias`` as Pillow and torch's ``antialias=True``: the kernel widens when shrinking, is cut at the border
    and renormalised, bicubic has a = -0.5. ``nearest`` takes the pixel under the sample and knows no antialiasing.
    """
    if method not in METHODS:
        raise ConfigError(f"resize method '{method}' is unknown; use one of {', '.join(METHODS)}")
    scale = size_in / size_out
    rows = np.arange(size_out)
    if method == "nearest":
        source = np.minimum(np.floor((rows + 0.5) * scale), size_in - 1).astype(int)
        return np.eye(size_in, dtype=np.float32)[source]
    centre = (rows + 0.5) * scale - 0.5
    if antialias:
        width = max(scale, 1.0)
        weights = _kernel((np.arange(size_in)[None] - centre[:, None]) / width, method, a=-0.5)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    matrix = np.zeros((size_out, size_in))
    for tap in range(-1, 3):
        column = np.floor(centre).astype(int) + tap
        np.add.at(matrix, (rows, np.clip(column, 0, size_in - 1)), _kernel(column - centre, method, a=-0.75))
    return matrix.astype(np.float32)


def _kernel(x: np.ndarray, method: str, a: float) -> np.ndarray:
    x = np.abs(x)
    if method == "bilinear":
        return np.maximum(0.0, 1.0 - x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize_images(
    image: np.ndarray, size: tuple[int, int], method: str = "bilinear", antialias: bool = False
) -> np.ndarray:
    """``image`` ``[B, H, W, C]`` as ``[B, *size, C]``; the width first, then the height.

    float32 stays float32; uint8 is rounded and clipped to uint8 after either pass, as Pillow does it. (Pillow 13 goes
    height first where the height shrinks and the width grows.)
    """
    across = resize_matrix(image.shape[2], size[1], method, antialias)
    down = resize_matrix(image.shape[1], size[0], method, antialias)
    out = np.einsum("xw,bhwc->bhxc", across, image.astype(np.float32), optimize=True)
    if image.dtype != np.uint8:
        return np.einsum("yh,bhxc->byxc", down, out, optimize=True)
    out = np.clip(np.rint(out), 0, 255)  # cuts the overshoot of bicubic between the passes
    out = np.einsum("yh,bhxc->byxc", down, out, optimize=True)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)
