"""Released weights: the published computation, written down again here, and ours agree; nothing is lost either way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lgaf.models import BACKBONES, LGAF, LGAFConfig
from lgaf.models.backbones.ir import IRSpec
from lgaf.models.backbones.iresnet import IResNetSpec
from lgaf.models.backbones.mobilefacenet import MobileFaceNetSpec
from lgaf.models.released import backbone_of, config_of, from_released, to_released

SMALL = {
    "small_iresnet": IResNetSpec(blocks=(1, 2, 1, 1), channels=(16, 24, 32, 48)),
    "small_ir": IRSpec(blocks=(1, 2, 1, 1), channels=(16, 24, 32, 48), stem_channels=16),
    "small_bottleneck": IRSpec(blocks=(1, 2, 1, 1), channels=(64, 64, 96, 128), stem_channels=16, bottleneck=True),
    "small_mobile": MobileFaceNetSpec(blocks=(1, 1, 2, 1), scale=1),
    "small_mobile_large": MobileFaceNetSpec(blocks=(2, 1, 1, 1), scale=1),
}
PUBLISHED = [name for name in BACKBONES if name.startswith(("iresnet", "ir_", "mobilefacenet"))]


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch) -> None:
    for name, spec in SMALL.items():
        monkeypatch.setitem(BACKBONES, name, spec)


def _form(backbone: str) -> str:
    return "adaface" if isinstance(BACKBONES[backbone], IRSpec) else "insightface"


def _config(backbone: str, embedding_dim: int = 512) -> LGAFConfig:
    """Written down, not inferred."""
    config = LGAFConfig(backbone=backbone, branches=("global",), embedding_dim=embedding_dim)
    if _form(backbone) == "adaface":
        return dataclasses.replace(config, dropout=0.4, feature_shift=False)
    projection = "gdc" if isinstance(BACKBONES[backbone], MobileFaceNetSpec) else "fc"
    return dataclasses.replace(config, dropout=0.0, feature_shift=True, global_projection=projection)


def _model(backbone: str) -> LGAF:
    """Double precision, no value at its default."""
    torch.manual_seed(0)
    model = _config(backbone, embedding_dim=16).build().double().eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif value.dim() == 1:
                value.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
            elif name.endswith("num_batches_tracked"):
                value.fill_(7)
    return model


def _theirs(backbone: str) -> dict[str, Tensor]:
    return to_released(_form(backbone), _config(backbone, 16), _model(backbone).state_dict())


class _Published:
    """The layers of the published networks by their published names; it notes which weights were used."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state, self.used = state, set()

    def _get(self, name: str) -> Tensor | None:
        self.used.add(name)
        return self.state.get(name)

    def conv(self, name: str, x: Tensor, stride: int = 1, groups: int = 1, padding: int | None = None) -> Tensor:
        weight = self._get(f"{name}.weight")
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, stride=stride, padding=padding, groups=groups)

    def bn(self, name: str, x: Tensor) -> Tensor:
        parts = (self._get(f"{name}.{part}") for part in ("running_mean", "running_var", "weight", "bias"))
        self.used.add(f"{name}.num_batches_tracked")
        return F.batch_norm(x, *parts, eps=1e-5)

    def prelu(self, name: str, x: Tensor) -> Tensor:
        return F.prelu(x, self._get(f"{name}.weight"))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x.flatten(1), self._get(f"{name}.weight"), self._get(f"{name}.bias"))

    def iresnet(self, x: Tensor, blocks: tuple[int, ...]) -> Tensor:
        x = self.prelu("prelu", self.bn("bn1", self.conv("conv1", x)))
        for stage, num in enumerate(blocks, 1):
            for block in range(num):
                name, stride = f"layer{stage}.{block}", 2 if block == 0 else 1
                y = self.conv(f"{name}.conv1", self.bn(f"{name}.bn1", x))
                y = self.prelu(f"{name}.prelu", self.bn(f"{name}.bn2", y))
                y = self.bn(f"{name}.bn3", self.conv(f"{name}.conv2", y, stride))
                if block == 0:
                    x = self.bn(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, stride))
                x = x + y
        return self.bn("features", self.linear("fc", self.bn("bn2", x)))

    def ir(self, x: Tensor, spec: IRSpec) -> tuple[Tensor, Tensor]:
        x = self.prelu("input_layer.2", self.bn("input_layer.1", self.conv("input_layer.0", x)))
        strides = [stride for num in spec.blocks for stride in (2, *[1] * (num - 1))]
        for block, stride in enumerate(strides):
            name = f"body.{block}.res_layer"
            y = self.bn(f"{name}.0", x)
            if spec.bottleneck:
                y = self.prelu(f"{name}.3", self.bn(f"{name}.2", self.conv(f"{name}.1", y)))
                y = self.prelu(f"{name}.6", self.bn(f"{name}.5", self.conv(f"{name}.4", y)))
                y = self.bn(f"{name}.8", self.conv(f"{name}.7", y, stride))
            else:
                y = self.prelu(f"{name}.3", self.bn(f"{name}.2", self.conv(f"{name}.1", y)))
                y = self.bn(f"{name}.5", self.conv(f"{name}.4", y, stride))
            name = f"body.{block}.shortcut_layer"
            if x.shape[1] == y.shape[1]:
                x = F.max_pool2d(x, 1, stride) + y
            else:
                x = self.bn(f"{name}.1", self.conv(f"{name}.0", x, stride)) + y
        feature = self.bn("output_layer.4", self.linear("output_layer.3", self.bn("output_layer.0", x)))
        norm = feature.norm(dim=1, keepdim=True)
        return feature / norm, norm

    def unit(self, name: str, x: Tensor, stride: int = 1, groups: int = 1, padding: int | None = None) -> Tensor:
        x = self.bn(f"{name}.layers.1", self.conv(f"{name}.layers.0", x, stride, groups, padding))
        return self.prelu(f"{name}.layers.2", x) if f"{name}.layers.2.weight" in self.state else x

    def depthwise(self, name: str, x: Tensor, hidden: int, stride: int) -> Tensor:
        y = self.unit(f"{name}.layers.1", self.unit(f"{name}.layers.0", x), stride, groups=hidden)
        y = self.unit(f"{name}.layers.2", y)
        return x + y if stride == 1 else y

    def mobile(self, x: Tensor, blocks: tuple[int, ...]) -> Tensor:
        x = self.unit("layers.0", x, stride=2)
        widths = zip(blocks, (128, 128, 256, 256), (0, 128, 256, 512), strict=True)
        for stage, (num, hidden, halving) in enumerate(widths):
            if stage == 0 and num == 1:
                x = self.unit("layers.1", x, groups=64)
                continue
            if stage > 0:
                x = self.depthwise(f"layers.{2 * stage}", x, halving, stride=2)
            for block in range(num):
                x = self.depthwise(f"layers.{2 * stage + 1}.layers.{block}", x, hidden, stride=1)
        x = self.unit("features.layers.0", self.unit("conv_sep", x), groups=512, padding=0)
        return self.bn("features.layers.3", self.linear("features.layers.2", x))


