"""The configuration: dataclasses with a docstring under each field, and nothing that parses.

`parse.py` fills them from TOML and the command line. A field's docstring is its help text.
"""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal


@dataclass
class ClassPath:
    """A class by its path, and the arguments of its constructor."""

    class_path: str = ""
    """Where the class lies, such as torch.nn.MSELoss or my_module.MyModel."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the constructor, checked against its signature before anything starts."""


@dataclass
class Data:
    """Where the samples are, and which of them are for training, validation and test."""

    files: str | list[str] = ""
    """A path or glob, or a list of them; the files, each glob sorted by name, are one long dataset."""
    inputs: str | list[str] | dict[str, str] = field(default_factory=list)
    """HDF5 datasets the model gets, by their path in the file; {name = "group/path"} renames."""
    targets: str | list[str] | dict[str, str] = field(default_factory=list)
    """HDF5 datasets the model is to predict."""
    weights: str = ""
    """HDF5 dataset with one weight a sample; without it every sample weighs 1."""
    coordinate: str = ""
    """HDF5 dataset with one number a sample that ranges of train, validation, test speak of."""
    train: list[str | float] = field(default_factory=list)
    """[first, last] of the coordinate, both included; empty: all that the others leave."""
    validation: float | list[str | float] = 0.0
    """A fraction of the samples, or [first, last]; early stopping and `best` look at it."""
    test: float | list[str | float] = 0.0
    """A fraction of the samples, or [first, last]; dates such as "2000-01" on a time axis."""
    split_order: Literal["file", "random"] = "file"
    """Fractions are cut from the end in file order (safe for time series), or at random."""
    normalize: bool = False
    """Give floating inputs and targets mean 0 and deviation 1 over the training samples."""
    missing: Literal["error", "mask"] = "error"
    """What a missing value in a target is: an error, or an element of weight 0."""
    task: ClassPath = field(default_factory=lambda: ClassPath("hpctrain.recipes.samples.Samples"))
    """What is made of the samples: inputs, targets, weights, metrics, baselines."""


@dataclass
class Parallel:
    """The layout: world size = replicas x stages."""

    stages: int = 1
    """Pipeline stages of one replica."""
    micro_batches: int | Literal["auto"] = "auto"
    """Micro-batches of one step over all replicas; auto: one a replica, with several stages four times as
    many as stages (and no more than a replica's samples)."""
    schedule: str = "auto"
    """In which order a stage runs its passes: 1f1b keeps the activations of as many micro-batches as there
    are stages, gpipe those of all; zb-h1 fills 1f1b's gaps with the weight gradients of linear layers and
    convolutions, zb-h2 more of them, with the memory of up to twice as many micro-batches; interleaved gives
    each rank several stages, for shorter gaps and more messages. auto simulates 1f1b, zb-h2 and zb-h1 (taken
    if 1 % shorter) and interleaved (10 %) with measured times; it is 1f1b where nothing is measured or could
    gain, zb-h1 for fast gradients. The results are the same bits, but for fast gradients and where stages
    share a weight."""
    virtual_stages: int = 2
    """Stages that a rank runs if the schedule is interleaved: twice as many for half the gaps. Has most where
    micro_batches a replica are a multiple of stages."""
    gradients: Literal["strict", "fast"] = "strict"
    """strict: the bits of one process with the same micro-batches. fast: stages compute the weight gradients
    of several small micro-batches at once, whose sum has another order."""
    recompute: Literal["auto", "always", "never"] = "auto"
    """Whether a stage keeps only what it received, and runs its forward again for backward, with the same
    random numbers; auto: where memory asks for it."""
    cuts: list[str] = field(default_factory=list)
    """Modules that begin a stage, such as ["encoder.3", "decoder.0"] for three; empty: cut by work."""


@dataclass
class Averaging:
    """How gradients are summed over the replicas."""

    invariant: bool = False
    """The same bits on any number of ranks: sum the step's micro-batches in one fixed tree; wants an
    integer in parallel.micro_batches, runs 1 thread a rank unless train.threads says more."""
    sync_batchnorm: bool = False
    """Take every BatchNorm's statistics over the whole batch, across the replicas; wants one micro-batch
    a replica, which parallel.micro_batches = auto takes then. A model's own SyncBatchNorm layers always
    do; with stages they want parallel.micro_batches = the number of replicas."""
    wire: Literal["exact", "bf16"] = "exact"
    """What travels between nodes: gradients as they are, or rounded to bfloat16 (8 bits of mantissa), and
    likewise what a step adds to the weights. It halves the bytes and changes the results a little;
    sums are float32, all ranks keep the same bits, within a node nothing is rounded."""


@dataclass
class Optimizer:
    """The optimizer and its learning-rate schedule."""

    class_path: str = "torch.optim.AdamW"
    """Any torch optimizer that needs no closure."""
    init_args: dict[str, Any] = field(default_factory=lambda: {"lr": 1e-3})
    """Arguments of its constructor, parameters left out."""
    decay_all: bool = False
    """Apply weight decay to biases and norms (tensors of fewer than 2 dimensions) too."""
    sharded: bool | Literal["auto"] = "auto"
    """On CPU each rank steps a part, into weights that a node's ranks share; auto: torch's own that
    work element by element; true: deal out whole tensors of any other; false: each rank steps all."""
    schedule: ClassPath = field(default_factory=lambda: ClassPath("hpctrain.learning_rate.WarmupCosine"))
    """A torch LR scheduler, stepped once a step; total_steps and T_max are filled in."""


