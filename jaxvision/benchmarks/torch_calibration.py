"""ACLS, MbLS and M-NDCG in PyTorch, eager mode, from public formulas: the peers that the losses are measured against.

Written as the official codes are (masks are multiplied, nothing is gathered), without their copies of repeated rows.
PyTorch is an optional extra (``bench``), imported inside these functions only.

    run = torch_calibration.acls(logits, labels)
    run()                                # forward and backward; the gradient is thrown away
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

Run = Callable[[], float]


def available() -> bool:
    """Is PyTorch installed?"""
    return find_spec("torch") is not None


def use_threads(count: int) -> None:
    """How many threads PyTorch computes with; more than free cores make it wait for itself."""
    import torch

    torch.set_num_threads(count)


def _differentiated(loss: Callable[..., Any], *leaves: np.ndarray) -> Run:
    import torch

    tensors = [torch.from_numpy(leaf).requires_grad_() for leaf in leaves]

    def run() -> float:
        for tensor in tensors:
            tensor.grad = None
        value = loss(*tensors)
        value.backward()
        return value.item()

    return run


def acls(logits: np.ndarray, labels: np.ndarray, *, margin: float = 10.0, alpha: float = 0.1) -> Run:
    """float32 [N, K] and int [N]; weights 1 and 0.1 of the two terms."""
    import torch
    from torch.nn import functional

    y = torch.from_numpy(labels.astype(np.int64))

    def loss(z):
        count, classes = z.shape
        highest = z.max(1, keepdim=True).values.expand_as(z)
        tied = (highest.detach() == z.detach()).float()
        top = tied * functional.relu(highest - margin) ** 2
        rest = (1 - tied) * functional.relu(highest.detach() - z - margin) ** 2
        penalty = top.sum() / count + 0.1 * rest.sum() / (count * (classes - 1))
        return functional.cross_entropy(z, y) + alpha * penalty

    return _differentiated(loss, logits)


def mbls(logits: np.ndarray, labels: np.ndarray, *, margin: float = 10.0, alpha: float = 0.1) -> Run:
    """float32 [N, K] and int [N]."""
    import torch
    from torch.nn import functional

    y = torch.from_numpy(labels.astype(np.int64))

    def loss(z):
        excess = functional.relu(z.max(1, keepdim=True).values - z - margin)
        return functional.cross_entropy(z, y) + alpha * excess.mean()

    return _differentiated(loss, logits)


def mndcg(raw: np.ndarray, mixed: np.ndarray, labels: np.ndarray, relevance: np.ndarray, *, weight: float = 0.1) -> Run:
    """float32 [B, K] and [M, B, K], int [B], float32 [M, B]."""
    import torch
    from torch.nn import functional

    y, rel = torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(relevance)

    def loss(z, mixture):
        conf = functional.softmax(mixture, -1).max(-1).values
        ranked, order = rel.sort(dim=0, descending=True, stable=True)
        discount = 1 / torch.log2(torch.arange(2, len(conf) + 3, dtype=z.dtype))[:, None]
        own = functional.softmax(z, -1).max(-1, keepdim=True).values.T
        dcg = (discount * torch.cat([own, conf.gather(0, order)])).sum(0)
        idcg = (discount * torch.cat([torch.ones_like(own), ranked])).sum(0)
        ndcg = torch.where(idcg > dcg, dcg / idcg, idcg / dcg)
        return functional.cross_entropy(z, y) + weight * (1 - ndcg).mean()

    return _differentiated(loss, raw, mixed)
