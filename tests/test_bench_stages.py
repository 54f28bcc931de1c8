"""What `bench pipeline` measures is what it says: the same gradients by each, autograd's by autograd alone."""

from functools import partial

import pytest
import torch
from torch import nn

from hpctrain import cli
from hpctrain.bench import pipeline as bench
from hpctrain.bench.autograd import Autograd
from hpctrain.bench.measure import WARM_UP, alternate
from hpctrain.bench.stage_cases import CASES, Case
from hpctrain.gradient import StraightIntoPlace
from hpctrain.topology import Topology

SCHEDULES = {"zb_h1": "zb-h1", "zb_h2": "zb-h2", "gpipe": "gpipe", "interleaved": "interleaved"}


def small():
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])


def test_help_names_every_case(capsys):
    with pytest.raises(SystemExit):
        cli.bench(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(name in told for name in CASES)


def test_every_contender_is_explained():
    assert {f"torch_{peer}" for peer in bench.TORCH} | set(bench.AWAKE) <= bench.CONTENDERS.keys()


@pytest.mark.mpi
def test_all_of_ours_have_the_same_gradients(world, monkeypatch):
    if world.size == 1:
        pytest.skip("one rank has no stages")
    if world.size == 3:
        pytest.skip("eight layers have no even stages on three ranks")
    entered = []
    forward = StraightIntoPlace.forward
    monkeypatch.setattr(
        StraightIntoPlace,
        "forward",
        lambda self, micro_batch=-1: entered.append(1) or forward(self, micro_batch),
    )
    with Topology.build(world, world.size, device="cpu") as topology:
        case = Case(small, (16, 64), 8)
        torch.manual_seed(3)
        x, y = torch.randn(case.shape), torch.randn(case.shape)
        found, engines, together = {}, {}, {}
        for name, (step, engine) in bench.our_steps(topology, case, x, y).items():
            assert name in bench.CONTENDERS
            entered.clear()
            step()
            assert engine.schedule == next((s for at, s in SCHEDULES.items() if at in name), "1f1b"), name
            assert isinstance(engine.straight, Autograd) == (name == "ours_autograd") == (not entered)
            places = [p.grad.clone() for p in engine.module.parameters()]
            assert all(place.abs().max() > 0 for place in places)
            found[name] = places
            engines[id(engine)] = engine
            together.setdefault(id(engine), []).append(name)
        assert sorted(map(len, together.values()))[-2:] == [3, 3], together
        for engine in engines.values():
            engine.pipeline.close()
            engine.averager.close()
    for name, places in found.items():
        if "interleaved" not in name:  # has other layers on a rank
            # sums of 16 rows in other orders: fast merges products, autograd adds them
            assert all(
                torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(places, found["ours_1f1b"])
            ), name


@pytest.mark.mpi
def test_contenders_change_their_order_from_round_to_round_alike_on_all_ranks(world):
    """Who always came behind the same other one would always find the caches as that one leaves them."""
    turns = list[str]()
    contenders = {name: partial(turns.append, name) for name in "abcd"}
    times = alternate(world, contenders, 8)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys("abcd", 8)
    rounds = ["".join(turns[at : at + 4]) for at in range(4 * WARM_UP, len(turns), 4)]
    assert all(sorted(one) == [*"abcd"] for one in rounds)
    assert len(set(rounds)) > 4
    assert all(other == rounds for other in world.allgather(rounds))
