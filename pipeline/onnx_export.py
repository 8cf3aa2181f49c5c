"""Export of a trained network to one ONNX file, checked in onnxruntime before it is put in place.

The file takes ``images`` [batch, 3, 112, 112] (RGB in [-1, 1], any batch) and gives ``embedding`` [batch, D],
``norm_local``, ``norm_global`` and ``weight_local`` [batch]. The embedding is the network's own, un-normalised one: the
flip test adds those of a face and its mirror image before it normalises. The statistics of the fusion are constants of
the graph, so a face's embedding depends on no other face of its batch.

An ONNX file is one protobuf message, which cannot exceed 2 GB: larger networks are refused (weights beside the file
could not be put in place together with it in one step). Needs the extra ``export``.
"""

# Shape legend: B = batch, D = embedding

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final, NamedTuple

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from lgaf.models import FaceNetwork
from lgaf.models.backbones import IMAGE_SIDE
from pipeline import storage
from pipeline.model_store import load_model, read_model_info

# The exporter's native opset: another one would go through a converter.
OPSET: Final = 18
INPUT: Final = "images"
OUTPUTS: Final = ("embedding", "norm_local", "norm_global", "weight_local")
MAX_BYTES: Final = 2**31 - 2**24
"""The limit of a protobuf message, less room for the graph itself."""
BATCH_SIZES: Final = (1, 2, 5)
EXAMPLE_BATCH: Final = 2
TOLERANCE: Final = 1e-4
"""Of unit embeddings and weights absolute; of norms relative, as their scale is the network's: it is about 20 after
training and may be anything before, and float32 rounds in proportion."""
MODULES: Final = ("onnx", "onnxscript", "onnxruntime")
DESCRIPTION: Final = (
    "Face embedding. images: aligned RGB faces [batch, 3, 112, 112], pixel / 127.5 - 1. embedding: un-normalised. "
    "norm_local, norm_global: norms of the branches' features (0: no such branch). weight_local: the local one's share."
)


class ExportError(ValueError):
    """The network cannot be exported; the message says why, and nothing was written."""


class Differences(NamedTuple):
    """The largest differences between a file in onnxruntime and its network in torch, over all batches tried.

    Attributes:
        embedding: Absolute, over the components of the unit embeddings.
        norm: Relative, of the norms of the embeddings and of both branches' features.
        weight: Absolute, of the weights of the local branch.
    """

    embedding: float
    norm: float
    weight: float


class OnnxExport(NamedTuple):
    """What was written: its size in bytes, and how far it is from the network."""

    num_bytes: int
    differences: Differences


def export_onnx(model: FaceNetwork, uri: str, *, metadata: Mapping[str, str] | None = None) -> OnnxExport:
    """Write a network as an ONNX file, atomically, if onnxruntime gives what torch gives.

    Args:
        model: In eval mode, float32, on the CPU.
        uri: The file; a former one is replaced.
        metadata: Texts to keep in the file (`metadata_props`).

    Raises:
        ExportError: The extra ``export`` is missing, the network is not as it should be or too large, or onnxruntime
            and torch differ by more than `TOLERANCE`; a file that was there stays as it was.
        StorageError: The file cannot be written.
    """
    for name in MODULES:
        _require(name)
    _check_exportable(model)
    content = _onnx_bytes(model, metadata or {})
    differences = compare(model, content)
    _check_close(differences)
    storage.write_bytes(uri, content)
    return OnnxExport(len(content), differences)


def compare(model: FaceNetwork, content: bytes) -> Differences:
    """Run a file's content in onnxruntime and its network in torch on the same images, in batches of `BATCH_SIZES`."""
    runtime = _require("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = [Differences(0.0, 0.0, 0.0)]
    for batch in BATCH_SIZES:
        images = _trial_images(batch)
        with torch.inference_mode():
            expected = model(images)[: len(OUTPUTS)]
        given = [torch.from_numpy(value) for value in session.run(OUTPUTS, {INPUT: images.numpy()})]
        found.append(_differences(given, expected))
    # torch's maximum keeps a NaN, which Python's may lose.
    return Differences(*torch.tensor(found, dtype=torch.float64).amax(dim=0).tolist())


def _require(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f'the export needs {name} ({error}): pip install "lgaf-on-ray[export]"') from error


def _check_exportable(model: FaceNetwork) -> None:
    if any(module.training for module in model.modules()):
        raise ExportError("the network is in training mode: call model.eval() before the export")
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.int64):
            raise ExportError(f"the network has a {tensor.dtype} tensor on {tensor.device}: export float32 on the CPU")
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if num_bytes > MAX_BYTES:
        raise ExportError(f"the network has {num_bytes} bytes of weights; one ONNX file holds at most {MAX_BYTES}")


