"""The loss is a sum over samples; only the sum over all ranks is divided, by the global weight.

      L = Σ_i Σ_e w_ie l_ie / n        W = Σ_i Σ_e w_ie / n        loss = Σ_ranks L / Σ_ranks W

l_ie: loss of element e of sample i; w_ie: its weight (1 where none is given); n: elements of a
sample. A sample of full weight adds 1 to W, so uneven batches and masks need no special case.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from hpctrain.batch import Batch
from hpctrain.errors import ConfigError, DataError
from hpctrain.tensors import shapes_of

# torch broadcasts (n,) integers against (n, 1) outputs to n x n differences, with a warning only.
NUMERIC = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss,
    nn.KLDivLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss, nn.MultiLabelSoftMarginLoss,
)  # fmt: skip
CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)


class SummedLoss:
    """Turns a loss of (output, target) into (L, W) of a micro-batch. Local."""

    def __init__(self, loss: Callable[..., torch.Tensor]) -> None:
        """Take a loss that gives one value an element or a sample, or a mean over samples."""
        self.loss = loss

    def __call__(self, outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Give (L, W), scalars; L carries the graph. With several targets L is their sum."""
        sums, weights, weighing = [], [], self.without_ignored(batch).weights
        for name, output, target in pairs(outputs, batch.targets):
            if isinstance(self.loss, NUMERIC) and not target.is_floating_point():
                raise ConfigError(
                    f"the target {name} holds integers, which {type(self.loss).__name__} can't compare "
                    f"with outputs: set train.loss.class_path = torch.nn.CrossEntropyLoss for classes, "
                    f"or store numbers as floats"
                )
            each = weighing.get(name)
            if isinstance(self.loss, CLASSES):
                check_scores(self.loss, output, name)
                target, each = of_classes(output, target, each)
            try:
                values = self.loss(output, target)
            except Exception as error:
                if isinstance(error, IndexError) and (
                    told := no_class(self.loss, output, target, name, batch)
                ):
                    raise DataError(told) from error
                kind = getattr(self.loss, "__name__", type(self.loss).__name__)
                error.add_note(f"in the loss, {kind}, given {shapes_of((output, target))} (target {name})")
                raise
            if values.ndim == 0 and each is not None and name not in batch.weights:
                total, weight = of_mean(values, each)
            else:
                total, weight = weigh(values, each, len(batch), name)
            sums.append(total)
            weights.append(weight)
        if len(sums) == 1:  # the same numbers, without three operators and their backward
            return sums[0], weights[0]
        return torch.stack(sums).sum(), torch.stack(weights).mean()

    def without_ignored(self, batch: Batch) -> Batch:
        """Give a batch in which targets that the loss ignores (`ignore_index`) weigh 0. Pure."""
        if not isinstance(self.loss, CLASSES):
            return batch
        weights = dict(batch.weights)
        for name, target in batch.targets.items():
            kept = target != self.loss.ignore_index
            if not target.is_floating_point() and not kept.all():
                given = weights.get(name, torch.ones((), device=kept.device))
                if given.ndim > kept.ndim:
                    given = given.reshape(len(given), -1).mean(dim=1)  # as `weigh` does
                weights[name] = given.reshape(given.shape + (1,) * (kept.ndim - given.ndim)) * kept
        return replace(batch, weights=weights)


