"""What a margin is to the head: a frozen config with pure functions of cosines, norms and a small state.

The head (sharded, dense or fused) does the same for every margin, in this order:

1. ``next_state`` moves the running statistics by the global batch;
2. ``target_logit`` gives the logit of each sample's own class;
3. ``negative_logits`` gives those of the other classes, element by element, so on any part of the classes;
4. ``objective.accumulate`` takes the other classes' logits together to one number a sample; numbers of different parts
   of the classes are joined by ``objective.join``; ``objective.loss`` makes the sample's loss of it and its target;
5. ``penalty`` is added to the loss.

A margin overrides what it changes; the defaults are softmax over scaled cosines.
"""

# Shape legend: N = the samples whose own class is on this rank, G = global batch, C = classes on this rank

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor

from lgaf.heads.objective import SOFTMAX, Objective

State = Mapping[str, Tensor]
EMPTY_STATE: Final[State] = {}

# Below this the sine is taken as constant: the derivative of sqrt at 0 is infinite, and the cosine +-1 must give a
# finite gradient.
_LEAST_SQUARED_SINE: Final = 1e-12


class Margin(ABC):
    """A margin: a frozen dataclass of its paper's settings, and pure functions.

    Attributes:
        scale: The factor s from cosines to logits.
        needs_all_targets: Whether ``next_state`` or ``negative_logits`` look at the target cosines, which the head has
            to share between the ranks for it (one small collective).
    """

    __slots__ = ()
    scale: float
    needs_all_targets: ClassVar[bool] = False

    @property
    def objective(self) -> Objective:
        """How target and other logits make a loss."""
        return SOFTMAX

    def initial_state(self, num_classes: int) -> dict[str, Tensor]:
        """Running statistics, scalars by name; saved with the head."""
        return {}

    def initial_parameters(self, num_classes: int) -> dict[str, Tensor]:
        """Learned scalars by name, part of the state too; the same on all ranks."""
        return {}

    def next_state(self, state: State, cosine_G: Tensor | None, norm_G: Tensor) -> dict[str, Tensor]:
        """The running statistics after seeing the global batch, without gradient.

        Args:
            state: The present one.
            cosine_G: Target cosines; None unless ``needs_all_targets``.
            norm_G: Norms of the embeddings.
        """
        return {}

    @abstractmethod
    def target_logit(self, cosine_N: Tensor, norm_N: Tensor | None = None, state: State = EMPTY_STATE) -> Tensor:
        """Logits [N] of the own classes, differentiable.

        Args:
            cosine_N: Cosines of the embeddings and their class centres.
            norm_N: Norms of the embeddings, with gradient; a margin that must not use it detaches them.
            state: Statistics and learned scalars.
        """

    def negative_logits(
        self, cosine_GC: Tensor, target_cosine_G: Tensor | None = None, state: State = EMPTY_STATE
    ) -> Tensor:
        """Logits [G, C] of the other classes, element by element (own classes' entries are not used).

        Args:
            cosine_GC: Cosines of the embeddings and all class centres of this part.
            target_cosine_G: Cosines with the own classes, without gradient; only with ``needs_all_targets``.
            state: Statistics and learned scalars; the latter may come as columns [G, 1], one copy a sample.
        """
        return self.scale * cosine_GC

    @property
    def plain_negatives(self) -> bool:
        """Whether `negative_logits` is scale * cosine: then heads need not ask for it, nor for its derivative."""
        return type(self).negative_logits is Margin.negative_logits

    def penalty(self, norm_N: Tensor) -> Tensor | None:
        """What a sample's norm adds to its loss [N], differentiable; None: nothing."""
        return None


def cosine_of_sum(cosine: Tensor, margin: float | Tensor) -> Tensor:
    """cos(theta + margin) from cos(theta) by the addition theorem, with a finite gradient at +-1."""
    sine = (1.0 - cosine.square()).clamp_min(_LEAST_SQUARED_SINE).sqrt()
    return cosine * _cos(margin) - sine * _sin(margin)


def straight_through(value: Tensor, cosine: Tensor) -> Tensor:
    """``value``, with the gradient of ``cosine`` itself, as if the margin were a constant added to it."""
    return cosine + (value - cosine).detach()


def guarded_cosine_of_sum(cosine: Tensor, margin: float | Tensor) -> Tensor:
    """cos(theta + margin) where theta + margin < pi, and beyond it the line cos(theta) - margin * sin(margin).

    The line goes on falling where the cosine would rise again (ArcFace's own guard, kept by CurricularFace, TFace and
    MagFace).
    """
    return torch.where(cosine > -_cos(margin), cosine_of_sum(cosine, margin), cosine - margin * _sin(margin))


# A number stays one: as a tensor it would be copied to the device, which waits for it.
def _cos(angle: float | Tensor) -> float | Tensor:
    return angle.cos() if isinstance(angle, Tensor) else math.cos(angle)


def _sin(angle: float | Tensor) -> float | Tensor:
    return angle.sin() if isinstance(angle, Tensor) else math.sin(angle)
