"""Every margin against its paper's formula: loss, gradients, the edges of the cosine, and plain softmax without one."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from lgaf.config import from_dict
from lgaf.heads.margins import MARGINS, create_margin
from lgaf.heads.margins.base import cosine_of_sum, guarded_cosine_of_sum
from lgaf.heads.margins.uniface import UniFace
from lgaf.heads.objective import Sigmoid, Softmax, exclude
from lgaf.heads.sharded import ShardedMarginHead
from lgaf.reference import dense_margin_loss
from tests.lgaf.margin_cases import MARGIN_CASES

COSINES = torch.tensor([-1.0, -0.99, -0.9, -0.3, 0.0, 0.3, 0.9, 0.99, 1.0], dtype=torch.float64)
NUM_CLASSES, DIM = 7, 5


def _state(margin, num_classes=NUM_CLASSES):
    values = {**margin.initial_state(num_classes), **margin.initial_parameters(num_classes)}
    return {name: value.double() for name, value in values.items()}


def problem(seed: int = 0, rows: int = 9, num_classes: int = NUM_CLASSES, dim: int = DIM):
    """Embeddings of norms 5 to 130, some close to their own class centre and some close to another's."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_classes, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, num_classes, (rows,), generator=generator)
    x = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    x[::3] = weight[labels[::3]] + 0.3 * x[::3]
    x[1::3] = weight[(labels[1::3] + 1) % num_classes] + 0.3 * x[1::3]
    x[-1] = -weight[labels[-1]] + 0.05 * x[-1]  # beyond pi with a margin
    norms = torch.linspace(5, 130, rows, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True) * norms[:, None], labels, weight


