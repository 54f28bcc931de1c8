"""One optimizer step: run the schedule's instructions, then one sum over the replicas.

      for instruction in schedule(micro-batches of this replica):
          Forward v    seed (seed, step, v) · model · loss summed over the samples
          Backward v   gradients join the buckets
      averager.step    one sum, the mean, the new weights

With several stages `staged.py` runs the passes.

A micro-batch gives the same bits wherever it is computed: its samples, its random stream and
its kernels do not depend on the layout.
"""

import math
import resource
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from mpi4py import MPI
from torch import nn
from torch.utils import _pytree

from hpctrain.averaging.averager import Averager
from hpctrain.averaging.result import Result
from hpctrain.averaging.sync_norm import PeerEndedError
from hpctrain.batch import Batch
from hpctrain.data import order
from hpctrain.data.loader import Step
from hpctrain.draws import Drawing, Draws, again, of_others, run_again, set_generators, told_of_others
from hpctrain.errors import FEWER_MICRO_BATCHES, TOO_FEW, DivergedError, HpctrainError, RankError, text_of
from hpctrain.gradient import Places, StraightIntoPlace
from hpctrain.keys import key
from hpctrain.log import LOGGER
from hpctrain.loss import SummedLoss
from hpctrain.models import build as models
from hpctrain.pipeline.schedule import Backward, Forward, Instruction, one_stage
from hpctrain.room import ran_out, room
from hpctrain.tensors import shapes_of
from hpctrain.topology import Topology
from hpctrain.wire import of_users, raise_together

# The random stream of evaluation, for models that draw in eval mode too.
EVALUATION = -1

LAID = 0.25
"""Share of the memory left after the first step that weights laid in blocks may take."""


@dataclass
class Clock:
    """Seconds of this rank in the parts of its steps, summed since the start."""

    reading: float = 0.0
    computing: float = 0.0
    waiting: float = 0.0
    """For slower ranks, and for messages of other stages."""
    averaging: float = 0.0
    """Sums and update, waiting set apart."""

    @property
    def total(self) -> float:
        """Seconds in all."""
        return self.reading + self.computing + self.waiting + self.averaging

    def shares(self) -> dict[str, float]:
        """Give each part's share of the sum."""
        total = self.total
        return {name: value / total if total else 0.0 for name, value in vars(self).items()}


