"""Matrix products of the head, in the precision that autocast asks for; sums and results are the weights' own type."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Products:
    """Multiplies operands.

    Attributes:
        result: Type of the results and of all statistics: the weights'.
        operands: Type that operands are rounded to. bfloat16 has float32's range, so probabilities need no scaling.
    """

    result: torch.dtype
    operands: torch.dtype

    @classmethod
    def for_autocast(cls, device: torch.device, result: torch.dtype) -> Products:
        """Those of the autocast that is in force.

        Only bfloat16 counts: in float16 the gradients of classes that a sample is rarely taken for would be 0, so there
        the head multiplies in its own type, as insightface's recipes do.
        """
        reduced = (
            result == torch.float32
            and torch.is_autocast_enabled(device.type)
            and torch.get_autocast_dtype(device.type) == torch.bfloat16
        )
        return cls(result, torch.bfloat16 if reduced else result)

    def operand(self, value: Tensor) -> Tensor:
        """The value as it is multiplied."""
        return value.to(self.operands)

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """Matrix product of two operands, summed in the result's type."""
        if self.operands == self.result:
            return torch.mm(a, b, out=out)
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=self.result) if out is None else torch.mm(a, b, self.result, out=out)
        # Rounded operands, exact products: the numbers of an accelerator's bfloat16 units, at float32's speed.
        return torch.mm(a.to(self.result), b.to(self.result), out=out)

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """Add a @ b to ``total`` in place."""
        if self.operands == self.result:
            total.addmm_(a, b)
        else:
            total.add_(self.product(a, b))
