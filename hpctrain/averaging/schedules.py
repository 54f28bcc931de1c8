"""LR schedulers by class path: built, restored from a checkpoint, replayed for another total."""

import warnings
from collections import Counter
from typing import Any

from hpctrain import construct
from hpctrain.averaging.averager import Averager
from hpctrain.config import Config


def arguments(config: Config, total: int) -> dict[str, Any]:
    """Check the scheduler; fill in the run's length where it asks for it."""
    filled = {"total_steps": total, "T_max": total}
    spec = config.optimizer.schedule
    return construct.check(spec, "optimizer.schedule", given=("optimizer",), **filled)


def build(config: Config, averager: Averager, total: int) -> Any:
    """Build the scheduler on the averager's optimizer."""
    spec = config.optimizer.schedule
    return construct.build(spec, "optimizer.schedule", averager.optimizer, **arguments(config, total))


def replay(config: Config, averager: Averager, total: int, steps: int) -> Any:
    """Build the scheduler of another total and take it to where the run stands.

    A stored state would bring the old total back: a cosine would rise again, OneCycle end.
    """
    for group in averager.optimizer.param_groups:
        group["lr"] = group.get("initial_lr", group["lr"])
    scheduler = build(config, averager, total)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "optimizer.step() before": the steps were taken earlier
        for _ in range(steps):
            scheduler.step()
    return scheduler


def restore(scheduler: Any, stored: dict[str, Any]) -> None:
    """Load a state that went through JSON, which knows no integer keys and no tuples."""
    fresh = scheduler.state_dict()
    scheduler.load_state_dict({name: like(fresh.get(name), value) for name, value in stored.items()})


def like(fresh: Any, value: Any) -> Any:
    """Give a value from JSON the type that it had.

    >>> like(Counter({3: 1}), {"3": 1})
    Counter({3: 1})
    """
    if isinstance(fresh, Counter):
        return Counter({int(key): count for key, count in value.items()})
    if isinstance(fresh, dict) and fresh and all(isinstance(key, int) for key in fresh):
        return {int(key): item for key, item in value.items()}
    return tuple(value) if isinstance(fresh, tuple) else value
