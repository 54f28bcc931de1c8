"""The engine of a model in stages: every rank runs its own program, with messages around its passes.

A rank that fails goes on with its program in name only (`pipeline/stage.py`), so that all meet where
errors are counted. Evaluation is a program of forwards.
"""

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from typing import Any, ClassVar

import torch
from torch import nn

from hpctrain.averaging.sync_norm import PeerEndedError
from hpctrain.batch import Batch
from hpctrain.data.loader import Step
from hpctrain.draws import DrawsAgain, again, run_again, set_generators
from hpctrain.engine import EVALUATION, Engine, exited, note, resident_bytes, to_float
from hpctrain.errors import ConfigError, HpctrainError, text_of
from hpctrain.gradient import Places
from hpctrain.keys import key
from hpctrain.log import LOGGER
from hpctrain.pipeline.aside import trains_itself
from hpctrain.pipeline.holders import modules_of
from hpctrain.pipeline.overwritten import Overwritten
from hpctrain.pipeline.part import Part
from hpctrain.pipeline.pipeline import Pipeline
from hpctrain.pipeline.schedule import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Instruction,
    Receive,
    ReceiveGradient,
    Send,
    SendGradient,
    behind,
    forward_only,
    program,
)
from hpctrain.pipeline.simulate import Span
from hpctrain.pipeline.stage import Stage, versions_of
from hpctrain.pipeline.trace import where
from hpctrain.pipeline.transport import PeerFailedError
from hpctrain.pipeline.unseen import Unseen, needed
from hpctrain.tensors import tensors_in
from hpctrain.wire import raise_together, together

PASSES = (Forward, Backward, BackwardInput, BackwardWeight)
SEVERAL_AT_ONCE = (
    "in stages several micro-batches are between forward and backward at once: where each forward changes a "
    "buffer or weight in place that its backward needs, use a copy (x * buffer.clone())"
)
GROUP = 2
"""Batches a stage that are read and evaluated between two looks at whether all is well."""


