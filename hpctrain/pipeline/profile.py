"""What pieces of a model cost for a micro-batch of the first batch: seconds, and memory.

      pieces    0 1 2 3 4 5 6 7           each rank measures every n-th; weights and what other pieces give
      ranks     0 1 2 3 0 1 2 3           are made up in their shapes, so no rank needs the model
      yardstick a product of matrices     how fast a rank is; near equals count as equal

The model itself is not run: copies of layers are, so no random stream of it moves on, and no buffer changes.
What a layer counts outside of itself (in its class, say) is counted there too.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from mpi4py import MPI
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from hpctrain.draws import streams_kept
from hpctrain.errors import text_of
from hpctrain.gradient import StraightIntoPlace
from hpctrain.modes import settings_kept
from hpctrain.pipeline.held import Living, bytes_kept
from hpctrain.pipeline.operators import called, changes
from hpctrain.pipeline.schedule import BackwardInput, BackwardWeight, Forward, Instruction, behind
from hpctrain.pipeline.simulate import Cost
from hpctrain.pipeline.skeleton import skeleton
from hpctrain.pipeline.trace import Traced
from hpctrain.room import ran_out
from hpctrain.tensors import containers_copied, hooked, tensors_in, with_tensors

REPEATS, MOST_REPEATS = 3, 12
"""Of each measurement, behind one to warm up; the least of them counts."""
ENOUGH_SECONDS = 0.05
"""A piece is repeated more often while that takes less in all."""
LONG_SECONDS = 0.5
"""A piece that takes longer is not repeated."""
YARDSTICK_ROWS, YARDSTICK_REPEATS = 384, 20
"""Some 30 ms in all."""
NAP_SECONDS = 1e-3
ALIKE = 1.25
"""Ranks whose yardsticks are within this ratio count as equally fast: a busy moment is no slow node."""


@dataclass(frozen=True)
class Work:
    """What a piece costs for one micro-batch, on the rank that measured it. Pure."""

    forward: float
    """Seconds."""
    input_gradient: float
    """Seconds of a backward that leaves out the weight gradients that may wait."""
    weight_gradient: float
    """Seconds of those, by themselves."""
    kept: int
    """Bytes that stay from forward to backward, weights left out."""
    joint: float = 0.0
    """Seconds of a backward as a whole, in which nothing waits; 0 where that was not measured."""
    late: int = 0
    """Bytes that wait with the weight gradients, between the halves of a backward."""
    moment: int = 0
    """Bytes that a pass takes at once, beside what stays."""
    gives: int = 0
    """Bytes of what the pieces behind it get from it and those before it."""
    own: int = 0
    """Bytes of `kept` that no other piece can have kept, too: what it was given is left out."""
    sooner: float = 0.0
    """Seconds by which `input_gradient` is shorter in micro-batches whose weight gradients come `behind`."""
    tail: float = 0.0
    """Seconds by which `weight_gradient` is longer in those."""
    together: int = 0
    """Bytes that wait for weight gradients of other micro-batches, at most: computed one after the other they
    find theirs in the caches, which one piece, measured by itself, does anyway."""

    @property
    def seconds(self) -> float:
        """Of all passes."""
        return self.forward + self.input_gradient + self.weight_gradient

    @property
    def whole(self) -> "Work":
        """The same work with a backward that is not split."""
        return replace(self, input_gradient=self.backward, weight_gradient=0.0, late=0, together=0)

    @property
    def at_once(self) -> "Work":
        """The same work with a backward that is split where the weight gradients come `behind`."""
        sooner = self.backward - self.input_gradient
        return replace(self.whole, sooner=sooner, tail=self.weight_gradient, late=self.late)

    @property
    def backward(self) -> float:
        """Seconds of a backward that is not split."""
        return self.joint or self.input_gradient + self.weight_gradient

    def times(self, factor: float) -> "Work":
        """Give the same work on a rank that takes so many times as long."""
        return replace(
            self,
            forward=factor * self.forward,
            input_gradient=factor * self.input_gradient,
            weight_gradient=factor * self.weight_gradient,
            joint=factor * self.joint,
            sooner=factor * self.sooner,
            tail=factor * self.tail,
        )


def cost_of(passes: Sequence[Work], programs: Sequence[Sequence[Instruction]]) -> Cost:
    """Give what a pass costs on a stage, by the stages' work and all ranks' programs. Pure."""
    late = [behind(program) if rank else set[int]() for rank, program in enumerate(programs)]

    def cost(stage: int, instruction: Instruction) -> float:
        work, waits = passes[stage], instruction.micro_batch in late[stage % len(late)]
        match instruction:
            case Forward():
                return work.forward
            case BackwardInput():
                return work.input_gradient - work.sooner * waits
            case BackwardWeight():
                return work.weight_gradient + work.tail * waits
        return work.backward

    return cost


@dataclass(frozen=True)
class Held:
    """Bytes of a piece's own tensors; what several pieces use is the first one's."""

    trained: int
    other: int = 0
    """Frozen weights and buffers."""

    @classmethod
    def of_each(cls, pieces: Iterable[Iterable[torch.Tensor]]) -> list["Held"]:
        """Count the tensors of each piece. Pure."""
        found, before = list[Held](), set[int]()
        for tensors in pieces:
            own = {id(tensor): tensor for tensor in tensors if id(tensor) not in before}
            before |= own.keys()
            sizes = [(tensor.requires_grad, tensor.nbytes) for tensor in own.values()]
            found.append(cls(sum(n for grad, n in sizes if grad), sum(n for grad, n in sizes if not grad)))
        return found


@dataclass(frozen=True)
class Limits:
    """Bytes that stages may take, as far as one rank knows, or all of them."""

    usual: list[float]
    """By rank of a pipeline: its share of a node, less what is left for what nothing here counts."""
    most: list[float]
    """By rank of a pipeline: what it could have if all others had nothing."""
    share: float
    """Of a rank, or of all ranks of a pipeline: of what there is."""

    @classmethod
    def of_all(cls, answers: Sequence["Limits"]) -> "Limits":
        """Join what the ranks of all pipelines say. Pure."""
        usual = [min(each) for each in zip(*(a.usual for a in answers))]
        most = [min(each) for each in zip(*(a.most for a in answers))]
        return cls(usual, most, sum(a.share for a in answers) * len(usual) / len(answers))


@dataclass(frozen=True)
class Profile:
    """What all pieces cost on the fastest rank, and how fast each rank of the job is."""

    works: list[Work]
    speeds: list[float]
    """By rank of the communicator; 1 for the fastest."""
    limits: Limits


@dataclass(frozen=True)
class Unmeasured:
    """Why pieces could not be measured."""

    reason: str
    short: bool
    """Whether there was no memory for it."""
    limits: Limits


def measure(
    comm: MPI.Intracomm,
    pieces: Sequence[Callable[[], Work]],
    around: AbstractContextManager[Any],
    turn: tuple[int, int],
    limits: Callable[[], Limits],
    names: Sequence[str],
) -> Profile | Unmeasured:
    """Measure pieces, spread over the ranks; all ranks get the same, or why there is none. Collective.

    `around` is what the passes run under (autocast); `turn`: which of how many turns is this rank's, where
    ranks outnumber cores and would disturb one another; `limits` is asked behind it all, as libraries
    take memory when they first run; `names` are the pieces', for an error.
    """
    failed, mine, at = None, dict[int, Work](), -1
    reference = 0.0
    for number in range(turn[1]):
        try:
            if number == turn[0]:
                with streams_kept(), around:
                    for at in range(comm.rank, len(pieces), comm.size):
                        with settings_kept():
                            mine[at] = pieces[at]()
                    reference = yardstick()
        except (Exception, SystemExit) as error:  # made-up numbers don't suit every operator
            line = next(iter(text_of(error).strip().splitlines()), "")
            which = f"piece {at + 1} of {len(pieces)}" + (f", {names[at]}" if names else "")
            failed = f"{which}: {type(error).__name__}: {line}", ran_out(error)
        done = comm.Ibarrier()
        while not done.Test():
            time.sleep(NAP_SECONDS)
    shares = comm.allgather((failed, mine, reference, limits()))
    found = Limits.of_all([left for *_, left in shares])
    failures: list[tuple[str, bool]] = [told for told, *_ in shares if told]
    if failures:
        return Unmeasured(*failures[0], found)
    fastest = min(took for _, _, took, _ in shares)
    speeds = [1.0 if took <= ALIKE * fastest else fastest / took for _, _, took, _ in shares]
    works: list[Work] = [Work(0.0, 0.0, 0.0, 0)] * len(pieces)
    for (_, share, *_), speed in zip(shares, speeds):
        for at, work in share.items():
            works[at] = work.times(speed)
    return Profile(works, speeds, found)


def yardstick() -> float:
    """Time one product of matrices, the least of many: how fast this rank is. Local."""
    square = torch.rand(YARDSTICK_ROWS, YARDSTICK_ROWS)
    times = []
    for _ in range(YARDSTICK_REPEATS):
        began = time.perf_counter()
        square @ square
        times.append(time.perf_counter() - began)
    return min(times)


def timed(
    run: Callable[[], Any],
    weights: Iterable[torch.Tensor],
    inputs: Iterable[torch.Tensor],
    waiting: Iterable[torch.Tensor],
) -> Work:
    """Time a forward, its backward as a whole, and in two halves; count what they hold. Local.

    They run as a step's do, weight gradients straight into places, but that no weight is laid for several
    products. The gradients of `waiting` weights may wait; the others' are with those of the inputs.
    """
    weights, inputs = list(weights), list(inputs)
    leaves = [x for x in [*inputs, *weights] if x.requires_grad]
    late = together = 0
    straight = StraightIntoPlace(nn.Module(), MadeUpPlaces())
    straight.weights = {id(weight): weight for weight in waiting}

    def once(micro_batch: int) -> tuple[float, float, float]:
        nonlocal late, together
        began = time.perf_counter()
        with straight.forward(micro_batch):
            every = tensors_in(run())
        between = time.perf_counter()
        outputs = [leaf for leaf in every if leaf.requires_grad]
        ones = [torch.ones_like(output) for output in outputs]
        ready = time.perf_counter()
        if outputs and leaves:
            with straight.accumulating(micro_batch):
                torch.autograd.grad(outputs, leaves, ones, allow_unused=True)
        behind = time.perf_counter()
        late, together = max(late, straight.waiting_bytes), max(together, straight.together_bytes)
        half = time.perf_counter()
        straight.weights_of(micro_batch, last=True)
        return between - began, behind - ready, time.perf_counter() - half

    kept, made, gives = bytes_kept(run, weights, inputs)
    found: list[tuple[float, ...]] = []
    began = time.perf_counter()
    while len(found) <= MOST_REPEATS:
        forward, joint, _ = once(-1)
        found.append((forward, joint, *once(0)[1:]))
        if forward + joint > LONG_SECONDS:
            break
        if len(found) > REPEATS and time.perf_counter() - began > ENOUGH_SECONDS:
            break
    forward, joint, *halves = (min(column) for column in zip(*(found[1:] or found)))
    with Living() as living:  # the places of gradients are there by now
        once(0)
    moment = max(0, living.most - made)
    if not straight.weights:
        return Work(forward, joint, 0.0, kept, joint, 0, moment, gives, made)
    return Work(forward, halves[0], halves[1], kept, joint, late, moment, gives, made, together=together)


class MadeUpPlaces:
    """Where the gradients of made-up weights go."""

    def __init__(self) -> None:
        """Have none yet."""
        self._places: dict[int, torch.Tensor] = {}

    def place(self, parameter: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Give its memory, to be added to."""
        if id(parameter) not in self._places:
            self._places[id(parameter)] = torch.zeros_like(parameter)
        return self._places[id(parameter)], False

    def filled(self, parameter: torch.Tensor) -> None:
        """Nothing to note."""

    def came(self) -> None:
        """Nothing to take: autograd has its own `.grad`."""

    def later(self, *parameters: torch.Tensor) -> bool:
        """All may wait."""
        return True

    def left(self, *parameters: torch.Tensor, waits: bool) -> bool:
        """All may be left to autograd that don't wait."""
        return not waits

    def caught_up(self, parameter: torch.Tensor) -> None:
        """Nothing to note."""

    def taken_back(self, parameter: torch.Tensor) -> None:
        """Nothing to note."""


