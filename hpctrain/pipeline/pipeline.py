"""This rank's stages of a model in pieces, and the parameters that several stages use.

Stage s is on rank s % ranks: one a rank, or several virtual ones. A parameter that several stages use
belongs to the rank of the first of them; the others' ranks hold copies, whose gradients come to the owner
and which get its new numbers after each step.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI
from torch import nn

from hpctrain.errors import ConfigError, HpctrainError
from hpctrain.gradient import Places
from hpctrain.hidden import notes_on, submodule
from hpctrain.pipeline.message import pack
from hpctrain.pipeline.part import Cut, Env, Part
from hpctrain.pipeline.stage import Stage
from hpctrain.pipeline.ties import Copies, Relay, Tie
from hpctrain.pipeline.trace import Like
from hpctrain.pipeline.transport import KINDS, TIED, PeerFailedError, Transport
from hpctrain.tensors import OurHook, hooked
from hpctrain.wire import together

MOST_PARTS = 64
"""That are kept, beside those of the batches that run."""


class Pipeline:
    """What one rank runs of a model in pieces."""

    def __init__(
        self,
        cut: Cut,
        transport: Transport,
        ties: Sequence[Tie] = (),
        recomputes: bool = False,
        kept: int = 1,
        elsewhere: Sequence[nn.Module] = (),
        borrowed: Sequence["Borrowed"] = (),
    ) -> None:
        """Take the model in pieces, what carries messages, and what several stages use.

        `elsewhere`: modules all of whose tensors other ranks have; `borrowed`: modules that have copies of
        other stages'; `recomputes`: stages let the graphs of
        their forwards go, and make them again for backward; `kept`: the most micro-batches that are on their
        way at once.
        """
        self.kept, self.elsewhere, self._borrowed = kept, elsewhere, borrowed
        self.cut, self.transport, self.ties = cut, transport, ties
        self.rank, self.ranks = transport.comm.rank, transport.comm.size
        self.virtual = cut.stages // self.ranks
        numbers = [at * self.ranks + self.rank for at in range(self.virtual)]
        highest, most = KINDS * self.virtual**2 - 1, int(MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 0)
        if highest > most:
            raise ConfigError(
                f"{self.virtual} stages a rank need message tags up to {highest:,}, and this MPI has "
                f"{most:,}: take fewer (parallel.virtual_stages)"
            )
        self.stages = [Stage(cut, number, transport, recomputes) for number in numbers]
        for stage in self.stages:
            stage.shared = [(tie.name, tie.marks) for tie in ties if self.rank in (tie.owner, *tie.others)]
        self._parts: dict[tuple[int, int, bool, str], Part] = {}
        """By stage, number of samples, whether in training, and shapes if it hangs on them."""
        self._change = [tie.tensor.requires_grad for tie in ties]
        """Whether a step changes what several stages use."""

    @property
    def reads_inputs(self) -> bool:
        """Whether a stage here may ask for the model's inputs."""
        return any(stage.reads_inputs for stage in self.stages)

    def names(self) -> list[list[str]]:
        """Names of the modules that each stage runs. Local."""
        return [self.cut.names(stage.stage) for stage in self.stages]

    def rows(self) -> list[list[str]]:
        """Names of the rows of convolutions of each stage. Local."""
        return [self.cut.rows(stage.stage) for stage in self.stages]

    def parts(
        self, batches: Mapping[int, tuple[int, Env]], training: bool, when: str, unread: bool = False
    ) -> dict[tuple[Stage, int], Part]:
        """Say what each stage does with each micro-batch, given its samples and inputs. Collective (stages).

        Where there are as many samples as never before, or of other shapes, a forward may have to be written
        down, and what fails on one stage is raised on all; `when` is for that error. What hangs on shapes a
        stage that has not read (`unread`) can't say: PeerFailedError on all of them.
        """
        shapes = {v: repr(like_of(x)) if self.cut.by_shape else "" for v, (_, x) in batches.items()}
        keys = {
            (stage, v): (stage.stage, samples, training, shapes[v])
            for v, (samples, _) in batches.items()
            for stage in self.stages
        }
        new = not self._parts.keys() >= {*keys.values()}
        if self.cut.by_shape:  # else all know it: the number of samples says it
            new, failed = self.transport.anywhere(new, unread)
            if failed:
                error = PeerFailedError("a stage has not read its micro-batches")
                error.agreed = True
                raise error
        if new:
            with together(self.transport.comm):
                for (stage, v), key in keys.items():
                    if key not in self._parts:
                        self._parts[key] = self._part(stage, v, *batches[v], training, when)
        if len(self._parts) > MOST_PARTS + len(batches):
            wanted = {*keys.values()}
            for old in [key for key in self._parts if key not in wanted][:-MOST_PARTS]:
                del self._parts[old]
        return {at: self._parts[key] for at, key in keys.items()}

    def _part(self, stage: Stage, v: int, samples: int, inputs: Env, training: bool, when: str) -> Part:
        try:
            return stage.part(samples, training, like_of(inputs))
        except Exception as error:
            where = f"{when}, micro-batch {v} of {samples} samples, stage {stage.stage}"
            if isinstance(error, HpctrainError):
                raise type(error)(f"{error} ({where})") from error
            error.add_note(where)
            raise

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let modules have other stages' parameters among their own: the user's code may list them. Local."""
        try:
            for one in self._borrowed:
                one.give()
            yield
        finally:
            for one in self._borrowed:
                one.take()

    def parameters(self, module: nn.Module) -> list[list[nn.Parameter]]:
        """Give the parameters that each stage owns; one that several use here is the first one's. Local."""
        left = dict.fromkeys(module.parameters())
        every = list(module.named_parameters(remove_duplicate=False))
        found = []
        for stage in self.stages:
            names = set(self.cut.tensors(stage.stage))
            own = [p for p in dict.fromkeys(p for name, p in every if name in names) if p in left]
            found.append(own)
            for parameter in own:
                del left[parameter]
        found[0] += left  # what nobody uses
        return found

    def places(self, own: Places, relays: bool = False) -> Places:
        """Give where gradients go here: those of parameters to their `own` places. Local.

        `relays`: those of copies go to the owners micro-batch by micro-batch, in the order of one process.
        """
        copies = [tie.tensor for tie in self.ties if self.rank in tie.others and tie.tensor.requires_grad]
        self.copies = Copies(own, copies, apart=relays)
        self.relay = Relay(self.ties if relays else [], self.copies, self.transport)
        return self.copies

    def collect(self, add: Callable[[nn.Parameter, torch.Tensor], None]) -> None:
        """Bring the gradients of copies to the owners, who `add` them. Collective over the stages."""
        if self.copies.apart:
            return  # they have come
        if self.ties:
            self.transport.watch.doing("waits for the gradients of what several stages use")
        for number, tie in enumerate(self.ties):
            if not tie.tensor.requires_grad:
                continue
            if self.rank == tie.owner:
                for other in tie.others:
                    gradient, _ = self.transport.receive(other, TIED, number)
                    if gradient is not None:
                        add(tie.tensor, gradient)  # type: ignore[arg-type]
            elif self.rank in tie.others:
                gradient = self.copies.taken(tie.tensor)
                self.transport.start((tie.owner, TIED, pack(tie.owner, number, gradient, 0)))
                self.transport.finish()

    @torch.no_grad()
    def refresh(self, every: bool = True) -> None:
        """Give the owners' numbers to the copies, `every` one or what a step changes. Collective (stages)."""
        self.transport.grow()
        if not every:
            self.cut.compare(self.transport.comm)
        for number, tie in enumerate(self.ties):
            if not (every or self._change[number]):
                continue
            if self.rank == tie.owner:
                for other in tie.others:
                    self.transport.start((other, TIED, pack(other, number, tie.tensor.detach(), 0)))
            elif self.rank in tie.others:
                tie.tensor.copy_(self.transport.receive(tie.owner, TIED, number)[0])
        self.transport.finish()

    def close(self) -> None:
        """Free the communicator. Collective."""
        self.transport.close()


