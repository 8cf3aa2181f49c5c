"""An exported model: the weights as safetensors, and a config that says whose they are and what they must hash to.

Whoever receives such a folder loads it with this package alone, so this is the one module of ``lgaf`` that knows
safetensors, and `load_exported` its one function that opens files: two local ones, for reading. Anywhere else they may
lie, `pipeline.model_store` fetches them; both make the network by `network_of`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import safetensors.torch
from torch import Tensor

from lgaf.config import from_dict, require_choice
from lgaf.models import NETWORKS, FaceNetwork, NetworkConfig

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"


class ExportError(ValueError):
    """A folder that holds no exported model, or a damaged one; the message names the file."""


def exported(config: NetworkConfig, state: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Any]]:
    """The two files of an exported model: what `WEIGHTS` holds, and the JSON of `CONFIG`.

    Args:
        config: Of a network of `NETWORKS`; it makes the network again.
        state: Its ``state_dict()``.

    Raises:
        ValueError: The config is of no network of `NETWORKS`.
    """
    network = next((name for name, kind in NETWORKS.items() if type(config) is kind), None)
    if network is None:
        raise ValueError(f"a {type(config).__name__} is of no network of {', '.join(NETWORKS)}")
    weights = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    return weights, {"network": network, "model": asdict(config), "sha256": hashlib.sha256(weights).hexdigest()}


def check_info(info: object, place: str) -> dict[str, Any]:
    """The JSON of `CONFIG`, once it is known to be that of an exported model.

    Raises:
        ExportError: It is something else; ``place``, the folder, is named.
    """
    if not isinstance(info, dict) or not {"model", "sha256"} <= info.keys():
        raise ExportError(
            f"{place}/{CONFIG}: is not the config of an exported model (no model and sha256 in it); "
            f"that of a run is in {place}/model"
        )
    return info


def network_config(info: Mapping[str, Any], place: str) -> NetworkConfig:
    """The settings of the network in a checked ``info``.

    Raises:
        ValueError: They name something that this version does not know.
    """
    network = info.get("network", "lgaf")  # models of version 0.1 were all of that network
    require_choice(f"{place}/{CONFIG}: network", network, NETWORKS)
    return from_dict(NETWORKS[network], info["model"], "model")


def network_of(info: Mapping[str, Any], weights: bytes, place: str) -> FaceNetwork:
    """Make the network of a checked ``info`` with its weights, in eval mode on the CPU.

    Args:
        info: As `check_info` gives it.
        weights: The content of `WEIGHTS`.
        place: The folder, for messages.

    Raises:
        ExportError: The weights differ from those that were exported, or are not of the network that ``info`` names.
        ValueError: ``info`` names something that this version does not know.
    """
    found = hashlib.sha256(weights).hexdigest()
    if found != info["sha256"]:
        raise ExportError(f"{place}/{WEIGHTS}: sha256 is {found}, {CONFIG} says {info['sha256']}")
    model = network_config(info, place).build()
    try:
        model.load_state_dict(safetensors.torch.load(weights))
    except RuntimeError as error:
        raise ExportError(f"{place}/{WEIGHTS}: not the weights of the network in {CONFIG}: {error}") from error
    return model.eval()


def load_exported(folder: str | Path) -> FaceNetwork:
    """Load an exported model from a local folder: images [B, 3, 112, 112] RGB in [-1, 1] to a `FaceEmbedding`.

    The network is in eval mode, on the CPU, in float32.

    Args:
        folder: With `WEIGHTS` and `CONFIG` in it.

    Raises:
        ExportError: A file is missing or damaged; the message names it.
        ValueError: The config names something that this version does not know.
    """
    place = str(folder)
    try:
        text, weights = (Path(folder, CONFIG).read_bytes(), Path(folder, WEIGHTS).read_bytes())
    except OSError as error:
        raise ExportError(f"{error.filename or place}: cannot be read: {error.strerror}") from error
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ExportError(f"{place}/{CONFIG}: is not valid JSON: {error}") from error
    return network_of(check_info(content, place), weights, place)