def made_up(like: torch.Tensor, grad: bool = True) -> torch.Tensor:
    """Give numbers of a tensor's shape, strides and dtype, its own where it has memory. Local.

    Else weights in the scale of torch's own start, near 1 where there is one dimension; zeros for integers.
    """
    if any(size > 1 and stride == 0 for size, stride in zip(like.shape, like.stride())):  # expanded
        sizes = [1 if stride == 0 else size for size, stride in zip(like.shape, like.stride())]
        base = made_up(like[tuple(slice(size) for size in sizes)], grad=False)
        return base.expand(like.shape).detach().requires_grad_(grad and differentiable(like.dtype))
    found = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    numbers = differentiable(like.dtype)
    if not isinstance(like, FakeTensor) and like.device.type != "meta":
        found.copy_(like.detach())
    elif not numbers:
        found.zero_()
    else:
        drawn = torch.rand(like.shape, dtype=like.dtype)
        rows = max(1, found.numel() // max(1, len(found))) if found.ndim > 1 else 1
        found.copy_(drawn.sub_(0.5).mul_(2.0 * rows**-0.5) if found.ndim > 1 else drawn.add_(0.5))
    return found.requires_grad_(grad and numbers)


def differentiable(dtype: torch.dtype) -> bool:
    """Whether numbers of a type have gradients. Pure."""
    return dtype.is_floating_point or dtype.is_complex


def may_wait(tensors: Iterable[torch.Tensor], seen: Iterable[int]) -> set[int]:
    """Give the ids of tensors among those `seen` whose gradients a step would let wait. Local."""
    ids = set(seen)
    return {id(t) for t in tensors if id(t) in ids and t.requires_grad and not hooked(t)}


def of_operators(
    nodes: list[fx.Node],
    traced: Traced,
    real: dict[str, torch.Tensor],
    seen: Iterable[int],
    inputs: dict[str, torch.Tensor],
    gives: int,
) -> Work:
    """Measure operators that follow one another. Local.

    `seen`: ids of weights whose gradients may wait; `inputs`: what the model is given, by name; `gives`:
    bytes of what operators behind these get from these and those before.
    """
    inside = {node.name for node in nodes}
    weights: dict[str, torch.Tensor] = {}
    given: dict[str, Any] = {}
    for node in nodes:
        for a in node.all_input_nodes:
            if a.name in inside or a.name in given:
                continue
            if a.name in traced.held:
                tensor = real[traced.held[a.name]]
                given[a.name] = weights[a.name] = made_up(tensor, tensor.requires_grad)
            elif a.name in traced.constants:
                given[a.name] = traced.constants[a.name]
            elif a.name in traced.inputs:
                given[a.name] = inputs[traced.inputs[a.name]].detach()
            else:
                given[a.name] = with_tensors(made_up, a.meta["val"])
    # what is changed must not be a leaf; running statistics are none
    in_place = any(changes(node) for node in nodes if node.target is not torch.ops.aten.batch_norm.default)
    moved = [name for name in given if in_place and name not in weights]

    def run() -> list[Any]:
        env = dict(given)
        env.update({name: with_tensors(torch.clone, given[name]) for name in moved})
        for node in nodes:
            arguments, named = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: env[n.name])
            env[node.name] = called(node, arguments, named)
        leaves = [n for n in nodes if not n.users or any(user.name not in inside for user in n.users)]
        return [env[node.name] for node in leaves]

    received = [v for name, v in given.items() if name not in weights and isinstance(v, torch.Tensor)]
    own = may_wait((real[traced.held[name]] for name in weights), seen)
    waiting = [w for name, w in weights.items() if id(real[traced.held[name]]) in own]
    return replace(timed(run, weights.values(), received, waiting), gives=gives)


