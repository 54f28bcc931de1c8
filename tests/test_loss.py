import pytest
import torch
from torch import nn

from hpctrain.batch import Batch
from hpctrain.errors import ConfigError, DataError
from hpctrain.loss import SummedLoss, pairs, takes_reduction


def batch_of(**targets):
    count = len(next(iter(targets.values())))
    return Batch(torch.arange(count).numpy(), {}, targets)


def test_elementwise_loss_is_torchs_mean():
    output, target = torch.randn(6, 3, 2), torch.randn(6, 3, 2)
    total, weight = SummedLoss(nn.MSELoss(reduction="none"))(output, batch_of(y=target))
    assert float(weight) == 6
    torch.testing.assert_close(total / weight, nn.functional.mse_loss(output, target))


def test_cross_entropy_a_sample_and_a_pixel():
    for shape in ((5, 4), (5, 4, 3)):
        output = torch.randn(shape)
        target = torch.randint(4, (5, *shape[2:]))
        total, weight = SummedLoss(nn.CrossEntropyLoss(reduction="none"))(output, batch_of(y=target))
        torch.testing.assert_close(total / weight, nn.functional.cross_entropy(output, target))


@pytest.mark.parametrize("pixels", [(), (3, 2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_classes_stored_with_a_dimension_of_one(pixels, weighted):
    """Labels of shape (n, 1) beside outputs of shape (n, classes); masks and weights are shaped as labels."""
    output, target = torch.randn(5, 4, *pixels), torch.randint(4, (5, 1, *pixels))
    weights = torch.rand(5, 1, *pixels)
    flat, stored = batch_of(y=target.squeeze(1)), batch_of(y=target)
    if weighted:
        flat.weights["y"], stored.weights["y"] = weights.squeeze(1), weights
    loss = SummedLoss(nn.CrossEntropyLoss(reduction="none"))
    for a, b in zip(loss(output, flat), loss(output, stored)):
        assert a.equal(b)


def test_a_losses_error_tells_shapes():
    with pytest.raises(RuntimeError) as caught:
        SummedLoss(nn.CrossEntropyLoss())(torch.randn(5, 4), batch_of(y=torch.zeros(5, 2).long()))
    told = "in the loss, CrossEntropyLoss, given float32 (5, 4), int64 (5, 2) (target y)"
    assert caught.value.__notes__ == [told]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pixels", [(), (3, 2)])
def test_what_is_ignored_weighs_nothing(pixels, weighted):
    """The mean is torch's own, over what is left; any split into micro-batches adds up to it."""
    output, target = torch.randn(6, 4, *pixels), torch.randint(4, (6, *pixels))
    target[1::2] = 255
    batch, own = batch_of(y=target), {"reduction": "none", "ignore_index": 255}
    each = torch.rand(6) if weighted else torch.ones(6)
    if weighted:
        batch.weights["y"] = each
    loss = SummedLoss(nn.CrossEntropyLoss(**own))
    total, weight = loss(output, batch)
    all_of_it = each.reshape(6, *len(pixels) * [1]).expand(6, *pixels)
    values, kept = nn.functional.cross_entropy(output, target, **own), (target != 255) * all_of_it
    torch.testing.assert_close(total / weight, (values * kept).sum() / kept.sum())
    if not weighted:
        torch.testing.assert_close(
            total / weight, nn.functional.cross_entropy(output, target, ignore_index=255)
        )
    torch.testing.assert_close(loss.without_ignored(batch).weights["y"], kept)
    assert ("y" in batch.weights) is weighted


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.NLLLoss])
@pytest.mark.parametrize("shape", [(5, 1), (5, 1, 4), (5,)])
def test_outputs_that_are_no_classes_are_refused(kind, shape):
    """One class has no entropy; (5,) would be 5 classes of one sample."""
    target = torch.rand(shape) if kind is nn.CrossEntropyLoss else torch.zeros(shape).long()
    told = rf"gives shape \({', '.join(map(str, shape))},?\) for the target y, and {kind.__name__} wants"
    with pytest.raises(ConfigError, match=told):
        SummedLoss(kind(reduction="none"))(torch.randn(shape), batch_of(y=target))


class Mean(nn.CrossEntropyLoss):
    """Gives a mean, whatever it is asked for."""

    def __init__(self):
        super().__init__(ignore_index=255)


def test_a_mean_weighs_what_it_has_not_ignored():
    """So micro-batches add up to the mean of them all; one in which all is ignored adds nothing."""
    output, target = torch.randn(6, 4, 3), torch.randint(4, (6, 3))
    target[:2], target[3, 1] = 255, 255
    loss, sums, weights = SummedLoss(Mean()), 0.0, 0.0
    for part in (slice(0, 2), slice(2, 5), slice(5, 6)):
        total, weight = loss(output[part], batch_of(y=target[part]))
        sums, weights = sums + total, weights + weight
    torch.testing.assert_close(sums / weights, Mean()(output, target))


def test_weights_of_a_column_are_no_table():
    """(n, 1) beside labels (n,), some of which are ignored."""
    output, target, each = torch.randn(4, 3), torch.tensor([0, 255, 2, 1]), torch.rand(4)
    found = []
    for weights in (each, each[:, None]):
        batch = batch_of(y=target)
        batch.weights["y"] = weights
        found.append(SummedLoss(nn.CrossEntropyLoss(reduction="none", ignore_index=255))(output, batch))
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))


