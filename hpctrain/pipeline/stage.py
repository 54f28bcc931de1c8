"""One stage at work: receives, runs its part, sends, and the same backwards, micro-batch by micro-batch.

What came from earlier stages begins this stage's own graph: its gradients are what goes back. What went to
later stages gets its gradient from there. Where several stages use a value, the gradient of the later ones
comes to the one before as a start to add to: as autograd adds in one process.

A stage that fails goes on with its program in name only: it takes what comes and sends word that
it failed, so that every other stage ends its own program too and all meet where errors are counted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from hpctrain.errors import ConfigError
from hpctrain.modes import SETTINGS, settings
from hpctrain.pipeline.derived import derived_refused
from hpctrain.pipeline.message import marked_as, pack
from hpctrain.pipeline.part import INPUT, Cut, Env, Part, following, input_of
from hpctrain.pipeline.schedule import Instruction, Receive, ReceiveGradient, Send, SendGradient
from hpctrain.pipeline.trace import Like
from hpctrain.pipeline.transport import BACKWARD, FORWARD, KINDS, PeerFailedError, Transport
from hpctrain.tensors import changed_once, firsts, tensors_in


@dataclass
class Kept:
    """What a micro-batch leaves on a stage between forward and backward."""

    received: dict[int, Env] = field(default_factory=dict)
    """By earlier stage."""
    found: Env = field(default_factory=dict)
    """What the part gave."""
    draws: int = 0
    """After the part's own."""
    given: Env = field(default_factory=dict)
    """What the part got, to run it again; nothing if it changed that in place."""
    gone: bool = False
    """Whether the graph was let go."""
    stream: int = 0
    start: int = 0
    """The random stream, and the draws before the part."""
    gradients: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """What came back for values given or used here."""
    returned: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """Gradients of what was received, by the id of the value: as they come, `.grad` would lay them anew."""

    def begin(self, values: Env) -> Env:
        """Give what was received as values that this stage's graph begins with. Local."""
        if len(values) == 1 and isinstance(value := next(iter(values.values())), torch.Tensor):
            return {next(iter(values)): self._begun(value)}
        return changed_once(self._begun, values)  # type: ignore[no-any-return]

    def _begun(self, leaf: torch.Tensor) -> torch.Tensor:
        if not leaf.requires_grad:
            return leaf
        caught: list[torch.Tensor] = []
        with torch.enable_grad():  # in evaluation, too, layers may ask for gradients
            value: torch.Tensor = _Begin.apply(leaf, caught)  # type: ignore[no-untyped-call]
        marked_as(leaf, value)
        self.returned[id(value)] = caught
        return value


