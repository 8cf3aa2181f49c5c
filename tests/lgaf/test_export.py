"""A folder of an exported model is all that ``lgaf`` needs, and it takes no other."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import lgaf
from lgaf.export import CONFIG, WEIGHTS, ExportError, exported, load_exported
from lgaf.models import LGAFConfig
from lgaf.models.peers import TransFaceConfig
from tests.conftest import ROOT

SMALL = LGAFConfig(backbone="micro", embedding_dim=8)

# What the machinery around the package needs, and the package must not.
ALONE = """
import importlib.abc, sys
class Forbid(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"pipeline", "jobs", "ray", "mlflow", "pyarrow", "tyro", "rich", "matplotlib"}:
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Forbid())
"""


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path, SMALL)
    return tmp_path


def _write(folder, config):
    torch.manual_seed(3)
    model = config.build().eval()
    weights, info = exported(config, model.state_dict())
    (folder / WEIGHTS).write_bytes(weights)
    (folder / CONFIG).write_text(json.dumps(info))
    return model


@pytest.mark.parametrize("config", [SMALL, TransFaceConfig(backbone="vit_tiny", embedding_dim=8)], ids=["lgaf", "peer"])
def test_what_was_exported_comes_back(tmp_path, config):
    model = _write(tmp_path, config)
    loaded = lgaf.load_exported(tmp_path)
    assert loaded.config == config
    assert not loaded.training
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        assert torch.equal(loaded(images).embedding_BD, model(images).embedding_BD)


def _run_alone(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"{ALONE}\n{code}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_the_package_alone_loads_it(folder):
    code = f"import torch, lgaf\nmodel = lgaf.load_exported({str(folder)!r})\n"
    found = _run_alone(f"{code}print(tuple(model(torch.zeros(2, 3, 112, 112)).embedding_BD.shape))")
    assert found.stdout.strip() == "(2, 8)", found.stderr


def test_the_ban_of_that_test_holds():
    for name in ("pipeline.storage", "ray", "pyarrow", "mlflow"):
        assert f"{name.split('.')[0]} was imported" in _run_alone(f"import {name}").stderr


def test_other_weights_are_refused(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ExportError, match=rf"{WEIGHTS}: sha256 is \w+, config\.json says \w+"):
        load_exported(folder)


def test_weights_of_another_network_are_refused(folder):
    info = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(info | {"model": info["model"] | {"embedding_dim": 16}}))
    with pytest.raises(ExportError, match=rf"{WEIGHTS}: not the weights of the network in config\.json"):
        load_exported(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_is_missing_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ExportError, match=rf"{name}: cannot be read: No such file"):
        load_exported(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"config\.json: is not valid JSON"),
        ("[]", r"config\.json: is not the config of an exported model"),
        ('{"preset": "demo"}', r"config\.json: is not the config of an exported model"),
        ('{"model": {}, "sha256": "0"}', r"sha256 is"),
    ],
)
def test_a_config_of_something_else_is_named(folder, text, words):
    (folder / CONFIG).write_text(text)
    with pytest.raises(ExportError, match=words):
        load_exported(folder)


def test_a_network_that_does_not_exist_is_named(folder):
    info = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(info | {"network": "lgav"}))
    with pytest.raises(ValueError, match=r"network='lgav' is not valid \(did you mean 'lgaf'\?\)"):
        load_exported(folder)


def test_settings_of_no_network_are_not_exported():
    with pytest.raises(ValueError, match=r"a dict is of no network of lgaf, ls_cnn"):
        exported({}, {})