@pytest.mark.parametrize("backbone", SMALL)
def test_ours_computes_what_the_published_network_does(backbone):
    model, spec = _model(backbone), BACKBONES[backbone]
    images = torch.rand(2, 3, 112, 112, dtype=torch.float64) * 2 - 1  # RGB
    with torch.no_grad():
        out = model(images)
        published = _Published(_theirs(backbone))
        if isinstance(spec, IRSpec):
            unit, norm = published.ir(images.flip(1), spec)  # its BGR
            torch.testing.assert_close(F.normalize(out.embedding_BD), unit)
            torch.testing.assert_close(out.norm_global_B, norm[:, 0].float())
            expected = unit * norm
        else:
            forward = published.iresnet if isinstance(spec, IResNetSpec) else published.mobile
            expected = forward(images, spec.blocks)
    torch.testing.assert_close(out.embedding_BD, expected)
    # All of its weights, and only weights that it has or the published batch norm lacks.
    assert published.state.keys() <= published.used
    assert all(
        name.startswith(("output_layer.4.", "features.layers.2.")) for name in published.used - set(_theirs(backbone))
    )


def test_a_network_that_takes_rgb_keeps_its_stem():
    theirs = _theirs("small_ir")
    _, swapped = from_released("adaface", theirs)
    _, kept = from_released("adaface", theirs, channel_order="rgb")
    stem = "backbone.input_layer.0.weight"
    assert torch.equal(kept[stem], theirs["input_layer.0.weight"])
    assert torch.equal(swapped[stem], theirs["input_layer.0.weight"][:, [2, 1, 0]])
    assert all(torch.equal(kept[name], swapped[name]) for name in kept if name != stem)
    back = to_released("adaface", _config("small_ir", 16), kept, channel_order="rgb")
    assert torch.equal(back["input_layer.0.weight"], theirs["input_layer.0.weight"])


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("backbone", SMALL)
def test_round_trips_are_exact(backbone, dtype):
    form, ours = _form(backbone), _model(backbone).to(dtype).state_dict()
    theirs = to_released(form, _config(backbone, 16), ours)
    config, again = from_released(form, theirs)
    assert config == _config(backbone, 16)
    assert _same(again, ours)
    assert list(again) == list(ours)
    assert _same(to_released(form, config, again), theirs)


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_published_networks_are_recognised(backbone):
    config, form = _config(backbone), _form(backbone)
    with torch.device("meta"):
        ours = config.build().state_dict()
    theirs = to_released(form, config, ours)
    assert backbone_of(theirs) == backbone
    assert config_of(form, theirs) == config
    assert from_released(form, theirs)[1].keys() == ours.keys()