@pytest.mark.parametrize("margin", MARGIN_CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_and_gradients_equal_the_formula(margin, seed):
    x, labels, weight = problem(seed)
    head = ShardedMarginHead(NUM_CLASSES, DIM, margin).double()
    with torch.no_grad():
        head.weight.copy_(weight)
    own_x = x.clone().requires_grad_()
    loss = head(own_x, labels)
    loss.backward()

    expected_x, expected_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    bias = torch.zeros((), dtype=torch.float64)
    if isinstance(margin, UniFace):
        bias = head.margin_state.bias.detach().clone().requires_grad_()
    expected = dense_margin_loss(expected_x, labels, expected_weight, margin, bias)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own_x.grad, expected_x.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(head.weight.grad, expected_weight.grad, rtol=1e-9, atol=1e-12)
    if isinstance(margin, UniFace):
        torch.testing.assert_close(head.margin_state.bias.grad, bias.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("margin", MARGIN_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_the_ends_of_the_cosine(margin, dtype):
    # Rows exactly on their centre, exactly opposite it, and on another class's.
    weight = torch.eye(3, DIM, dtype=dtype)
    x = torch.stack([20 * weight[0], -20 * weight[0], 20 * weight[1], 20 * weight[0]]).requires_grad_()
    head = ShardedMarginHead(3, DIM, margin).to(dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
    loss = head(x, torch.tensor([0, 0, 0, 2]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(head.weight.grad).all()


@pytest.mark.parametrize("name", MARGINS)
def test_target_logit_rises_with_the_cosine(name):
    margin = create_margin(name)
    cosine = torch.linspace(-1, 1, 401, dtype=torch.float64).requires_grad_()
    logits = margin.target_logit(cosine, torch.full((401,), 30.0, dtype=torch.float64), _state(margin))
    logits.sum().backward()
    assert torch.isfinite(cosine.grad).all()
    steps = logits.diff()
    if name in ("mv_softmax", "magface"):
        # They apply the margin only above a threshold, where the logit falls by the margin: one step down.
        assert (steps < -1e-9).sum() == 1
    else:
        assert (steps >= -1e-9).all()
    assert (logits <= margin.scale * cosine + 1e-5).all(), "a margin makes the target harder"


NO_MARGIN = {
    "arcface": {"margin": 0.0},
    "cosface": {"margin": 0.0},
    "combined": {"m1": 1.0, "m2": 0.0, "m3": 0.0},
    "adaface": {"margin": 0.0},
    "magface": {"l_margin": 0.0, "u_margin": 0.0, "lambda_g": 0.0},
    "mv_softmax": {"margin": 0.0, "t": 1.0},
    "curricularface": {"margin": 0.0},
}


@pytest.mark.parametrize("name", NO_MARGIN)
def test_no_margin_is_plain_scaled_softmax(name):
    x, labels, weight = problem(4)
    if name == "curricularface":
        # Its negatives are modulated wherever they beat the target, margin or not: take rows that win.
        x = weight[labels] * 9 + 0.01 * x
    head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin(name, scale=30.0, **NO_MARGIN[name])).double()
    with torch.no_grad():
        head.weight.copy_(weight)
    logits = 30.0 * torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(weight).T
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(head(x, labels), expected, rtol=1e-3 if name == "adaface" else 1e-6, atol=1e-6)


def test_combined_without_an_angle_is_cosface_at_every_cosine():
    cosines = [COSINES.clone().requires_grad_() for _ in range(2)]
    logits = [
        margin.target_logit(cosine)
        for margin, cosine in zip(
            (create_margin("combined", m2=0.0, m3=0.4), create_margin("cosface", margin=0.4)), cosines, strict=True
        )
    ]
    assert torch.equal(logits[0], logits[1])
    for logit in logits:
        logit.sum().backward()
    assert torch.equal(cosines[0].grad, cosines[1].grad)


def test_uniface_without_a_margin_is_a_sigmoid_of_every_class():
    x, labels, weight = problem(4)
    head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("uniface", margin=0.0, scale=8.0)).double()
    with torch.no_grad():
        head.weight.copy_(weight)
    cosine = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(weight).T
    is_own = torch.nn.functional.one_hot(labels, NUM_CLASSES).double()
    logits = (8.0 * cosine - head.margin_state.bias.detach()).clamp(-8, 8)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, is_own, reduction="none").sum(1).mean()
    torch.testing.assert_close(head(x, labels), expected)


class TestPublishedValues:
    def test_the_three_arcfaces_beyond_pi(self):
        # insightface -59.9, the AdaFace repository -64.0, TFace and CurricularFace -78.7 at cos = -0.99, m = 0.5.
        cosine = torch.tensor([-0.99], dtype=torch.float64)
        assert create_margin("arcface", gradient="straight_through").target_logit(cosine).item() == pytest.approx(
            -59.9, abs=0.05
        )
        assert create_margin("arcface").target_logit(cosine).item() == pytest.approx(-64.0, abs=0.01)
        assert create_margin("curricularface").target_logit(cosine).item() == pytest.approx(-78.7, abs=0.05)

    @pytest.mark.parametrize(("gradient", "slope"), [("exact", 65.8), ("straight_through", 64.0)])
    def test_the_two_gradients(self, gradient, slope):
        cosine = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
        create_margin("arcface", gradient=gradient).target_logit(cosine).sum().backward()
        assert cosine.grad.item() == pytest.approx(slope, abs=0.05)

    def test_defaults_are_the_papers(self):
        def defaults(name):
            return dataclasses.asdict(create_margin(name))

        assert defaults("arcface") == {"margin": 0.5, "scale": 64.0, "gradient": "exact"}
        assert defaults("cosface") == {"margin": 0.4, "scale": 64.0}
        assert defaults("adaface") == {"margin": 0.4, "scale": 64.0, "h": 0.333, "t_alpha": 0.01}
        assert defaults("mv_softmax") == {"margin": 0.35, "scale": 32.0, "t": 1.12, "variant": "am"}
        assert defaults("curricularface") == {"margin": 0.5, "scale": 64.0, "alpha": 0.01}
        assert defaults("uniface") == {"margin": 0.4, "scale": 64.0, "l": 1.0, "r": 1.0}
        magface = defaults("magface")
        assert (magface["l_a"], magface["u_a"], magface["lambda_g"]) == (10.0, 110.0, 35.0)
        assert (magface["l_margin"], magface["u_margin"], magface["scale"]) == (0.45, 0.8, 64.0)

    def test_magface_penalty_is_least_at_the_greatest_norm(self):
        norm = torch.linspace(10, 110, 11, dtype=torch.float64)
        penalty = create_margin("magface").penalty(norm)
        assert (penalty.diff() < 0).all()
        assert penalty[-1].item() == pytest.approx(35 * (1 / 110 + 1 / 110))
        assert create_margin("arcface").penalty(norm) is None

    def test_uniface_starts_at_the_published_threshold(self):
        assert create_margin("uniface").initial_parameters(1000)["bias"].item() == pytest.approx(math.log(10_000))


class TestState:
    def test_adaface_statistics_are_those_of_the_batch(self):
        x, labels, _ = problem(3)
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("adaface", t_alpha=0.25))
        head(x.float(), labels)
        norms = x.norm(dim=1).clamp(1e-3, 100)
        assert head.margin_state.norm_mean.item() == pytest.approx(0.25 * norms.mean().item() + 0.75 * 20, rel=1e-5)
        assert head.margin_state.norm_std.item() == pytest.approx(0.25 * norms.std().item() + 0.75 * 100, rel=1e-5)

    def test_curricularface_moves_before_it_is_used(self):
        x, labels, weight = problem(3)
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("curricularface", alpha=1.0)).double()
        with torch.no_grad():
            head.weight.copy_(weight)
        head(x, labels)
        cosine = (torch.nn.functional.normalize(x) * torch.nn.functional.normalize(weight)[labels]).sum(1)
        assert head.margin_state.t.item() == pytest.approx(cosine.mean().item())

    @pytest.mark.parametrize("name", ["adaface", "curricularface"])
    def test_frozen_in_eval_mode(self, name):
        x, labels, _ = problem(3)
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin(name)).eval()
        before = {key: value.clone() for key, value in head.state_dict().items()}
        head(x.float(), labels)
        assert all(torch.equal(before[key], value) for key, value in head.state_dict().items())

    @pytest.mark.parametrize("name", ["adaface", "curricularface", "uniface"])
    def test_two_forwards_before_a_backward(self, name):
        # As under gradient accumulation: the second forward moves the statistics that the first one's graph used.
        x, labels, _ = problem(3)
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin(name)).double()
        (head(x, labels) + head(x.flip(0), labels.flip(0))).backward()
        assert torch.isfinite(head.weight.grad).all()

    @pytest.mark.parametrize(("name", "keys"), [("adaface", {"norm_mean", "norm_std"}), ("uniface", {"bias"})])
    def test_saved_with_the_head(self, name, keys):
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin(name))
        assert set(head.state_dict()) == {"weight", *(f"margin_state.{key}" for key in keys)}

    def test_adaface_takes_norms_between_its_bounds(self):
        margin = create_margin("adaface", h=5.0)
        state = {"norm_mean": torch.tensor(20.0), "norm_std": torch.tensor(5.0)}
        cosine = torch.full((4,), 0.5)
        logits = margin.target_logit(cosine, torch.tensor([0.0, 1e-3, 100.0, 1e6]), state)
        assert logits[0] == logits[1]
        assert logits[2] == logits[3]
        # z is clipped to +-1: cos(theta + m) for the worst norms, cos(theta - m) - 2 m for the best.
        theta = math.acos(0.5)
        expected = [64 * math.cos(theta + 0.4), 64 * (math.cos(theta - 0.4) - 0.8)]
        assert logits[[0, 2]].tolist() == pytest.approx(expected, abs=1e-4)
        moved = margin.next_state(margin.initial_state(3), None, torch.tensor([0.0, 1e6]))
        assert moved["norm_mean"].item() == pytest.approx(0.01 * (1e-3 + 100) / 2 + 0.99 * 20, rel=1e-6)

    def test_norms_may_come_from_outside(self):
        # AdaFace reads them; the embedding's own length then does not matter.
        x, labels, _ = problem(3)
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("adaface", t_alpha=1.0)).double()
        norms = torch.linspace(1, 50, len(x), dtype=torch.float64)
        torch.testing.assert_close(head(x, labels, norms), head(x * 3, labels, norms))
        assert not torch.isclose(head(x, labels, norms), head(x, labels, norms.flip(0)))

    def test_magface_gradient_reaches_the_norm(self):
        x, labels, weight = problem(3)
        head = ShardedMarginHead(NUM_CLASSES, DIM, create_margin("magface")).double()
        x = (weight[labels] * 20).requires_grad_()
        head(x, labels).backward()
        along = (x.grad * x.detach()).sum(dim=1)
        assert (along.abs() > 1e-6).all()


