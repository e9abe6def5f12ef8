import numpy as np

from jaxvision.methods.igq_vit.baselines import fqvit


def test_kernels_are_rounded_symmetrically_per_output_channel():
    kernel = np.asarray([[1.0, 8.0], [3.0, -2.0]], np.float32)
    rounded = fqvit.minmax_variables({"params": {"a": {"kernel": kernel, "bias": np.ones(2)}}, "other": 1}, 4)
    step = np.asarray([3.0, 8.0]) / 7.5
    expected = np.clip(np.round(kernel / step), -8, 7) * step
    np.testing.assert_allclose(rounded["params"]["a"]["kernel"], expected, rtol=1e-6)
    np.testing.assert_array_equal(rounded["params"]["a"]["bias"], 1)
    assert rounded["other"] == 1
