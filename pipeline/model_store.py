"""Exported models: a folder with ``model.safetensors`` and ``config.json``, never a pickle."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any, Final

import safetensors.torch
from torch import Tensor

from lgaf.config import from_dict, require_choice
from lgaf.models import NETWORKS, FaceNetwork, NetworkConfig
from pipeline import storage

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"


def save_model(uri: str, config: NetworkConfig, state: dict[str, Tensor]) -> str:
    """Write a model and give its fingerprint (sha256 of the weights); the config, which holds it, is written last.

    Args:
        uri: The folder.
        config: Of a network of `NETWORKS`; it makes the network again.
        state: Its ``state_dict()``.
    """
    network = next((name for name, kind in NETWORKS.items() if type(config) is kind), None)
    if network is None:
        raise ValueError(f"a {type(config).__name__} is of no network of {', '.join(NETWORKS)}")
    weights = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    fingerprint = hashlib.sha256(weights).hexdigest()
    storage.write_bytes(storage.join(uri, WEIGHTS), weights)
    storage.write_json(storage.join(uri, CONFIG), {"network": network, "model": asdict(config), "sha256": fingerprint})
    return fingerprint


def read_model_info(uri: str) -> dict[str, Any]:
    """The ``config.json`` of an exported model: keys ``network``, ``model`` and ``sha256``.

    Raises:
        StorageError: There is none.
    """
    info: dict[str, Any] = storage.read_json(storage.join(uri, CONFIG))
    if not {"model", "sha256"} <= info.keys():
        raise storage.StorageError(
            f"{storage.join(uri, CONFIG)}: is not the config of an exported model (no model and sha256 in it); "
            f"that of a run is in {storage.join(uri, 'model')}"
        )
    return info


def load_model(uri: str) -> FaceNetwork:
    """Read an exported model, in eval mode on the CPU.

    Raises:
        StorageError: The folder holds no model, or the weights differ from those that were saved.
        ValueError: The config names something this version does not know.
    """
    info = read_model_info(uri)
    weights = storage.read_bytes(storage.join(uri, WEIGHTS))
    found = hashlib.sha256(weights).hexdigest()
    if found != info["sha256"]:
        raise storage.StorageError(f"{storage.join(uri, WEIGHTS)}: sha256 is {found}, {CONFIG} says {info['sha256']}")
    network = info.get("network", "lgaf")  # models of version 0.1 were all of that network
    require_choice(f"{storage.join(uri, CONFIG)}: network", network, NETWORKS)
    model = from_dict(NETWORKS[network], info["model"], "model").build()
    model.load_state_dict(safetensors.torch.load(weights))
    return model.eval()