@dataclass
class Engine:
    """Takes steps and evaluates. All ranks call the same methods in the same order."""

    topology: Topology
    module: nn.Module
    loss: SummedLoss
    averager: Averager
    names: list[str]
    """The model's inputs, in order."""
    seed: int
    autocast: str = "none"
    clock: Clock = field(default_factory=Clock)
    on_gradient: Callable[[int], None] | None = None
    """Called after each micro-batch's backward; `verify` looks at gradients with it."""
    metrics: Callable[[Any, Batch], object] | None = None
    """What evaluation will compute of outputs; tried on a copy of the first that there are."""

    echoes: ClassVar[tuple[type[Exception], ...]] = (PeerEndedError,)
    """Failures that only follow another rank's."""

    def __post_init__(self) -> None:
        """Learn how forward gets its inputs."""
        self.named = models.by_name(self.module, self.names)
        self.straight = StraightIntoPlace(self.module, self.places())
        self._losses: dict[int, tuple[torch.Tensor, float]] = {}
        self._drawing = {training: Drawing([self.module]) for training in (True, False)}
        self._drawn = 0, range(0)
        """Stream of the latest forward, and its draws."""
        self._read, self._ended, self._stepped, self._told = 0.0, 0.0, False, False
        self.waited = 0.0
        """Seconds that the step's passes waited for other stages."""
        self.activation_bytes = 0
        """Pages that the forward of a micro-batch of the first step has added."""

    def places(self) -> Places:
        """Give where weight gradients go. Local."""
        return self.averager.places

    def memory(self) -> dict[str, int]:
        """Bytes of this rank's memory by use, where the averaging does not count them. Local."""
        return {"activations": self.activation_bytes, "laid weights": self.straight.laid.nbytes}

    def step(
        self,
        number: int,
        step: Step[Batch],
        clip: float = 0.0,
        lr: Iterable[float] | None = None,
        stop: bool = False,
        save: bool = False,
    ) -> Result:
        """Take optimizer step `number` (from 0). Collective.

        `stop` and `save` are this rank's wishes; the result counts the ranks that have them.

        A failure on any rank (reading, the model, a loss that is not finite) is raised on all
        of them, with the failing rank's name; the weights are then as before the step.
        """
        began = time.perf_counter()
        failure = step.failure
        sizes = order.sizes(step.next_position - step.position, len(self.averager.owners))
        self.averager.begin(
            step.micro_batches, sorted({r for r, size in zip(self.averager.owners, sizes) if size})
        )
        try:
            self.switch(True)
        except Exception as error:  # of a train() of the user's, on this rank alone, maybe
            failure = failure or error
        failure = self.run_passes(number, step, sizes, failure)
        flags = self.averager.flags
        flags.errors, flags.stops, flags.saves = int(failure is not None), int(stop), int(save)
        if isinstance(failure, self.echoes):
            failure = None  # the rank that failed tells why
        computed = time.perf_counter()
        flags.reading, flags.computing = self.clock.reading - self._read, computed - began
        if self._stepped:
            flags.other = max(0.0, began - self._ended - flags.reading)
        with of_users(f"at step {number}, rank {self.topology.world_rank}"):
            result = self.averager.step(clip, lr)
        self._read, self._ended = self.clock.reading, time.perf_counter()
        if not self._stepped:
            self.settle()
        averaging = self._ended - computed
        waiting = min(averaging, float(result.times.waiting[self.topology.replica]))
        self.clock.computing += computed - began - self.waited
        self.clock.waiting += waiting + self.waited
        self.clock.averaging += averaging - waiting
        if result.errors:
            raise_together(self.topology.comms.world, failure or result.failure)
        if not (math.isfinite(result.loss) and math.isfinite(result.norm)):
            diverged = DivergedError(self._explain(number, result))
            diverged.agreed = True  # every rank has the same sums
            raise diverged
        self.refresh(every=False)
        return result

    def switch(self, training: bool) -> None:
        """Bring the module into a mode. Local."""
        self.module.train(training)

    def settle(self) -> None:
        """Note that a step has been taken: all that it needs is there, memory too. Local."""
        self._stepped = True
        self.straight.laid.allow(room(self.topology.comms.node.size) * LAID)

    def refresh(self, every: bool = True) -> None:
        """Bring weights to where copies are kept: every one, or those that a step changes. Collective."""

    def run_passes(
        self, number: int, step: Step[Batch], sizes: list[int], failure: Exception | None
    ) -> Exception | None:
        """Run the passes of the step unless it failed before; give the failure of this rank, if any. Local.

        `sizes`: samples of each of the step's micro-batches; nothing is summed over replicas.
        """
        if failure is not None:
            return failure
        self.straight.begin(len(step.micro_batches))
        instruction: Instruction | None = None
        try:
            for instruction in one_stage(step.micro_batches):
                batch = step.micro_batches[instruction.micro_batch]
                if len(batch):
                    self._execute(instruction, number, batch)
                elif isinstance(instruction, Backward):
                    self.averager.joined(instruction.micro_batch, 0.0, 0.0)
        except HpctrainError as error:
            return error
        except (Exception, SystemExit) as error:  # this rank would leave and the others wait for it
            where = instruction.micro_batch if instruction else "none"
            place = f"at step {number}, micro-batch {where}, rank {self.topology.world_rank}"
            if isinstance(error, SystemExit):
                return exited(error, f"the model or the loss {place}")
            note(error, place)
            return error
        return None

    def _execute(self, instruction: Instruction, number: int, batch: Batch) -> None:
        if isinstance(instruction, Forward):
            self._losses[instruction.micro_batch] = self._forward(number, instruction.micro_batch, batch)
        elif isinstance(instruction, Backward):
            total, weight = self._losses.pop(instruction.micro_batch)
            unseen = self.averager.running.unseen()  # what the backward computes again
            with self.straight.accumulating(), again(*self._drawn), unseen:
                torch.autograd.backward(total)
            if self.on_gradient:
                self.on_gradient(instruction.micro_batch)
            self.averager.joined(instruction.micro_batch, float(total.detach()), weight)

    def _forward(self, number: int, micro_batch: int, batch: Batch) -> tuple[torch.Tensor, float]:
        stream = key(self.seed, number, micro_batch)
        set_generators(stream >> 1)
        resident = 0 if self._stepped else resident_bytes()
        with self.straight.forward(), self._watching():
            found = run_again(lambda: self._loss(batch, stream), self.averager.running.records)
        if resident:
            self.activation_bytes = max(self.activation_bytes, resident_bytes() - resident)
        return self._checked(number, micro_batch, batch, found)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Note what a forward does with buffers; in the first step, tell of random numbers not torch's."""
        before = None if self._stepped else of_others()
        with self.averager.watching(not self.straight.compiled):  # to look would cut a compiled graph
            yield
        if before is None:
            return
        told = told_of_others(before, "results depend on the layout")
        if told and not self._told:
            self._told = True
            LOGGER.warning("%s", told)

    def _checked(
        self, number: int, micro_batch: int, batch: Batch, found: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, float]:
        """Refuse a loss that is not finite. Raises DivergedError."""
        total, weight = found
        value = float(total.detach())
        if not math.isfinite(value):
            raise DivergedError(
                f"the loss is {value} at step {number} on rank {self.topology.world_rank}, "
                f"micro-batch {micro_batch}, samples {listed(batch.samples)}: lower "
                f"optimizer.init_args.lr, set train.clip, or look at these samples"
            )
        return total, float(weight)

    def _loss(self, batch: Batch, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
        on_device = batch.to(self.topology.device)
        return self._loss_of(self._call(on_device, stream), on_device)

    def _loss_of(self, outputs: Any, on_device: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the loss; the first time, see that evaluation won't fail an epoch later. Local."""
        outputs = to_float(outputs)
        found = self.loss(outputs, on_device)
        metrics, self.metrics = self.metrics, None
        if metrics is not None:
            try:
                with torch.no_grad():  # of copies: there it may change in place what a backward needs here
                    batch = self.loss.without_ignored(on_device)
                    parts = {name: copied(getattr(batch, name)) for name in ("inputs", "targets", "weights")}
                    metrics(copied(outputs), replace(batch, **parts))
            except Exception as error:
                LOGGER.warning(
                    "of the first outputs in training the metrics can't be computed (%s: %s): if the model "
                    "gives the same where it is evaluated, the run will end there",
                    *(type(error).__name__, error),
                )
        return found

    def _call(self, on_device: Batch, stream: int) -> Any:
        compiled = nullcontext(Draws(stream))  # a mode would cut its graph
        of_mode = self._drawing[self.module.training]
        drawing = compiled if self.straight.compiled else of_mode.of(stream, 0, on_device.inputs)
        with self._precision(), drawing as counting:
            try:
                outputs = models.call(self.module, on_device.inputs, self.named)
            except Exception as error:
                if layer := layer_of(error, self.module):
                    error.add_note(layer)
                raise
        self._drawn = stream, range(counting.count)
        return outputs

    def _precision(self) -> AbstractContextManager[Any]:
        return precision(self.autocast, self.topology.device)

    def _explain(self, number: int, result: Result) -> str:
        """Name what is not finite though every rank's loss was: weight 0, or a gradient."""
        if not result.weight:
            return (
                f"step {number}: all weights of the batch are 0, so it has no mean: look at data.weights "
                f"and data.missing, leave such samples out, or set train.batch higher"
            )
        bad = self.averager.not_finite()
        return (
            f"the gradient of {', '.join(bad[:3]) or 'a parameter'} is not finite at step {number} "
            f"(loss {result.loss:.6g}): lower optimizer.init_args.lr or set train.clip"
        )

    def outputs(self, batch: Batch, everywhere: bool = False) -> Any:
        """Run the model in eval mode on one micro-batch; outputs on the CPU. Local with one stage.

        Else collective over the stages: the last has the outputs, with `everywhere` all have them.
        """
        self.switch(False)
        return self._outputs(batch)

    @torch.no_grad()
    def _outputs(self, batch: Batch) -> Any:
        stream = key(self.seed, EVALUATION)
        set_generators(stream >> 1)
        on_device = batch.to(self.topology.device)
        return to_float(run_again(lambda: self._call(on_device, stream), []), "cpu")

    def each(self, batches: Iterable[Batch], use: Callable[[Batch, Any], None]) -> None:
        """Run batches through the model in eval mode; `use` gets each with its outputs. Local."""
        self.switch(False)  # once, as in stages: a train() of the user's may count
        for batch in batches:
            use(batch, self._outputs(batch))

    def evaluate(
        self,
        batches: Iterator[Batch],
        measure: Callable[[Any, Batch], dict[str, tuple[float, float]]],
    ) -> dict[str, tuple[float, float]]:
        """Sums of the loss and the metrics over all ranks' batches, exact to the sample.

        Gives {name: (numerator, denominator)}, `loss` among them. Collective; ranks may have
        different numbers of batches.
        """
        sums: dict[str, list[tuple[float, float]]] = {}
        failure: Exception | None = None

        def take(batch: Batch, outputs: Any) -> None:
            total, weight = self.loss(outputs, batch)
            found = {
                "loss": (float(total), float(weight)),
                **measure(outputs, self.loss.without_ignored(batch)),
            }
            for name, pair in found.items():
                sums.setdefault(name, []).append((float(pair[0]), float(pair[1])))

        try:
            self.each(batches, take)
        except Exception as error:
            failure = error
        raise_together(self.topology.comms.world, failure)
        return sum_over(self.topology.comms.world, sums)


def copied(values: Any) -> Any:
    """Give a tree of tensors with memory of their own, without what made them. Local."""
    return _pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), values)


