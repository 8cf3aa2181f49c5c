"""A network in onnxruntime, and as an exported program, says what it says in torch."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
import sys
import warnings

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from lgaf.models import LGAF, FaceNetwork, LGAFConfig
from lgaf.models.fusion import EPSILON, LocalGlobalFusion
from lgaf.models.network import FaceEmbedding
from pipeline import onnx_export, storage
from pipeline.model_store import save_model
from pipeline.onnx_export import OUTPUTS, ExportError, export_job, export_onnx
from tests.conftest import ROOT

MICRO = LGAFConfig(backbone="micro", embedding_dim=16, num_heads=2, scales=(1, 3))
TINY = LGAFConfig(backbone="tiny", embedding_dim=32, num_heads=2)
EXPORTED = {
    "norm-add": dataclasses.replace(MICRO, diversity_weight=1.0),  # a loss in training, a field less in the file
    "entropy-cat": dataclasses.replace(TINY, quality="entropy", fusion="cat"),
    "none-add": dataclasses.replace(MICRO, quality="none", unit_branches=True),
    "none-iaff": dataclasses.replace(MICRO, quality="none", fusion="iaff"),
    "global": dataclasses.replace(MICRO, branches=("global",), global_projection="gdc"),
    "local": dataclasses.replace(MICRO, branches=("local",), lanet_gap="spatial", local_projection="gap"),
}


def _images(batch: int) -> torch.Tensor:
    noise = torch.rand(batch, 3, 112, 112, generator=torch.Generator().manual_seed(100 + batch)) * 2 - 1
    return noise * torch.linspace(0.2, 1.0, batch)[:, None, None, None]


def _trained(config: LGAFConfig) -> LGAF:
    """A network whose statistics have moved, and whose weights are clearly not halves."""
    torch.manual_seed(1)
    model = config.build().to(memory_format=torch.channels_last)  # as TrainStep leaves it
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, 3, 112, 112))
        model.eval()
        if isinstance(model.fusion, LocalGlobalFusion):
            assert model.fusion.local_quality.mean != 20.0
            features = model.backbone(_images(5))
            for quality, branch, above in (
                (model.fusion.local_quality, model.local_branch, -1.0),
                (model.fusion.global_quality, model.global_branch, 2.0),
            ):
                measure = model.fusion.measure(branch(features))
                quality.std.fill_(measure.std())
                quality.mean.fill_(measure.mean() - above * measure.std())
    return model


def _run(content: bytes, images: torch.Tensor) -> FaceEmbedding:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"images": images.numpy()})
    assert [output.name for output in session.get_outputs()] == list(OUTPUTS)
    return FaceEmbedding(*map(torch.from_numpy, outputs))


@pytest.mark.parametrize(
    "name",
    # The others' programs are among those below, without a file.
    [pytest.param(name, marks=[] if name in ("norm-add", "entropy-cat") else pytest.mark.slow) for name in EXPORTED],
)
def test_a_file_gives_what_torch_gives(name, tmp_path):
    model = _trained(EXPORTED[name])
    uri = str(tmp_path / "new" / "model.onnx")
    written = export_onnx(model, uri)
    content = storage.read_bytes(uri)
    assert len(content) == written.num_bytes
    assert all(0 <= value <= 1e-4 for value in written.differences)
    for batch in (1, 3, 4):  # none is the example's, nor all those that the export itself checks
        images = _images(batch)
        with torch.no_grad():
            expected = model(images)
        found = _run(content, images)
        for field in ("embedding_BD", "norm_local_B", "norm_global_B"):
            value = getattr(expected, field)
            scale = value.norm(dim=1).amax() if value.ndim == 2 else 1.0
            torch.testing.assert_close(getattr(found, field) / scale, value / scale, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.weight_local_B, expected.weight_local_B, rtol=0, atol=1e-4)
        if isinstance(model.fusion, LocalGlobalFusion):
            assert (found.weight_local_B - 0.5).abs().min() > 0.05
    proto = onnx.load_from_string(content)
    onnx.checker.check_model(proto, full_check=True)
    assert [(opset.domain, opset.version >= 17) for opset in proto.opset_import] == [("", True)]
    assert [value.name for value in proto.graph.input] == ["images"]
    shapes = [[dim.dim_param or dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in proto.graph.output]
    assert shapes == [["batch", EXPORTED[name].output_dim], ["batch"], ["batch"], ["batch"]]
    assert str(ROOT).encode() not in content  # no path of this machine


def test_the_statistics_of_the_fusion_are_those_of_the_export(tmp_path):
    model, images = _trained(dataclasses.replace(MICRO, num_heads=1, scales=(1,))), _images(5)
    fusion = model.fusion
    first, second = (f"memory://onnx-{tmp_path.name}/{name}.onnx" for name in ("first", "second"))
    export_onnx(model, first)
    constants = _scalars(onnx.load_from_string(storage.read_bytes(first)))
    for quality in (fusion.local_quality, fusion.global_quality):
        # The exporter folds the sum of eq. 6's denominator.
        assert {quality.mean.item(), (quality.std + EPSILON).item()} <= constants
    before = _run(storage.read_bytes(first), images)
    with torch.no_grad():
        fusion.local_quality.mean.sub_(2 * fusion.local_quality.std)
        fusion.global_quality.std.mul_(3)
        expected = model(images)
    after = _run(storage.read_bytes(first), images)
    assert torch.equal(after.weight_local_B, before.weight_local_B)
    assert (before.weight_local_B - expected.weight_local_B).abs().min() > 0.05
    export_onnx(model, second)
    fresh = _run(storage.read_bytes(second), images)
    torch.testing.assert_close(fresh.weight_local_B, expected.weight_local_B, rtol=0, atol=1e-4)


def _scalars(proto: onnx.ModelProto) -> set[float]:
    arrays = [onnx.numpy_helper.to_array(initializer) for initializer in proto.graph.initializer]
    return {array.item() for array in arrays if array.size == 1}


class _ExportsWrong(FaceNetwork):
    """Differs by ``change`` inside an exported program."""

    def __init__(self, change) -> None:
        super().__init__()
        self.change, self.project = change, nn.Linear(3, 4)

    def forward(self, images: torch.Tensor) -> FaceEmbedding:
        embedding = self.project(images.mean(dim=(2, 3)))
        norm = embedding.norm(dim=1)
        output = FaceEmbedding(embedding, norm * 0, norm, norm * 0)
        return self.change(output) if torch.compiler.is_exporting() else output


CHANGES = {
    "direction": lambda output: output._replace(embedding_BD=output.embedding_BD * torch.tensor([1.01, 1, 1, 1])),
    "length": lambda output: output._replace(embedding_BD=output.embedding_BD * 1.001),
    "norm": lambda output: output._replace(norm_global_B=output.norm_global_B * 1.001),
    "norm of no branch": lambda output: output._replace(norm_local_B=output.norm_local_B + 1e-3),
    "weight": lambda output: output._replace(weight_local_B=output.weight_local_B + 1e-3),
    "nan": lambda output: output._replace(weight_local_B=output.weight_local_B + float("nan")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_differs_is_not_put_in_place(change, tmp_path):
    with pytest.raises(ExportError, match=r"differ by more than 0\.0001, nothing was written: embedding .*norm .*weig"):
        export_onnx(_ExportsWrong(CHANGES[change]).eval(), str(tmp_path / "model.onnx"))
    assert not list(tmp_path.iterdir())


def test_a_former_file_outlives_one_that_differs(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"former")
    with pytest.raises(ExportError):
        export_onnx(_ExportsWrong(CHANGES["weight"]).eval(), str(tmp_path / "model.onnx"))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"former"]


def test_a_network_that_exports_right_passes_the_same_check(tmp_path):
    export_onnx(_ExportsWrong(lambda output: output).eval(), str(tmp_path / "model.onnx"), metadata={"run": "a"})
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    (entry,) = onnx.load(tmp_path / "model.onnx").metadata_props
    assert (entry.key, entry.value) == ("run", "a")


@pytest.mark.parametrize("module", onnx_export.MODULES)
def test_a_missing_extra_is_named(module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExportError, match=rf'needs {module} .*: pip install "lgaf-on-ray\[export\]"'):
        export_onnx(MICRO.build().eval(), str(tmp_path / "model.onnx"))
    assert not list(tmp_path.iterdir())


def test_a_network_in_training_mode_or_half_precision_or_too_large_is_refused(monkeypatch, tmp_path):
    uri = str(tmp_path / "model.onnx")
    model = MICRO.build().eval()
    model.fusion.train()
    with pytest.raises(ExportError, match=r"training mode: call model\.eval\(\)"):
        export_onnx(model, uri)
    with pytest.raises(ExportError, match=r"torch\.bfloat16 tensor on cpu: export float32"):
        export_onnx(MICRO.build().eval().bfloat16(), uri)
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 10_000)
    with pytest.raises(ExportError, match=r"has \d+ bytes of weights; one ONNX file holds at most 10000"):
        export_onnx(model.eval(), uri)
    assert not list(tmp_path.iterdir())


def test_the_exporter_keeps_its_remarks_to_itself(tmp_path, caplog, capfd):
    model = LGAFConfig(backbone="micro", embedding_dim=16, branches=("global",)).build().eval()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir"):
            logging.getLogger(name).addHandler(caplog.handler)
        try:
            export_onnx(model, str(tmp_path / "model.onnx"))
        finally:
            for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir"):
                logging.getLogger(name).removeHandler(caplog.handler)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_the_command_exports_a_stored_model(tmp_path, capfd):
    model = _trained(MICRO)
    fingerprint = save_model(str(tmp_path / "model"), MICRO, model.state_dict())
    output = tmp_path / "model.onnx"
    assert export_job(["--model", str(tmp_path / "model"), "--output", str(output)]) == 0
    out = capfd.readouterr().out
    assert out.startswith(f"file://{output}: 0.")
    assert "opset 18; differs from torch by" in out
    assert out.count("\n") == 1
    assert onnx.load(output).metadata_props[0].value == fingerprint


def test_the_command_names_what_is_not_there(tmp_path, capfd):
    assert export_job(["--model", str(tmp_path / "no"), "--output", str(tmp_path / "model.onnx")]) == 1
    assert "no/config.json: does not exist" in capfd.readouterr().err


# Every way to join the branches: quality and fusion mean nothing with one branch.
JOININGS = [
    {"branches": ("global",)},
    {"branches": ("local",)},
    {"fusion": "iaff", "quality": "none"},
    *(
        {"fusion": fusion, "quality": quality}
        for fusion in ("add", "cat")
        for quality in ("norm", "entropy", "gaussian_entropy", "none")
    ),
]
SWITCHES = [
    JOININGS,
    *(
        [{name: value} for value in values]
        for name, values in {
            "lanet_gap": ("none", "channel", "spatial"),
            "scale_form": ("stacked", "direct"),
            "local_projection": ("flatten", "gap"),
            "global_projection": ("fc", "gdc"),
            "feature_shift": (False, True),
            "unit_branches": (False, True),
            "quality_gradient": (False, True),
            "gradient_checkpointing": (False, True),
            "local_width": (0, 6),
        }.items()
    ),
]


# What gives sizes, or has a case of its own among `EXPORTED`.
ELSEWHERE = {"backbone", "embedding_dim", "num_heads", "scales", "dropout", "diversity_weight"}


def test_no_switch_is_forgotten():
    switched = {name for values in SWITCHES for value in values for name in value}
    assert switched | ELSEWHERE == {field.name for field in dataclasses.fields(LGAFConfig)}


def _covering_rows() -> list[tuple[int, ...]]:
    """Choices, one index per switch, in which every two values of any two switches meet."""
    wanted = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(SWITCHES)), 2)
        for i, j in itertools.product(range(len(SWITCHES[a])), range(len(SWITCHES[b])))
    }
    draw = random.Random(0)
    rows = []
    while wanted:
        candidates = [tuple(draw.randrange(len(values)) for values in SWITCHES) for _ in range(200)]
        best = max(candidates, key=lambda row: len(wanted & set(itertools.combinations(enumerate(row), 2))))
        rows.append(best)
        wanted -= set(itertools.combinations(enumerate(best), 2))
    return rows


@pytest.mark.parametrize("row", _covering_rows(), ids=lambda row: "".join(map(str, row)))
def test_exported_programs_give_what_torch_gives(row):
    settings = {key: value for values, i in zip(SWITCHES, row, strict=True) for key, value in values[i].items()}
    torch.manual_seed(0)
    model = dataclasses.replace(MICRO, num_heads=1, **settings).build()
    with torch.no_grad():
        model(torch.randn(4, 3, 112, 112))
    model.eval()
    batch = {"images_BCHW": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (torch.zeros(2, 3, 112, 112),), dynamic_shapes=batch, strict=False).module()
    with torch.no_grad():
        for images in (_images(1), _images(3)):
            for expected, found in zip(model(images), program(images), strict=True):
                assert (expected is None) == (found is None)
                if expected is not None:
                    torch.testing.assert_close(found, expected)
