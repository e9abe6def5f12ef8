"""Training steps of the CIFAR ResNet of TRS and LBT in PyTorch, eager mode: the peer that speed is measured against.

Three of them: float; TRS with 2-bit weights and activations and SGDT; LBT with all three tensors in 4 bits and its
interval controller. Written from public layers as the official codes are: quantizers of tensor operations, rounding
with a straight-through gradient. PyTorch is an optional extra (``bench``), imported inside these functions only.

    step = torch_resnet.trs_step(num_classes=100)
    loss = step(images, labels)        # NCHW float32 [B, 3, H, W], int64 [B]; NumPy arrays or tensors
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from jaxvision.core.errors import ConfigError

TrainStep = Callable[[Any, Any], float]
"""``(images, labels) -> loss``: forward, backward and update; returns when all of it is done."""

MOMENTUM, DECAY = 0.9, 1e-4


def available() -> bool:
    """Is PyTorch installed?"""
    return find_spec("torch") is not None


def float_step(*, depth: int = 20, num_classes: int = 100, lr: float = 0.1, device: str = "cpu") -> TrainStep:
    """One step of SGD with momentum and weight decay in float32."""
    import torch

    def conv(inputs, features, stride):
        return torch.nn.Conv2d(inputs, features, 3, stride, 1, bias=False)

    module = _network(conv, depth, num_classes).to(device)
    sgd = torch.optim.SGD(module.parameters(), lr, momentum=MOMENTUM, weight_decay=DECAY)
    return _train_step(module, [sgd], device)


def trs_step(
    *, bits: int = 2, depth: int = 20, num_classes: int = 100, lr: float = 0.1, scale_lr: float = 1e-2,
    target_rate: float = 5e-3, momentum: float = 0.99, device: str = "cpu",
) -> TrainStep:  # fmt: skip
    """One step of TRS: ``bits``-bit weights and activations (2 or more), SGDT with the released code's rule.

    Groups of parameters as in the official code: latent weights by SGDT, float weights by SGD, activation scales and
    normalisations without decay and momentum; weight scales stay as the first step finds them.
    """
    import torch

    if bits < 2:
        raise ConfigError(f"bits={bits} must be at least 2; one bit has another formula, which this peer lacks")
    module = _network(_trs_conv(bits), depth, num_classes).to(device)
    quantized = [layer for layer in module.modules() if hasattr(layer, "codes")]
    norms = [p for layer in module.modules() if "BatchNorm" in type(layer).__name__ for p in layer.parameters()]
    plain = {"lr": lr, "momentum": 0.0, "weight_decay": 0.0}
    sgd = torch.optim.SGD(
        [
            {"params": [module.conv1.weight, *module.linear.parameters()], "lr": lr},
            {"params": norms, **plain},
            {"params": [layer.input_scale for layer in quantized], **plain, "lr": scale_lr},
        ],
        momentum=MOMENTUM,
        weight_decay=DECAY,
    )
    return _train_step(module, [sgd, _sgdt(quantized, lr, target_rate, momentum)], device)


def lbt_step(
    *, bits: int = 4, depth: int = 20, num_classes: int = 100, lr: float = 0.1, interval_lr: float = 1e-5,
    alpha: float = 1e-3, beta: float = 1e-3, device: str = "cpu",
) -> TrainStep:  # fmt: skip
    """One step of LBT: ``bits`` bits for weights, activations and gradients; SGD, and Adam for the intervals.

    The interval controller runs inside the backward pass, so no gradient is kept for it (the official code retains
    one a layer).
    """
    import torch

    module = _network(_lbt_conv(bits, alpha, beta), depth, num_classes).to(device)
    names = dict(module.named_parameters())
    intervals = [value for name, value in names.items() if name.endswith("_interval")]
    weights = [value for name, value in names.items() if not name.endswith("_interval")]
    sgd = torch.optim.SGD(weights, lr, momentum=MOMENTUM, weight_decay=DECAY)
    return _train_step(module, [sgd, torch.optim.Adam(intervals, interval_lr)], device)


def _train_step(module: Any, optimizers: list[Any], device: str) -> TrainStep:
    import torch

    def step(images: Any, labels: Any) -> float:
        images, labels = (torch.as_tensor(value, device=device) for value in (images, labels))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(images), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.item()  # waits for the device

    return step


# --- the network ---------------------------------------------------------------------------------------------------


def _network(conv: Callable[[int, int, int], Any], depth: int, num_classes: int) -> Any:
    """Option A shortcuts, BatchNorm1d before the classifier; ``conv(inputs, features, stride)`` makes the blocks'."""
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, inputs, features, stride):
            super().__init__()
            self.conv1, self.bn1 = conv(inputs, features, stride), nn.BatchNorm2d(features)
            self.conv2, self.bn2 = conv(features, features, 1), nn.BatchNorm2d(features)
            self.stride, self.extra = stride, (features - inputs) // 2

        def forward(self, x):
            y = functional.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            if self.extra:
                x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
            return functional.relu(y + x)

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
            blocks, inputs = [], 16
            for features in (16, 32, 64):
                for index in range((depth - 2) // 6):
                    blocks.append(Block(inputs, features, 2 if index == 0 and features > 16 else 1))
                    inputs = features
            self.blocks, self.bn2 = nn.Sequential(*blocks), nn.BatchNorm1d(64)
            self.linear = nn.Linear(64, num_classes)
            for layer in self.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    nn.init.kaiming_normal_(layer.weight)

        def forward(self, x):
            x = self.blocks(functional.relu(self.bn1(self.conv1(x))))
            return self.linear(self.bn2(functional.adaptive_avg_pool2d(x, 1).flatten(1)))

    return ResNet().train()


def _round() -> Callable[[Any], Any]:
    """Rounding whose gradient is the identity."""
    import torch

    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    return Round.apply


# --- TRS -----------------------------------------------------------------------------------------------------------


def _trs_conv(bits: int) -> Callable[[int, int, int], Any]:
    """Convolutions with fixed-point weights in [-1, 1) and inputs in [0, 1), no scale afterwards."""
    import torch
    from torch import nn

    round_ste, half = _round(), 2 ** (bits - 1)

    class Conv(nn.Conv2d):
        def __init__(self, inputs, features, stride):
            super().__init__(inputs, features, 3, stride, 1, bias=False)
            self.weight_scale = nn.Parameter(torch.tensor(1.0), requires_grad=False)
            self.input_scale = nn.Parameter(torch.tensor(1.0))
            self.started = False

        @torch.no_grad()
        def start(self, x):
            self.weight_scale.fill_(3 * self.weight.std())
            self.input_scale.fill_(3 * x.std() / math.sqrt(1 - 2 / math.pi))
            self.started = True

        def codes(self):
            values = half * self.weight / (self.weight_scale.abs() + 1e-6)
            return round_ste(values.clamp(-half, half - 1))

        def forward(self, x):
            if not self.started:
                self.start(x)
            values = 2 * half * x / (self.input_scale.abs() + 1e-6)
            x = round_ste(values.clamp(0, 2 * half - 1)) / (2 * half)
            return nn.functional.conv2d(x, self.codes() / half, None, self.stride, self.padding)

    return Conv


def _sgdt(layers: list[Any], step_size: float, target_rate: float, momentum: float) -> Any:
    """SGD with momentum whose step size a layer follows the transition rate of its codes (the ``momentum`` rule)."""
    import torch

    class SGDT(torch.optim.Optimizer):
        def __init__(self):
            super().__init__([layer.weight for layer in layers], {})

        @torch.no_grad()
        def step(self):
            for layer in layers:
                state, weight = self.state[layer.weight], layer.weight
                direction, codes = weight.grad + DECAY * weight, layer.codes()
                if not state:
                    state["buffer"] = direction.clone()
                    state["rate"], state["ratio"] = codes.new_tensor(target_rate), codes.new_tensor(1.0)
                else:
                    state["buffer"].mul_(MOMENTUM).add_(direction)
                    rate = (codes != state["codes"]).float().mean()
                    state["rate"].lerp_(rate, 1 - momentum)
                    ratio = state["ratio"]
                    ratio.lerp_(ratio * target_rate / (state["rate"] + 1e-8), 1 - momentum)
                state["codes"] = codes
                weight.sub_(step_size * state["ratio"] * state["buffer"])

    return SGDT()


# --- LBT -----------------------------------------------------------------------------------------------------------


def _quantize_gradient(bits: int, alpha: float, beta: float) -> Callable[[Any, Any], Any]:
    """The identity ``(y, gamma) -> y`` that quantizes the gradient of ``y`` and then moves ``gamma`` in place."""
    import torch

    levels = 2**bits - 2

    class QuantizeGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, gamma):
            ctx.gamma = gamma
            return y.view_as(y)

        @staticmethod
        def backward(ctx, gradient):
            gamma, magnitude = ctx.gamma, gradient.abs()
            largest = magnitude.max()
            clip = torch.where(largest > 0, gamma * largest, 1e-8)
            step = 2 * clip / levels
            noise = torch.rand_like(gradient) - 0.5
            quantized = ((gradient + clip) / step + noise).clamp(0, levels).round() * step - clip
            excess = (magnitude > gamma * largest).float().mean() - alpha / (2**bits - 1)
            moved = (gamma + beta * excess.sign()).clamp(1e-3, 1)
            gamma.copy_(torch.where(largest > 0, moved, gamma))
            return quantized, None

    return QuantizeGradient.apply


