"""The products of linear layers: the same bits from a weight as it stands and laid in blocks."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from marks import lays_weights
from torch import nn
from torch.nn import functional

from hpctrain import products
from hpctrain.gradient import StraightIntoPlace
from hpctrain.processor import about
from hpctrain.products import Laid, LaidWeights, linear, to_input

REAL_SECONDS_OF = products.seconds_of


class NoPlaces:
    """Manages nothing."""

    def place(self, parameter):
        return None


@pytest.fixture(autouse=True)
def laying_pays(monkeypatch):
    """However fast this machine is, and whoever made its processor."""
    monkeypatch.setattr(products, "seconds_of", lambda ways: [1.0, 0.5, 1.0])
    monkeypatch.setattr(products, "AVAILABLE", products.there())


@pytest.mark.parametrize(("vendor", "found"), [("AuthenticAMD", True), ("GenuineIntel", False), ("", True)])
def test_intels_processors_are_left_to_mkl(monkeypatch, vendor, found):
    monkeypatch.setattr(products, "about", {"vendor_id": vendor}.get)
    assert products.gains() == found


def test_the_vendor_is_the_one_that_linux_tells():
    """Read by another way than ours."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no Linux")
    told = re.findall(r"^vendor_id\s*: (\S+)$", cpuinfo.read_text(), re.MULTILINE)
    assert about("vendor_id") == (told[0] if told else "")
    assert about("no such field") == ""


def tensors(rows, out, into, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, into, generator=generator),
        torch.randn(rows, out, generator=generator),
        torch.randn(out, into, generator=generator),
        torch.randn(out, generator=generator),
    )


@lays_weights
@pytest.mark.parametrize("rows", [1, 3, 16, 33, 64, 200])
@pytest.mark.parametrize(("out", "into"), [(64, 64), (128, 640), (640, 128), (1024, 512)])
def test_laid_weights_give_the_same_bits(rows, out, into):
    x, g, weight, bias = tensors(rows, out, into)
    for_y, for_x = Laid(weight, True), Laid(weight, False)
    for b in (bias, None, bias):
        assert torch.equal(linear(x, weight, b, for_y), linear(x, weight, b))
        assert torch.equal(to_input(g, weight, for_x), to_input(g, weight))
    assert [laid.use(rows, weight, None) for laid in (for_y, for_x)] == 2 * [rows > 1]


@lays_weights
def test_zeros_tell_nothing_of_the_bits():
    """Of a single row the bits differ; products of zeros, or of a weight of zeros, are the same."""
    _, _, weight, bias = tensors(1, 512, 512)
    for first in (torch.zeros(1, 512), torch.zeros(3, 512)):
        laid = Laid(torch.zeros_like(weight), True)
        for x in (first, first, *(torch.randn(len(first), 512) for _ in range(5))):
            assert torch.equal(linear(x, weight, bias, laid), linear(x, weight, bias))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (4, 0)])
@pytest.mark.parametrize(("out", "into"), [(7, 5), (64, 128), (300, 130)])
def test_they_are_the_products(threads, shape, out, into):
    """Against float64, within the rounding of sums of `into` or `out` terms of about 1."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(*shape, into, generator=generator)
        g = torch.randn(*shape, out, generator=generator)
        _, _, weight, bias = tensors(1, out, into)
        found = linear(x, weight, bias), to_input(g, weight)
    finally:
        torch.set_num_threads(before)
    wanted = x.double() @ weight.double().t() + bias.double(), g.double() @ weight.double()
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert one.is_contiguous()
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,)])
def test_a_layer_behind_may_work_in_place(shape, dtype):
    """A view of the product would refuse it."""
    layer, x = nn.Linear(16, 32, dtype=dtype), torch.randn(*shape, 16, requires_grad=True, dtype=dtype)
    weight = {id(layer.weight)}
    straight = StraightIntoPlace(layer, NoPlaces())
    straight.weights = weight
    with straight.forward():
        found = functional.relu_(layer(x))
    found.sum().backward()
    torch.testing.assert_close(x.grad, ((layer(x) > 0).to(dtype) @ layer.weight).detach())


@lays_weights
def test_biases_of_other_shapes_and_strides():
    """oneDNN would take the memory as it lies."""
    x, _, weight, bias = tensors(6, 192, 128)
    for other in (bias.repeat_interleave(2)[::2], bias[:1].expand(192), bias[:1], torch.tensor(2.0)):
        torch.testing.assert_close(linear(x, weight, other), x @ weight.t() + other)


def test_shapes_that_do_not_fit_are_told_by_torch():
    x, _, weight, bias = tensors(6, 192, 128)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x[:, :5], weight, bias)


@lays_weights
def test_where_memory_lies_does_not_matter():
    """Strided, expanded, and beside a line's beginning: the same bits."""
    x, g, weight, bias = tensors(6, 192, 128)
    wanted = linear(x, weight, bias), to_input(g, weight)
    wide = torch.empty(6, 2 * 128).copy_(x.repeat(1, 2))
    shifted = torch.empty(6 * 128 + 3)[3:].view(6, 128).copy_(x)
    for other in (wide[:, :128], shifted, x.t().contiguous().t()):
        assert torch.equal(linear(other, weight, bias), wanted[0])
    assert torch.equal(to_input(g.t().contiguous().t(), weight), wanted[1])
    one = g[:1].expand(6, -1)
    assert torch.equal(to_input(one, weight), to_input(one.clone(), weight))