def layer_of(error: Exception, module: nn.Module) -> str:
    """Say in which layer of a module a forward ended, and what that was given; empty if in none. Local."""
    names = {id(m): name for name, m in module.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        inside, layer = frame.f_locals, frame.f_locals.get("self")
        if frame.f_code is nn.Module._call_impl.__code__ and names.get(id(layer)):
            given = shapes_of((inside["args"], inside["kwargs"]))
            found = f"in layer {names[id(layer)]} ({type(layer).__name__}), given {given}"
    return found


def exited(error: SystemExit, where: str) -> RankError:
    """Give what stands for a rank's own end in the user's code."""
    return RankError(f"sys.exit({error.code}) was called in {where}")


def note(error: Exception, place: str) -> None:
    """Add where an error came up, and what to do where there was no memory. Local."""
    error.add_note(place)
    if ran_out(error):
        error.add_note(
            "no memory is left: take more parallel.stages or parallel.micro_batches, a smaller train.batch, "
            "parallel.recompute = always, fewer ranks a node, or nodes with more memory"
        )
    elif TOO_FEW in text_of(error):
        error.add_note(f"this micro-batch is too small for BatchNorm: {FEWER_MICRO_BATCHES}")


def precision(autocast: str, device: str) -> AbstractContextManager[Any]:
    """Give what passes run under: `train.autocast` is "none" or "bf16".

    A weight is cast at each of its uses, not once a forward: else the gradients of its uses would be added in
    bfloat16 on one stage, and as they are where several stages use it.
    """
    if autocast == "none":
        return nullcontext()
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, cache_enabled=False)


