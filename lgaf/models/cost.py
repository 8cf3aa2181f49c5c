"""What each part of the network costs beside the plain backbone: parameters, floating-point operations, time.

Operations are counted by torch while the part runs, on tensors without contents: 2 for each multiply-accumulate of a
convolution or a matrix product. Whatever is done element by element (norms, activations, the whole of the fusion by
quality) is not in that count; the measured time shows it.
"""

# Shape legend: B = batch, C = channels of C(x), H, W = its sides, D = embedding

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from lgaf.models.backbones import IMAGE_SIDE
from lgaf.models.lgaf import LGAF, LGAFConfig

_CONVOLUTION_BACKWARD: Final = torch.ops.aten.convolution_backward
PARTS: Final = ("backbone", "GFE", "MHMS", "LGF")
WHOLE: Final = "LGAF"
PLAIN: Final = "backbone + GFE"
NUM_ROUNDS: Final = 5
SHORTEST_S: Final = 0.05
"""What is faster is repeated for about this long within a round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of a part or a whole network, for one image.

    Attributes:
        num_parameters: Trained numbers.
        forward_flops: Of the forward pass, in training as in evaluation.
        training_flops: Of the forward and the backward pass; gradients of the image are not computed.
    """

    num_parameters: int
    forward_flops: int
    training_flops: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Duration:
    """Of a part or a whole network, for one image of a batch, in seconds.

    Attributes:
        forward_s: Of the forward pass in evaluation.
        training_s: Of the forward and the backward pass in training.
        batch: Images of the batch.
    """

    forward_s: float
    training_s: float
    batch: int


def network_costs(config: LGAFConfig) -> dict[str, Cost]:
    """Costs of the `PARTS`, of the `WHOLE` network and of the `PLAIN` one, each counted by itself.

    Args:
        config: Of a network with both branches.

    Raises:
        ValueError: The network lacks a branch.
    """
    batch = 2  # batch norm in training needs more than one
    # Tensors of the meta device have shapes and no contents: counting takes no memory and little time.
    with torch.device("meta"):
        subjects = _subjects(config.build(), batch)
        return {
            name: Cost(
                num_parameters=sum(parameter.numel() for parameter in module.parameters()),
                forward_flops=_flops(_forward(module, inputs)) // batch,
                training_flops=_flops(_training(module, inputs)) // batch,
            )
            for name, (module, inputs) in subjects.items()
        }


def network_durations(config: LGAFConfig, batch: int) -> dict[str, Duration]:
    """Time the same subjects as `network_costs` on one CPU thread: float32, channels-last as in training.

    It is the processor's time, which is that of the clock on an idle core: the clock's own says little on a machine
    that has other work (measured: +84 % where +2 % was due). The subjects take turns, so that what
    disturbs meets all alike; of the rounds the median counts.

    Args:
        config: Of a network with both branches.
        batch: Images of one pass, at least 2.

    Raises:
        ValueError: The network lacks a branch, or the batch is too small.
    """
    if batch < 2:
        raise ValueError(f"time_batch={batch} must be at least 2: batch norm cannot train on a single image")
    model = config.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from the stubs
    subjects = _subjects(model, batch)
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in subjects}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of several, those that wait for others would be counted too
    try:
        for number in range(NUM_ROUNDS + 1):
            for name, (module, inputs) in subjects.items():
                for run, kept in zip((_forward, _training), seconds[name], strict=True):
                    took = _seconds(run(module, inputs))
                    if number:  # the first round warms up
                        kept.append(took / batch)
    finally:
        torch.set_num_threads(num_threads)
    return {
        name: Duration(forward_s=statistics.median(forward), training_s=statistics.median(training), batch=batch)
        for name, (forward, training) in seconds.items()
    }


