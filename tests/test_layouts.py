"""The same answer on any layout: every model that tends to differ goes through `verify`,
and one is compared with plain torch, which knows no micro-batches."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Averaged, Net, config_of, plain_training
from mpi4py import MPI

from hpctrain import assemble
from hpctrain import verify as verifying
from hpctrain.config import ClassPath, Data
from hpctrain.errors import ConfigError
from hpctrain.resume import check_resume
from hpctrain.topology import Topology

MODELS = [
    "Net", "Dropping", "Normed", "Frozen", "Idle", "Twice", "Unseeded", "Assigned", "Counting", "Awkward", "Wave",
]  # fmt: skip


@pytest.mark.mpi
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("micro_batches", ["auto", 1, 3, 7, 12])
def test_every_layout_equals_one_process(topology, files, model, micro_batches):
    config = config_of(files, f"helpers.{model}")
    config.parallel.micro_batches = micro_batches
    job = assemble.build(config, topology)
    assert verifying.compare(job, steps=5) is None
    job.close()


@pytest.mark.mpi
@pytest.mark.parametrize(
    "change",
    [
        {"weights": "weight"},
        {"normalize": True},
        {"targets": ["label"]},
        {"inputs": {"x": "x"}, "targets": {"y": "y"}},
    ],
)
def test_weights_normalisation_and_classes(topology, files, change):
    config = config_of(files)
    config.data = Data(files=files, **{"inputs": ["x"], "targets": ["y"], **change})
    if change.get("targets") == ["label"]:
        config.model = ClassPath("helpers.Net", {"out_features": 3})
        config.train.loss = ClassPath("torch.nn.CrossEntropyLoss")
    job = assemble.build(config, topology)
    assert verifying.compare(job, steps=5) is None
    job.close()


@pytest.mark.mpi
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_running_statistics_are_those_of_one_process(topology, files, momentum):
    config = config_of(files, "helpers.Normed")
    config.model.init_args["momentum"] = momentum
    config.parallel.micro_batches = 7
    found = [
        trained(config, topology),
        trained(config, Topology.build(MPI.COMM_SELF, threads=topology.threads)),
    ]
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        a, b = (state[name] for state in found)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[0]["norm.running_mean"], torch.zeros(2))


def trained(config, topology, steps=8):
    job = assemble.build(config, topology)
    position = 0
    losses = []
    for number in range(steps):
        step = job.loader.read(position)
        losses.append(job.engine.step(number, step, 0.0).loss)
        job.scheduler_step()
        position = step.next_position
    state = {n: t.clone() for n, t in job.engine.module.state_dict().items()}
    job.close()
    return {**state, "losses": torch.tensor(losses)}


@pytest.mark.mpi
def test_plain_torch_gives_the_same_losses(topology, files):
    """Independent answer: torch alone, whole batches, the mean loss of torch.

    Tolerance: float32 sums in another order, over 8 steps of Adam.
    """
    config = config_of(files)
    config.optimizer.schedule = ClassPath("torch.optim.lr_scheduler.ConstantLR", {"factor": 1.0})
    config.optimizer.decay_all = True
    from hpctrain.models.build import build, complete

    module = build(complete(config.model, {"x": (5,)}, {"y": (2,)}), config.train.seed)
    expected = plain_training(config, 8, module)
    found = trained(config, topology)["losses"].numpy()
    assert np.allclose(found, expected, rtol=2e-4)


@pytest.mark.mpi
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("micro_batches", [4, 7])
def test_invariant_averaging_gives_the_same_bits_as_one_process(
    topology, files, model, clip, micro_batches, monkeypatch
):
    """Losses, norms, weights, buffers and optimizer state, over an epoch's short last batch."""
    monkeypatch.setattr("hpctrain.gradient.SMALLEST", 1)
    monkeypatch.setattr("hpctrain.gradient.LARGE", 1)
    config = config_of(files, f"helpers.{model}", clip=clip)
    config.parallel.micro_batches = micro_batches
    config.averaging.invariant = True
    if model == "Unseeded":
        pytest.skip("its weights come from a stream that no seed reaches: each start is another model")
    found, alone = (
        trained(config, t) for t in (topology, Topology.build(MPI.COMM_SELF, threads=topology.threads))
    )
    for name, value in alone.items():
        bits = [t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in (found[name], value)]
        assert bits[0] == bits[1], name
    config.averaging.invariant = False
    other = trained(config, Topology.build(MPI.COMM_SELF, threads=topology.threads))
    torch.testing.assert_close(other["losses"], alone["losses"], rtol=1e-3, atol=1e-4)


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["moves", "replaces", "reads", "counts", "queues", "sometimes", "once"])
def test_invariant_averaging_refuses_buffers_that_hang_on_all_micro_batches(
    topology, files, monkeypatch, way
):
    """A replica has seen its own only. The latest of something is no such buffer (`Assigned`, `Counting`)."""
    monkeypatch.setattr(Averaged, "way", way)
    config = config_of(files, "helpers.Queued" if way == "queues" else "helpers.Averaged")
    config.parallel.micro_batches, config.averaging.invariant = 6, True
    if topology.world_size == 1:
        assert len(trained(config, topology)["losses"])
        return
    with pytest.raises(
        ConfigError, match=r"averaging.invariant: the forward changes the buffer last, each of"
    ):
        trained(config, topology)