def like_of(inputs: Env) -> Like:
    """Give the shapes of samples, and their dtypes. Pure."""
    return {name: (tuple(x.shape[1:]), x.dtype) for name, x in inputs.items()}


def every_tensor(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """List parameters and buffers by all of their names. Local."""
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def users_of(module: nn.Module, cut: Cut) -> dict[str, list[int]]:
    """Give the stages that use each tensor, by its first name; the first one owns it. Local.

    What nobody uses is stage 0's.
    """
    first: dict[int, str] = {}
    everything = every_tensor(module)
    for name, tensor in everything:
        first.setdefault(id(tensor), name)
    by_name = dict(everything)
    users: dict[str, set[int]] = {name: set() for name in first.values()}
    for at in range(cut.stages):
        for name in cut.tensors(at):
            users[first[id(by_name[name])]].add(at)
    return {name: sorted(stages or {0}) for name, stages in users.items()}


def _elsewhere(name: str, _: torch.Tensor) -> None:
    """Refuse a gradient that has come to another stage's weight: this rank's is an old one. Local."""
    raise ConfigError(
        f"{name} is used by a stage that has it from elsewhere (a function or object that remembers it, a "
        f"global, the loss), not from a module that it runs, so it would stay as it was at the start there: "
        f"use it by a module's attribute, or set parallel.cuts so that its stage makes all its uses"
    )


@dataclass(frozen=True)
class Share:
    """What a rank has of a model."""

    own: set[int]
    """Ids of the parameters and buffers of its own."""
    ties: list[Tie]
    """What several stages use."""
    elsewhere: list[nn.Module]
    """Modules all of whose parameters and buffers other ranks have."""
    borrowed: list["Borrowed"]
    """Modules that have copies."""


@dataclass(frozen=True)
class Borrowed:
    """A module that has copies of other stages' parameters, or buffers, among its own."""

    held: dict[str, torch.Tensor | None]
    """Its own ones, as torch keeps them."""
    attributes: dict[str, Any]
    """All that it has besides: the copies, too, but while it runs."""
    order: list[str]
    """Names of all of them."""
    copies: dict[str, torch.Tensor]

    def give(self) -> None:
        """Let it have the copies among its own, in the order of one process. Local."""
        every = {name: self.copies.get(name, self.held.get(name)) for name in self.order}
        for name in self.copies:
            self.attributes.pop(name, None)
        rest = {name: value for name, value in self.held.items() if name not in every}
        self.held.clear()
        self.held.update(every | rest)

    def take(self) -> None:
        """Take them away again: they are nothing to train or to store. Local."""
        for name in self.copies:
            if (value := self.held.pop(name, None)) is not None:
                self.attributes[name] = value


def take_share(module: nn.Module, cut: Cut, rank: int, ranks: int) -> Share:
    """Leave in the module what this rank's stages own. Local.

    Tensors that later stages of a tie use stay in their modules as plain attributes: no parameter
    to train or to store, but there for the forward; while that runs they are parameters (`Borrowed`).
    """
    everything = every_tensor(module)
    by_name = dict(everything)
    ties, mine, copies = [], set[int](), dict[int, torch.Tensor]()
    for name, stages in users_of(module, cut).items():
        tensor, at = by_name[name], id(by_name[name])
        here: torch.Tensor = tensor
        users = list(dict.fromkeys(stage % ranks for stage in stages))
        if rank == users[0]:
            mine.add(at)
        elif rank in users:
            here = tensor.detach().clone()
            trained = isinstance(tensor, nn.Parameter)
            here = nn.Parameter(here, tensor.requires_grad) if trained else here
            copies[at] = here
            vars(here).update(notes_on(tensor))
        if len(stages) > 1 and name.endswith("running_mean"):
            raise ConfigError(
                f"stages {stages[0]} and {stages[-1]} both call the BatchNorm of {name}, whose running "
                f"statistics have one place: set parallel.cuts so that one stage makes all its calls"
            )
        if len(stages) > 1 and hooked(tensor):
            raise ConfigError(
                f"there is a hook on the gradient of {name}, which stages {stages[0]} and {stages[-1]} both "
                f"use: none of them has the whole gradient of a micro-batch; set parallel.cuts so that one "
                f"stage makes all its uses, or leave the hook out"
            )
        if len(stages) > 1:
            paths = [path.rpartition(".") for path, other in everything if other is tensor]
            held = tuple((submodule(module, path), leaf) for path, _, leaf in paths)
            ties.append(Tie(name, here, users[0], tuple(users[1:]), held))
    if any(map(hooked, module.parameters())):  # which may look at what no operator uses
        used = {id(by_name[name]) for at in range(cut.stages) for name in cut.tensors(at)}
        copies |= {id(t): t for _, t in everything if id(t) not in used | mine}
    here_too = mine | copies.keys()
    tensors = {inner: [id(t) for _, t in every_tensor(inner)] for inner in module.modules()}
    elsewhere = [inner for inner, ids in tensors.items() if ids and here_too.isdisjoint(ids)]
    borrowed = []
    for _, owner in list(module.named_modules()):
        for kept in (owner._parameters, owner._buffers):
            theirs = {name: copies[id(value)] for name, value in kept.items() if id(value) in copies}
            if theirs:
                borrowed.append(Borrowed(kept, owner.__dict__, [*kept], theirs))
            for name, value in list(kept.items()):
                if value is None or id(value) in mine:
                    continue
                if name in theirs:
                    del kept[name]
                    owner.__dict__[name] = theirs[name]
                else:
                    kept[name] = None
    for name, tensor in everything:
        if id(tensor) not in here_too and isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            tensor.register_post_accumulate_grad_hook(OurHook(_elsewhere, name))  # type: ignore[no-untyped-call]
    if hasattr(cut, "adopt"):
        cut.adopt({name: copies.get(id(t), t) for name, t in everything if id(t) in here_too})
    return Share(mine, ties, elsewhere, borrowed)