class TestObjective:
    @pytest.mark.parametrize("objective", [Softmax(), Sigmoid(negative_weight=0.3)])
    def test_parts_join_to_the_whole(self, objective):
        logits = torch.randn(4, 11, dtype=torch.float64) * 20
        parts = torch.stack([objective.accumulate(part) for part in logits.split([1, 7, 3], dim=1)])
        torch.testing.assert_close(objective.join(parts), objective.accumulate(logits))

    def test_softmax_is_cross_entropy(self):
        logits = torch.randn(5, 6, dtype=torch.float64) * 30
        labels = torch.randint(0, 6, (5,))
        rows = torch.arange(5)
        negatives = exclude(logits, labels)
        loss = Softmax().loss(Softmax().accumulate(negatives), logits[rows, labels])
        expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("objective", [Softmax(), Sigmoid()])
    def test_an_excluded_class_has_no_gradient(self, objective):
        logits = torch.randn(2, 1, requires_grad=True)
        negatives = exclude(logits, torch.zeros(2, dtype=torch.long))
        loss = objective.loss(objective.accumulate(negatives), torch.tensor([1.0, -1.0], requires_grad=True)).sum()
        loss.backward()
        assert torch.isfinite(loss)
        assert (logits.grad == 0).all()


def test_cosine_of_sum_is_exact_and_its_gradient_finite():
    cosine = COSINES.clone().requires_grad_()
    out = cosine_of_sum(cosine, 0.5)
    torch.testing.assert_close(out, torch.cos(torch.acos(COSINES) + 0.5), rtol=0, atol=1e-6)
    out.sum().backward()
    assert torch.isfinite(cosine.grad).all()