@dataclass(kw_only=True)
class StagedEngine(Engine):
    """Takes steps and evaluates, this rank running one stage of a replica, or several virtual ones."""

    pipeline: Pipeline
    """This rank's stages."""
    schedule: str = "1f1b"
    fast: bool = False
    """Whether weight gradients of several micro-batches may be computed at once (`parallel.gradients`)."""

    echoes: ClassVar[tuple[type[Exception], ...]] = (PeerEndedError, PeerFailedError)

    def __post_init__(self) -> None:
        """Start with nothing that waits."""
        super().__post_init__()
        self.straight.fast = self.fast
        self.averager.places.catch_up = self.straight.catch_up
        self._last_backward, self._splits, self._told_of_draws = -1, False, False
        self._spans: list[Span] | None = None
        self._joining: dict[int, tuple[float, float]] = {}
        """Loss and weight of micro-batches whose weight gradients wait."""
        self._without: list[list[int]] = []
        """Micro-batches without samples that have not joined yet, by virtual stage."""
        self._overwritten = Overwritten(self.module)
        self.pipeline.cut.beside("the loss", getattr(self.loss, "loss", self.loss))
        self.parameters = self.pipeline.parameters(self.module)
        """By virtual stage of this rank."""
        if self.pipeline.virtual > 1:
            self.averager.divide(self.parameters)

    def switch(self, training: bool) -> None:
        """Bring what this rank has of the module into a mode; a layer's own train() may freeze, say. Local.

        Raises ConfigError where a train() needs what other ranks have.
        """
        try:
            with unswitched(self.pipeline.elsewhere), self.pipeline.whole():
                self.module.train(training)
            self.pipeline.cut.switched(training)
        except Exception as error:
            line = where(error, self.module) or f": {type(self.module).__name__}"
            raise ConfigError(
                f"train({training}) of the model fails on rank {self.topology.world_rank}, which has a part "
                f"of it alone{line} ({type(error).__name__}: {error}): let train() of the layer that has the "
                f"weights do that, or the constructor; a layer whose own train() it is must not be cut in "
                f"two (parallel.cuts)"
            ) from None

    def places(self) -> Places:
        """Give where weight gradients go, those of copies of other stages' weights too. Local."""
        return self.pipeline.places(self.averager.places, relays=self.averager.sums is not None)

    def memory(self) -> dict[str, int]:
        """Bytes of this rank's memory by use, its ring and buffers for messages too. Local."""
        return {**super().memory(), "between stages": self.pipeline.transport.nbytes}

    def refresh(self, every: bool = True) -> None:
        """Give the owners' new weights to the copies of other stages. Collective (stages)."""
        self.pipeline.refresh(every)

    def watch(self) -> None:
        """Note the passes of the coming step and their times. Local."""
        self._spans = []

    def unwatch(self) -> list[Span]:
        """Give the passes that were noted, by this process' clock; a GPU's are only started then. Local."""
        spans, self._spans = self._spans or [], None
        return spans

    def run_passes(
        self, number: int, step: Step[Batch], sizes: list[int], failure: Exception | None
    ) -> Exception | None:
        """Run this rank's program to its end; in name only once it has failed. Collective (stages)."""
        pipeline = self.pipeline
        mine = [v for v, owner in enumerate(self.averager.owners) if owner == self.topology.replica]
        working = [v for v in mine if sizes[v]]
        self._last_backward = working[-1] if working else -1
        self._without = [[v for v in mine if not sizes[v]] for _ in pipeline.stages]
        self._joining.clear()
        self._losses.clear()  # of a step that failed
        for stage in pipeline.stages:
            stage.kept.clear()
        every = [*program(self.schedule, pipeline.rank, pipeline.ranks, working, pipeline.virtual)]
        # nobody waits for the first stage
        late = behind(every) if pipeline.rank else set[int]()
        self.straight.begin(len(working), waits=pipeline.rank > 0, behind=late)
        pipeline.copies.begin()
        pipeline.relay.begin()
        pipeline.transport.begin(pipeline.kept)
        waited = pipeline.transport.waited
        given = {v: step.micro_batches[v].inputs if v in step.micro_batches else {} for v in working}
        batches = {v: (sizes[v], inputs) for v, inputs in given.items()}
        try:
            parts = pipeline.parts(batches, True, f"at step {number}", unread=failure is not None)
        except HpctrainError as error:
            if not error.agreed:
                raise
            return failure or error
        # the tree of `averaging.invariant` takes a micro-batch's gradients before the next one's
        splits = any(isinstance(i, BackwardInput) for i in every)
        self._splits = splits and self.averager.sums is None
        with pipeline.whole():
            failure = self._run(every, number, step, parts, failure)
        if failure is None:
            for virtual in reversed(range(len(pipeline.stages))):
                self._join_without(virtual, len(sizes))
        pipeline.collect(self.averager.add)
        pipeline.transport.finish()
        pipeline.transport.watch.doing()
        self.waited = pipeline.transport.waited - waited
        return failure

    def _run(
        self,
        program: Iterable[Instruction],
        number: int,
        step: Step[Batch],
        parts: dict[tuple[Stage, int], Part],
        failure: Exception | None,
    ) -> Exception | None:
        """Run instructions, in name only once one has failed; give that failure. Collective (stages)."""
        pipeline = self.pipeline
        for instruction in program:
            v, stage = instruction.micro_batch, pipeline.stages[instruction.virtual]
            part = parts[stage, v]
            pipeline.transport.watch.doing(instruction, stage.stage)
            if failure is not None:
                self._fail(instruction, stage, part)
                continue
            began = time.perf_counter()
            try:
                self._execute_staged(instruction, number, step, stage, part)
            except HpctrainError as error:
                failure = error
            except SystemExit as error:
                failure = exited(error, f"the model or the loss {self._place(number, v, stage)}")
            except Exception as error:
                if isinstance(instruction, (Backward, BackwardInput)):
                    self._name_layer(error, number, step.micro_batches[v], stage, part, instruction)
                note(error, self._place(number, v, stage))
                if said := lacks(error, self.pipeline.elsewhere):
                    error.add_note(said)
                if "modified by an inplace operation" in text_of(error) and len(stage.kept) > 1:
                    error.add_note(SEVERAL_AT_ONCE)
                failure = error
            if failure is not None and not isinstance(instruction, (Receive, ReceiveGradient)):
                self._fail(instruction, stage, part)  # nothing of it has left; a receive took all
            if self._spans is not None and isinstance(instruction, PASSES):
                self._spans.append(Span(stage.stage, instruction, began, time.perf_counter()))
        return failure

    def _execute_staged(
        self, instruction: Instruction, number: int, step: Step[Batch], stage: Stage, part: Part
    ) -> None:
        v, pipeline = instruction.micro_batch, self.pipeline
        batch = step.micro_batches[v]
        match instruction:
            case Receive():
                stage.receive(v, part)
            case Forward():
                self._forward_staged(number, v, batch, stage, part)
            case Send():
                stage.send(v, part)
            case ReceiveGradient():
                stage.receive_gradient(v, part)
            case Backward() | BackwardInput():
                whole = not isinstance(instruction, BackwardInput) or not self._splits
                self._join_without(instruction.virtual, v)  # before its gradients come
                stage.kept[v].gradients += pipeline.relay.receive(v)
                pipeline.transport.watch.doing(instruction, stage.stage)
                self._backward_staged(instruction, number, stage, part, whole)
                pipeline.relay.send(v)
                if stage.stage == 0:
                    stage.forget(v)
            case BackwardWeight():
                if self._splits:
                    self._weights(instruction)
            case SendGradient():
                stage.send_gradient(v, part)
                stage.forget(v)

    def _place(self, number: int, v: int, stage: Stage) -> str:
        return f"at step {number}, micro-batch {v}, stage {stage.stage}, rank {self.topology.world_rank}"

    def _fail(self, instruction: Instruction, stage: Stage, part: Part) -> None:
        """Do in name only what is left of an instruction. Local, but waits for what comes."""
        if isinstance(instruction, (Backward, BackwardInput)):
            self.pipeline.relay.fail(instruction.micro_batch)
        stage.fail(instruction, part)

    def _forward_staged(self, number: int, v: int, batch: Batch, stage: Stage, part: Part) -> None:
        self.averager.forward_of(v)
        stream = key(self.seed, number, v)
        set_generators(stream >> 1)
        resident = 0 if self._stepped else resident_bytes()
        running, buffers = self.averager.running, self.averager.buffers
        own = self.parameters[stage.stage // self.topology.stages]
        marks = (buffers.marks(), versions_of(own)) if stage.recomputes else None
        before = buffers.contents() if stage.recomputes and not self._stepped else {}
        unseen = None if self._stepped else Unseen(self.module)
        noting = nullcontext() if self._stepped else self._overwritten.forward(v)
        trained = [p.requires_grad for p in own]
        taking = self.straight.forward(v if self._splits else -1)
        with taking, self._precision(), self._watching():
            inputs = batch.to(self.topology.device).inputs
            with noting:
                outputs = run_again(lambda: stage.forward(v, part, inputs, stream), running.records)
        if trained != [p.requires_grad for p in own]:
            self._refuse_freezing(v, stage)
        if unseen:
            self._refuse_unseen(v, stage, unseen)
        if marks and marks == (buffers.marks(), versions_of(own)):  # it changed nothing that it read
            now = buffers.now() if before else {}
            stage.keeps |= any(not torch.equal(now[name], old) for name, old in before.items())
            if unseen is None or self._runs_again(stage, unseen):
                stage.let_go(v)
        if stage.last:
            begins = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
            found = self._loss_of(outputs, batch.to(self.topology.device))
            if not self._stepped:
                self._refuse_weights(found[0], begins, tensors_in(outputs))
            self._losses[v] = self._checked(number, v, batch, found)
        if resident:  # of all micro-batches that are on their way at once
            self.activation_bytes += max(0, resident_bytes() - resident)

    def _refuse_weights(self, loss: torch.Tensor, begins: int, outputs: list[torch.Tensor]) -> None:
        """Refuse a loss that uses weights of the model by itself: this stage has its own only. Local.

        `begins`: the number of the loss's own first operator; those of the model come before.
        """
        given = set(map(id, outputs))
        own = {id(p): name for name, p in self.module.named_parameters() if id(p) not in given}
        left, seen = [loss.grad_fn], set[Any]()
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if name := own.get(id(getattr(node, "variable", None))):
                raise ConfigError(
                    f"the loss computes with {name} of the model: in stages each has its own weights only, "
                    f"so it would miss the others'; add such a penalty in the model's forward, as an output, "
                    f"or let the optimizer decay weights (weight_decay)"
                )
            if node._sequence_nr() >= begins:
                left += [inner for inner, _ in node.next_functions]

    def _refuse_unseen(self, v: int, stage: Stage, unseen: Unseen) -> None:
        """Refuse what a forward has changed unseen, if a backward on its way needs it. Local."""
        others = [kept.found for other, kept in stage.kept.items() if other != v and not kept.gone]
        tensors = unseen.tensors() if others else {}
        name = needed(tensors_in(others), tensors) if tensors else ""
        if name:
            raise ConfigError(
                f"the forward of stage {stage.stage} changes {name} through .data or by NumPy, which torch "
                f"does not count, and the backward of a micro-batch before it needs what was there: "
                f"{SEVERAL_AT_ONCE}"
            )

    def _refuse_freezing(self, v: int, stage: Stage) -> None:
        """Refuse a forward that has changed what is trained, if a backward before it is on its way. Local."""
        if any(other != v and not kept.gone for other, kept in stage.kept.items()):
            raise ConfigError(
                f"the forward of stage {stage.stage} freezes a weight, or thaws one (requires_grad_), while "
                f"the backward of a micro-batch before it has not run, which would lose that gradient or get "
                f"it: use weight.detach() there, freeze in train(), or set parallel.recompute = always"
            )

    def _runs_again(self, stage: Stage, unseen: Unseen) -> bool:
        """Whether a forward can run again: plain attributes that it changes would change twice. Local."""
        changed, new = unseen.attributes()
        if changed and not (stage.keeps or stage.last):
            stage.keeps = True
            LOGGER.warning(
                "the forward of stage %d changes %s: it is not run again for backward, and keeps its memory",
                *(stage.stage, ", ".join(changed[:3])),
            )
        return not new  # what the first forward makes, later ones may only use

    def _backward_staged(
        self, instruction: Instruction, number: int, stage: Stage, part: Part, whole: bool
    ) -> None:
        v, virtual = instruction.micro_batch, instruction.virtual
        total, weight = self._losses.pop(v, (None, 0.0)) if stage.last else (None, 0.0)
        if stage.kept[v].gone:
            set_generators(key(self.seed, number, v) >> 1)
            taking = self.straight.forward(v if self._splits else -1)
            noting = nullcontext() if self._stepped else self._overwritten.forward(v)
            with self.averager.running.unseen(), taking, self._precision(), noting:
                stage.again(v, part)
        if v == self._last_backward:
            self.averager.last_backward(self.parameters[virtual] if virtual else None)
        kept = stage.kept[v]
        drawn = range(kept.start, kept.draws)
        looks = None if self._stepped or self._told_of_draws else DrawsAgain(kept.stream, drawn)
        with (
            self.straight.accumulating(v if self.averager.sums is None else -1, whole),
            looks or again(kept.stream, drawn),
            self.averager.running.unseen(),  # what the backward computes again
            nullcontext() if self._stepped else self._overwritten.backward(v),
        ):
            stage.backward(v, total)
        if looks and looks.own:
            self._told_of_draws = True
            LOGGER.warning(
                "the backward of stage %d draws random numbers (in an autograd.Function or a hook): in "
                "stages they are others than in one process; draw in the forward, and keep them",
                stage.stage,
            )
        if total is not None:
            self._joining[v] = float(total.detach()), weight
        self._joining.setdefault(v, (0.0, 0.0))
        if whole:
            self._weights(instruction)

    def _weights(self, instruction: Instruction) -> None:
        """Compute the weight gradients that wait; the micro-batch is done here. Local."""
        v = instruction.micro_batch
        self.straight.weights_of(v, last=v == self._last_backward)
        self._join(instruction)

    def _name_layer(
        self, error: Exception, number: int, batch: Batch, stage: Stage, part: Part, instruction: Instruction
    ) -> None:
        """Add to an error of a backward pass in which layer it was raised, if that can be found. Local."""
        if self.averager.sync:
            return  # the forward of a SyncBatchNorm meets those of other replicas
        v = instruction.micro_batch
        target = batch.to(self.topology.device)
        with suppress(Exception, SystemExit), self.averager.running.unseen(), self._precision():
            set_generators(key(self.seed, number, v) >> 1)
            where = stage.where(
                v, part, lambda outputs: self.loss(to_float(outputs), target)[0],
                self.parameters[instruction.virtual], error,
            )  # fmt: skip
            if where:
                error.add_note(f"in the backward pass of {where}")

    def _join(self, instruction: Instruction) -> None:
        """Note that a micro-batch is done here, with the last of its backward passes. Local."""
        v, virtual = instruction.micro_batch, instruction.virtual
        self._joined(v, virtual, *((0.0, 0.0) if virtual else self._joining.pop(v)))

    def _join_without(self, virtual: int, before: int) -> None:
        """Note that micro-batches without samples are done, in their turn: those before one. Local."""
        left = self._without[virtual]
        while left and left[0] < before:
            self._joined(left.pop(0), virtual, 0.0, 0.0)

    def _joined(self, v: int, virtual: int, loss: float, weight: float) -> None:
        """Let a virtual stage's gradients of a micro-batch join; 0, the last one, tells its loss. Local."""
        if virtual:
            self.averager.joined_part(v, virtual)
        else:
            self.averager.joined(v, loss, weight)

    def outputs(self, batch: Batch, everywhere: bool = False) -> Any:
        """Run one micro-batch through the stages. Collective over them; raises on all where one fails."""
        pipe, found = self.topology.comms.pipe, [None]
        self._evaluating()
        self._forwards([batch], lambda _, outputs: found.append(outputs))
        return pipe.bcast(found[-1], root=pipe.size - 1) if everywhere else found[-1]

    def each(self, batches: Iterable[Batch], use: Callable[[Batch, Any], None]) -> None:
        """Run batches through the stages, several on their way at once; the last stage uses the outputs.

        Collective over the stages; what fails on one (reading, the model, `use`) is raised on all.
        """
        pipe, source = self.topology.comms.pipe, iter(batches)
        self._evaluating()
        while True:
            group, failure = list[Batch](), None
            try:
                group = list(islice(source, GROUP * pipe.size))
            except Exception as error:
                failure = error
            raise_together(pipe, failure)
            if not group:
                return
            self._forwards(group, use)

    def _evaluating(self) -> None:
        """Bring the module into eval mode. Collective over the stages."""
        with together(self.topology.comms.pipe) if trains_itself(self.module) else nullcontext():
            self.switch(False)

    @torch.no_grad()
    def _forwards(self, batches: list[Batch], use: Callable[[Batch, Any], None]) -> None:
        """Run the program of a few forwards to its end, in name only once this stage has failed."""
        pipeline = self.pipeline
        failure: Exception | None = None
        stream = key(self.seed, EVALUATION)
        pipeline.transport.begin(GROUP, looks=1)
        parts = pipeline.parts({v: (len(b), b.inputs) for v, b in enumerate(batches)}, False, "in evaluation")
        every = range(len(batches))
        for instruction in forward_only(
            self.schedule, pipeline.rank, pipeline.ranks, every, pipeline.virtual
        ):
            v, stage = instruction.micro_batch, pipeline.stages[instruction.virtual]
            batch, part = batches[v], parts[stage, v]
            pipeline.transport.watch.doing(instruction, stage.stage, of="evaluation's batch")
            if failure is not None:
                stage.fail(instruction, part)
                continue
            try:
                match instruction:
                    case Receive():
                        stage.receive(v, part)
                    case Forward():
                        set_generators(stream >> 1)
                        with self._precision(), pipeline.whole():
                            inputs = batch.to(self.topology.device).inputs
                            outputs = run_again(partial(stage.forward, v, part, inputs, stream), [])
                            found = to_float(outputs, "cpu")
                        if stage.last:
                            use(batch, found)
                            stage.forget(v)
                    case Send():
                        stage.send(v, part)
                        stage.forget(v)
            except SystemExit as error:
                failure = exited(error, "the model or the metrics")
            except Exception as error:
                if not isinstance(error, HpctrainError):
                    error.add_note(
                        f"in evaluation, on samples {batch.samples[0]} to {batch.samples[-1]}, stage "
                        f"{stage.stage}, rank {self.topology.world_rank}"
                    )
                failure = error
            if failure is not None and isinstance(instruction, Send):
                stage.fail(instruction, part)
        pipeline.transport.finish()
        pipeline.transport.watch.doing()
        for stage, v in product(pipeline.stages, every):
            stage.forget(v)
        raise_together(self.topology.comms.pipe, None if isinstance(failure, PeerFailedError) else failure)
        pipeline.transport.grow()  # all stages are behind their programs


def lacks(error: Exception, elsewhere: Sequence[nn.Module]) -> str:
    """Say that what failed uses a module whose weights another stage has, if so; else "". Local."""
    callers = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [caller for caller in callers if isinstance(caller, nn.Module)]
    called = [module for module in own if any(module is one for one in elsewhere)]
    users = own[-1:] if isinstance(error, (TypeError, AttributeError)) else []  # None has no number, no shape
    held = [m for _, m in modules_of([("", user) for user in users]) if any(m is one for one in elsewhere)]
    if not called and not held:
        return ""
    return (
        f"it {'calls' if called else 'holds'} a {type((called or held)[0]).__name__} whose weights another "
        f"stage has, and which it does not have as a submodule (a function or object remembers it): register "
        f"it there, or set parallel.cuts so that one stage makes all its calls"
    )


@contextmanager
def unswitched(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules whose weights are elsewhere switch as torch does while the body runs. Local."""
    own = [(module, vars(module).get("train")) for module in modules]
    for module in modules:
        vars(module)["train"] = partial(nn.Module.train, module)
    try:
        yield
    finally:
        for module, train in own:
            if train is None:
                del vars(module)["train"]
            else:
                vars(module)["train"] = train
