"""Released weights: state dicts of insightface's and AdaFace's networks to ours and back, bit for bit.

Ours is that of ``LGAFConfig(branches=("global",), ...)``, keys ``backbone.*`` and ``global_branch.*``. The bodies have
the published names already, so what changes is where the tail is, the published layers behind C(x). The one tensor
that changes is the first convolution of a network that takes BGR, AdaFace's: its input channels are reversed, so that
the converted network takes RGB as all of ours do.

Sources: recognition/arcface_torch/backbones of deepinsight/insightface (iresnet.py, mobilefacenet.py), net.py of
mk-minchul/AdaFace and models/iresnet of mk-minchul/CVLface.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from lgaf.config import require_choice
from lgaf.models.backbones import BACKBONES, BackboneSpec
from lgaf.models.backbones.ir import IRSpec
from lgaf.models.backbones.iresnet import IResNetSpec
from lgaf.models.backbones.mobilefacenet import MobileFaceNetSpec
from lgaf.models.lgaf import LGAFConfig

ReleasedForm = Literal["insightface", "adaface"]
ChannelOrder = Literal["rgb", "bgr"]
RELEASED_FORMS: Final[tuple[ReleasedForm, ...]] = ("insightface", "adaface")
CHANNEL_ORDERS: Final[tuple[ChannelOrder, ...]] = ("rgb", "bgr")

# What checkpoints hold a state dict under: Lightning (AdaFace), arcface_torch.
CONTAINERS: Final = ("state_dict", "state_dict_backbone")
# What goes before every key: DistributedDataParallel, torch.compile, AdaFace's Lightning module, CVLface.
WRAPPERS: Final = ("module.", "_orig_mod.", "model.", "net.")
# Beside a network under a wrapper: the class centres and statistics of its head.
HEAD: Final = "head."
COUNTER: Final = "num_batches_tracked"
# Below this share of common tensors, a network is not a version of a known one.
LIKENESS: Final = 0.3
MOST_NAMED: Final = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """Published networks of one kind: how their keys and settings become ours."""

    form: ReleasedForm
    spec: type
    channel_order: ChannelOrder
    stem: str  # the first convolution
    projection: str  # the linear layer [D, ...]
    tail: tuple[tuple[str, str], ...]  # prefixes, theirs and ours
    config: LGAFConfig

    def to_ours(self, key: str) -> str:
        for theirs, ours in self.tail:
            if key.startswith(theirs):
                return ours + key.removeprefix(theirs)
        return "backbone." + key

    def to_theirs(self, key: str) -> str:
        for theirs, ours in self.tail:
            if key.startswith(ours):
                return theirs + key.removeprefix(ours)
        return key.removeprefix("backbone.")

    def has(self, backbone: str) -> bool:
        # Our sizes for CPUs have a stride that no weight shows and no published network has.
        spec = BACKBONES[backbone]
        return isinstance(spec, self.spec) and getattr(spec, "stem_stride", 1) == 1


_FAMILIES: Final = (
    _Family(
        form="insightface",
        spec=IResNetSpec,
        channel_order="rgb",
        stem="conv1.weight",
        projection="fc.weight",
        tail=(("bn2.", "global_branch.bn2."), ("fc.", "global_branch.fc."), ("features.", "global_branch.features.")),
        config=LGAFConfig(branches=("global",), dropout=0.0, feature_shift=True),
    ),
    _Family(
        form="insightface",
        spec=MobileFaceNetSpec,
        channel_order="rgb",
        stem="layers.0.layers.0.weight",
        projection="features.layers.2.weight",
        tail=(
            ("features.layers.0.layers.0.", "global_branch.depthwise."),
            ("features.layers.0.layers.1.", "global_branch.bn."),
            ("features.layers.2.", "global_branch.fc."),
            ("features.layers.3.", "global_branch.features."),
        ),
        config=LGAFConfig(branches=("global",), dropout=0.0, feature_shift=True, global_projection="gdc"),
    ),
    _Family(
        form="adaface",
        spec=IRSpec,
        channel_order="bgr",
        stem="input_layer.0.weight",
        projection="output_layer.3.weight",
        tail=(
            ("output_layer.0.", "global_branch.bn2."),
            ("output_layer.3.", "global_branch.fc."),
            ("output_layer.4.", "global_branch.features."),
        ),
        config=LGAFConfig(branches=("global",), dropout=0.4),
    ),
)


def backbone_of(state: Mapping[str, Any]) -> str:
    """Which backbone released weights look like: the name in `BACKBONES` whose body has most tensors in common.

    Args:
        state: A released state dict or checkpoint.

    Raises:
        ValueError: It looks like none of them; the message names a few of its keys.
    """
    return _recognise(_bare(state))[1]


def config_of(form: ReleasedForm, state: Mapping[str, Any]) -> LGAFConfig:
    """The settings of the network whose weights these are: backbone and embedding_dim from the weights.

    Args:
        form: Whose network it is.
        state: A released state dict or checkpoint.

    Raises:
        ValueError: They are not weights of that form.
    """
    return _inferred(form, _bare(state))[1]


def from_released(
    form: ReleasedForm, state: Mapping[str, Any], *, channel_order: ChannelOrder | None = None
) -> tuple[LGAFConfig, dict[str, Tensor]]:
    """Turn released weights into a config and the state dict of ``config.build()``, which takes RGB.

    Batch norms of before torch 0.4.1 have no ``num_batches_tracked``; they get 0.

    Args:
        form: Whose network it is.
        state: A state dict, or a checkpoint that holds it under one of `CONTAINERS`; keys may have `WRAPPERS` before
            them, and a head beside them.
        channel_order: What the network takes; None: what the networks of that form do (insightface RGB, AdaFace BGR).
            CVLface's networks of the AdaFace form name theirs in their settings.

    Returns:
        The config, and our state dict; but for the stem its tensors share memory with the given ones.

    Raises:
        ValueError: They are not weights of that form; the message names keys that are missing or unexpected and shapes
            that differ, and what the weights look like.
    """
    theirs = _bare(state)
    family, config = _inferred(form, theirs)
    expected = _shapes(config)
    for key in expected:
        if key.endswith(COUNTER):
            theirs.setdefault(family.to_theirs(key), torch.zeros((), dtype=torch.long))
    ours = {family.to_ours(key): tensor for key, tensor in theirs.items()}
    fault = _fault(expected, ours, family.to_theirs)
    if fault:
        raise ValueError(f"these look like weights of {config.backbone} ({form}) but do not fit it: {fault}")
    _to_or_from_rgb(ours, family, channel_order)
    return config, {key: ours[key] for key in expected}


def to_released(
    form: ReleasedForm, config: LGAFConfig, state: Mapping[str, Tensor], *, channel_order: ChannelOrder | None = None
) -> dict[str, Tensor]:
    """Turn the state dict of ``config.build()`` into that of the published network, the inverse of `from_released`.

    Args:
        form: Whose network it is to be.
        config: Of a network that the form can hold: one with the global branch alone and the form's last layers.
        state: Its state dict.
        channel_order: What the network is to take; None: what the networks of that form do.

    Returns:
        The bare state dict, without any wrapper; but for the stem its tensors share memory with the given ones.

    Raises:
        ValueError: The config has no such form, or the state is not one of it.
    """
    require_choice("form", form, RELEASED_FORMS)
    family = next((family for family in _FAMILIES if family.form == form and family.has(config.backbone)), None)
    if family is None:
        names = [name for name in BACKBONES if any(known.form == form and known.has(name) for known in _FAMILIES)]
        raise ValueError(f"model.backbone={config.backbone!r} has no {form} form; those that have: {', '.join(names)}")
    for name in ("branches", "global_projection", "feature_shift"):
        found, needed = getattr(config, name), getattr(family.config, name)
        if found != needed:
            raise ValueError(f"model.{name}={found!r} has no {form} form; it needs {needed!r}")
    fault = _fault(_shapes(config), state, str)
    if fault:
        raise ValueError(f"the state is not one of the config (backbone {config.backbone}): {fault}")
    ours = dict(state)
    _to_or_from_rgb(ours, family, channel_order)
    return {family.to_theirs(key): tensor for key, tensor in ours.items()}


def _bare(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of the network alone, under its published names."""
    state = next((checkpoint[name] for name in CONTAINERS if isinstance(checkpoint.get(name), Mapping)), checkpoint)
    tensors = {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"no weights in it; it has {_named(map(str, state))}")
    while True:
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(HEAD)} or tensors
        wrapper = next((prefix for prefix in WRAPPERS if all(key.startswith(prefix) for key in tensors)), None)
        if wrapper is None:
            return tensors
        tensors = {key.removeprefix(wrapper): tensor for key, tensor in tensors.items()}