def of_layers(layers: Sequence[nn.Module], value: Any, seen: Iterable[int]) -> list[Callable[[], Work]]:
    """Give what measures each of layers that follow one another from a value; run them in order. Local.

    `seen`: ids of the weights whose gradients may wait.

    What a layer gives is what the next one gets, so each is run at least once by every rank. Copies run,
    with weights and buffers made up: the model's own, its hooks and what it counts stay as they are.
    """
    given = {0: value}

    def piece(at: int) -> Work:
        for before in range(max(given), at):
            run, _ = of_layer(layers[before], given.pop(before))
            with torch.no_grad():
                given[before + 1] = run()
        value = with_tensors(lambda t: made_up(t, at > 0), given[at])
        run, numbers = of_layer(layers[at], value)
        inputs = tensors_in(value)
        own = may_wait(layers[at].parameters(), seen)
        waiting = [numbers[name] for name, p in layers[at].named_parameters() if id(p) in own]
        return timed(run, numbers.values(), inputs, waiting)

    return [partial(piece, at) for at in range(len(layers))]


def of_layer(layer: nn.Module, value: Any) -> tuple[Callable[[], Any], dict[str, torch.Tensor]]:
    """Give what runs a copy of a layer on a value, and its made-up weights and buffers. Local."""
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    twin = skeleton(layer, FakeTensorMode())
    numbers = {name: made_up(tensor, tensor.requires_grad) for name, tensor in tensors.items()}
    in_place = any(getattr(module, "inplace", False) for module in layer.modules())

    def run() -> Any:
        # what is changed must not be a leaf
        own = with_tensors(torch.clone, value) if in_place else containers_copied(value)
        return torch.func.functional_call(twin, numbers, (own,))

    return run, numbers