class _Begin(torch.autograd.Function):
    """What came, as a value that may be changed in place, which a leaf may not; catches its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, caught: list[torch.Tensor]) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.caught = caught
        return x.detach()  # counts its changes with x, by which a forward that can't run again is known

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[None, None]:
        if gradient is not None:
            ctx.caught.append(gradient)
        return None, None


class Stage:
    """One stage of a model in pieces, on this rank. Local, but waits for others where it receives."""

    def __init__(self, cut: Cut, stage: int, transport: Transport, recomputes: bool = False) -> None:
        """Take the model in pieces, the number of the stage and what carries messages.

        `recomputes`: graphs of forwards are let go, and made again for backward.
        """
        self.cut, self.stage, self.transport, self.recomputes = cut, stage, transport, recomputes
        self.kept: dict[int, Kept] = {}
        self.keeps = False
        """Whether its forward changes buffers without torch's counting it: it can't be run again."""
        self.shared: list[tuple[str, Callable[[], list[tuple[int, int]]]]] = []
        """What other stages use, too, and its marks: no forward may change it, which they would not see."""

    @property
    def last(self) -> bool:
        """Whether the loss is computed here."""
        return self.stage == self.cut.stages - 1

    def part(self, samples: int, training: bool, like: Like | None = None) -> Part:
        """What this stage does with so many samples."""
        return self.cut.part(self.stage, samples, training, like)

    @property
    def reads_inputs(self) -> bool:
        """Whether this stage may ask for the model's inputs: one in the middle of layers does not."""
        return self.stage == 0 or self.last or self.cut.by_shape

    def to(self, target: int, kind: int) -> tuple[int, int]:
        """Rank and tag of the messages for a stage; ranks may run several. Local."""
        ranks = self.transport.comm.size
        return target % ranks, self._tag(self.stage // ranks, target // ranks, kind)

    def of(self, source: int, kind: int) -> tuple[int, int]:
        """Rank and tag of the messages from a stage. Local."""
        ranks = self.transport.comm.size
        return source % ranks, self._tag(source // ranks, self.stage // ranks, kind)

    def _tag(self, source: int, target: int, kind: int) -> int:
        return kind + KINDS * (source * (self.cut.stages // self.transport.comm.size) + target)

    # -- forward -----------------------------------------------------------------------------

    def receive(self, v: int, part: Part) -> None:
        """Take the activations of a micro-batch. Raises PeerFailedError once all have come."""
        kept = self.kept[v] = Kept()
        failures: list[Exception] = []
        for producer in sorted(p for p in part.needs if p != INPUT):
            try:
                values, draws = self.transport.receive(*self.of(producer, FORWARD), v)
                kept.received[producer] = kept.begin(values)
                kept.draws = max(kept.draws, draws)
            except Exception as error:
                failures.append(error)
        raise_first(failures)

    def forward(self, v: int, part: Part, inputs: Env, stream: int) -> Any:
        """Run the part; gives the model's output on the last stage. Local.

        Raises ConfigError where it changes what another stage uses, too.
        """
        kept = self.kept.setdefault(v, Kept())
        env = {name: value for values in kept.received.values() for name, value in values.items()}
        given = {**{input_of(name): value for name, value in inputs.items()}, **env}
        kept.stream, kept.start = stream, kept.draws
        versions, before = versions_of(given), [marks() for _, marks in self.shared]
        held = settings()
        with derived_refused(self.stage, tensors_in(kept.received)):
            found, kept.draws = part.run(given, stream, kept.start)
        self._refuse_settings(held)
        for (name, marks), old in zip(self.shared, before):
            if marks() != old:
                raise ConfigError(
                    f"the forward of stage {self.stage} changes {name}, which another stage uses, too, and "
                    f"would see it late or never: set parallel.cuts so that one has all its uses"
                )
        names = {name for given in part.gives.values() for name in given}
        kept.found = {name: found[name] for name in found if name in names}
        if versions_of(given) == versions:
            kept.given = given
        return found.get("output")

    def _refuse_settings(self, before: list[Any]) -> None:
        """Refuse a forward that has set something for all that follows: other ranks would not have it."""
        for what, then, now in zip(SETTINGS, before, settings()):
            if then != now:
                raise ConfigError(
                    f"the forward of stage {self.stage} leaves {what} set to {now} (it was {then}), which "
                    f"layers of other stages would not see: set it back in the layer that sets it (a with "
                    f"block does), or set parallel.cuts so that one stage has all between"
                )

    def let_go(self, v: int) -> None:
        """Let the graph of a forward go, if it can be run again: it has not changed what it got. Local.

        The last stage keeps it: there the loss hangs on it.
        """
        kept = self.kept[v]
        if self.recomputes and not self.last and not self.keeps and kept.given:
            kept.gone = True
            kept.found = changed_once(without_graph, kept.found)

    def again(self, v: int, part: Part) -> None:
        """Run the part once more, for the graph that was let go. Local.

        Raises ConfigError where it gives other numbers than those that were sent.
        """
        kept = self.kept[v]
        found, _ = part.run(kept.given, kept.stream, kept.start)
        old, kept.found = kept.found, {name: found[name] for name in kept.found}
        before, now = _pytree.tree_leaves(old), _pytree.tree_leaves(kept.found)
        pairs = list(zip(before, now))
        if len(before) != len(now) or not all(same(a, b) for a, b in pairs):
            raise ConfigError(
                f"stage {self.stage} gives other numbers when its forward is run again (it counts its calls, "
                f"or draws from a stream that is not torch's): set parallel.recompute = never"
            )
        new = {id(a): b for a, b in pairs}
        kept.gradients = [(new.get(id(leaf), leaf), gradient) for leaf, gradient in kept.gradients]

    def send(self, v: int, part: Part) -> None:
        """Start to send what later stages want. Local."""
        kept = self.kept[v]
        packed = {
            target: pack(target, v, {name: kept.found[name] for name in names}, kept.draws)
            for target, names in part.gives.items()
        }
        self.transport.start(*((*self.to(target, FORWARD), ready) for target, ready in packed.items()))

    # -- backward ----------------------------------------------------------------------------

    def receive_gradient(self, v: int, part: Part) -> None:
        """Take the gradients of what was sent, and of what later stages use too."""
        kept, failures = self.kept[v], list[Exception]()
        values = {name: value for given in kept.received.values() for name, value in given.items()}
        values |= kept.found  # what came and goes on may have been changed here
        for source, names in sorted(part.awaits.items(), reverse=True):
            try:
                found, _ = self.transport.receive(*self.of(source, BACKWARD), v)
            except Exception as error:
                failures.append(error)
                continue
            leaves = _pytree.tree_leaves({name: values[name] for name in names})
            kept.gradients += [(leaf, g) for leaf, g in zip(leaves, found, strict=True) if g is not None]
        raise_first(failures)

    def backward(self, v: int, loss: torch.Tensor | None) -> None:
        """Run backward from the loss, or from the gradients that came. Local."""
        if loss is not None:
            torch.autograd.backward(loss)
            return
        pairs = self.kept[v].gradients
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])

    def where(
        self, v: int, part: Part, loss_of: Callable[[Any], torch.Tensor], parameters: list[nn.Parameter],
        error: Exception,
    ) -> str:  # fmt: skip
        """Say in which layer a backward pass has raised `error`: run it again, with an eye on it. Local.

        Nothing is added to gradients. Raises whatever hinders it; gives "" if that can't be told.
        """
        kept, trail = self.kept[v], list[str]()
        inputs = [leaf for leaf in [*tensors_in(kept.given), *parameters] if leaf.requires_grad]
        with following(trail):
            found, _ = part.run(kept.given, kept.stream, kept.start)
        new, old = _pytree.tree_leaves({n: found[n] for n in kept.found}), _pytree.tree_leaves(kept.found)
        again = {id(a): b for a, b in zip(old, new, strict=True)}
        pairs = [(again.get(id(value), value), gradient) for value, gradient in kept.gradients]
        if self.last:
            loss = loss_of(found["output"])
            pairs = [(loss, torch.ones_like(loss))]
        values, gradients = zip(*pairs, strict=True)
        try:
            torch.autograd.grad(values, inputs, gradients, allow_unused=True)
        except Exception as other:
            alike = type(other) is type(error) and str(other) == str(error)
            return trail[-1] if trail and alike else ""
        return ""  # it did not fail this time

    def send_gradient(self, v: int, part: Part) -> None:
        """Start to send the gradients of what was received; the micro-batch is done. Local."""
        kept = self.kept[v]
        values = {name: value for given in kept.received.values() for name, value in given.items()}
        packed = {}
        for target, names in part.returns.items():
            leaves = _pytree.tree_leaves({name: values[name] for name in names})
            caught = [kept.returned.get(id(leaf)) for leaf in leaves]
            gradients = [found[0] if found else None for found in caught]
            if len(leaves) > 1:  # what came in several places has one gradient
                first = firsts(leaves)
                gradients = [g if first[at] == at else None for at, g in enumerate(gradients)]
            packed[target] = pack(target, v, gradients, 0)
        self.transport.start(*((*self.to(target, BACKWARD), ready) for target, ready in packed.items()))

    def forget(self, v: int) -> None:
        """Let go of a micro-batch's activations. Local."""
        self.kept.pop(v, None)

    # -- failing -----------------------------------------------------------------------------

    def fail(self, instruction: Instruction, part: Part) -> None:
        """Do in name only what the instruction says: take what comes, send word of the failure."""
        v = instruction.micro_batch
        producers = sorted(p for p in part.needs if p != INPUT)
        if isinstance(instruction, Receive):
            self._drop(producers, FORWARD, v)
        elif isinstance(instruction, ReceiveGradient):
            self._drop(sorted(part.awaits, reverse=True), BACKWARD, v)
        elif isinstance(instruction, Send):
            for target in part.gives:
                self.transport.send_failure(*self.to(target, FORWARD), v)
        elif isinstance(instruction, SendGradient):
            for target in part.returns:
                self.transport.send_failure(*self.to(target, BACKWARD), v)
            self.forget(v)

    def _drop(self, stages: list[int], kind: int, v: int) -> None:
        for stage in stages:
            self.transport.drop(*self.of(stage, kind), v)


def raise_first(failures: list[Exception]) -> None:
    """Raise the first failure of this rank's own, else one of another's, if there is any. Local."""
    for failure in sorted(failures, key=lambda failure: isinstance(failure, PeerFailedError)):
        raise failure


def versions_of(given: Any) -> list[int]:
    """Count the changes in place of each tensor."""
    return [tensor._version for tensor in tensors_in(given)]


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are the same bits."""
    if isinstance(one, torch.Tensor):
        if not isinstance(other, torch.Tensor) or one.shape != other.shape:
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())  # not a number twice, too
    return bool(one == other or (one != one and other != other))


def without_graph(tensor: torch.Tensor) -> torch.Tensor:
    """Give the same numbers without what made them, still to be differentiated."""
    return marked_as(tensor, tensor.detach().requires_grad_(tensor.requires_grad))