@pytest.mark.parametrize("shape", [(8,), (48,), (4, 4), (2, 3, 4)])
@pytest.mark.parametrize("biased", [True, False])
def test_few_wide_rows_are_multiplied_the_other_way_round_by_mkl(monkeypatch, shape, biased):
    monkeypatch.setattr(products, "TURNS", True)
    _, _, weight, bias = tensors(1, 192, 512)
    x = torch.randn(*shape, 512, generator=torch.Generator().manual_seed(1))
    found = products.turned(x, weight, bias if biased else None)
    expected = functional.linear(x, weight, bias if biased else None)
    assert found.shape == expected.shape
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)  # sums of 512 numbers in another order


@pytest.mark.parametrize("turns", [True, False])
def test_only_few_wide_rows_are(monkeypatch, turns):
    monkeypatch.setattr(products, "TURNS", turns)
    _, _, weight, bias = tensors(1, 192, 512)
    taken = {rows for rows in range(60) if products.turned(torch.ones(rows, 512), weight, bias) is not None}
    assert taken == (set(range(8, 49)) if turns else set())
    few = torch.ones(16, 512)
    assert products.turned(few[:, :256], weight[:, :256].contiguous(), bias) is None, "narrow"
    assert products.turned(few.double(), weight.double(), bias.double()) is None
    assert products.turned(few, weight.t().contiguous().t(), bias) is None, "it lies the other way round"
    assert products.turned(few, weight, bias[:, None]) is None
    assert products.turned(few[0], weight, bias) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_are_torchs(dtype):
    x, g, weight, bias = (t.to(dtype) for t in tensors(6, 192, 128))
    assert torch.equal(linear(x, weight, bias), nn.functional.linear(x, weight, bias))
    assert torch.equal(to_input(g, weight), g @ weight)


@pytest.mark.parametrize(
    "way", ["torch.backends.fp32_precision = 'tf32'", "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'"]
)
def test_a_user_who_asks_in_torchs_newer_way_gets_torchs(way):
    """In a process of its own: torch does not forget it."""
    program = (
        "import torch; from hpctrain import products; products.AVAILABLE = True; assert products.allowed(); "
        f"{way}; print(products.allowed())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    )
    assert found.stdout.strip() == "False"


def test_a_user_who_asks_for_lower_precision_gets_torchs():
    before = torch.get_float32_matmul_precision()
    assert products.allowed() == products.there()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not products.allowed()
    finally:
        torch.set_float32_matmul_precision(before)


def change_counted(weight):
    with torch.no_grad():
        weight.mul_(2)


def change_uncounted(weight):
    weight.data.mul_(2)


def change_memory(weight):
    weight.data = 2 * weight.data


def change_by_another(weight):
    """As MPI and NumPy write, a single number: torch counts nothing, and no sample need show it."""
    weight.detach().numpy()[3, 5] += 1


def change_new_step(every, weight):
    change_by_another(weight)
    every.begin(products.REPAID)


@lays_weights
@torch.no_grad()
@pytest.mark.parametrize("change", [change_counted, change_uncounted, change_memory, change_new_step])
def test_a_changed_weight_is_laid_anew(change):
    x, g, weight, _ = tensors(9, 512, 512)
    weight = nn.Parameter(weight)
    every = LaidWeights()
    every.allow(1e9)
    every.begin(products.REPAID)
    for_y, for_x = every.get(weight, True), every.get(weight, False)
    for _ in range(2):
        old = linear(x, weight, None, for_y), to_input(g, weight, for_x)
    if change is change_new_step:
        change(every, weight)
    else:
        change(weight)
    assert every.get(weight, True) is for_y
    if change is change_new_step:  # whose first product has the weight as it stands
        linear(x, weight, None, for_y), to_input(g, weight, for_x)
    found = linear(x, weight, None, for_y), to_input(g, weight, for_x)
    for one, other, before in zip(found, (linear(x, weight, None), to_input(g, weight)), old, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, before)


@lays_weights
def test_weights_are_laid_where_it_pays_and_memory_allows():
    big, odd, more = (nn.Parameter(torch.randn(*s)) for s in ((512, 512), (1000, 1000), (512, 512)))
    every = LaidWeights()
    every.begin(products.REPAID)
    assert every.get(big, True) is None, "nothing is allowed before the first step"
    every.allow(1.5 * 4 * big.numel())
    every.begin(products.REPAID - 1)
    assert every.get(big, True) is None, "too few uses"
    every.begin(products.REPAID)
    assert every.get(odd, True) is None
    assert every.get(big, True) is not None
    assert every.get(more, True) is None, "room for one"
    assert every.nbytes == 4 * big.numel()


@lays_weights
@torch.no_grad()
@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [([1.0, 0.5, 2.9], [True, True]), ([1.0, 0.5, 3.0], [False, True]), ([1.0, 1.0, 0.0], [False, False])],
)
def test_what_costs_more_to_lay_than_it_gains_is_not_laid(monkeypatch, seconds, wanted):
    """Six products of a step save 0.5 s each; where a rank waits, laying costs nothing."""
    assert products.REPAID == 6
    monkeypatch.setattr(products, "seconds_of", lambda ways: seconds)
    x, _, weight, bias = tensors(9, 512, 512)
    for waits, used in zip((False, True), wanted):
        every, parameter = LaidWeights(), nn.Parameter(weight)
        every.allow(1e9)
        every.begin(products.REPAID, waits)
        for _ in range(2):
            linear(x, parameter, bias, every.get(parameter, True))
        every.begin(products.REPAID, waits)
        laid = every.get(parameter, True)
        assert (laid is not None) == used
        assert every.nbytes == (weight.nbytes if used else 0)
        for _ in range(3):
            assert torch.equal(linear(x, parameter, bias, laid), linear(x, parameter, bias))
        assert laid is None or laid._state


