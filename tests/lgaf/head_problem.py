"""A small problem for the head, and what tests look at."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NUM_CLASSES, DIM, ROWS = 150, 32, 12


def problem(dtype: torch.dtype = torch.float32, scale: float = 10.0):
    generator = torch.Generator().manual_seed(2)
    x = scale * torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, NUM_CLASSES, (ROWS,), generator=generator)
    labels[3] = labels[5]  # two of one person
    return x.to(dtype), labels


def gradients(head, x, labels):
    x = x.clone().requires_grad_()
    head.weight.grad = None
    loss = head(x, labels)
    loss.backward()
    return loss.detach(), x.grad, head.weight.grad


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


class Recorded(TorchDispatchMode):
    """Sizes of all tensors that are made, operands and work of all matrix products."""

    def __init__(self):
        super().__init__()
        self.seen: list[int] = []
        self.multiplications = 0
        self.operands: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
            self.operands.append((a, b))
        self.seen += [
            value.numel() for value in torch.utils._pytree.tree_leaves(out) if isinstance(value, torch.Tensor)
        ]
        return out
