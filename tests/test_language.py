"""The recipe `language`: windows of text files, what is counted, and a GPT that sees only what was before."""

import bz2
import gzip
import json
import lzma
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import hpctrain
from hpctrain import assemble, parse
from hpctrain.data import make
from hpctrain.engine import sum_over
from hpctrain.errors import ConfigError
from hpctrain.models.gpt import GPT
from hpctrain.recipes.language import START
from hpctrain.topology import Topology
from hpctrain.verify import compare

RECIPE = Path(hpctrain.__file__).parent / "recipes" / "language.toml"
SMALL = {"width": 32, "layers": 2, "heads": 2}


def library(folder):
    """Write text files as those of a standard library: short ones, long ones, one twice, others' ones."""
    for at in range(40):
        text = json.dumps([[at, other, other * at % 7] for other in range(3 + at * at % 90)], indent=1)
        path = folder / f"package{at % 3}" / f"module{at}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    (folder / "again.txt").write_bytes((folder / "package1" / "module1.py").read_bytes())
    (folder / "empty.py").write_text("")
    (folder / "LICENSE.txt").write_text("as you like")
    for other in ("site-packages/theirs.py", "__pycache__/made.py", "picture.png"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_text("not of the library")
    return folder


@pytest.fixture
def made(world, shared_tmp):
    """Make the data of a small library; gives (file, {name: bytes} in training, the same held out)."""
    output = shared_tmp / "language.h5"
    if world.rank == 0:
        make.language(output, library(shared_tmp / "lib"))
    world.Barrier()
    parts = ({}, {})
    for name, content in make.texts(shared_tmp / "lib"):
        parts[make.held_out(name)][name] = content
    return output, *parts


@pytest.fixture
def config(made):
    found = parse.from_toml(RECIPE)
    return replace(
        found,
        data=replace(found.data, files=[str(made[0])]),
        model=replace(found.model, init_args=SMALL),
        train=replace(found.train, batch=8, epochs=None, steps=4),
    )


def job_of(config, topology, **parallel):
    return assemble.build(replace(config, parallel=replace(config.parallel, **parallel)), topology)


@pytest.mark.mpi
def test_windows_hold_every_byte_once(made):
    output, train, held = made
    assert "empty.py" not in {**train, **held}
    assert len({"again.txt", "package1/module1.py"} & {*train, *held}) == 1
    assert len(train) > 20
    assert len(held) > 2
    with h5py.File(output) as file:
        text, place, part = file["text"][:], file["place"][:], file["part"][:]
        names = [name.decode() for name in file["path"][:]]
        assert file["license"][()] == b"as you like"
        assert file.attrs["license"] == "PSF-2.0"
    found = {name: bytearray() for name in names}
    for row, (number, first, stop), held_out in zip(text, place, part):
        name = names[number]
        assert held_out == (name in held)
        whole = {**train, **held}[name]
        at = len(found[name])
        assert bytes(row[:stop]) == whole[at - first : at - first + stop]
        assert not row[stop:].any()
        found[name] += bytes(row[first:stop])
    assert found == {**train, **held}


@pytest.mark.mpi
def test_every_byte_counts_once_and_compressors_are_the_libraries_own(config, topology, world, made):
    """A model that knows nothing takes log2(257) bits a byte; of the baselines the sizes are compressed anew."""
    _, train, held = made
    job = job_of(config, topology)
    with torch.no_grad():
        job.engine.module.embedding.weight.zero_()
    counts = {}
    for split in ("train", "test"):
        count = {}
        for batch in job.split_batches(split):
            weights = batch.weights["next"]
            bits, bytes_ = job.task.measure(job.engine.outputs(batch), batch)["bits_per_byte"]
            assert bits / bytes_ == pytest.approx(np.log2(257), rel=1e-6)
            for sample, row in zip(batch.samples.tolist(), weights):
                count[sample] = float(row.sum())
            assert torch.equal(batch.inputs["text"][:, 1:], batch.targets["next"][:, :-1])
            assert (batch.inputs["text"][:, 0] == START).all()
        counts[split] = sum(world.allreduce(list(count.values())))
    assert counts["test"] == sum(map(len, held.values()))
    windows = sum(
        max(0, -(-(len(text) - make.CONTEXT) // (make.WINDOW - make.CONTEXT)) - 1) for text in train.values()
    )
    # in training also what the window before has, but for the byte without one before it
    assert counts["train"] == sum(map(len, train.values())) + windows * (make.CONTEXT - 1)

    mine = job.task.baselines(lambda: job.split_batches("test"))
    assert list(mine) == ["gzip", "bz2", "xz", "gzip_joint", "bz2_joint", "xz_joint"]
    strong = {
        "gzip": lambda text: gzip.compress(text, 9, mtime=0),
        "bz2": lambda text: bz2.compress(text, 9),
        "xz": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    for name, compress in strong.items():
        texts = [held[name] for name in sorted(held)]
        total = len(b"".join(texts))
        for key, expected in ((name, map(compress, texts)), (f"{name}_joint", [compress(b"".join(texts))])):
            # on every rank the whole sums: their ratio is the same over any number of ranks
            sums = sum_over(topology.comms.data, {"bits_per_byte": [mine[key]["bits_per_byte"]]})[
                "bits_per_byte"
            ]
            assert sums[0] / sums[1] == 8 * sum(map(len, expected)) / total, key
    job.close()


@pytest.mark.mpi
@pytest.mark.parametrize("positions", ["rotary", "learnt"])
def test_a_byte_is_predicted_from_those_before_it(positions):
    torch.manual_seed(0)
    model = GPT((16,), positions=positions, **SMALL).eval()
    text = torch.randint(256, (2, 16))
    changed = text.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(text), model(changed)
    assert before.shape == (2, 257, 16)
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert (before[:, :, 9:] != after[:, :, 9:]).any(dim=1).all()
    swapped = text.clone()  # places matter: the same bytes in another order are another text
    swapped[:, [2, 3]] = swapped[:, [3, 2]]
    different = text[:, 2] != text[:, 3]
    assert (model(swapped)[:, :, 8:] != before[:, :, 8:])[different].any()
    assert ("place" in dict(model.named_parameters())) == (positions == "learnt")
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 36, "heads": 8}, "model width = 36 must be a multiple of 2 x heads = 16"),
        ({"heads": 0}, "width = 192, heads = 0, layers = 4: at least 1"),
        ({"positions": "sine"}, "model positions = 'sine': rotary or learnt was expected"),
    ],
)
def test_what_a_gpt_refuses(wrong, message):
    with pytest.raises(ConfigError, match=message):
        GPT((16,), **wrong)


