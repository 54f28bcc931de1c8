import random

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.config import ClassPath
from hpctrain.errors import ConfigError
from hpctrain.learning_rate import WarmupCosine, warmup_cosine
from hpctrain.models import build as models
from hpctrain.models.residual import ResidualNet
from hpctrain.models.unet import UNet
from hpctrain.piece import of_module


def complete(path, inputs=None, outputs=None, **arguments):
    return models.complete(ClassPath(path, arguments), inputs or {"x": (3, 8, 4)}, outputs or {"y": (2,)})


class Shapes(nn.Module):
    def __init__(self, input_shape, output_shapes, in_channels, out_features, extra=1):
        super().__init__()
        assert input_shape == (3, 8, 4)
        assert output_shapes == {"y": (2,)}
        self.layer = nn.Linear(in_channels, out_features)


class Permuted(nn.Module):
    """Draws from all global generators."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.drawn = np.random.permutation(100).tolist(), random.random()


def test_a_constructor_may_draw_from_any_generator():
    """Each rank builds the model; what the seed says is the same on all, and nobody else's numbers move."""
    drawn = []
    for seed in (5, 5, 2**40):
        np.random.rand()
        random.random()
        before = np.random.get_state()[1:3], random.getstate()
        drawn.append(models.build(ClassPath("test_models.Permuted"), seed).drawn)
        after = np.random.get_state()[1:3], random.getstate()
        assert repr(after) == repr(before)
    first, second, other = drawn
    assert first == second
    assert all(one != another for one, another in zip(first, other))


class Lazy(nn.Module):
    """One lazy layer has seen its sizes in the constructor, the other has not."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2))
        self.layer[0](torch.zeros(1, 3))


def test_shapes_reach_the_constructor_by_name():
    spec = complete("test_models.Shapes", extra=2)
    assert spec.init_args == {
        "input_shape": [3, 8, 4], "output_shapes": {"y": [2]}, "in_channels": 3, "out_features": 2, "extra": 2,
    }  # fmt: skip
    assert isinstance(models.build(spec, 0).layer, nn.Linear)


def test_what_the_user_sets_wins():
    assert complete("torch.nn.Linear", out_features=7).init_args == {"in_features": 4, "out_features": 7}


def test_scalars_have_one_channel():
    found = models.shape_arguments({"x": ()}, {"y": ()})
    assert (found["in_channels"], found["out_features"]) == (1, 1)


def test_weights_follow_the_seed_alone():
    spec = complete("torch.nn.Linear")
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    a = models.build(spec, 4).weight
    assert torch.equal(torch.random.get_rng_state(), before), "the user's own stream goes on"
    torch.manual_seed(1)
    b, c = models.build(spec, 4).weight, models.build(spec, 5).weight
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def listed(kind):
    return kind([nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)])


@pytest.mark.parametrize("kind", ["list", "tuple", "torch.nn.ModuleList"])
def test_a_list_of_layers_is_a_row(kind):
    made = {"list": list, "tuple": tuple}.get(kind, nn.ModuleList)
    model = models.build(ClassPath("test_models.listed", {"kind": made}), 0)
    assert type(model) is nn.Sequential
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert model(torch.ones(5, 3)).shape == (5, 2)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("collections.OrderedDict", "is no torch.nn.Module, nor a list of them .*: it gives a OrderedDict"),
        ("torch.nn.ReLU", "it has no parameter to train"),
        ("test_models.Lazy", r"layer\.1 is a LazyLinear, which learns its sizes from the first batch"),
    ],
)
def test_what_is_no_model(path, message):
    with pytest.raises(ConfigError, match=message):
        models.build(complete(path), 0)


def forward_of(code):
    scope = {}
    exec(f"def forward(self, {code}): pass", scope)
    return type("M", (nn.Module,), {"forward": scope["forward"]})()


@pytest.mark.parametrize(
    ("signature", "names", "named"),
    [
        ("b, a", ["a", "b"], True),
        ("first, second", ["a", "b"], False),
        ("a, b, scale=1.0", ["a", "b"], True),
        ("x", ["a"], False),
        ("*inputs", ["a", "b"], False),
        ("**inputs", ["a", "b"], True),
    ],
)
def test_which_arguments_forward_gets(signature, names, named):
    assert models.by_name(forward_of(signature), names) is named


@pytest.mark.parametrize(("signature", "names"), [("a, b", ["a"]), ("x", ["a", "b"]), ("a, c", ["a"])])
def test_forward_that_does_not_fit(signature, names):
    with pytest.raises(ConfigError, match="their number must agree"):
        models.by_name(forward_of(signature), names)


@pytest.mark.parametrize(
    ("signature", "names"), [("wnd, t2m", ["t2m", "wind"]), ("b, a, c=None", ["a", "d"])]
)
def test_a_name_at_another_place_is_no_position(signature, names):
    """One typo would swap the inputs, silently."""
    with pytest.raises(
        ConfigError, match=f"by position {names[0]} would be taken for another; (wnd: did|b: )"
    ):
        models.by_name(forward_of(signature), names)


def test_unet_is_a_cylinder():
    """Turning the globe turns the answer; the position maps apart, longitude has no edge."""
    torch.manual_seed(0)
    net = UNet((3, 16, 24), width=8, maps=1, fold=2)
    nn.init.zeros_(net.maps)
    nn.init.normal_(net.last.weight)
    fields, guess = torch.randn(2, 3, 16, 24), torch.randn(2, 16, 24)
    found = net(fields, guess)
    turned = net(fields.roll(8, dims=3), guess.roll(8, dims=2))
    assert found.shape == (2, 16, 24)
    torch.testing.assert_close(turned, found.roll(8, dims=2), rtol=1e-4, atol=1e-5)


def test_unet_starts_from_the_first_guess():
    guess = torch.randn(1, 16, 24)
    assert torch.equal(UNet((3, 16, 24), width=8)(torch.randn(1, 3, 16, 24), guess), guess)


def test_residual_net_classifies():
    assert ResidualNet(10, width=8)(torch.randn(3, 8, 8)).shape == (3, 10)


def test_pieces_of_a_module_take_shared_tensors_once():
    layer = nn.Linear(2, 2)
    module = nn.Sequential(layer, layer, nn.BatchNorm1d(2))
    names = [piece.name for piece in of_module(module)]
    assert names == ["model.0.weight", "model.0.bias", "model.2.weight", "model.2.bias", "model.2.running_mean",
                     "model.2.running_var", "model.2.num_batches_tracked"]  # fmt: skip


def test_schedule_is_the_drawn_one():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, total_steps=8, warmup=0.25, final=0.5)
    seen = []
    for step in range(8):
        seen.append(optimizer.param_groups[0]["lr"])
        assert seen[-1] == pytest.approx(2.0 * warmup_cosine(step, 8, 0.25, 0.5))
        optimizer.step()
        schedule.step()
    assert seen[0] == 1.0
    assert max(seen) == 2.0
    assert optimizer.param_groups[0]["lr"] == 1.0