# Read off the published code: backbone, a key behind C(x), its shape.
TAILS = [
    ("iresnet100", "bn2.running_mean", (512,)),
    ("iresnet100", "fc.weight", (512, 25088)),
    ("iresnet100", "fc.bias", (512,)),
    ("iresnet100", "features.weight", (512,)),
    ("ir_101", "output_layer.0.weight", (512,)),
    ("ir_101", "output_layer.3.weight", (512, 25088)),
    ("ir_101", "output_layer.3.bias", (512,)),
    ("ir_101", "output_layer.4.running_var", (512,)),
    ("ir_200", "output_layer.3.weight", (512, 100352)),
    ("mobilefacenet", "features.layers.0.layers.0.weight", (512, 1, 7, 7)),
    ("mobilefacenet", "features.layers.0.layers.1.bias", (512,)),
    ("mobilefacenet", "features.layers.2.weight", (512, 512)),
    ("mobilefacenet", "features.layers.3.weight", (512,)),
]


@pytest.mark.parametrize(("backbone", "key", "shape"), TAILS)
def test_published_names(backbone, key, shape):
    with torch.device("meta"):
        theirs = to_released(_form(backbone), _config(backbone), _config(backbone).build().state_dict())
    assert theirs[key].shape == shape
    assert "output_layer.4.weight" not in theirs
    assert "features.layers.2.bias" not in theirs


def _prefixed(prefix: str) -> Iterator[dict]:
    state = {prefix + name: value for name, value in _theirs("small_ir").items()}
    yield state
    yield {"state_dict": state, "epoch": 3, "hyper_parameters": {"arch": "ir_18"}}


@pytest.mark.parametrize("prefix", ["", "model.", "net.", "module.", "module.model.", "model.net.", "_orig_mod."])
def test_wrappers_come_off(prefix):
    expected = from_released("adaface", _theirs("small_ir"))[1]
    for checkpoint in _prefixed(prefix):
        assert _same(from_released("adaface", checkpoint)[1], expected)


@pytest.mark.parametrize("outer", ["", "module."])
def test_a_lightning_checkpoint_has_a_head_too(outer):
    theirs = _theirs("small_ir")
    state = {f"{outer}model.{name}": value for name, value in theirs.items()}
    state |= {f"{outer}head.kernel": torch.zeros(16, 9), f"{outer}head.t": torch.zeros(1)}
    checkpoint = {"state_dict": state, "hyper_parameters": {}}
    assert _same(from_released("adaface", checkpoint)[1], from_released("adaface", theirs)[1])


def test_a_checkpoint_of_arcface_torch():
    theirs = _theirs("small_iresnet")
    checkpoint = {"epoch": 2, "state_dict_backbone": theirs, "state_dict_softmax_fc": {"weight": torch.zeros(9, 16)}}
    assert _same(from_released("insightface", checkpoint)[1], from_released("insightface", theirs)[1])


def test_old_weights_have_no_counters():
    theirs = _theirs("small_iresnet")
    old = {name: value for name, value in theirs.items() if not name.endswith("num_batches_tracked")}
    config, state = from_released("insightface", old)
    assert len(old) < len(theirs)
    assert all(state[name] == 0 for name in state if name.endswith("num_batches_tracked"))
    config.build().load_state_dict(state)