@pytest.mark.mpi
def test_stages_equal_one_process(config, world):
    """Tied weights on the first and last stage, dropout, both kinds of positions."""
    stages = 2 if world.size % 2 == 0 else 1
    with Topology.build(world, stages, threads=1) as topology:
        for positions in ("rotary", "learnt"):
            init_args = {**SMALL, "positions": positions, "dropout": 0.1}
            one = replace(config, model=replace(config.model, init_args=init_args))
            job = job_of(one, topology, stages=stages, micro_batches=4)
            assert compare(job, 2) is None
            job.close()


@pytest.mark.mpi
def test_a_sample_goes_on_from_the_prompt(config, topology):
    job = job_of(config, topology)
    job.task.sample_bytes = 20
    asked = []

    def always(letter):
        def run(batch):
            asked.append(batch.inputs["text"])
            logits = torch.zeros(1, 257, job.task.length)
            logits[:, letter] = 100.0
            return logits

        return run

    assert job.task.sample(always(ord("x"))) == "def " + 20 * "x"
    assert asked[0][0, :6].tolist() == [START, *b"def ", START]
    assert asked[-1][0, :25].tolist() == [START, *b"def ", *19 * b"x", START]
    job.task.sample_bytes = 2 * job.task.length  # longer than a window: the last bytes are seen
    assert len(job.task.sample(always(ord("y")))) == 4 + 2 * job.task.length
    assert asked[-1][0].tolist() == [START, *(job.task.length - 1) * b"y"]
    job.close()


def test_a_folder_without_enough_text_is_named(tmp_path):
    (tmp_path / "one.py").write_text("1")
    with pytest.raises(ConfigError, match=f"{tmp_path} holds 1 files of text"):
        make.language(tmp_path / "l.h5", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.py"]


@pytest.mark.mpi
def test_other_data_is_refused(config, topology):
    with pytest.raises(ConfigError, match=r"must be windows of bytes.*`hpctrain data make language`"):
        assemble.build(replace(config, data=replace(config.data, inputs=["place"])), topology)