def test_the_guard_goes_on_falling_beyond_pi():
    cosine = torch.linspace(-1, 1, 201, dtype=torch.float64)
    assert (guarded_cosine_of_sum(cosine, 0.5).diff() > 0).all()


def test_the_filter_silences_likely_twins():
    margin = create_margin("combined", m2=0.5, interclass_filtering_threshold=0.4)
    logits = margin.negative_logits(torch.tensor([[0.39, 0.41, -0.9]]))
    torch.testing.assert_close(logits, 64 * torch.tensor([[0.39, 0.0, -0.9]]))


@pytest.mark.parametrize("name", MARGINS)
def test_json_round_trip(name):
    margin = create_margin(name)
    assert from_dict(type(margin), json.loads(json.dumps(dataclasses.asdict(margin)))) == margin


def test_unknown_names_fields_and_values_are_named():
    with pytest.raises(ValueError, match=r"margin='arcfase'.*did you mean 'arcface'"):
        create_margin("arcfase")
    with pytest.raises(ValueError, match=r"head: the key='margin' is not valid.*l_margin"):
        create_margin("magface", margin=0.5)
    with pytest.raises(ValueError, match=r"head\.h='much' must be of type float"):
        create_margin("adaface", h="much")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("cosface", "scale", 0.0),
        ("arcface", "margin", 4.0),
        ("arcface", "gradient", "exakt"),
        ("combined", "m1", 0.5),
        ("combined", "interclass_filtering_threshold", 1.5),
        ("adaface", "h", 0.0),
        ("adaface", "t_alpha", 1.5),
        ("magface", "u_a", 5.0),
        ("magface", "u_margin", 0.1),
        ("mv_softmax", "t", 0.5),
        ("mv_softmax", "variant", "cos"),
        ("curricularface", "alpha", -0.1),
        ("uniface", "l", 0.0),
        ("uniface", "r", 0.0),
    ],
)
def test_bad_fields_are_named(name, field, value):
    with pytest.raises(ValueError, match=rf"head\.{field}={value!r}"):
        create_margin(name, **{field: value})
