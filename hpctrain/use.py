"""Use what was trained: load a run's model, export its weights."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hpctrain.checkpoint import load as loading
from hpctrain.checkpoint.files import complete_steps, folder_name
from hpctrain.config import Config
from hpctrain.data.output import refuse, temporary_beside
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.models import build as models
from hpctrain.parse import from_toml
from hpctrain.piece import tensors_of

EXPORT = "hpctrain checkpoint export"


def open_run(run: Path, step: int | None = None) -> tuple[Config, loading.Stored]:
    """Read a run folder's configuration and its newest good checkpoint, or that of a step. Local."""
    need_run(run)
    config = from_toml(run / "config.toml")
    if step is not None:
        steps = complete_steps(run / "checkpoints")
        if step not in steps:
            raise ConfigError(f"{run} has no checkpoint of step {step}: it has {steps}")
        stored = loading.open_checkpoint(run / "checkpoints" / folder_name(step))
        problems = stored.damage()
        if problems:
            raise CheckpointError("; ".join(problems))
        return config, stored
    found, passed_over = loading.newest(run / "checkpoints")
    if found is None:
        why = "; ".join(passed_over) or "none was written yet"
        raise CheckpointError(f"{run} has no good checkpoint: {why}")
    return config, found


def load_module(run: Path, step: int | None = None) -> torch.nn.Module:
    """Give the run's model with its weights, in eval mode. Local."""
    config, stored = open_run(run, step)
    return rebuild(stored, config)


def rebuild(stored: loading.Stored, config: Config) -> torch.nn.Module:
    """Build a run's model with a checkpoint's weights, in eval mode. Local; needs no data."""
    module = models.build(config.model, config.train.seed)
    state = tensors_of(module)
    loaded = {name: tensor for name, tensor in state.items() if f"model.{name}" in stored.tensors}
    for name in loaded:
        loaded[name] = stored.read(f"model.{name}")
    # a tensor with several names is stored under its first
    missing = set(state) - set(loaded)
    module.load_state_dict(loaded, strict=False)
    after = tensors_of(module)
    aliases = {id_of(after[name]) for name in loaded}
    lost = [name for name in missing if id_of(after[name]) not in aliases]
    if lost:
        raise CheckpointError(f"{stored.path} has no model.{lost[0]}: it is of another model")
    return module.eval()


def id_of(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Say which memory a tensor shows."""
    return tensor.data_ptr(), tuple(tensor.shape)


def export(run: Path, output: Path, step: int | None = None) -> Path:
    """Write a plain state_dict: safetensors, or torch's own format for .pt and .pth. Local.

    Raises ConfigError where a file is there, but an earlier export in safetensors, which says what it is.
    """
    safe = output.suffix == ".safetensors"
    if not safe and output.suffix not in (".pt", ".pth"):
        raise ConfigError(f"{output}: a name that ends in .safetensors, .pt or .pth was expected")
    if output.exists() and not (safe and is_export(output)):
        refuse(output, EXPORT)
    module = load_module(run, step)
    state = {name: tensor.contiguous() for name, tensor in tensors_of(module).items()}
    temporary = temporary_beside(output)
    try:
        if safe:
            copies = {name: tensor.clone() for name, tensor in state.items()}
            save_file(copies, temporary, {"format": "pt", "source": EXPORT})
        else:
            torch.save(state, temporary)
        return temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def is_export(path: Path) -> bool:
    """Whether a file is an earlier export. Local."""
    try:
        with safe_open(path, "pt") as file:
            return bool((file.metadata() or {}).get("source") == EXPORT)
    except (OSError, SafetensorError):
        return False


def describe(run: Path) -> list[str]:
    """One line a complete checkpoint: step, size, whether it is good. Local; reads them whole."""
    need_run(run)
    lines = []
    for step in complete_steps(run / "checkpoints"):
        try:
            stored = loading.open_checkpoint(run / "checkpoints" / folder_name(step))
        except CheckpointError as error:
            lines.append(f"step {step}  {error}")
            continue
        size = sum(path.stat().st_size for path in stored.path.iterdir())
        best = "  best" if stored.state["best_step"] == step else ""
        lines.append(f"step {step}  {size:,} bytes  {'; '.join(stored.damage()) or 'good'}{best}")
    return lines or [f"{run} has no complete checkpoint"]


def need_run(run: Path) -> None:
    """Refuse a folder that holds no run. Local."""
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run} holds no run: a folder with config.toml and checkpoints/ was expected")