def test_nothing_ignored_costs_nothing():
    batch = batch_of(y=torch.randint(4, (6,)))
    assert SummedLoss(nn.CrossEntropyLoss(reduction="none")).without_ignored(batch).weights == {}
    mean = SummedLoss(nn.CrossEntropyLoss(ignore_index=0))
    batch.targets["y"][0] = 0
    assert float(mean(torch.randn(6, 4), batch)[1]) == int((batch.targets["y"] != 0).sum())


@pytest.mark.parametrize("loss", [nn.PoissonNLLLoss, nn.KLDivLoss, nn.MSELoss])
def test_counts_are_no_classes(loss):
    """torch would broadcast (n, 1) against (n,)."""
    with pytest.raises(ConfigError, match="or store numbers as floats"):
        SummedLoss(loss(reduction="none"))(torch.randn(5, 1), batch_of(y=torch.arange(5)))


@pytest.mark.parametrize("wrong", [4, -1])
@pytest.mark.parametrize("pixels", [(), (3,)])
def test_a_class_that_the_model_does_not_give(wrong, pixels):
    """torch says which class, not of which sample, nor how many there are."""
    target = torch.randint(4, (5, *pixels))
    target[0], target[3] = -100, wrong
    batch = batch_of(y=target)
    batch.samples[3] = 77
    loss = SummedLoss(nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(DataError, match=rf"y of sample 77 is class {wrong}, and the model gives 4, 0 to 3: "):
        loss(torch.randn(5, 4, *pixels), batch)


def test_an_index_error_of_a_users_loss_stays():
    with pytest.raises(IndexError, match="list index out of range"):
        SummedLoss(lambda output, target: [][0])(torch.randn(5, 4), batch_of(y=torch.zeros(5).long()))


def test_a_users_mean_over_samples():
    output, target = torch.randn(6, 2), torch.randn(6, 2)
    total, weight = SummedLoss(lambda o, t: ((o - t) ** 4).mean())(output, batch_of(y=target))
    torch.testing.assert_close(total / weight, ((output - target) ** 4).mean())
    assert float(weight) == 6


def test_weights_by_sample_and_by_element():
    output, target = torch.randn(4, 3), torch.randn(4, 3)
    square = (output - target) ** 2
    for weights in (torch.rand(4, 1), torch.rand(4, 3), torch.rand(1, 3)):
        batch = batch_of(y=target)
        batch.weights["y"] = weights
        total, weight = SummedLoss(nn.MSELoss(reduction="none"))(output, batch)
        full = weights.expand(4, 3)
        torch.testing.assert_close(total / weight, (square * full).sum() / full.sum())


def test_a_mean_with_weights_is_refused():
    batch = batch_of(y=torch.zeros(3))
    batch.weights["y"] = torch.ones(3)
    with pytest.raises(ConfigError, match="one number for the micro-batch, but y has weights or a mask"):
        SummedLoss(nn.MSELoss())(torch.zeros(3), batch)


def test_values_without_samples_first_are_refused():
    with pytest.raises(ConfigError, match=r"the loss gives shape \(2,\) for 3 samples of y"):
        SummedLoss(lambda o, t: (o - t).mean(dim=0))(torch.zeros(3, 2), batch_of(y=torch.zeros(3, 2)))


def test_the_shape_that_torch_would_broadcast():
    """(n, 1) against (n,) would give an n x n loss, silently wrong."""
    output, target = torch.randn(5, 1), torch.randn(5)
    total, weight = SummedLoss(nn.MSELoss(reduction="none"))(output, batch_of(y=target))
    torch.testing.assert_close(total / weight, ((output[:, 0] - target) ** 2).mean())
    with pytest.raises(ConfigError, match=r"the model gives shape \(5, 2\) for target y of shape \(5,\)"):
        SummedLoss(nn.MSELoss(reduction="none"))(torch.zeros(5, 2), batch_of(y=target))


def test_several_targets_by_name_and_in_order():
    a, b = torch.randn(4, 2), torch.randn(4)
    batch = batch_of(a=a, b=b)
    expected = (a**2).mean() + (b**2).mean()
    loss = SummedLoss(nn.MSELoss(reduction="none"))
    for outputs in ({"b": b * 0, "a": a * 0}, [a * 0, b * 0]):
        total, weight = loss(outputs, batch)
        torch.testing.assert_close(total / weight, expected)
    with pytest.raises(ConfigError, match=r"the model gives \['a'\], data.targets are \['a', 'b'\]"):
        pairs({"a": a}, batch.targets)
    with pytest.raises(ConfigError, match="the model gives 1 outputs for 2 targets"):
        pairs(a, batch.targets)


@pytest.mark.parametrize("kind", [nn.MSELoss, nn.L1Loss, nn.BCEWithLogitsLoss])
def test_classes_need_a_loss_for_classes(kind):
    batch = batch_of(y=torch.tensor([0, 1, 2]))
    with pytest.raises(
        ConfigError, match="y holds integers, which .* set train.loss.class_path = torch.nn.CrossE"
    ):
        SummedLoss(kind(reduction="none"))(torch.zeros(3, 1), batch)


def test_which_losses_take_reduction():
    assert takes_reduction(nn.HuberLoss)
    assert not takes_reduction(lambda output, target: output)


def test_a_transposed_output_is_no_output():
    with pytest.raises(ConfigError, match=r"the model gives shape \(2, 4\) for target y of shape \(4, 2\)"):
        SummedLoss(nn.MSELoss(reduction="none"))(torch.zeros(2, 4), batch_of(y=torch.zeros(4, 2)))