class _Outputs(nn.Module):
    """A network that gives a plain tuple of `OUTPUTS`: the fields of `FaceEmbedding` that training alone has go."""

    def __init__(self, network: FaceNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network(images)[: len(OUTPUTS)])


def _onnx_bytes(model: FaceNetwork, metadata: Mapping[str, str]) -> bytes:
    example = torch.zeros(EXAMPLE_BATCH, 3, IMAGE_SIDE, IMAGE_SIDE)
    with _quiet_exporter():
        program = torch.onnx.export(
            _Outputs(model).eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    assert program is not None  # it is None for the exporter that dynamo=True replaces
    proto: Any = program.model_proto
    # The exporter notes source lines with their paths on this machine at every node: not for those who get the file.
    for node in proto.graph.node:
        node.ClearField("metadata_props")
    proto.doc_string = DESCRIPTION
    _require("onnx").helper.set_model_props(proto, dict(metadata))
    content: bytes = proto.SerializeToString()
    return content


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep to itself what torch's exporter says of its own code, and nothing else.

    It warns that it has no use for torchvision, which this project does not use, and of a deprecated call of its own.
    """
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")

    def concerns_us(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("torchvision is not installed")

    registry.addFilter(concerns_us)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        registry.removeFilter(concerns_us)


def _trial_images(batch: int) -> Tensor:
    """Noise of falling contrast: features of different norms, for the fusion to tell apart."""
    noise = torch.rand(batch, 3, IMAGE_SIDE, IMAGE_SIDE, generator=torch.Generator().manual_seed(batch)) * 2 - 1
    return noise * torch.linspace(1.0, 0.1, batch)[:, None, None, None]


def _differences(given: list[Tensor], expected: tuple[Tensor, ...]) -> Differences:
    embedding_BD, norm_local_B, norm_global_B, weight_B = given
    wanted_BD, wanted_local_B, wanted_global_B, wanted_weight_B = expected
    norms_3B = torch.stack([embedding_BD.norm(dim=1), norm_local_B, norm_global_B])
    wanted_3B = torch.stack([wanted_BD.norm(dim=1), wanted_local_B, wanted_global_B])
    # The norm of an absent branch is 0 in both: the least positive number makes any other value a large difference.
    relative_3B = (norms_3B - wanted_3B).abs() / wanted_3B.clamp_min(torch.finfo(wanted_3B.dtype).tiny)
    return Differences(
        embedding=float((F.normalize(embedding_BD) - F.normalize(wanted_BD)).abs().max()),
        norm=float(relative_3B.max()),
        weight=float((weight_B - wanted_weight_B).abs().max()),
    )


def _check_close(differences: Differences) -> None:
    # Not "any greater": NaN is neither greater nor less.
    if not all(value <= TOLERANCE for value in differences):
        found = ", ".join(f"{name} {value:.2g}" for name, value in differences._asdict().items())
        raise ExportError(
            f"onnxruntime and torch differ by more than {TOLERANCE:g}, nothing was written: {found} "
            "(largest difference of unit embeddings, of norms as a share, of weights)"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxArguments:
    """Export a trained model to one ONNX file, checked in onnxruntime against torch."""

    model: str
    """Folder or URI of an exported model (model.safetensors and config.json)."""
    output: str
    """The file or URI to write."""


def export_job(arguments: list[str] | None = None) -> int:
    """Entry point of ``python -m pipeline.onnx_export``; gives the exit code."""
    # Here, because it loads Ray and MLflow, which `export_onnx` itself does without.
    from rich.console import Console

    from pipeline.cli import run_job

    def job() -> None:
        wanted = tyro.cli(OnnxArguments, args=arguments)
        fingerprint = str(read_model_info(wanted.model)["sha256"])
        written = export_onnx(load_model(wanted.model), wanted.output, metadata={"model_sha256": fingerprint})
        differences = written.differences
        Console().print(
            f"{storage.normalise(wanted.output)}: {written.num_bytes / 1e6:.1f} MB, opset {OPSET}; "
            f"differs from torch by {differences.embedding:.1g} (unit embedding), {differences.norm:.1g} (norms, as a "
            f"share), {differences.weight:.1g} (weights)",
            soft_wrap=True,
            highlight=False,
        )

    return run_job(job)


if __name__ == "__main__":
    raise SystemExit(export_job())
