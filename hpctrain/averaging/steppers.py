"""From the mean gradient to new weights: torch's optimizer, run on what this rank owns.

`Adam` steps flat memory block by block with torch's fused kernel, while the mean gradient of the
block lies in the cache. `Pieces` runs any torch optimizer on tensors: cut at the borders of the
ranks' parts where the optimizer works element by element, whole ones otherwise. Both give what
torch's own step gives on whole tensors; a parameter that no sample used is left alone, as by torch.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from hpctrain.averaging.space import UNIT, Seat, Space, aligned, up
from hpctrain.errors import CheckpointError
from hpctrain.piece import Piece, whole

Owned = Callable[[tuple[int, int]], tuple[int, int]]
Shapes = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype name of stored tensors, by name."""

_ELEMENTWISE = [
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]
PLAIN = (int, float, bool, str, list, tuple, type(None))


def elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether each element of a parameter is stepped without a look at the others."""
    kind = type(optimizer)
    return kind.__module__.startswith("torch.optim.") and kind.__name__ in _ELEMENTWISE


def group_settings(group: dict[str, Any]) -> dict[str, Any]:
    """Give a parameter group's settings for a checkpoint. Raises CheckpointError for what can't be kept."""
    for key, value in group.items():
        if key != "params" and not isinstance(value, PLAIN):
            raise CheckpointError(
                f"the optimizer keeps {key} of a parameter group as a {type(value).__name__}: checkpoints "
                f"hold numbers and texts there, so it can't be resumed: give {key} as a plain number"
            )
    return {key: value for key, value in group.items() if key != "params"}


class Stepper(Protocol):
    """Steps the weights that a rank owns."""

    blockwise: bool
    """Whether `block` does the work, in any order of the blocks; else `step` does."""

    def begin(self, used: Sequence[bool]) -> None:
        """Start a step: which parameters, by index, got a gradient."""

    def block(self, number: int, start: int, stop: int, gradient: torch.Tensor) -> None:
        """Step numbers [start, stop) of a space by their mean gradient, (stop - start,)."""

    def step(self) -> None:
        """Step all, from the gradients in memory."""

    def needs(self) -> list[list[tuple[int, int]]] | None:
        """Ranges of each space whose mean gradient `step` reads beside this rank's parts."""

    def pieces(self) -> list[Piece]:
        """State, as tensors by name and range."""

    def scalars(self) -> dict[str, Any]:
        """State that is no tensor, by parameter."""

    def expect(self, scalars: dict[str, Any], tensors: Shapes) -> None:
        """Make room for a checkpoint's state, so that `pieces` offers it."""