@dataclass
class Train:
    """The loop."""

    steps: int | None = None
    """Optimizer steps in all; wins over epochs."""
    epochs: int = 10
    """Passes over the training samples."""
    batch: int = 32
    """Samples of one optimizer step, over all ranks."""
    seed: int = 0
    """Seed of weights, sample order and random layers."""
    run_folder: str = ""
    """Where the run is kept; default runs/NAME; a # in it becomes the lowest free number."""
    loss: ClassPath = field(default_factory=lambda: ClassPath("torch.nn.MSELoss"))
    """Loss of (output, target): unreduced if it takes `reduction`, else a mean over samples."""
    clip: float = 0.0
    """Largest global norm of the mean gradient; 0: no clipping."""
    autocast: Literal["none", "bf16"] = "none"
    """Run the model in bfloat16 where torch finds it safe."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of this local rank where there is one, else the CPU."""
    threads: int | None = None
    """Threads a rank; default: cores it may use, shared fairly with the other local ranks."""
    validate_steps: int = 0
    """Validate every so many steps; 0: after each epoch."""
    monitor: str = "loss"
    """The validation metric that early stopping and `best` look at."""
    patience: int = 0
    """Stop after so many validations without a better monitored metric; 0: never."""


@dataclass
class Checkpoint:
    """When checkpoints are written and which are kept."""

    every_steps: int = 0
    """Write one every so many steps; 0: by the clock alone."""
    every_minutes: float = 10.0
    """Write one every so many minutes; 0: by steps alone. One is always written at the end."""
    keep: int = 3
    """The newest so many are kept, and the best one."""


@dataclass
class Report:
    """What the user sees."""

    log_seconds: float = 10.0
    """In a batch log, a line each so many seconds."""
    pictures: bool = True
    """Draw pictures/*.png at the end."""


@dataclass
class Config:
    """One run."""

    data: Data = field(default_factory=Data)
    """The samples."""
    model: ClassPath = field(default_factory=ClassPath)
    """The model: any torch.nn.Module by its class path."""
    parallel: Parallel = field(default_factory=Parallel)
    """The layout."""
    averaging: Averaging = field(default_factory=Averaging)
    """The sum over replicas."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """The optimizer."""
    train: Train = field(default_factory=Train)
    """The loop."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """The checkpoints."""
    report: Report = field(default_factory=Report)
    """The output."""


# Paths, logging and what changes no bit: a resume may change them.
FREE_ON_RESUME = (
    "data.files",
    "train.run_folder",
    "report.",
    "optimizer.sharded",
    "parallel.stages",
    "parallel.schedule",
    "parallel.virtual_stages",
    "parallel.recompute",
    "parallel.cuts",
)


SAMPLE_WEIGHTS = " weights"
"""Name of the variable that `data.weights` gives; no dataset can have it."""


def names_to_paths(names: str | list[str] | dict[str, str]) -> dict[str, str]:
    """Turn `data.inputs` or `data.targets` into {name: path in the file}.

    A list names a dataset by the last part of its path, or by the whole path where two agree.

    >>> names_to_paths(["fields/t2m", "mask"])
    {'t2m': 'fields/t2m', 'mask': 'mask'}
    >>> names_to_paths(["a/x", "b/x"])
    {'a/x': 'a/x', 'b/x': 'b/x'}
    """
    if isinstance(names, dict):
        return dict(names)
    paths = [names] if isinstance(names, str) else list(names)
    short = [path.strip("/").rsplit("/", 1)[-1] for path in paths]
    unique = [name if short.count(name) == 1 else path for name, path in zip(short, paths)]
    return dict(zip(unique, paths))


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Give {"section.key": value} of a configuration, nested dataclasses included.

    >>> found = flatten(Config(parallel=Parallel(stages=2)))
    >>> found["parallel.stages"], found["parallel.schedule"]
    (2, 'auto')
    """
    flat: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        key = f"{prefix}{entry.name}"
        if is_dataclass(value):
            flat.update(flatten(value, key + "."))
        else:
            flat[key] = value
    return flat


def differences(stored: Config, asked: Config) -> list[str]:
    """Say in what a resume would differ from the run that it resumes, a line a key.

    Paths and logging are no difference, nor is a larger total. Steps win over epochs, so their
    totals are compared where the samples are known.

    >>> differences(Config(), Config(train=Train(batch=64)))
    ['train.batch: the run has 32, asked is 64']
    """
    old, new = flatten(stored), flatten(asked)
    lines = []
    for key, value in new.items():
        before = old[key]
        if value == before or key.startswith(FREE_ON_RESUME):
            continue
        if (
            key == "parallel.micro_batches" and before == "auto"
        ):  # SyncBatchNorm: one a replica, on any layout
            continue
        if key == "train.threads" and not asked.averaging.invariant:  # hang on the ranks of a node anyway
            continue
        if key == "train.steps" and (before is None or value is None or value >= before):
            continue
        if key == "train.epochs" and (asked.train.steps is not None or value >= before):
            continue
        lines.append(f"{key}: the run has {before!r}, asked is {value!r}")
    return lines


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dictionaries, without what is None (TOML has no null)."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return value

    result: dict[str, Any] = clean(asdict(config))
    return result
