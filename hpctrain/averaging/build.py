"""What an averager is made of, chosen by the optimizer, the device and the ranks."""

from collections.abc import Iterable, Sequence

import torch
from mpi4py import MPI

from hpctrain.averaging import tree as trees
from hpctrain.averaging.medium import Medium, Wire
from hpctrain.averaging.node import Node
from hpctrain.averaging.space import WIRE, Space, deal_whole
from hpctrain.averaging.staged import Staged
from hpctrain.averaging.steppers import Adam, Pieces, Stepper, elementwise
from hpctrain.config import Averaging
from hpctrain.errors import ConfigError
from hpctrain.log import LOGGER


def shards(optimizer: torch.optim.Optimizer, spaces: list[Space], asked: bool | str) -> bool:
    """Whether each rank steps its own part of the weights. Local.

    Unasked only where that can't change a result: an optimizer of the user's may look at several
    tensors at once.
    """
    on_cpu = all(space.device.type == "cpu" for space in spaces)
    if asked == "auto":
        return on_cpu and (elementwise(optimizer) or Adam.fits(optimizer))
    return bool(asked) and on_cpu


def check_dtypes(config: Averaging, dtypes: Iterable[torch.dtype]) -> None:
    """Refuse dtypes of parameters whose sums can't be the same bits on any layout, if asked for. Local."""
    short = [dtype for dtype in dtypes if WIRE.get(dtype, dtype) != dtype]
    if config.invariant and short:
        raise ConfigError(
            f"averaging.invariant = true: parameters of {str(short[0]).removeprefix('torch.')} would be "
            f"rounded at each sum of micro-batches, elsewhere on each number of ranks: keep them in float32 "
            f"(train.autocast = bf16 runs the layers in bfloat16)"
        )


def medium(
    comm: MPI.Intracomm,
    spaces: list[Space],
    smalls: int,
    config: Averaging,
    owners: Sequence[int],
    sharded: bool,
    crowded: bool,
    node_of: Sequence[int] | None,
    cuda_aware: bool = False,
) -> Medium:
    """Give the node's memory, or MPI alone for one rank and for GPUs that it can read. Collective."""
    slots, tree = trees.deal(comm.size, owners) if config.invariant else (1, None)
    check_dtypes(config, (space.dtype for space in spaces))
    on_cpu = all(space.device.type == "cpu" for space in spaces)

    def node(its: list[Space]) -> Node:
        bf16 = on_cpu and config.wire == "bf16"
        shared_weights = sharded or not on_cpu
        return Node(comm, its, smalls, crowded, shared_weights, slots, tree, node_of, bf16=bf16)

    if comm.size > 1 and (on_cpu or not cuda_aware):
        try:
            return node(spaces) if on_cpu else Staged(spaces, node, slots)
        except OSError as error:
            LOGGER.warning(
                "averaging by MPI alone, which is slower: the node's shared memory can't be used: %s; "
                "make /dev/shm larger (containers: --shm-size)",
                error,
            )
    if comm.size > 1 and config.wire == "bf16":
        LOGGER.warning("averaging.wire = bf16 is not used: MPI alone sends the gradients as they are")
    return Wire(comm, spaces, slots, tree, cuda_aware)


def stepper(
    optimizer: torch.optim.Optimizer,
    spaces: list[Space],
    weights: list[torch.Tensor],
    of: Medium,
    sharded: bool,
) -> Stepper:
    """Give what runs the optimizer on what this rank owns; it takes the optimizer's groups. Local."""
    owned = of.owned if sharded else (lambda bucket: bucket)
    gradients = of.slots[0]
    if Adam.fits(optimizer):
        return Adam(optimizer, spaces, weights, owned)
    if elementwise(optimizer):
        return Pieces(optimizer, spaces, weights, gradients, owned)
    if not sharded:
        return Pieces(optimizer, spaces, weights, gradients, None)
    assert isinstance(of, Node)
    dealt, mine = deal_whole(spaces, of.local.size), of.local.rank
    return Pieces(optimizer, spaces, weights, gradients, None, lambda at: dealt[at] == mine)