class Taught(Net):
    """A copy of its first layer, which is not trained, follows that; or it bounds the weights that are."""

    bounds = False
    way = ""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.teacher = copy.deepcopy(self.first).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for mine, its in zip(self.teacher.parameters(), self.first.parameters()):
                if self.way == "assigned":
                    mine.data = mine.data * 0.9 + its.data * 0.1
                elif self.way == "uncounted":
                    mine.data.mul_(0.9).add_(its.data, alpha=0.1)
                else:
                    its.clamp_(-0.3, 0.3) if self.bounds else mine.mul_(0.9).add_(its, alpha=0.1)
        return super().forward(x) + self.teacher(x).mean(1, keepdim=True)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("bounds", "way"), [(False, ""), (True, ""), (False, "assigned"), (False, "uncounted")]
)
def test_parameters_that_forwards_change_are_refused_where_bits_are_promised(
    topology, files, monkeypatch, bounds, way
):
    """And without the promise a teacher is that of the replica with the last micro-batch, alike on all."""
    monkeypatch.setattr(Taught, "bounds", bounds)
    monkeypatch.setattr(Taught, "way", way)
    config = config_of(files, "test_layouts.Taught")
    config.parallel.micro_batches = 6
    teacher = trained(config, topology)["teacher.weight"]
    assert all(torch.equal(teacher, other) for other in MPI.COMM_WORLD.allgather(teacher))
    config.train.batch, config.parallel.micro_batches = 1, topology.world_size
    teacher = trained(config, topology, 3)["teacher.weight"]  # the first replica alone has forwards
    assert all(torch.equal(teacher, other) for other in MPI.COMM_WORLD.allgather(teacher))
    config.train.batch, config.parallel.micro_batches = 8, 6
    config.averaging.invariant = True
    if topology.world_size == 1:
        assert len(trained(config, topology)["losses"])
        return
    what = r"first\.\w+" if bounds else r"teacher\.\w+"
    with pytest.raises(ConfigError, match=rf"averaging.invariant: the forward changes the parameter {what}"):
        trained(config, topology)


@pytest.mark.mpi
@pytest.mark.parametrize("way", ["sometimes", "latest"])
@pytest.mark.parametrize("micro_batches", [4, 7])
def test_a_buffer_is_as_the_last_micro_batch_that_wrote_it_left_it(
    topology, files, monkeypatch, way, micro_batches
):
    """Of whichever replica, also where the epoch's last batch leaves some replicas without samples."""
    monkeypatch.setattr(Averaged, "way", way)
    config = config_of(files, "helpers.Averaged", batch=9)
    config.parallel.micro_batches = micro_batches
    alone = Topology.build(MPI.COMM_SELF, threads=topology.threads)
    for steps in range(1, 8):  # 29 samples: the fourth step has 2
        found = [trained(config, t, steps)["last"] for t in (topology, alone)]
        assert torch.equal(*found), steps


@pytest.mark.mpi
@pytest.mark.parametrize("micro_batches", [4, 7])
def test_buffers_that_only_some_replicas_have_are_shared(topology, files, monkeypatch, micro_batches):
    """Registered in the forward, by names that hang on the data: of all, as in one process."""
    monkeypatch.setattr(Averaged, "way", "named")
    config = config_of(files, "helpers.Averaged", batch=9)
    config.parallel.micro_batches = micro_batches
    alone = Topology.build(MPI.COMM_SELF, threads=topology.threads)
    for steps in (1, 4, 6):
        found, expected = (trained(config, t, steps) for t in (topology, alone))
        names = [name for name in expected if name.startswith("last_")]
        assert names
        assert all(torch.equal(found[name], expected[name]) for name in names)


@pytest.mark.mpi
def test_verify_finds_invariant_layouts_equal(topology, files):
    config = config_of(files, "helpers.Dropping")
    config.parallel.micro_batches, config.averaging.invariant = 6, True
    job = assemble.build(config, topology)
    assert verifying.compare(job, steps=4) is None
    job.close()


