"""AZ-NAS on NAS-Bench-201 in PyTorch, eager: the peer that scoring is measured against.

Written from public layers as the official code does it: build the network, initialise, one forward pass that collects
the blocks' outputs, eigenvalues of their covariances, one vector-Jacobian product a block by ``torch.autograd.grad``,
singular values. PyTorch is an optional extra (``bench``), imported inside these functions only.

    score = torch_nas_bench_201.scorer(resolution=32, batch_size=64)
    values = score([3, 3, 3, 1, 2, 3])       # {"expressivity": ..., "progressivity": ..., "trainability": ...}
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from jaxvision.models.nas_bench_201 import AVG_POOL, CONV_1X1, CONV_3X3, EDGES, NONE, SKIP


def available() -> bool:
    """Is PyTorch installed?"""
    return find_spec("torch") is not None


def scorer(
    *, resolution: int = 32, batch_size: int = 64, width: int = 16, cells: int = 5
) -> Callable[[Sequence[int]], dict[str, float]]:
    """``operations [6] -> scores``, with fresh weights, noise and probes each time; on CPU, in float32."""
    import torch

    def score(operations: Sequence[int]) -> dict[str, float]:
        blocks = _blocks(operations, width, cells)
        for module in blocks.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        return block_scores(blocks, torch.randn(batch_size, 3, resolution, resolution))

    return score


def block_scores(blocks: Any, images: Any) -> dict[str, float]:
    """The three proxies of a chain of modules, the first of which is the stem: NCHW images [B, 3, H, W]."""
    import torch

    blocks.train()
    inputs, outputs, x = [], [], images
    for block in blocks:
        # Detached at each block: a product with its own Jacobian, not with the chain's.
        x = x.detach().requires_grad_()
        inputs.append(x)
        x = block(x)
        outputs.append(x)
    entropies = torch.stack([_entropy(output.detach()) for output in outputs])
    values = []
    for x, y in zip(inputs[1:], outputs[1:], strict=True):
        probe = torch.randint(0, 2, y.shape).float() * 2 - 1
        (g,) = torch.autograd.grad(y, x, probe)
        values.append(_trainability(g, probe))
    scores = {
        "expressivity": float(entropies.sum()),
        "progressivity": float(torch.diff(entropies).min()),
        "trainability": sum(values) / len(values),
    }
    return {name: -float("inf") if value != value else value for name, value in scores.items()}


def _rows(x: Any) -> Any:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _entropy(features: Any) -> Any:
    import torch

    x = _rows(features)
    x = x - x.mean(0, keepdim=True)
    # Clamped, as here by default: the official code ends in NaN where rounding makes one negative.
    eigenvalues = torch.linalg.eigvalsh(x.T @ x / len(x)).clamp_min(0)
    share = eigenvalues / eigenvalues.sum()
    return -(share * torch.log(share + 1e-8)).sum()


def _trainability(g: Any, probe: Any) -> float:
    import torch

    if g.shape == probe.shape and bool((g == probe).all()):
        return -float("inf")
    if g.shape[2:] != probe.shape[2:]:
        g = torch.nn.functional.pixel_unshuffle(g, g.shape[2] // probe.shape[2])
    g, probe = _rows(g), _rows(probe)
    sigma = float(torch.linalg.svdvals(g.T @ probe / len(g))[0])
    return 2 - sigma - 1 / (sigma + 1e-6)


def _blocks(operations: Sequence[int], width: int, cells: int) -> Any:
    """Stem, cells and reduction blocks, as a sequence."""
    from torch import nn

    def convolution(inputs: int, features: int, size: int, stride: int = 1) -> list[Any]:
        conv = nn.Conv2d(inputs, features, size, stride, size // 2, bias=False)
        return [nn.ReLU(inplace=False), conv, nn.BatchNorm2d(features)]

    class Cell(nn.Module):
        def __init__(self, channels):
            super().__init__()
            made = {
                SKIP: nn.Identity,
                CONV_1X1: lambda: nn.Sequential(*convolution(channels, channels, 1)),
                CONV_3X3: lambda: nn.Sequential(*convolution(channels, channels, 3)),
                AVG_POOL: lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
                NONE: Zero,
            }
            self.edges = nn.ModuleList([made[int(operation)]() for operation in operations])

        def forward(self, x):
            nodes = [x, 0, 0, 0]
            for (node, source), edge in zip(EDGES, self.edges, strict=True):
                nodes[node] = nodes[node] + edge(nodes[source])
            return nodes[-1]

    class Zero(nn.Module):
        def forward(self, x):
            return x * 0

    class Reduction(nn.Module):
        def __init__(self, channels):
            super().__init__()
            features = 2 * channels
            self.main = nn.Sequential(*convolution(channels, features, 3, 2), *convolution(features, features, 3))
            self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(channels, features, 1, bias=False))

        def forward(self, x):
            return self.main(x) + self.shortcut(x)

    blocks: list[Any] = [nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))]
    for stage in range(3):
        channels = width << stage
        blocks += [Cell(channels) for _ in range(cells)]
        if stage < 2:
            blocks.append(Reduction(channels))
    return nn.Sequential(*blocks)