class Adam:
    """AdamW and Adam (Loshchilov and Hutter 2019; Kingma and Ba 2015) on flat memory."""

    blockwise = True

    @staticmethod
    def fits(optimizer: torch.optim.Optimizer) -> bool:
        """Whether torch's fused kernel does this optimizer's work on flat memory."""
        plain = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        return plain and all(
            group["fused"] and not (group["amsgrad"] or group["capturable"] or group["differentiable"])
            for group in optimizer.param_groups
        )

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        spaces: list[Space],
        weights: list[torch.Tensor],
        owned: Owned,
    ) -> None:
        """Take the optimizer for its groups' settings, the flat weights and what this rank owns."""
        self.optimizer, self.spaces, self.weights = optimizer, spaces, weights
        self.parts = [[owned(bucket) for bucket in space.buckets] for space in spaces]
        self.moments = [
            [[aligned(b - a, s.dtype, s.device) for a, b in parts] for s, parts in zip(spaces, self.parts)]
            for _ in ("exp_avg", "exp_avg_sq")
        ]
        count = sum(len(space.seats) for space in spaces)
        self.steps = [0] * count
        for group in optimizer.param_groups:
            group["params"] = []  # its own step has nothing to do, but LR schedulers count it
        self._starts = [[seat.start for seat in space.seats] for space in spaces]
        self._used: list[bool] = []
        self._plans: dict[tuple[int, int, int], list[Any]] = {}

    def begin(self, used: Sequence[bool]) -> None:
        """Count the steps of used parameters; plans of blocks hold while the same ones are used."""
        if list(used) != self._used:
            self._used = list(used)
            self._plans.clear()
        for at, was in enumerate(used):
            self.steps[at] += bool(was)
        self._numbers: dict[int, torch.Tensor] = {}
        self.optimizer.step()

    def _number(self, step: int, device: torch.device) -> torch.Tensor:
        if step not in self._numbers:
            self._numbers[step] = torch.tensor(float(step), dtype=torch.float32, device=device)
        return self._numbers[step]

    def block(self, number: int, start: int, stop: int, gradient: torch.Tensor) -> None:
        """Run the fused kernel, once a parameter group."""
        key = (number, start, stop)
        if key not in self._plans:
            self._plans[key] = self._plan(number, start, stop)
        gradient = gradient.to(self.spaces[number].dtype)  # the sum of 16-bit gradients comes in float32
        for group, weights, means, squares, cuts, seats in self._plans[key]:
            settings = self.optimizer.param_groups[group]
            device = gradient.device
            decoupled = settings["decoupled_weight_decay"]
            kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
            kernel(
                weights,
                [gradient[a:b] for a, b in cuts],
                means,
                squares,
                [],
                [self._number(self.steps[seat], device) for seat in seats],
                amsgrad=False,
                lr=settings["lr"],
                beta1=float(settings["betas"][0]),
                beta2=float(settings["betas"][1]),
                weight_decay=settings["weight_decay"],
                eps=settings["eps"],
                maximize=settings["maximize"],
                grad_scale=None,
                found_inf=None,
            )

    def _plan(self, number: int, start: int, stop: int) -> list[Any]:
        """Cut a block at the borders of groups and of parameters with other step counts."""
        space = self.spaces[number]
        at, begin = next((i, a) for i, (a, b) in enumerate(self.parts[number]) if a <= start and stop <= b)
        runs: list[list[int]] = []
        first = max(0, bisect_right(self._starts[number], start) - 1)
        last_one = bisect_left(self._starts[number], stop)
        for seat in space.seats[first:last_one]:
            # to the end of its last unit: the kernel's last few numbers would have other bits than the rest
            a, b = max(start, seat.start), min(stop, up(seat.stop, UNIT))
            if a >= b or not self._used[seat.index]:
                continue
            last = runs[-1] if runs else None
            if (
                last
                and last[1] == a
                and last[2] == seat.group
                and self.steps[last[3]] == self.steps[seat.index]
            ):
                last[1] = b
            else:
                runs.append([a, b, seat.group, seat.index])
        plan = []
        for group in sorted({run[2] for run in runs}):
            mine = [run for run in runs if run[2] == group]
            plan.append(
                (
                    group,
                    [self.weights[number][a:b] for a, b, _, _ in mine],
                    [self.moments[0][number][at][a - begin : b - begin] for a, b, _, _ in mine],
                    [self.moments[1][number][at][a - begin : b - begin] for a, b, _, _ in mine],
                    [(a - start, b - start) for a, b, _, _ in mine],
                    [run[3] for run in mine],
                )
            )
        return plan

    def step(self) -> None:
        """Nothing is left to do."""

    def needs(self) -> None:
        """Blocks are handed over by the averager."""

    def pieces(self) -> list[Piece]:
        """The moments of each parameter, as far as this rank owns it."""
        found = []
        for number, space in enumerate(self.spaces):
            for name, moment in zip(("exp_avg", "exp_avg_sq"), self.moments):
                for part, memory in zip(self.parts[number], moment[number]):
                    for seat in space.seats:
                        a, b = max(part[0], seat.start), min(part[1], seat.stop)
                        if a < b:
                            found.append(
                                Piece(
                                    f"optimizer.{name}.{seat.name}",
                                    state_shape(seat),
                                    a - seat.start,
                                    b - seat.start,
                                    memory[a - part[0] : b - part[0]],
                                )
                            )
        return found

    def scalars(self) -> dict[str, Any]:
        """The number of steps of each parameter."""
        return {seat.name: {"step": self.steps[seat.index]} for s in self.spaces for seat in s.seats}

    def expect(self, scalars: dict[str, Any], tensors: Shapes) -> None:
        """Take the step counts; room for the moments is there."""
        for space in self.spaces:
            for seat in space.seats:
                self.steps[seat.index] = int(scalars.get(seat.name, {}).get("step", 0))
        self._plans.clear()


def state_shape(seat: Seat) -> tuple[int, ...]:
    """Shape under which flat state of a parameter is stored: memory order must be the logical one."""
    parameter = seat.parameter
    if not parameter.is_contiguous():
        return (seat.numbers,)
    return (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape)


