"""Exported models come back as they were, or not at all."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from lgaf.models import LGAF, FaceNetwork, LGAFConfig, NetworkConfig
from lgaf.models.fusion import LocalGlobalFusion
from lgaf.models.peers import CQAFaceConfig, TransFaceConfig
from pipeline import storage
from pipeline.model_store import CONFIG, WEIGHTS, load_model, read_model_info, save_model

CONFIGS = [
    LGAFConfig(backbone="micro", embedding_dim=16),
    LGAFConfig(backbone="micro", embedding_dim=8, branches=("global",), dropout=0.0),
    LGAFConfig(backbone="micro", embedding_dim=8, branches=("local",), num_heads=2, scales=(1, 7)),
    LGAFConfig(backbone="micro", embedding_dim=8, quality="none"),
    LGAFConfig(backbone="micro", embedding_dim=8, quality="entropy", fusion="cat"),
    TransFaceConfig(backbone="vit_tiny", embedding_dim=8),
    CQAFaceConfig(backbone="micro", embedding_dim=8),
]


def _model(config: NetworkConfig) -> FaceNetwork:
    torch.manual_seed(1)
    model = config.build().to(memory_format=torch.channels_last)  # as TrainStep leaves it
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2.0)
        if isinstance(model, LGAF) and isinstance(model.fusion, LocalGlobalFusion):
            model.fusion.local_quality.mean.fill_(3.0)
            model.fusion.global_quality.std.fill_(0.5)
    return model


@pytest.fixture(params=["file", "memory"])
def uri(request, tmp_path) -> str:
    return str(tmp_path / "model") if request.param == "file" else f"memory://models{tmp_path.name}/model"


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_the_same_outputs_come_back(uri, config):
    model = _model(config).eval()
    fingerprint = save_model(uri, config, model.state_dict())
    images = torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(99)  # the fresh weights of `build` must not show
    loaded = load_model(uri)
    assert loaded.config == config
    assert not loaded.training
    with torch.no_grad():
        expected, found = model(images), loaded.to(memory_format=torch.channels_last)(images)
    for name, value in list(expected._asdict().items())[:4]:
        assert torch.equal(getattr(found, name), value), name
    assert found[4:] == expected[4:] == (None, None), "only training weighs samples"
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert expected.embedding_BD.abs().sum() > 0
    assert read_model_info(uri)["sha256"] == fingerprint
    assert hashlib.sha256(storage.read_bytes(storage.join(uri, WEIGHTS))).hexdigest() == fingerprint


def test_the_fingerprint_is_of_the_weights_alone(tmp_path):
    model = _model(CONFIGS[0])
    first, second = (save_model(str(tmp_path / name), CONFIGS[0], model.state_dict()) for name in "ab")
    assert first == second
    with torch.no_grad():
        model.backbone.prelu.weight[0] += 1e-3
    assert save_model(str(tmp_path / "c"), CONFIGS[0], model.state_dict()) != first


def _flip_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("change", [_flip_bit, lambda content: content[:-8], lambda content: b""])
def test_altered_weights_are_refused(uri, change):
    save_model(uri, CONFIGS[0], _model(CONFIGS[0]).state_dict())
    place = storage.join(uri, WEIGHTS)
    storage.write_bytes(place, change(storage.read_bytes(place)))
    with pytest.raises(storage.StorageError, match=rf"{WEIGHTS}: sha256 is \w+, config\.json says \w+"):
        load_model(uri)


def test_a_folder_without_a_model_is_named(uri):
    with pytest.raises(storage.StorageError, match=r"model/config\.json: does not exist"):
        load_model(uri)


def test_weights_without_their_config_are_no_model(uri):
    # The config is written last: this is what a kill between the two leaves.
    save_model(uri, CONFIGS[0], _model(CONFIGS[0]).state_dict())
    storage.delete_file(storage.join(uri, CONFIG))
    with pytest.raises(storage.StorageError, match=r"config\.json: does not exist"):
        load_model(uri)


def test_a_config_without_its_weights_is_named(uri):
    save_model(uri, CONFIGS[0], _model(CONFIGS[0]).state_dict())
    storage.delete_file(storage.join(uri, WEIGHTS))
    with pytest.raises(storage.StorageError, match=r"model\.safetensors: does not exist"):
        load_model(uri)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bakbone": "micro"}, r"model: the key='bakbone' is not valid \(did you mean 'backbone'\?\)"),
        ({"backbone": "micron"}, r"model\.backbone='micron' is not valid \(did you mean 'micro'\?\)"),
        ({"embedding_dim": "16"}, r"model\.embedding_dim='16' must be of type int"),
    ],
)
def test_a_config_that_this_version_does_not_know_is_named(uri, change, text):
    save_model(uri, CONFIGS[0], _model(CONFIGS[0]).state_dict())
    place = storage.join(uri, CONFIG)
    info = storage.read_json(place)
    storage.write_json(place, info | {"model": info["model"] | change})
    with pytest.raises(ValueError, match=text):
        load_model(uri)


def test_the_folder_of_a_run_is_not_taken_for_a_model(uri):
    storage.write_json(storage.join(uri, CONFIG), {"preset": "demo"})
    with pytest.raises(storage.StorageError, match=r"not the config of an exported model.*model/model"):
        load_model(uri)


def test_an_unknown_network_is_named(uri):
    save_model(uri, CONFIGS[0], _model(CONFIGS[0]).state_dict())
    place = storage.join(uri, CONFIG)
    storage.write_json(place, storage.read_json(place) | {"network": "lgav"})
    with pytest.raises(ValueError, match=r"config\.json: network='lgav' is not valid \(did you mean 'lgaf'\?\)"):
        load_model(uri)


def test_models_from_before_there_were_others_are_lgaf(uri):
    save_model(uri, CONFIGS[0], _model(CONFIGS[0]).state_dict())
    place = storage.join(uri, CONFIG)
    info = storage.read_json(place)
    del info["network"]
    storage.write_json(place, info)
    assert load_model(uri).config == CONFIGS[0]


def test_a_config_that_is_not_json_is_named(uri):
    save_model(uri, CONFIGS[0], _model(CONFIGS[0]).state_dict())
    storage.write_bytes(storage.join(uri, CONFIG), b"{")
    with pytest.raises(storage.StorageError, match=r"config\.json: is not valid JSON"):
        load_model(uri)
