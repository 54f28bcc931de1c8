"""A few steps in the asked layout against the 1 x 1 layout, each from equal weights.

      every rank   step in the asked layout                  ──► mean gradient, loss
      rank 0       the same step alone, V micro-batches      ──► mean gradient, loss, Σ_v |g_v|
      every rank   |asked - alone| ≤ 2 (V + 4) ε Σ_v |g_v| / W       element by element

Gradients are compared, not weights after many steps: a weight whose true gradient is zero
follows the noise of Adam. The bound is that of summing V terms in another order (Higham 2002,
section 4.2: (V - 1)·ε·Σ|g_v|), with room for the division. A product that is added to a weight's
gradient in place is rounded as its terms are, which may cancel within g_v: there |g_v| is |g|ᵀ·|x|. There
is no clip. Of a weight that several stages use one process shows only the sums over its uses, where large
terms may have cancelled: its bound is that of its largest number.

SyncBatchNorm couples all samples of the batch, so one process takes it in one micro-batch, and there
is no Σ_v: then the bound is 1e-5 of the largest gradient of any parameter, some hundred roundings
(of the largest buffer for buffers).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from mpi4py import MPI
from torch import nn

from hpctrain import assemble, log
from hpctrain.assemble import Job
from hpctrain.averaging.sync_norm import SyncBatchNorm
from hpctrain.config import Config
from hpctrain.data.loader import Step
from hpctrain.log import LOGGER, counted
from hpctrain.piece import tensors_of
from hpctrain.topology import Topology
from hpctrain.wire import from_root, raise_together

EPSILON = torch.finfo(torch.float32).eps
SYNCED = 1e-5
"""Bound of gradients under SyncBatchNorm, as a share of the largest."""
SYNCED_BF16 = 2.0**-5
"""The same under autocast: 8 bits of mantissa, several layers."""


@dataclass(frozen=True)
class Reference:
    """What rank 0 found alone: mean gradient and bound of each parameter; loss and its bound."""

    gradients: dict[str, torch.Tensor]
    bounds: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    loss: float
    loss_bound: float


@dataclass(frozen=True)
class Difference:
    """The first tensor that differs on a rank, by how many times its bound."""

    name: str
    rank: int
    times: float


def verify(config: Config, comm: MPI.Intracomm, steps: int = 3) -> int:
    """Compare layouts; print the finding; give 0 if equal, 1 if not. Collective over `comm`."""
    parallel, device, threads = config.parallel, config.train.device, config.train.threads
    with Topology.build(comm, parallel.stages, device, threads) as topology:
        log.start(topology)
        job = assemble.build(config, topology)
        try:
            found = compare(job, steps)
        finally:
            job.close()
        if found is None:
            layout = counted(topology.replicas, "replica"), counted(topology.stages, "stage")
            told = counted(steps, "step"), *layout
            LOGGER.info("equal: %s of %s x %s against 1 x 1, loss and every gradient", *told)
            if comm.size == 1:
                LOGGER.info("one rank was compared with itself: start it with mpirun -n 2, say")
            return 0
        LOGGER.info("differs: %s", found)
        used = sorted(set(comm.allgather(topology.threads)))
        if len(used) > 1:
            LOGGER.info(
                "ranks run %d to %d threads, by which kernels cut their sums, and one process %d: with "
                "--train.threads 1 that is no reason",
                *(used[0], used[-1], comm.bcast(topology.threads)),
            )
        return 1


def compare(job: Job, steps: int) -> str | None:
    """Compare `steps` steps; give None if equal, else what differs and where. Collective."""
    world = job.topology.comms.world
    job.averager.keep = True
    alone: Job | None = None
    device = job.topology.device.split(":")[0]
    failure: Exception | None = None
    try:
        if world.rank == 0:
            plain = replace(job.config.averaging, invariant=False)  # its gradients are read as they add up
            whole = replace(job.config.parallel, stages=1, cuts=[])
            config = replace(job.config, averaging=plain, parallel=whole)
            with log.silent():
                alone = assemble.build(config, Topology.build(MPI.COMM_SELF, 1, device, job.topology.threads))
            alone.averager.keep = True
    except Exception as error:
        failure = error
    raise_together(world, failure)
    position = 0
    try:
        for number in range(steps):
            step = job.loader.read(position)
            found = one_step(job, alone, number, step)
            if found:
                return found
            position = step.next_position
    finally:
        if alone is not None:
            alone.close()
            alone.topology.__exit__(None, None, None)
    return None


def one_step(job: Job, alone: Job | None, number: int, step: Step[Any]) -> str | None:
    """One step in both layouts from equal weights; the asked layout keeps its new weights."""
    world = job.topology.comms.world
    before = snapshot(job)
    reference = from_root(world, lambda: step_alone(alone, before, number, step.position))
    loss = job.engine.step(number, step).loss
    mine = first_difference(job, reference, loss)
    differences = [d for d in world.allgather(mine) if d is not None]
    if not differences:
        return None
    worst = differences[0]
    after = snapshot(job)
    restore(job, before)
    culprit = micro_batch_at_fault(job, alone, before, number, step, worst.name)
    restore(job, after)
    return (
        f"{worst.name} at step {number} on rank {worst.rank} of {world.size}, by {worst.times:.3g} "
        f"times the bound; {culprit}"
    )


def snapshot(job: Job) -> dict[str, torch.Tensor]:
    """Copy all weights and buffers, of all stages. Collective over them."""
    mine = {name: value.detach().clone() for name, value in tensors_of(job.engine.module).items()}
    if not job.pipeline:
        return mine
    return {name: value for share in job.topology.comms.pipe.allgather(mine) for name, value in share.items()}


def restore(job: Job, state: dict[str, torch.Tensor]) -> None:
    """Put weights and buffers back. A tied one may have come under one of its names only."""
    with torch.no_grad():
        for name, value in tensors_of(job.engine.module).items():
            if name in state:
                value.copy_(state[name])
    job.refresh()


def step_alone(alone: Job | None, weights: dict[str, torch.Tensor], number: int, position: int) -> Reference:
    """Take the step in the 1 x 1 layout; sum up |g_v| as the micro-batches come. Local: rank 0."""
    assert alone is not None
    restore(alone, weights)
    averager = alone.averager
    sums = {name: torch.zeros_like(p) for name, p in averager.named.items()}
    before = {name: torch.zeros_like(p) for name, p in averager.named.items()}

    def note(micro_batch: int) -> None:
        for name in sums:
            now = averager.gradient(name).clone()
            sums[name] += (now - before[name]).abs()
            before[name] = now

    alone.engine.on_gradient = note
    terms: dict[nn.Parameter, torch.Tensor] = {}
    alone.engine.straight.terms = terms
    result = alone.engine.step(number, alone.loader.read(position))
    count = alone.loader.count
    factor = 2.0 * (count + 4) * EPSILON / result.weight
    gradients = {name: averager.gradient(name).clone() for name in sums}
    for name, parameter in averager.named.items():
        if parameter in terms:
            sums[name] = torch.maximum(sums[name], terms[parameter])
    bounds = {name: (total.abs() * factor).cpu() for name, total in sums.items()}
    if synced(alone):
        rounding = SYNCED if alone.config.train.autocast == "none" else SYNCED_BF16
        bound = rounding * largest_of(gradients.values())
        bounds = {name: torch.full_like(total, bound) for name, total in bounds.items()}
    return Reference(
        gradients,
        bounds,
        {name: value.clone() for name, value in alone.engine.module.named_buffers()},
        result.loss,
        2.0 * (count + 4) * EPSILON * abs(result.loss) * loss_room(alone),
    )


def loss_room(job: Job) -> float:
    """Say by how much the loss of coupled samples may differ more. Local."""
    if not synced(job):
        return 1.0
    return 8.0 if job.config.train.autocast == "none" else 2.0**16


def synced(job: Job) -> bool:
    """Whether some layer of the model sees the whole batch."""
    return any(isinstance(m, SyncBatchNorm) for m in job.engine.module.modules())


def largest_of(tensors: Iterable[torch.Tensor]) -> float:
    """Give the largest absolute value in several tensors."""
    return max((float(t.abs().max()) for t in tensors if t.numel() and t.is_floating_point()), default=0.0)


def first_difference(job: Job, reference: Reference, loss: float) -> Difference | None:
    """Compare this rank's result with the reference. Local."""
    rank = job.topology.world_rank
    tied = {tie.name for tie in job.pipeline.ties} if job.pipeline else set()
    if abs(loss - reference.loss) > reference.loss_bound:
        least = math.ulp(0.0)  # the bound of a loss that is exactly 0
        return Difference("the loss", rank, abs(loss - reference.loss) / (reference.loss_bound or least))
    for name in job.averager.named:
        expected = reference.gradients[name]
        bound = reference.bounds[name]
        if name in tied:
            bound = torch.full_like(bound, largest_of([bound]))
        times = times_bound(job.averager.gradient(name), expected, bound)
        if not times <= 1.0:
            return Difference(f"the gradient of {name}", rank, times)
    for name, value in job.engine.module.named_buffers():
        expected = reference.buffers[name]
        bound = 1e-5 * (expected.abs().float() + 1e-5).cpu()
        if synced(job):
            like = [b for b in reference.buffers.values() if b.shape == expected.shape]
            rounding = SYNCED if job.config.train.autocast == "none" else SYNCED_BF16
            bound = torch.full_like(bound, rounding * largest_of(like))
        times = times_bound(value.float(), expected.float(), bound)
        if not times <= 1.0:
            return Difference(f"the buffer {name}", rank, times)
    return None