class Pieces:
    """Any torch optimizer, on the tensors that this rank owns."""

    blockwise = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        spaces: list[Space],
        weights: list[torch.Tensor],
        gradients: list[torch.Tensor],
        owned: Owned | None,
        mine: Callable[[int], bool] = lambda index: True,
    ) -> None:
        """Take the optimizer, whose groups are given other tensors to step.

        With `owned`, parameters are cut where this rank's parts end; without, whole parameters
        for which `mine(index)` holds are stepped.
        """
        self.optimizer, self.spaces = optimizer, spaces
        self.cuts: list[tuple[Seat, int, int, int, nn.Parameter, torch.Tensor]] = []
        self.owned = owned
        for number, space in enumerate(spaces):
            for seat in space.seats:
                if owned is None:
                    if mine(seat.index):
                        view = seat.view(gradients[number])
                        self.cuts.append((seat, number, seat.start, seat.stop, seat.parameter, view))
                    continue
                for bucket in space.buckets:
                    part = owned(bucket)
                    a, b = max(part[0], seat.start), min(part[1], seat.stop)
                    if a < b:
                        flat = nn.Parameter(weights[number][a:b])
                        self.cuts.append((seat, number, a, b, flat, gradients[number][a:b]))
        self._move_state()
        for number, group in enumerate(optimizer.param_groups):
            group["params"] = [cut[4] for cut in self.cuts if cut[0].group == number]

    def _move_state(self) -> None:
        """Give the pieces what the constructor kept for whole parameters, as Adagrad's does."""
        if self.owned is None:
            return
        early = dict(self.optimizer.state)
        self.optimizer.state.clear()
        for seat, _, a, b, parameter, _ in self.cuts:
            for key, value in early.get(seat.parameter, {}).items():
                kept = value.clone() if isinstance(value, torch.Tensor) else value
                if isinstance(value, torch.Tensor) and value.ndim:
                    flat = torch.empty(seat.numbers, dtype=parameter.dtype, device=value.device)
                    replace(seat, start=0).view(flat).copy_(value)
                    kept = flat[a - seat.start : b - seat.start].clone()
                self.optimizer.state[parameter][key] = kept

    def begin(self, used: Sequence[bool]) -> None:
        """Give gradients to what was used."""
        for seat, _, _, _, parameter, gradient in self.cuts:
            parameter.grad = gradient if used[seat.index] else None

    def block(self, number: int, start: int, stop: int, gradient: torch.Tensor) -> None:
        """Blocks are not stepped alone."""

    def step(self) -> None:
        """Run the optimizer's own step."""
        try:
            self.optimizer.step()
        except Exception as error:
            error.add_note(f"in the optimizer ({type(self.optimizer).__name__})")
            raise

    def needs(self) -> list[list[tuple[int, int]]] | None:
        """Whole parameters lie in several ranks' parts."""
        if self.owned is not None:
            return None
        return [
            [(a, b) for _, n, a, b, _, _ in self.cuts if n == number] for number in range(len(self.spaces))
        ]

    def pieces(self) -> list[Piece]:
        """What the optimizer keeps: by range where it has the parameter's size, else whole."""
        found = []
        for seat, _, a, b, parameter, _ in self.cuts:
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                if not isinstance(value, torch.Tensor):
                    continue
                name = f"optimizer.{key}.{seat.name}"
                if self.owned is not None and value.ndim:
                    start = a - seat.start
                    found.append(Piece(name, state_shape(seat), start, start + b - a, value))
                else:
                    found.append(whole(name, value))
        return found

    def scalars(self) -> dict[str, Any]:
        """Numbers that the optimizer keeps. Raises CheckpointError for what can't be kept."""
        state: dict[str, Any] = {}
        for seat, _, _, _, parameter, _ in self.cuts:
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if not isinstance(value, (torch.Tensor, int, float, bool, str, type(None))):
                    raise CheckpointError(
                        f"the optimizer keeps {key} of {seat.name} as a {type(value).__name__}: checkpoints "
                        f"hold tensors and numbers only, so it can't be resumed: take another optimizer"
                    )
                if not isinstance(value, torch.Tensor):
                    state.setdefault(seat.name, {})[key] = value
        return state

    def expect(self, scalars: dict[str, Any], tensors: Shapes) -> None:
        """Make state of the stored names and shapes."""
        fused = any(g.get("fused") or g.get("capturable") for g in self.optimizer.param_groups)
        for seat, _, a, b, parameter, _ in self.cuts:
            state = dict(scalars.get(seat.name, {}))
            for stored, (shape, dtype) in tensors.items():
                if not (stored.startswith("optimizer.") and stored.endswith(f".{seat.name}")):
                    continue
                key = stored[len("optimizer.") : -len(seat.name) - 1]
                if "." in key:
                    continue
                device = "cpu" if key == "step" and not fused else parameter.device
                size = (b - a,) if self.owned is not None and len(shape) else shape
                state[key] = torch.zeros(size, dtype=getattr(torch, dtype), device=device)
            if state:
                self.optimizer.state[parameter] = state
