"""The command line: verbs, help, and the one place where MPI is started."""

import os
import platform
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain import cuda_probe, launch
from hpctrain.config import Config
from hpctrain.config_file import MADE, read_config, recipes
from hpctrain.errors import ConfigError, HpctrainError, RankError, nearest
from hpctrain.version import __version__

if TYPE_CHECKING:
    from mpi4py import MPI

SINGLETON_WAIT_SECONDS = 2.0

HELP = """\
Train PyTorch models on HDF5 data with MPI: the same answer on any number of ranks.

  mpirun -n 4 hpctrain                     train the default recipe, climate
  mpirun -n 4 hpctrain train my.toml       train your own; my.toml names data and model
  mpirun -n 4 hpctrain train digits --train.epochs 3

verbs:
  train [CONFIG] [--section.key value ...]    train; resumes what the run folder holds
  verify [CONFIG] [--section.key value ...]   a few steps in this layout against one process
  predict RUN --output FILE [--split test]    predictions of a trained model into HDF5
  checkpoint list RUN | export RUN FILE       look at checkpoints; export a state_dict
  data make digits|language [--output FILE]   make the data of a recipe
  bench allreduce|step|pipeline [--json]      measure against the peers and the limit

CONFIG is a TOML file or a recipe: {recipes}. Without a verb: train.
`hpctrain train --help` explains every key. Exit status: 0 done; 2 the configuration, the
arguments or the data are wrong; 75 stopped early with a good checkpoint; 1 anything else."""

TRAIN_HELP = """\
Train a model. CONFIG is a TOML file with the sections below, or a recipe's name ({recipes}).
Every key can be set as --section.key value. A run is kept in runs/NAME and resumed from there;
--train.run_folder names another place.

  --dry-run      check everything, print the resolved configuration and the layout, stop
"""
VERIFY_HELP = """\
Take a few steps in this layout (ranks, stages, micro-batches) and in one process, and compare loss,
outputs, gradients and buffers. CONFIG and keys are those of `hpctrain train`; nothing is kept.

  --steps N      steps to compare; default 3
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; give the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] in (["--help"], ["-h"], ["help"]):
            return show(HELP.format(recipes=", ".join(recipes())))
        if words[:1] == ["--version"]:
            return show(f"hpctrain {__version__}")
        verb, rest = split_verb(words)
        return VERBS[verb](rest)
    except HpctrainError as error:
        if launch.speaks(os.environ):
            print_error(error)
        let_speak()
        return error.status
    except SystemExit as error:  # argparse has printed what is wrong with the words
        if error.code:
            let_speak()
        raise
    except BrokenPipeError:  # `hpctrain ... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def let_speak() -> None:
    """Wait until the rank that speaks has printed: mpirun ends all at the first one that fails.

    All ranks fail alike here, most before MPI has started. Collective where there is a world.
    """
    meant, _ = launch.meant_ranks(os.environ)
    if meant == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    from mpi4py import MPI

    if MPI.COMM_WORLD.size > 1:
        MPI.COMM_WORLD.Barrier()
    elif not launch.speaks(os.environ):  # singletons have no barrier
        time.sleep(SINGLETON_WAIT_SECONDS)


def show(text: str) -> int:
    """Print a text once, whatever the number of ranks; give status 0."""
    if launch.speaks(os.environ):
        print(text)
    return 0


def split_verb(words: list[str]) -> tuple[str, list[str]]:
    """Take the verb off the words; a bare call, or one that starts with an option, is `train`.

    >>> split_verb(["--train.steps", "3"]), split_verb(["predict", "runs/a"])
    (('train', ['--train.steps', '3']), ('predict', ['runs/a']))
    """
    if not words or words[0].startswith("-"):
        return "train", words
    if words[0] in VERBS:
        return words[0], words[1:]
    if words[0] in recipes() or words[0].endswith(".toml"):
        raise ConfigError(f"{words[0]} is no verb: did you mean `hpctrain train {words[0]}`?")
    raise ConfigError(f"{words[0]} is no verb: {nearest(words[0], VERBS)}")


def print_error(error: HpctrainError) -> None:
    """Print an error once, to standard error."""
    sys.stdout.flush()
    label = "failed" if isinstance(error, RankError) else "error"
    brief = getattr(error, "brief", "")
    whole = f"\n(the whole traceback is in {error.log})" if brief and error.log else ""
    sys.stderr.write(f"hpctrain: {label}: {brief or error}{whole}\n")
    sys.stderr.flush()


def on_ranks(work: Callable[["MPI.Intracomm"], int], pictures: bool = False) -> int:
    """Start MPI, set threads, run on all ranks; errors end all ranks with one message.

    Threads are set before torch starts: torch must not be imported before this.
    """
    start_children_early(pictures and launch.speaks(os.environ))
    cuda_probe.look()
    launch.share_cores()
    from mpi4py import MPI

    from hpctrain import abort

    world = MPI.COMM_WORLD
    launch.check_world(world.size, os.environ)
    abort.install(world)
    set_threads(world)
    try:
        status = work(world)
    except HpctrainError as error:
        if world.size > 1 and not error.agreed:
            abort.end_with_message(world, getattr(error, "brief", "") or str(error), error.status)
        if world.rank == 0:
            print_error(error)
        status = error.status
    except SystemExit as error:
        if world.size > 1:
            abort.end_with_message(world, f"sys.exit({error.code}) was called on this rank", 1)
        raise
    abort.remove(world)
    return status


def start_children_early(pictures: bool) -> None:
    """Do now what may start a process: after MPI_Init a rank starts none."""
    from hpctrain import construct

    platform.processor()  # calls `uname -p` once; torch asks for it later
    construct.prepare()
    if pictures:
        from hpctrain.report.pictures import prepare

        prepare()


def set_threads(world: "MPI.Intracomm") -> None:
    """Give each rank its fair share of the cores, before torch starts. Collective."""
    from mpi4py import MPI

    from hpctrain.topology import fair_threads, usable_cores

    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    launch.set_threads(fair_threads(usable_cores(), node.allgather(usable_cores())))
    node.Free()


def configured(words: list[str], world: "MPI.Intracomm") -> Config:
    """Read the configuration on world rank 0 and give it to all. Collective."""
    from hpctrain.wire import from_root

    return from_root(world, lambda: read_config(words))


def train_help(verb: str) -> int:
    """Print every key with its default, grouped by section."""
    from hpctrain.parse import parser

    text = TRAIN_HELP.format(recipes=", ".join(recipes())) if verb == "train" else VERIFY_HELP
    usage = f"hpctrain {verb} [CONFIG] [--section.key value ...]"
    made = parser(prog="hpctrain", usage=usage, description=text)
    made.formatter_class = type("Help", (RawDescriptionHelpFormatter, made.formatter_class), {})
    return show(made.format_help())


def train(words: list[str]) -> int:
    """`hpctrain train`."""
    if "--help" in words or "-h" in words:
        return train_help("train")
    dry = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]

    def work(world: "MPI.Intracomm") -> int:
        config = configured(words, world)
        if dry:
            from hpctrain.dry_run import dry_run

            return dry_run(config, world)
        from hpctrain.train import train as run

        return run(config, world)

    return on_ranks(work, pictures=not dry)


def verify(words: list[str]) -> int:
    """`hpctrain verify`."""
    if "--help" in words or "-h" in words:
        return train_help("verify")
    steps = 3
    if "--steps" in words:
        at = words.index("--steps")
        value = words[at + 1] if at + 1 < len(words) else ""
        if not value.isdigit() or int(value) < 1:
            raise ConfigError(f"--steps {value}: a number of steps, at least 1, was expected")
        steps = int(value)
        words = words[:at] + words[at + 2 :]

    def work(world: "MPI.Intracomm") -> int:
        config = configured(words, world)
        from hpctrain.verify import verify as run

        return run(config, world, steps)

    return on_ranks(work)


def predict(words: list[str]) -> int:
    """`hpctrain predict`."""
    parser = ArgumentParser(prog="hpctrain predict", description="Write predictions into HDF5, by all ranks.")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--output", type=Path, required=True, help="the HDF5 file to write")
    parser.add_argument("--split", default="test", help="train, validation or test; default test")
    parser.add_argument("--step", type=int, help="the checkpoint of this step; default the newest")
    found = parse_words(parser, words)

    def work(world: "MPI.Intracomm") -> int:
        from hpctrain.predict import predict as run

        run(found.run, found.output, found.split, found.step, world)
        return 0

    return on_ranks(work)


def parse_words(parser: ArgumentParser, words: list[str]) -> Namespace:
    """Parse a verb's words; usage errors and help are printed by one rank, not by each."""
    if launch.speaks(os.environ):
        return parser.parse_args(words)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return parser.parse_args(words)