def test_nothing_else_happens():
    theirs = _theirs("small_ir")
    before, random = dict(theirs), torch.get_rng_state()
    _, ours = from_released("adaface", theirs)
    assert theirs.keys() == before.keys()
    assert all(theirs[name] is before[name] for name in before)
    assert torch.equal(torch.get_rng_state(), random)
    assert ours["global_branch.fc.weight"].data_ptr() == theirs["output_layer.3.weight"].data_ptr()


def _changed(backbone: str, **changes: Tensor | None) -> dict[str, Tensor]:
    state = _theirs(backbone) | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("backbone", "changes", "text"),
    [
        ("small_iresnet", {"fc__bias": None}, r"look like weights of small_iresnet .*: missing: fc\.bias$"),
        ("small_iresnet", {"bn2__weight": None, "fc__bias": None}, r"missing: bn2\.weight, fc\.bias$"),
        ("small_iresnet", {"se__weight": torch.zeros(1)}, r"unexpected: se\.weight$"),
        (
            "small_iresnet",
            {"conv1__weight": torch.zeros(16, 1, 3, 3)},
            r"of another shape: conv1\.weight is \[16, 1, 3, 3\], \[16, 3, 3, 3\] was expected$",
        ),
        (
            "small_ir",
            {f"body__{i}__res_layer__se_block__fc1__weight": torch.zeros(1) for i in range(5)},
            r"small_ir \(adaface\).*unexpected: body\.0\.res_layer\.se_block\.fc1\.weight, .* and 2 more$",
        ),
        ("small_mobile", {"features__layers__3__bias": None}, r"missing: features\.layers\.3\.bias$"),
    ],
)
def test_weights_that_do_not_fit_are_named(backbone, changes, text):
    with pytest.raises(ValueError, match=text):
        from_released(_form(backbone), _changed(backbone, **changes))


@pytest.mark.parametrize(
    ("form", "state", "text"),
    [
        ("insightface", "small_ir", r"form='insightface', but these look like weights of small_ir: form='adaface'"),
        ("adaface", "small_mobile", r"look like weights of small_mobile: form='insightface'"),
        ("adafaec", "small_ir", r"form='adafaec' is not valid \(did you mean 'adaface'\?\)"),
        ("adaface", {}, r"no weights in it; it has nothing"),
        ("adaface", {"epoch": 3, "optimizer": {0: torch.zeros(1)}}, r"no weights in it; it has epoch, optimizer"),
        ("adaface", {0: torch.zeros(1)}, r"no weights in it"),
        ("adaface", {"blocks.0.weight": torch.zeros(2)}, r"do not look like .* known network; they have blocks\.0"),
    ],
)
def test_what_is_not_of_the_form_is_told(form, state, text):
    with pytest.raises(ValueError, match=text):
        from_released(form, _theirs(state) if isinstance(state, str) else state)


@pytest.mark.parametrize(
    ("form", "config", "text"),
    [
        ("adaface", {"backbone": "iresnet18"}, r"model\.backbone='iresnet18' has no adaface form; .*: ir_18, ir_34"),
        ("insightface", {"backbone": "micro"}, r"model\.backbone='micro' has no insightface form"),
        ("insightface", {"backbone": "vit_t"}, r"model\.backbone='vit_t' has no insightface form"),
        (
            "adaface",
            {"branches": ("global", "local")},
            r"model\.branches=.* has no adaface form; it needs \('global',\)",
        ),
        ("adaface", {"feature_shift": True}, r"model\.feature_shift=True has no adaface form; it needs False"),
        ("adaface", {"global_projection": "gdc"}, r"model\.global_projection='gdc' has no adaface form"),
        ("adaface", {"embedding_dim": 32}, r"not one of the config .*of another shape: global_branch\.fc\.weight is"),
        ("pytorch", {}, r"form='pytorch' is not valid"),
    ],
)
def test_what_has_no_published_form_is_told(form, config, text):
    config = dataclasses.replace(_config("small_ir", 16), **config)
    with pytest.raises(ValueError, match=text):
        to_released(form, config, _model("small_ir").state_dict())


def test_channel_orders_are_checked():
    with pytest.raises(ValueError, match=r"channel_order='brg' is not valid"):
        from_released("adaface", _theirs("small_ir"), channel_order="brg")