def test_ways_are_timed_in_turn(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(products, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    called = []
    found = REAL_SECONDS_OF([lambda: called.append("a"), lambda: called.extend([next(clock), "b"])])
    assert found == [1.0, 2.0]
    assert [who for who in called if isinstance(who, str)] == ["a", "b"] * products.TIMED


@lays_weights
def test_memory_that_the_system_refuses_ends_it(monkeypatch):
    def refuse(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(products, "Laid", refuse)
    big = nn.Parameter(torch.randn(512, 512))
    every = LaidWeights()
    every.allow(1e9)
    every.begin(products.REPAID)
    assert every.get(big, True) is None
    assert every.nbytes == 0


@lays_weights
def test_without_memory_to_compare_in_a_weight_is_taken_as_it_stands(monkeypatch):
    """What makes a step faster does not end it."""

    def refuse(rows, width):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    weight, x = torch.randn(512, 512), torch.randn(8, 512)
    laid = Laid(weight, True)
    monkeypatch.setattr(products, "made_up", refuse)
    for _ in range(3):
        assert torch.equal(products.linear(x, weight, None, laid), products.linear(x, weight, None))
    assert not laid.useful


@lays_weights
def test_another_layout_of_oneDNN_is_not_guessed_at(monkeypatch):
    weight = torch.randn(128, 128)
    real = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_linear_weight", lambda w, n: real(w.flip(0).contiguous(), n)
    )
    for for_y in (True, False):
        with pytest.raises(NotImplementedError):
            Laid(weight, for_y)


@lays_weights
def test_where_the_bits_differ_the_weight_as_it_stands_is_taken(monkeypatch):
    x, g, weight, bias = tensors(6, 128, 128)
    for_y, for_x, real = Laid(weight, True), Laid(weight, False), torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda x, w, *rest: real(x, w, *rest) + 1e-6 * w.is_mkldnn
    )
    for _ in range(3):
        assert torch.equal(linear(x, weight, bias, for_y), linear(x, weight, bias))
        assert torch.equal(to_input(g, weight, for_x), to_input(g, weight))


@lays_weights
@torch.no_grad()
def test_a_rank_that_waits_lays_ahead_what_products_take():
    """Its first product of the step takes the laid weight; a single row takes none, and none is laid for it."""
    x, _, weight, bias = tensors(9, 512, 512)
    for rows, wanted in ((9, True), (1, False)):
        every, parameter = LaidWeights(), nn.Parameter(weight)
        every.allow(1e9)
        every.begin(products.REPAID)
        laid = every.get(parameter, True)
        for _ in range(2):
            linear(x[:rows], parameter, bias, laid)
        every.begin(products.REPAID, waits=True)
        assert laid.use(rows, parameter, bias) == wanted
        assert bool(laid._state) == wanted
        every.begin(products.REPAID)
        assert not laid.use(rows, parameter, bias)