def _lbt_conv(bits: int, alpha: float, beta: float) -> Callable[[int, int, int], Any]:
    """Convolutions with symmetric weights, unsigned inputs and quantized gradients of their outputs."""
    import torch
    from torch import nn

    round_ste, quantize_gradient = _round(), _quantize_gradient(bits, alpha, beta)
    weight_levels, input_levels = 2**bits - 2, 2**bits - 1

    class Conv(nn.Conv2d):
        def __init__(self, inputs, features, stride):
            super().__init__(inputs, features, 3, stride, 1, bias=False)
            self.weight_interval = nn.Parameter(torch.tensor(1.0))
            self.input_interval = nn.Parameter(torch.tensor(1.0))
            self.register_buffer("gamma", torch.tensor(1.0))
            self.started = False

        @torch.no_grad()
        def start(self, x):
            self.weight_interval.fill_(3 * self.weight.std())
            self.input_interval.fill_(3 * x.std() / math.sqrt(1 - 2 / math.pi))
            self.started = True

        def forward(self, x):
            if not self.started:
                self.start(x)
            share = ((self.weight / self.weight_interval.abs() + 1) / 2).clamp(0, 1)
            weight = self.weight_interval * (2 * round_ste(weight_levels * share) / weight_levels - 1)
            share = (x / self.input_interval).clamp(0, 1)
            x = self.input_interval * round_ste(input_levels * share) / input_levels
            y = nn.functional.conv2d(x, weight, None, self.stride, self.padding)
            return quantize_gradient(y, self.gamma)

    return Conv
