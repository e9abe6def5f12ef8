"""The forward pass of a DeiT/ViT in PyTorch, eager mode, from public layers: the peer that speed is measured against.

PyTorch is an optional extra (``bench``); this is the only kind of place where it may be imported.
"""

from typing import Any

import numpy as np


def network(width: int, depth: int, num_heads: int, patch_size: int, tokens: int, num_classes: int) -> Any:
    """A ``torch.nn.Module``, timm's arithmetic: pre-norm blocks, fused qkv and attention, exact GELU, class token."""
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

        def forward(self, x):
            batch, length, _ = x.shape
            q, k, v = self.qkv(x).reshape(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
            x = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(x.transpose(1, 2).reshape(batch, length, width))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            self.attn = Attention()
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x):
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, width, patch_size, patch_size)
            self.token = nn.Parameter(torch.zeros(1, 1, width))
            self.position = nn.Parameter(torch.zeros(1, tokens, width))
            self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
            self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, num_classes)

        def forward(self, images):
            x = self.patches(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
            return self.head(self.norm(self.blocks(x))[:, 0])

    return ViT().eval()


def forward(images: np.ndarray, **sizes: int) -> Any:
    """A function that runs the network on NCHW float32 ``images`` without gradients, or None without PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    module, batch = network(**sizes), torch.from_numpy(np.ascontiguousarray(images))

    def run() -> None:
        with torch.inference_mode():
            module(batch)

    return run
