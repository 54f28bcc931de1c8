"""Predictions of a trained model into one HDF5 file, written by all ranks at once.

      rank 0   creates the file: datasets contiguous, their place in the file known
      rank r   writes its rows' bytes there:   │ r0 r0 │ r1 r1 │ r2 r2 │

Plain HDF5 without its MPI driver can't be written by several processes; bytes at known places can.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from mpi4py import MPI

from hpctrain import assemble, log
from hpctrain.assemble import Job
from hpctrain.batch import Batch
from hpctrain.checkpoint.load import Stored
from hpctrain.config import Config
from hpctrain.data.index import find_files
from hpctrain.data.output import PREDICTIONS, refuse_others, temporary_beside
from hpctrain.errors import ConfigError, HpctrainError, nearest
from hpctrain.log import LOGGER, counted
from hpctrain.topology import Topology
from hpctrain.use import open_run
from hpctrain.wire import from_root, together

Offsets = dict[str, int]


def predict(run: Path, output: Path, split: str, step: int | None, comm: MPI.Intracomm) -> Path:
    """Write the predictions of a split, in the run's stages where the ranks allow. Collective over `comm`.

    The file has one dataset a target, rows in the order of the split, with units and
    coordinates, and `sample`, the row of the whole data that each is for. Raises ConfigError where
    `output` is there and no earlier prediction, or is what the run is trained on.
    """

    def opened() -> tuple[Config, Stored]:
        config, stored = open_run(run, step)
        refuse_others(output, PREDICTIONS, find_files(config.data.files))
        temporary_beside(output).unlink()  # what can't be written is found before the work
        return config, stored

    config, stored = from_root(comm, opened)
    stages = config.parallel.stages if comm.size % config.parallel.stages == 0 else 1
    with Topology.build(comm, stages) as topology:
        log.start(topology)
        if stages != config.parallel.stages:
            LOGGER.info(
                "%s can't be the run's %d stages: each holds the whole model",
                *(counted(comm.size, "rank"), config.parallel.stages),
            )
            config = replace(config, parallel=replace(config.parallel, cuts=[]))
        # nothing is averaged here: any number of ranks will do
        config = replace(config, averaging=replace(config.averaging, invariant=False))
        job = assemble.build(config, topology, learn=False, trains=False)
        job.restore_weights(stored)
        try:
            write(job, split, output, topology.comms.world)
        finally:
            job.close()
        LOGGER.info(
            "%s of %s, step %d, in %s",
            *(counted(len(job.index.splits[split]), "prediction"), run, stored.step, output),
        )
    return output


def write(job: Job, split: str, output: Path, world: MPI.Intracomm) -> None:
    """Write under a temporary name, by all ranks, then rename. Collective."""

    def begin() -> Path:
        if split not in job.index.splits:
            raise ConfigError(f"--split {split}: {nearest(split, job.index.splits)}")
        return temporary_beside(output)

    temporary = from_root(world, begin)
    try:
        fill(job, split, temporary, world)
        from_root(world, lambda: temporary.replace(output))
    finally:
        if world.rank == 0:
            temporary.unlink(missing_ok=True)


def fill(job: Job, split: str, temporary: Path, world: MPI.Intracomm) -> None:
    """Write the rows, each rank its own. Collective."""
    offsets, dtypes = from_root(world, lambda: writing(temporary)(create)(job, split, temporary))
    kinds = dict(zip(offsets, dtypes))
    shapes = {wanted.name: tuple(wanted.shape) for wanted in job.task.predictions()}
    with together(world):  # before the stages wait for one another
        file = open(temporary, "rb+")  # noqa: SIM115
    with together(world), file:
        starts = iter(job.split_blocks(split))

        def store(batch: Batch, outputs: Any) -> None:
            start, _ = next(starts)
            for name, values in job.task.predict(outputs, batch).items():
                rows = np.ascontiguousarray(values, dtype=kinds.get(name))
                check_rows(name, rows, len(batch), shapes)
                with writing(temporary):
                    os.pwrite(file.fileno(), rows.tobytes(), offsets[name] + start * rows[0].nbytes)

        job.engine.each(job.split_batches(split), store)
        with writing(temporary):
            os.fsync(file.fileno())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file can't be written, and what to do. Local."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter is HDF5's, of what it could not flush
        raise HpctrainError(
            f"{path} can't be written ({error}): free space, or give another --output"
        ) from None


def check_rows(name: str, rows: Any, count: int, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse what would be written over other rows: a task's prediction of another shape. Local."""
    if name not in shapes:
        raise ConfigError(
            f"the task predicts {name}, which its predictions() does not list: {sorted(shapes)}"
        )
    if rows.shape != (count, *shapes[name]):
        raise ConfigError(
            f"the task predicts {name} as {rows.shape} for {count} samples, its predictions() says "
            f"{(count, *shapes[name])}: make them agree"
        )


def create(job: Job, split: str, path: Path) -> tuple[Offsets, list[str]]:
    """Make the file with all names, units and coordinates; give where each dataset's bytes lie."""
    samples = job.index.splits[split].samples(np.arange(len(job.index.splits[split])))
    dtypes: list[str] = []
    with h5py.File(path, "w") as file:
        file.attrs["source"] = f"{PREDICTIONS}, split {split}"
        file["sample"] = samples
        first = axis_of_samples(job, file, samples)
        for wanted in job.task.predictions():
            made = contiguous(file, wanted.name, (len(samples), *wanted.shape), wanted.dtype)
            dtypes.append(wanted.dtype)
            if wanted.units:
                made.attrs["units"] = wanted.units
            made.dims[0].attach_scale(file[first])
            for at, (name, (values, units)) in enumerate(wanted.coordinates.items(), start=1):
                if name not in file:
                    file[name] = values
                    file[name].attrs["units"] = units
                    file[name].make_scale(name)
                made.dims[at].attach_scale(file[name])
        names = [wanted.name for wanted in job.task.predictions()]
    with h5py.File(path, "r") as file:
        return {name: file[name].id.get_offset() for name in names}, dtypes


def axis_of_samples(job: Job, file: h5py.File, samples: Any) -> str:
    """Write the coordinate of the samples, if the data have one; give the name of the first axis."""
    name = "sample"
    if job.index.coordinate is not None:
        name = job.config.data.coordinate.strip("/").rsplit("/", 1)[-1]
        file[name] = job.index.coordinate[samples]
        for key, value in job.index.coordinate_attributes:
            if key not in ("CLASS", "NAME"):
                file[name].attrs[key] = value
    file[name].make_scale(name)
    return name


def contiguous(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> h5py.Dataset:
    """Make a dataset whose bytes exist, in one run, before anything is written."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    space = h5py.h5s.create_simple(shape)
    kind = h5py.h5t.py_create(np.dtype(dtype))
    made = h5py.h5d.create(file.id, name.encode(), kind, space, properties)
    return h5py.Dataset(made)
