"""The Muon optimiser for a few ranks that hold the same parameters: momentum made orthogonal, matrix by matrix."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Muon:
    """Momentum, orthogonalised by Newton-Schulz iterations (Jordan et al., 2024), for the matrices inside the layers.

    The update of each matrix is scaled to the root mean square that AdamW's would have, so that one learning rate suits
    both. Each rank orthogonalises every `world`-th matrix; one all-reduce hands the results to the others.
    """

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        self.parameters = parameters
        self.momentum, self.weight_decay = momentum, weight_decay
        sizes = [p.numel() for p in parameters]
        self.buffer = torch.zeros(sum(sizes))
        self._update = torch.zeros(sum(sizes))
        self._momenta = [b.view_as(p) for b, p in zip(self.buffer.split(sizes), parameters, strict=True)]
        self._updates = [u.view_as(p) for u, p in zip(self._update.split(sizes), parameters, strict=True)]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        self._update.zero_()
        for i, (p, m, u) in enumerate(zip(self.parameters, self._momenta, self._updates, strict=True)):
            assert p.grad is not None
            m.lerp_(p.grad, 1 - self.momentum)
            if i % world == rank:
                u.copy_(_orthogonalise(torch.lerp(p.grad, m, self.momentum)))
                u.mul_(0.2 * math.sqrt(max(p.shape)))
        dist.all_reduce(self._update)
        for p, u in zip(self.parameters, self._updates, strict=True):
            p.mul_(1 - learning_rate * self.weight_decay).add_(u, alpha=-learning_rate)


def _orthogonalise(g: Tensor, iterations: int = 5) -> Tensor:
    """The semi-orthogonal matrix nearest to `g` [rows, columns], roughly: singular values land in about [0.7, 1.2]."""
    x: Tensor = g.T if g.shape[0] > g.shape[1] else g
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        a = x @ x.T
        x = 3.4445 * x + torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315) @ x
    return x.T if g.shape[0] > g.shape[1] else x