def _inferred(form: ReleasedForm, theirs: Mapping[str, Tensor]) -> tuple[_Family, LGAFConfig]:
    require_choice("form", form, RELEASED_FORMS)
    family, backbone = _recognise(theirs)
    if family.form != form:
        raise ValueError(f"form={form!r}, but these look like weights of {backbone}: form={family.form!r}")
    projection = theirs.get(family.projection)
    if projection is None or projection.dim() != 2:
        return family, replace(family.config, backbone=backbone)
    return family, replace(family.config, backbone=backbone, embedding_dim=projection.shape[0])


def _recognise(theirs: Mapping[str, Tensor]) -> tuple[_Family, str]:
    found = _signature(theirs)
    known = [(family, name) for family in _FAMILIES for name in filter(family.has, BACKBONES)]
    bodies = [_body(BACKBONES[name]) for _, name in known]
    likeness = [len(body & found) / len(body | found) for body in bodies]
    highest = max(likeness)
    if highest < LIKENESS:
        raise ValueError(f"these do not look like weights of a known network; they have {_named(theirs)}")
    return known[likeness.index(highest)]


def _signature(state: Mapping[str, Tensor]) -> frozenset[tuple[str, tuple[int, ...]]]:
    # Counters say nothing, and old weights lack them.
    return frozenset((key, tuple(tensor.shape)) for key, tensor in state.items() if not key.endswith(COUNTER))


@functools.cache
def _body(spec: BackboneSpec) -> frozenset[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        return _signature(spec.build().state_dict())


def _shapes(config: LGAFConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in config.build().state_dict().items()}


def _fault(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], name: Callable[[str], str]) -> str:
    """What keeps a state from being one of the expected shapes, "" if nothing; ``name`` is what to call a key."""
    missing = [name(key) for key in expected if key not in state]
    unexpected = [name(key) for key in state if key not in expected]
    differing = [
        f"{name(key)} is {list(state[key].shape)}, {list(shape)} was expected"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    parts = {"missing": missing, "unexpected": unexpected, "of another shape": differing}
    return "; ".join(f"{text}: {_named(keys)}" for text, keys in parts.items() if keys)


def _to_or_from_rgb(ours: dict[str, Tensor], family: _Family, channel_order: ChannelOrder | None) -> None:
    """Reverse the input channels of the stem of a BGR network: as good as reversing those of its images."""
    order = family.channel_order if channel_order is None else channel_order
    require_choice("channel_order", order, CHANNEL_ORDERS)
    if order == "bgr":
        stem = family.to_ours(family.stem)
        ours[stem] = ours[stem].flip(1)


def _named(keys: Iterable[str]) -> str:
    names = list(keys)
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "") if names else "nothing"
