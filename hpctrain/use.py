"""Use what was trained: load a run's model, export its weights."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from hpctrain import assemble
from hpctrain.checkpoint import load as loading
from hpctrain.checkpoint.save import complete_steps, folder_name
from hpctrain.config import Config
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.parse import from_toml


def open_run(run: Path, step: int | None = None) -> tuple[Config, loading.Stored]:
    """Read a run folder's configuration and its newest good checkpoint, or that of a step. Local."""
    if not (run / "config.toml").is_file():
        raise ConfigError(f"{run} holds no run: a folder with config.toml and checkpoints/ was expected")
    config = from_toml(run / "config.toml")
    if step is not None:
        steps = complete_steps(run / "checkpoints")
        if step not in steps:
            raise CheckpointError(f"{run} has no checkpoint of step {step}: it has {steps}")
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
    return assemble.load(stored, config)


def export(run: Path, output: Path, step: int | None = None) -> Path:
    """Write a plain state_dict: safetensors, or torch's own format for .pt and .pth. Local."""
    module = load_module(run, step)
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    if output.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, temporary)
    elif output.suffix in (".pt", ".pth"):
        torch.save(state, temporary)
    else:
        raise ConfigError(f"{output}: a name that ends in .safetensors, .pt or .pth was expected")
    return temporary.replace(output)


def describe(run: Path) -> list[str]:
    """One line a complete checkpoint: step, size, whether it is good. Local; reads them whole."""
    open_run_config = run / "config.toml"
    if not open_run_config.is_file():
        raise ConfigError(f"{run} holds no run: a folder with config.toml and checkpoints/ was expected")
    lines = []
    for step in complete_steps(run / "checkpoints"):
        stored = loading.open_checkpoint(run / "checkpoints" / folder_name(step))
        size = sum((stored.path / name).stat().st_size for name in stored.files)
        best = " best" if stored.state["best_step"] == step else ""
        problems = stored.damage()
        lines.append(f"step {step}  {size:,} bytes  {'; '.join(problems) or 'good'}{best}")
    return lines or [f"{run} has no complete checkpoint"]
