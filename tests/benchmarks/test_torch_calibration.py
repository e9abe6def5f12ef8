"""The PyTorch peers compute the losses and gradients that ours do; skipped where PyTorch (an extra) is missing."""

import pytest

from jaxvision.benchmarks import calibration
from tests.losses.oracle import check

torch = pytest.importorskip("torch")


def test_peers_agree(monkeypatch):
    leaves = []
    original = torch.Tensor.requires_grad_
    monkeypatch.setattr(torch.Tensor, "requires_grad_", lambda self: leaves.append(original(self)) or self)
    pairs = calibration.loss_pairs(6, 5, ranking=True)
    assert list(pairs) == ["acls", "mbls", "mndcg"] and len(leaves) == 4
    for name, (ours, theirs) in pairs.items():
        calibration.check(name, ours, theirs)
    gradients = [pairs["acls"][0]()[1], pairs["mbls"][0]()[1], *pairs["mndcg"][0]()[1]]
    for gradient, leaf in zip(gradients, leaves, strict=True):
        check(gradient, leaf.grad.numpy())
    with pytest.raises(AssertionError, match="in PyTorch"):
        calibration.check("acls", pairs["acls"][0], pairs["mndcg"][1])