def checkpoint(words: list[str]) -> int:
    """`hpctrain checkpoint`: one process, no MPI."""
    parser = ArgumentParser(prog="hpctrain checkpoint", description="Look at a run's checkpoints.")
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="one line a complete checkpoint")
    listing.add_argument("run", type=Path)
    exporting = actions.add_parser("export", help="write a plain state_dict")
    exporting.add_argument("run", type=Path)
    exporting.add_argument("output", type=Path, help="a name ending in .safetensors, .pt or .pth")
    exporting.add_argument("--step", type=int, help="the checkpoint of this step; default the newest")
    found = parse_words(parser, words)
    from hpctrain import use

    if found.action == "export":
        print(f"wrote {use.export(found.run, found.output, found.step)}")
        return 0
    for line in use.describe(found.run):
        print(line)
    return 0


def bench(words: list[str]) -> int:
    """`hpctrain bench`: on the ranks it was launched on."""
    parser = ArgumentParser(
        prog="hpctrain bench", description="Measure against the peers and the physical limit, in turn."
    )
    parser.add_argument(
        "what", choices=["allreduce", "step", "pipeline"], help="pipeline needs 2 ranks or more"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--case",
        action="append",
        help="which to measure, may be repeated, all by default; of allreduce: bytes; of step: a model's "
        "name; of pipeline: mlp m=8, mlp m=16, mlp m=32, transformer m=8, cnn m=8, "
        "cnn channels_last m=8, emulated m=8",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="how often each is timed in turn, two at least: few for a look, many on an uneven machine; "
        "by default 5 to 25",
    )
    found = parse_words(parser, words)

    def work(world: "MPI.Intracomm") -> int:
        from hpctrain.bench import run

        text = run.bench(found.what, found.case, found.json, world, found.rounds)
        if world.rank == 0:
            print(text)
        return 0

    return on_ranks(work)


def data(words: list[str]) -> int:
    """`hpctrain data`: one process, no MPI."""
    parser = ArgumentParser(prog="hpctrain data", description="Make the data of a recipe.")
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("make", help="make a recipe's HDF5 file")
    making.add_argument("name", choices=[Path(file).stem for file in MADE])
    making.add_argument("--output", type=Path, help="the file to write; default NAME.h5")
    found = parse_words(parser, words)
    from hpctrain.data import make

    print(getattr(make, found.name)(found.output or Path(f"{found.name}.h5")))
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "verify": verify,
    "predict": predict,
    "checkpoint": checkpoint,
    "data": data,
    "bench": bench,
}