def cost_table(config: LGAFConfig, costs: Mapping[str, Cost], durations: Mapping[str, Duration] | None = None) -> str:
    """The table of `network_costs` and, where given, `network_durations`, as aligned plain text."""
    columns: list[tuple[str, dict[str, float], Callable[[float], str]]] = [
        ("parameters", {name: cost.num_parameters for name, cost in costs.items()}, lambda value: f"{value:,.0f}"),
        ("forward GFLOP", {name: cost.forward_flops / 1e9 for name, cost in costs.items()}, _digits),
        ("training GFLOP", {name: cost.training_flops / 1e9 for name, cost in costs.items()}, _digits),
    ]
    if durations is not None:
        columns += [
            ("forward ms", {name: value.forward_s * 1e3 for name, value in durations.items()}, _digits),
            ("training ms", {name: value.training_s * 1e3 for name, value in durations.items()}, _digits),
        ]
    rows = [["", *(cell for title, _, _ in columns for cell in (title, "share"))]]
    for name in (*PARTS, WHOLE, PLAIN):
        rows.append([name])
        for _, values, text in columns:
            rows[-1] += [text(values[name]), f"{100 * values[name] / values[WHOLE]:.2f} %"]
    rows.append([f"{WHOLE} over {PLAIN}"])
    for _, values, _ in columns:
        rows[-1] += [f"{100 * (values[WHOLE] / values[PLAIN] - 1):+.2f} %", ""]
    heading = f"One image of {IMAGE_SIDE}x{IMAGE_SIDE}: backbone {config.backbone}, embedding {config.embedding_dim}"
    notes = [
        "FLOP: 2 for each multiply-accumulate of convolutions and matrix products; element-wise work is not counted.",
        "Training: forward and backward, without the margin head and the optimizer.",
    ]
    if durations is not None:
        notes.append(
            f"Times: processor time of one thread, medians of {NUM_ROUNDS} rounds of batches of "
            f"{durations[WHOLE].batch}, float32, each part and each network by itself."
        )
    return "\n".join([heading, "", *_aligned(rows), "", *notes]) + "\n"


def _digits(value: float) -> str:
    """Four decimals below one, three above."""
    return f"{value:.4f}" if value < 1 else f"{value:,.3f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return [line.rstrip() for line in lines]


def _subjects(model: LGAF, batch: int) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Every part with inputs of its own, on torch's default device; only images want no gradient."""
    config, backbone = model.config, model.backbone
    if model.global_branch is None or model.local_branch is None or model.fusion is None:
        raise ValueError(f"model.branches={config.branches!r}: the comparison is of a network with both branches")
    images_BCHW = torch.rand(batch, 3, IMAGE_SIDE, IMAGE_SIDE) * 2 - 1
    map_BCHW = torch.rand(batch, backbone.out_channels, backbone.map_side, backbone.map_side)
    images_BCHW, map_BCHW = (value.contiguous(memory_format=torch.channels_last) for value in (images_BCHW, map_BCHW))
    map_BCHW.requires_grad_()
    features = tuple(torch.randn(batch, config.embedding_dim, requires_grad=True) for _ in range(2))
    return {
        "backbone": (backbone, (images_BCHW,)),
        "GFE": (model.global_branch, (map_BCHW,)),
        "MHMS": (model.local_branch, (map_BCHW,)),
        "LGF": (model.fusion, features),
        WHOLE: (model, (images_BCHW,)),
        PLAIN: (nn.Sequential(backbone, model.global_branch), (images_BCHW,)),
    }


def _forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    def run() -> None:
        module.eval()
        with torch.no_grad():
            module(*inputs)

    return run


def _training(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    def run() -> None:
        module.train()
        for tensor in (*module.parameters(), *inputs):
            tensor.grad = None
        output = module(*inputs)
        # The first of several outputs is the feature; the others are told, not trained.
        feature: Tensor = output[0] if isinstance(output, tuple) else output
        feature.sum().backward()  # type: ignore[no-untyped-call]

    return run


def _flops(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False, custom_mapping={_CONVOLUTION_BACKWARD: _backward_flops}) as counter:
        run()
    return int(counter.get_total_flops())


def _backward_flops(
    grad_out: Sequence[int], x: Sequence[int], weight: Sequence[int], *others: Any, out_shape: Any = None
) -> int:
    """Of the wanted ones of a convolution's gradients (of its input, of its weight): each as many as going forward.

    torch's own formula forgets the groups: for depthwise convolutions it is too large by their channels.
    """
    input_and_weight_wanted: list[bool] = others[-1][:2]
    return sum(input_and_weight_wanted) * conv_flop_count(list(x), list(weight), list(grad_out))


def _seconds(run: Callable[[], None]) -> float:
    """Processor time of one call: the mean over as many as take `SHORTEST_S`."""
    started, number, took = time.process_time(), 0, -1.0
    while took < SHORTEST_S:
        run()
        took, number = time.process_time() - started, number + 1
    return took / number