def of_mean(mean: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give (L, W) of a mean over what is `kept` (1; 0 for what the loss ignores), shaped (count, …). Pure."""
    weight = kept.sum(dtype=mean.dtype) / kept[0].numel()
    return torch.where(weight > 0, mean * weight, 0.0), weight  # of none torch gives NaN


def check_scores(loss: Callable[..., torch.Tensor], output: torch.Tensor, name: str) -> None:
    """Refuse outputs that are no scores of classes, which torch takes without a word. Pure.

    One class has a cross entropy of 0 whatever is learnt; outputs (n,) are those of one sample to torch.
    """
    if output.ndim > 1 and output.shape[1] > 1:
        return
    raise ConfigError(
        f"the model gives shape {tuple(output.shape)} for the target {name}, and {type(loss).__name__} wants "
        f"(samples, classes, ...), two classes at least: let the model give them (model.init_args), or set "
        f"train.loss.class_path = torch.nn.MSELoss for numbers, torch.nn.BCEWithLogitsLoss for yes or no"
    )


def of_classes(
    output: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Give a target of classes, and its weights, without a second dimension of size 1. Pure.

    Labels are often stored as (n, 1) beside outputs (n, classes), and as (n, 1, …) beside (n, classes, …):
    torch's losses refuse the one, and comparing them with the outputs' argmax, (n, …), would broadcast.

    >>> of_classes(torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.int64))[0].shape
    torch.Size([4])
    """
    spare = not target.is_floating_point() and target.ndim == output.ndim > 1
    if not spare or target.shape[1] != 1 or target.shape[2:] != output.shape[2:]:
        return target, weights
    if weights is not None and weights.ndim == target.ndim:
        weights = weights.squeeze(1)
    return target.squeeze(1), weights


def no_class(
    loss: Callable[..., torch.Tensor], output: torch.Tensor, target: torch.Tensor, name: str, batch: Batch
) -> str:
    """Say which sample is of a class that the model does not give; empty if none is. Local."""
    if not isinstance(loss, CLASSES) or target.is_floating_point() or output.ndim != target.ndim + 1:
        return ""
    classes = output.shape[1]
    wrong = ((target < 0) | (target >= classes)) & (target != loss.ignore_index)
    if not wrong.any():
        return ""
    at = int(wrong.reshape(len(wrong), -1).any(dim=1).nonzero()[0])
    found = int(target[at][wrong[at]].flatten()[0])
    return (
        f"the target {name} of sample {batch.samples[at]} is class {found}, and the model gives {classes}, "
        f"0 to {classes - 1}: let it give more (model.init_args), or mark what is not to count by the loss' "
        f"ignore_index ({loss.ignore_index})"
    )


def weigh(
    values: torch.Tensor, weights: torch.Tensor | None, count: int, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of loss values, shaped () or (count, …), and the weight it stands for."""
    if values.ndim == 0:
        if weights is not None:
            raise ConfigError(
                f"the loss gives one number for the micro-batch, but {name} has weights or a "
                f"mask: use a loss with reduction = 'none', or one value a sample"
            )
        return values * count, torch.tensor(float(count), device=values.device)
    if values.shape[0] != count:
        raise ConfigError(
            f"the loss gives shape {tuple(values.shape)} for {count} samples of {name}: "
            f"a mean over samples, or values with the samples first, were expected"
        )
    each = values.numel() // count
    if weights is None:
        return values.sum() / each, number(float(count), values.device)
    if weights.ndim > values.ndim:
        weights = weights.reshape(count, -1).mean(dim=1)
    weights = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
    return (values * weights).sum() / each, weights.expand_as(values).sum() / each


@lru_cache(maxsize=64)
def number(value: float, device: torch.device) -> torch.Tensor:
    """Give a number as a tensor, the same one each time: nothing changes it. Pure."""
    return torch.tensor(value, device=device)


def pairs(outputs: Any, targets: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Match what the model gives with the targets: one to one, by name or in order."""
    names = list(targets)
    if isinstance(outputs, dict):
        if set(names) - set(outputs):
            raise ConfigError(f"the model gives {sorted(outputs)}, data.targets are {names}")
        found = [outputs[name] for name in names]
    elif isinstance(outputs, (list, tuple)):
        found = list(outputs)
    else:
        found = [outputs]
    if len(found) != len(names):
        raise ConfigError(
            f"the model gives {len(found)} outputs for {len(names)} targets {names}: "
            f"return as many tensors, or a dictionary by name"
        )
    return [(name, fit(output, targets[name], name), targets[name]) for name, output in zip(names, found)]


def fit(output: torch.Tensor, target: torch.Tensor, name: str) -> torch.Tensor:
    """Refuse the one shape error that torch broadcasts silently: (n, 1) against (n,)."""
    if target.is_floating_point() and output.shape != target.shape:
        if [n for n in output.shape if n != 1] == [n for n in target.shape if n != 1]:
            return output.reshape(target.shape)
        raise ConfigError(
            f"the model gives shape {tuple(output.shape)} for target {name} of shape "
            f"{tuple(target.shape)}, samples first: they must agree (model.init_args, data.targets; classes "
            f"for CrossEntropyLoss are stored as integers)"
        )
    return output


def takes_reduction(factory: Callable[..., Any]) -> bool:
    """Tell whether a loss class has a `reduction` argument, as torch's have."""
    return "reduction" in inspect.signature(factory).parameters