def times_bound(found: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> float:
    """Largest |found - expected| / bound; 0 where they are equal, NaN where one is NaN."""
    if not found.numel():
        return 0.0
    gap = (found.cpu() - expected.cpu()).abs()
    same = found.cpu() == expected.cpu()  # infinities too
    return float(torch.where(same, 0.0, gap / bound).max())


def micro_batch_at_fault(
    job: Job, alone: Job | None, weights: dict[str, torch.Tensor], number: int, step: Step[Any], name: str
) -> str:
    """Compare one micro-batch at a time, to say which rank computes which one wrong. Collective."""
    if job.pipeline:
        crosses = "at what crosses between the stages there"
        if job.topology.replicas == 1:
            return f"look at the layers around it, and {crosses}"
        shared = "at what replicas share (a buffer that each micro-batch moves on)"
        return f"look at the layers around it, {crosses}, and {shared}"
    if synced(job):
        return "SyncBatchNorm joins all micro-batches, so none can be looked at alone"
    world = job.topology.comms.world
    parameter = name.removeprefix("the gradient of ")
    if parameter not in job.averager.named:
        parameter = next(iter(job.averager.named))
    mine = {v: gradient_of(job, weights, number, step, v, parameter) for v in step.micro_batches}
    shares = world.gather(mine, root=0)

    def look() -> str:
        assert alone is not None
        assert shares is not None
        whole = alone.loader.read(step.position)
        worst = (16 * EPSILON, "each micro-batch agrees: it is their sum over the replicas that differs")
        for rank, share in enumerate(shares):
            for v, found in sorted(share.items()):
                expected = gradient_of(alone, weights, number, whole, v, parameter)
                scale = float(expected.abs().max()) if expected.numel() else 0.0
                gap = float((found - expected).abs().max()) / scale if scale else 0.0
                if gap > worst[0]:
                    worst = gap, f"rank {rank} computes micro-batch {v} differently"
        return worst[1]

    return from_root(world, look)


def gradient_of(
    job: Job, weights: dict[str, torch.Tensor], number: int, step: Step[Any], micro_batch: int, name: str
) -> torch.Tensor:
    """Summed gradient of one micro-batch. Local: nothing is averaged."""
    restore(job, weights)
    job.averager.begin([micro_batch])
    one = replace(step, micro_batches={micro_batch: step.micro_batches[micro_batch]})
    failure = job.engine.run_passes(number, one, [], None)
    if failure is not None:
        raise failure
    return job.averager.gradient(name).detach().cpu().clone()