@pytest.mark.mpi
def test_invariant_asks_for_a_fixed_number_of_micro_batches(topology, files):
    config = config_of(files)
    config.averaging.invariant = True
    with pytest.raises(ConfigError, match="set parallel.micro_batches to an integer, 4 say"):
        assemble.build(config, topology)
    config.averaging.wire = "bf16"
    with pytest.raises(ConfigError, match="bits would depend on where the ranks are.*leave one of them out"):
        assemble.build(config, topology)
    config.averaging.wire = "exact"
    if topology.replicas > 1:
        config.parallel.micro_batches = 1
        with pytest.raises(
            ConfigError, match=r"replicas for parallel.micro_batches = 1 leaves .* without work"
        ):
            assemble.build(config, topology)


@pytest.mark.mpi
def test_layouts_give_the_same_losses_over_epochs(topology, files):
    config = config_of(files, "helpers.Dropping")
    config.parallel.micro_batches = 5
    together = trained(config, topology, 12)["losses"]
    alone = trained(config, Topology.build(MPI.COMM_SELF, threads=topology.threads), 12)["losses"]
    assert torch.allclose(together, alone, rtol=1e-3)
    again = trained(config, topology, 12)["losses"]
    assert torch.equal(together, again)


@pytest.mark.mpi
def test_verify_names_a_loss_beside_one_of_nothing(topology, files):
    """A loss of exactly 0 has a bound of 0, by which nothing can be divided."""
    job = assemble.build(config_of(files), topology)
    reference = verifying.Reference({}, {}, {}, 0.0, 0.0)
    found = verifying.first_difference(job, reference, 1e-3)
    assert found is not None
    assert found.name == "the loss"
    assert found.times > 1
    job.averager.named.clear()
    assert verifying.first_difference(job, reference, 0.0) is None


@pytest.mark.mpi
@pytest.mark.parametrize("where", ["sample", "scale", "order", "sum", "loss"])
def test_verify_catches_what_is_broken(topology, files, monkeypatch, where):
    """Break the asked layout on purpose, on one rank; verify must see it and say where."""
    config = config_of(files)
    config.parallel.micro_batches = max(2, topology.world_size)
    job = assemble.build(config, topology)
    last = topology.world_rank == topology.world_size - 1
    world = topology.comms.world
    if where == "sample" and last:
        make = job.loader.make
        job.loader.make = lambda samples: make(samples[::-1] - samples.min() if len(samples) > 1 else samples)
    if where == "scale" and last:
        job.averager.named["first.weight"].register_hook(lambda g: g * 1.0001)
    if where == "order":
        job.loader.seed += 1
    if where == "sum" and last:
        begin = job.averager.begin

        def leave_something(*arguments):
            begin(*arguments)
            job.averager.gradient("second.bias").add_(1e-4)

        monkeypatch.setattr(job.averager, "begin", leave_something)
    if where == "loss" and last:
        job.engine.loss = lambda outputs, batch, loss=job.engine.loss: (
            loss(outputs, batch)[0] * 1.001,
            loss(outputs, batch)[1],
        )
    found = verifying.compare(job, steps=3)
    assert found is not None
    if where == "scale":
        assert "first.weight at step 0 on rank 0" in found
    if where in ("sample", "scale"):
        assert f"rank {topology.world_size - 1} computes micro-batch" in found
    assert world.allgather(found) == [found] * world.size
    job.close()


@pytest.mark.mpi
def test_verify_from_the_command_line_says_equal(world, files, capsys):
    assert verifying.verify(config_of(files), world, 2) == 0
    out = capsys.readouterr().out
    assert ("equal: 2 steps" in out) == (world.rank == 0)
    assert ("one rank was compared with itself" in out) == (world.size == 1)


@pytest.mark.mpi
def test_evaluation_is_exact_to_the_sample(topology, files):
    """Independent answer: all samples at once, on one process."""
    config = config_of(files)
    config.data.test = 0.4
    job = assemble.build(config, topology)
    sums = job.engine.evaluate(job.split_batches("test"), job.task.measure)
    batch = job.task.batch(np.arange(17, 29))
    expected = ((job.engine.outputs(batch) - batch.targets["y"]).double() ** 2).mean()
    assert sums["loss"][1] == 12
    assert sums["loss"][0] / 12 == pytest.approx(float(expected), rel=1e-6)
    assert job.task.finish("rmse", *sums["rmse"]) == pytest.approx(float(expected) ** 0.5, rel=1e-6)
    job.close()


@pytest.mark.mpi
def test_bf16_autocast(topology, files):
    config = config_of(files, autocast="bf16")
    config.parallel.micro_batches = 4
    job = assemble.build(config, topology)
    assert verifying.compare(job, steps=3) is None
    plain = assemble.build(config_of(files), topology)
    batch = job.task.batch(np.arange(4))
    assert not torch.equal(job.engine.outputs(batch), plain.engine.outputs(batch))
    assert job.engine.outputs(batch).dtype == torch.float32
    job.close()
    plain.close()


