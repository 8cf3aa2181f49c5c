"""Released weights as files: what is read, what is refused, and what the command writes."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch

from lgaf.models import BACKBONES, LGAF, LGAFConfig
from lgaf.models.backbones.ir import IRSpec
from lgaf.models.backbones.iresnet import IResNetSpec
from lgaf.models.released import RELEASED_FORMS, to_released
from pipeline import storage
from pipeline.errors import user_error
from pipeline.model_store import load_model
from pipeline.released import convert_job, load_released, read_released


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch) -> None:
    channels = (16, 24, 32, 48)
    monkeypatch.setitem(BACKBONES, "small_ir", IRSpec(blocks=(1, 2, 1, 1), channels=channels, stem_channels=16))
    monkeypatch.setitem(BACKBONES, "small_iresnet", IResNetSpec(blocks=(1, 2, 1, 1), channels=channels))


def _config(form: str) -> LGAFConfig:
    config = LGAFConfig(backbone="small_ir", branches=("global",), embedding_dim=16, dropout=0.4)
    if form == "adaface":
        return config
    return dataclasses.replace(config, backbone="small_iresnet", dropout=0.0, feature_shift=True)


def _model(form: str) -> LGAF:
    torch.manual_seed(0)
    return _config(form).build().eval()


def _weights(form: str) -> dict[str, torch.Tensor]:
    return to_released(form, _config(form), _model(form).state_dict())


def _lightning(**more: object) -> dict[str, object]:
    """A checkpoint as AdaFace's trainer leaves it."""
    state = {f"model.{name}": value for name, value in _weights("adaface").items()}
    state |= {"head.kernel": torch.zeros(16, 9), "head.t": torch.zeros(1)}
    return {
        "epoch": 25,
        "pytorch-lightning_version": "1.8.6",
        "state_dict": collections.OrderedDict(state),
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [{"milestones": collections.Counter([12, 20, 24]), "_last_lr": [1e-4]}],
        "hyper_parameters": {
            "arch": "ir_101",
            "lr_milestones": [12, 20, 24],
            "m": 0.4,
            "use_16bit": True,
            "seed": None,
        },
    } | more


def _save(uri: object, value: object, **options: object) -> str:
    content = io.BytesIO()
    torch.save(value, content, **options)
    storage.write_bytes(str(uri), content.getvalue())
    return str(uri)


def _same_network(found: LGAF, form: str) -> bool:
    images = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        return torch.equal(found(images).embedding_BD, _model(form)(images).embedding_BD)


@pytest.mark.parametrize("form", RELEASED_FORMS)
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_state_dict_comes_in(tmp_path, form, options):
    loaded = load_released(_save(tmp_path / "backbone.pth", _weights(form), **options), form)
    assert loaded.config == _config(form)
    assert not loaded.training
    assert _same_network(loaded, form)


def test_a_lightning_checkpoint_comes_in_from_anywhere():
    assert _same_network(load_released(_save("memory://released/adaface.ckpt", _lightning()), "adaface"), "adaface")


def test_half_precision_comes_in_as_float32(tmp_path):
    half = {name: value.half() if value.is_floating_point() else value for name, value in _weights("adaface").items()}
    loaded = load_released(_save(tmp_path / "half.pt", half), "adaface")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_safetensors_come_in(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors.torch.save({f"model.net.{name}": t for name, t in _weights("adaface").items()}))
    assert _same_network(load_released(str(file), "adaface"), "adaface")


def _callback_class() -> type:
    """A class that pickles under the name of Lightning's, without Lightning."""
    return type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})


def test_the_callback_of_an_old_lightning_checkpoint_is_no_hindrance(tmp_path, monkeypatch):
    callback = _callback_class()
    module = types.ModuleType(callback.__module__)
    module.ModelCheckpoint = callback
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, callback.__module__, module)
        state = {"monitor": "val_acc", "best_model_score": torch.tensor(0.97)}
        file = _save(tmp_path / "old.ckpt", _lightning(callbacks={callback: state}))
    allowed = set(torch.serialization.get_safe_globals())
    assert _same_network(load_released(file, "adaface"), "adaface")
    assert "pytorch_lightning" not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == allowed


PLAIN = [None, True, 1, 0.5, 1j, "a", b"a", bytearray(b"a"), [1], (1,), {1}, {"a": {"b": 1}}, torch.Size([1])]
PLAIN += [collections.OrderedDict(a=1), collections.Counter([1]), torch.float16, torch.device("cpu")]


def test_plain_values_beside_the_weights_pass(tmp_path):
    file = _save(tmp_path / "plain.ckpt", _lightning(hyper_parameters=PLAIN))
    assert read_released(file)["hyper_parameters"] == PLAIN


