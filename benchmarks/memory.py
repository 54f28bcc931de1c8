"""Memory of weights, gradients and optimizer on a node: ours against DistributedDataParallel.

    python benchmarks/memory.py [RANKS]

Proportional set size (a page that n processes share counts 1/n in each), summed over the ranks:
after five steps with AdamW at batch 1, less what the processes held before the model was built.
"""

import json
import os
import subprocess
import sys

import torch
import torch.distributed as dist
from mpi4py import MPI

from hpctrain.bench.measure import start_gloo
from hpctrain.bench.step import ddp_step, mlp, our_step
from hpctrain.topology import Topology

WIDTHS = (1024, 4096, 4096, 4096, 1024)
STEPS = 5


def resident() -> int:
    """Bytes of this process, shared pages by their share."""
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))


def worker(kind: str) -> None:
    """Take steps and print the memory that they need, all ranks together."""
    with Topology.build(MPI.COMM_WORLD, device="cpu") as topology:
        comm = topology.comms.world
        start_gloo(comm)
        x = torch.randn(1, WIDTHS[0])
        ddp_step(mlp(8, 8), x[:, :8], fused=True)()  # what the libraries themselves hold
        our_step(topology, mlp(8, 8), x[:, :8])()
        comm.Barrier()
        before = resident()
        model = mlp(*WIDTHS)
        size = 4 * sum(p.numel() for p in model.parameters())
        step = our_step(topology, model, x) if kind == "ours" else ddp_step(model, x, fused=True)
        for _ in range(STEPS):
            step()
        comm.Barrier()
        total = comm.allreduce(resident() - before)
        comm.Barrier()
        if comm.rank == 0:
            sys.stdout.write(json.dumps({"kind": kind, "bytes": total, "model": size}) + "\n")
        dist.destroy_process_group()


def main(ranks: int) -> None:
    """Run both in turn."""
    environment = {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    found = {}
    for kind in ("ours", "ddp"):
        words = ["mpirun", "-n", str(ranks), sys.executable, __file__, "worker", kind]
        done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True, timeout=300)
        found[kind] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    ours, ddp, model = found["ours"]["bytes"], found["ddp"]["bytes"], found["ours"]["model"]
    sys.stdout.write(
        f"{ranks} ranks, model of {model / 2**20:.0f} MiB: ours {ours / 2**20:.0f} MiB "
        f"({ours / model:.2f} models), DDP {ddp / 2**20:.0f} MiB ({ddp / model:.2f} models): "
        f"{ours / ddp:.0%} of DDP's\n"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