@pytest.mark.mpi
def test_all_ranks_start_from_the_same_bits(world, topology, files):
    job = assemble.build(config_of(files, "helpers.Unseeded"), topology)
    bits = job.engine.module.first.weight.detach().numpy().tobytes()
    assert world.allgather(bits) == [bits] * world.size
    job.close()


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": ClassPath("test_layouts.ByRank")},
            "gives ranks different parameters .* must not depend on the rank",
        ),
        ({"model": ClassPath("test_layouts.Extra")}, "the model keeps _extra_state by get_extra_state"),
        (
            {"model": ClassPath("test_layouts.OwnList")},
            r"parameters\(\) or .* of its modules \(first.weight\)",
        ),
        ({"model": ClassPath("test_layouts.SparseTable")}, "graph of the model is torch.sparse_coo: .*plain"),
        (
            {"loss": ClassPath("torch.nn.MSELoss", {"reduction": "sum"})},
            "reduction = 'sum': the mean is taken over all",
        ),
        ({"schedule": ClassPath("torch.optim.lr_scheduler.StepLR")}, "StepLR needs step_size"),
    ],
)
def test_what_would_go_wrong_later_is_refused_at_the_start(topology, files, change, message):
    config = config_of(files)
    config.model = change.get("model", config.model)
    config.train.loss = change.get("loss", config.train.loss)
    config.optimizer.schedule = change.get("schedule", config.optimizer.schedule)
    if "ByRank" in config.model.class_path and topology.world_size == 1:
        config.model = ClassPath("test_layouts.Extra")
        message = "get_extra_state"
    with pytest.raises(ConfigError, match=message) as caught:
        assemble.build(config, topology)
    assert caught.value.agreed


class ByRank(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("a", "b") if MPI.COMM_WORLD.rank == 0 else ("b", "a"):
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(2)))


class Extra(Net):
    def get_extra_state(self):
        return {"a": 1}


class OwnList(Net):
    """As some write who want to train a part."""

    def parameters(self, recurse=True):
        return self.second.parameters(recurse)


@pytest.mark.mpi
@pytest.mark.parametrize("key", ["parallel.stages", "optimizer.sharded"])
def test_an_optimizer_that_needs_all_parameters_is_refused_where_a_rank_has_some(world, files, key):
    config = config_of(files)
    config.optimizer.class_path, config.optimizer.init_args = "test_groups.Normed", {"lr": 0.1}
    stages = 2 if key == "parallel.stages" and world.size % 2 == 0 else 1
    config.parallel.stages = stages
    config.optimizer.sharded = True if key == "optimizer.sharded" else "auto"
    with Topology.build(world, stages, device="cpu") as topology:
        if stages == 1 and key == "parallel.stages":
            assert len(trained(config, topology)["losses"])
            return
        with pytest.raises(ConfigError, match=rf"test_groups.Normed: .* has only some with {key}"):
            assemble.build(config, topology)


class SparseTable(Net):
    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.register_buffer("graph", torch.eye(4).to_sparse())


@pytest.mark.mpi
@pytest.mark.parametrize("invariant", [False, True])
def test_unlike_processors_are_named_where_the_bits_matter(topology, files, monkeypatch, caplog, invariant):
    monkeypatch.setattr(assemble, "processor", lambda: f"kind {topology.world_rank % 2}")
    config = config_of(files)
    config.parallel.micro_batches, config.averaging.invariant = 4, invariant
    with caplog.at_level("WARNING"):
        assemble.build(config, topology).close()
    unlike = invariant and topology.world_size > 1
    assert ("the processors differ (kind 0; kind 1)" in caplog.text) == unlike


@pytest.mark.mpi
def test_a_resume_on_other_processors_says_so(topology, files, monkeypatch, caplog):
    config = config_of(files)
    config.parallel.micro_batches, config.averaging.invariant = 4, True
    monkeypatch.setattr(assemble, "processor", lambda: "new kind")
    job = assemble.build(config, topology)
    state = {"total_steps": 1, "data": job.index.identity(), "processors": ["old kind"]}
    stored = SimpleNamespace(state=state)
    for known in (["old kind"], job.processors):
        caplog.clear()
        state["processors"] = known
        with caplog.at_level("WARNING"):
            check_resume(job, stored, None)
        told = "are not those of the session before (old kind; now; new kind)" in caplog.text
        assert told == (known == ["old kind"])
    job.close()


def test_this_processor_has_a_name():
    name, capability = assemble.processor().rsplit(", ", 1)
    assert name
    assert capability == torch.backends.cpu.get_cpu_capability()
