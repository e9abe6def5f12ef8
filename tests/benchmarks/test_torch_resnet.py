"""The PyTorch peers train, and quantize what they say; skipped where PyTorch (an extra) is not installed."""

import numpy as np
import pytest

from jaxvision.benchmarks import torch_resnet
from jaxvision.core.errors import ConfigError

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("peer", ["float_step", "trs_step", "lbt_step"])
def test_the_loss_falls_on_one_batch(peer):
    assert torch_resnet.available()
    generator = np.random.default_rng(0)
    batch = generator.normal(size=(8, 3, 8, 8)).astype(np.float32), generator.integers(0, 5, 8)
    step = getattr(torch_resnet, peer)(depth=8, num_classes=5)
    losses = [step(*batch) for _ in range(20)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < 0.5 * losses[0]


def test_trs_weights_are_fixed_point_and_the_controller_moves_the_step():
    conv = torch_resnet._trs_conv(2)(4, 6, 1)
    x = torch.randn(2, 4, 5, 5).relu()
    conv(x).square().sum().backward()
    assert conv.weight_scale.item() == pytest.approx(3 * conv.weight.std().item())
    assert set(conv.codes().detach().unique().tolist()) <= {-2, -1, 0, 1}
    assert conv.weight.grad.abs().sum() > 0 and conv.input_scale.grad != 0 and conv.weight_scale.grad is None

    sgdt = torch_resnet._sgdt([conv], 0.1, 5e-3, 0.9)
    before = conv.weight.detach().clone()
    sgdt.step()
    state = sgdt.state[conv.weight]
    expected = before - 0.1 * (conv.weight.grad + 1e-4 * before)
    torch.testing.assert_close(conv.weight.detach(), expected)
    rate = (conv.codes() != state["codes"]).float().mean().item()
    sgdt.step()
    assert state["rate"].item() == pytest.approx(0.9 * 5e-3 + 0.1 * rate)
    assert state["ratio"].item() == pytest.approx(0.9 + 0.1 * 5e-3 / (state["rate"].item() + 1e-8))


def test_lbt_gradients_lie_on_the_grid_and_gamma_follows_the_clipped_share():
    identity = torch_resnet._quantize_gradient(4, 1e-3, 1e-3)
    gradient = torch.randn(1000)
    for start, direction in ((1.0, -1), (0.5, 1)):
        gamma = torch.tensor(start)
        y = torch.zeros(1000, requires_grad=True)
        identity(y, gamma).backward(gradient)
        step = start * gradient.abs().max() / 7
        codes = y.grad / step
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
        assert codes.abs().max() <= 7.001
        assert gamma.item() == pytest.approx(start + direction * 1e-3)
    zero = torch.zeros(3, requires_grad=True)
    identity(zero, gamma).backward(torch.zeros(3))
    assert not zero.grad.any() and gamma.item() == pytest.approx(0.501)


def test_a_width_that_trs_has_no_formula_for_here_is_refused():
    with pytest.raises(ConfigError, match="bits=1 must be at least 2"):
        torch_resnet.trs_step(bits=1)