@pytest.mark.parametrize(
    ("value", "name", "package"),
    [
        (argparse.Namespace(arch="ir_18"), r"argparse\.Namespace", "argparse"),
        (pathlib.PurePosixPath("faces"), r"pathlib\.PurePosixPath", "pathlib"),
        (np.float64(0.97), r"numpy\._core\.multiarray\.scalar", "numpy"),
        (collections.defaultdict(list), r"collections\.defaultdict", "collections"),
        (torch.nn.PReLU(), r"torch\.nn\.modules\.activation\.PReLU", "torch"),
    ],
)
def test_objects_are_refused_by_name(tmp_path, value, name, package):
    file = _save(tmp_path / "objects.ckpt", _lightning(hyper_parameters={"value": value}))
    told = rf"objects\.ckpt: needs {name} beside .* where {package} is installed: python -c .*weights_only=False"
    with pytest.raises(storage.StorageError, match=told) as raised:
        load_released(file, "adaface")
    assert user_error(raised.value) is raised.value


def test_what_the_message_says_helps(tmp_path):
    file = _save(tmp_path / "objects.ckpt", _lightning(hyper_parameters=argparse.Namespace()))
    with pytest.raises(storage.StorageError) as raised:
        read_released(file)
    new = str(tmp_path / "weights.pt")
    code = str(raised.value).split('python -c "')[1].removesuffix('"').replace("FILE", file).replace("NEW", new)
    subprocess.run([sys.executable, "-c", code], check=True)
    assert _same_network(load_released(new, "adaface"), "adaface")


class _Harmful:
    def __init__(self, file: pathlib.Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return pathlib.Path.touch, (self.file,)


def test_nothing_in_a_file_is_run(tmp_path):
    proof = tmp_path / "proof"
    with pytest.raises(storage.StorageError, match=r"could run any code, so it is not read"):
        read_released(_save(tmp_path / "harmful.pt", {"state_dict": _weights("adaface"), "more": _Harmful(proof)}))
    assert not proof.exists()


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("change", [_cut, lambda _: b"", lambda _: b"<html>not found</html>"])
def test_a_damaged_file_is_named(tmp_path, change):
    file = tmp_path / "damaged.pt"
    file.write_bytes(change(pathlib.Path(_save(tmp_path / "whole.pt", _weights("adaface"))).read_bytes()))
    with pytest.raises(storage.StorageError, match=r"damaged\.pt: is not a file of torch\.save, or is damaged: \w+"):
        read_released(str(file))


def test_other_files_are_named(tmp_path):
    with pytest.raises(storage.StorageError, match=r"list\.pt: holds a list, a state dict was expected"):
        read_released(_save(tmp_path / "list.pt", [1]))
    with pytest.raises(storage.MissingError, match=r"absent\.pt: does not exist"):
        read_released(str(tmp_path / "absent.pt"))
    with pytest.raises(ValueError, match=r"faces\.pt: form='insightface', but .* small_ir: form='adaface'"):
        load_released(_save(tmp_path / "faces.pt", _weights("adaface")), "insightface")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_program_is_refused(tmp_path):
    file = str(tmp_path / "script.pt")
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), file)
    with pytest.raises(storage.StorageError, match=r"script\.pt: is a TorchScript archive"):
        read_released(file)


def test_the_command_writes_a_model(tmp_path, capsys):
    file, output = _save(tmp_path / "adaface.ckpt", _lightning()), str(tmp_path / "model")
    assert convert_job(["--weights", file, "--form", "adaface", "--output", output]) == 0
    assert "small_ir, 16 dimensions" in capsys.readouterr().out
    loaded = load_model(output)
    assert loaded.config == _config("adaface")
    assert _same_network(loaded, "adaface")


def test_the_command_takes_the_channel_order(tmp_path):
    file, output = _save(tmp_path / "adaface.ckpt", _lightning()), str(tmp_path / "model")
    assert convert_job(["--weights", file, "--form", "adaface", "--output", output, "--channel-order", "rgb"]) == 0
    stem = load_model(output).backbone.input_layer[0].weight
    assert torch.equal(stem, _weights("adaface")["input_layer.0.weight"])


def test_the_command_tells_errors(tmp_path, capsys):
    output = str(tmp_path / "model")
    assert convert_job(["--weights", str(tmp_path / "no.pt"), "--form", "adaface", "--output", output]) == 1
    assert "no.pt: does not exist" in capsys.readouterr().err
    file = _save(tmp_path / "faces.pt", _weights("adaface"))
    assert convert_job(["--weights", file, "--form", "insightface", "--output", output]) == 1
    assert "faces.pt: form='insightface', but these look like weights of small_ir" in capsys.readouterr().err
    assert not storage.exists(output)


def test_a_flipped_byte_is_found(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"conv1.weight": torch.ones(64, 3, 3, 3)}, path)
    content = bytearray(path.read_bytes())
    middle = content.index(bytes(torch.ones(8).numpy().tobytes()))
    content[middle + 5] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(storage.StorageError, match=r"weights\.pth: is damaged: the checksum of .* is wrong"):
        read_released(str(path))
