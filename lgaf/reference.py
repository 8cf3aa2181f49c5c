"""Dense, single-process oracles: slow and obvious. Tests hold the sharded operations against them."""

# Shape legend: G = global batch, D = embedding, C = all classes

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lgaf.heads.margins import Margin


def dense_margin_loss(x_GD: Tensor, labels_G: Tensor, weight_CD: Tensor, margin: Margin) -> Tensor:
    """Mean margin softmax loss with all logits in one matrix, one sample after the other."""
    cosine_GC = F.normalize(x_GD) @ F.normalize(weight_CD).T
    losses = []
    for row, label in enumerate(labels_G.tolist()):
        logits = margin.scale * cosine_GC[row]
        own = margin.target_logit(cosine_GC[row, label].clamp(-1, 1)[None], x_GD[row].norm()[None])
        logits = torch.cat([logits[:label], own, logits[label + 1 :]])
        losses.append(torch.logsumexp(logits, dim=0) - logits[label])
    return torch.stack(losses).mean()
