"""Exported models at any URI: a folder with ``model.safetensors`` and ``config.json``, never a pickle.

What the files hold is `lgaf.export`'s, which loads a local folder without this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lgaf.export import CONFIG, WEIGHTS, ExportError, check_info, exported, network_config, network_of
from lgaf.models import FaceNetwork, NetworkConfig
from pipeline import storage

__all__ = ["CONFIG", "WEIGHTS", "load_model", "read_model_config", "read_model_info", "save_model"]


def save_model(uri: str, config: NetworkConfig, state: Mapping[str, Tensor]) -> str:
    """Write a model and give its fingerprint (sha256 of the weights); the config, which holds it, is written last.

    Args:
        uri: The folder.
        config: Of a network of `NETWORKS`; it makes the network again.
        state: Its ``state_dict()``.
    """
    weights, info = exported(config, state)
    storage.write_bytes(storage.join(uri, WEIGHTS), weights)
    storage.write_json(storage.join(uri, CONFIG), info)
    return str(info["sha256"])


def read_model_info(uri: str) -> dict[str, Any]:
    """The ``config.json`` of an exported model: keys ``network``, ``model`` and ``sha256``.

    Raises:
        StorageError: There is none.
    """
    try:
        return check_info(storage.read_json(storage.join(uri, CONFIG)), storage.normalise(uri))
    except ExportError as error:
        raise storage.StorageError(str(error)) from error


def read_model_config(uri: str) -> NetworkConfig:
    """The settings of an exported model's network.

    Raises:
        StorageError: The folder holds no model.
        ValueError: They name something this version does not know.
    """
    return network_config(read_model_info(uri), storage.normalise(uri))


def load_model(uri: str) -> FaceNetwork:
    """Read an exported model, in eval mode on the CPU.

    Raises:
        StorageError: The folder holds no model, or the weights differ from those that were saved.
        ValueError: The config names something this version does not know.
    """
    info = read_model_info(uri)
    try:
        return network_of(info, storage.read_bytes(storage.join(uri, WEIGHTS)), storage.normalise(uri))
    except ExportError as error:
        raise storage.StorageError(str(error)) from error