def resident_bytes() -> int:
    """Memory that this process alone has in use; 0 where the system does not say.

    Shared pages are left out: the first forward also touches the weights that the node shares.
    """
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            _, resident, shared = map(int, file.read().split()[:3])
            return (resident - shared) * resource.getpagesize()
    except OSError:
        return 0


def sum_over(
    comm: MPI.Intracomm, pairs: dict[str, list[tuple[float, float]]]
) -> dict[str, tuple[float, float]]:
    """Sum every batch's pairs by name over the ranks; a rank may lack a name. Collective.

    The sum is exact (Shewchuk 1997, by math.fsum), so it does not depend on who had which batch.
    """
    every = comm.allgather(pairs)
    found = {}
    for name in sorted(set().union(*every)):
        columns = list(zip(*(pair for share in every for pair in share.get(name, []))))
        found[name] = exact_sum(columns[0]), exact_sum(columns[1])
    return found


def exact_sum(values: Iterable[float]) -> float:
    """Add numbers exactly; not a number where one is infinite or none."""
    listed_values = list(values)
    return math.fsum(listed_values) if all(map(math.isfinite, listed_values)) else math.nan


def to_float(outputs: Any, device: str = "") -> Any:
    """Give 16-bit outputs as float32 (losses are sums, and sums need digits), on a device if asked."""
    if isinstance(outputs, torch.Tensor):
        half = outputs.dtype in (torch.bfloat16, torch.float16)
        outputs = outputs.float() if half else outputs
        return outputs.to(device) if device else outputs
    if isinstance(outputs, dict):
        return {name: to_float(value, device) for name, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return [to_float(value, device) for value in outputs]
    return outputs


def listed(samples: Any, most: int = 8) -> str:
    """Write sample numbers, the first few.

    >>> listed(range(10), most=3)
    '0, 1, 2 and 7 more'
    """
    text = ", ".join(str(int(s)) for s in samples[:most])
    return text + (f" and {len(samples) - most} more" if len(samples) > most else "")
