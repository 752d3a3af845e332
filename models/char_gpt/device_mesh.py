"""Training on many devices: what lives where on a mesh with the axes "data" and "heads".

    query, key, value, output of a block, and their moments   (H, ...)          heads over "heads"
    everything else in the state                              any               a copy on every device
    windows                                                   (B, n+1)          sequences over "data"
    cells and densities of the layers                         (L, H, B, ...)    both
    cells and densities of the embedding                      (B, ...)          sequences over "data"

From the first four the compiler partitions decoder, loss and optimiser; the cells of the last two are swept device by
device (`prob_transformer.kernels.sharding`), those of the embedding, which has one head, by each device along
"heads" again. The numbers are those of one device up to rounding, but for what a subsampled barrier draws.

With several processes every one runs the same program on its own devices. Process 0 alone writes and prints.
"""

import hashlib
import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from models.char_gpt.config import Config, Site
from prob_transformer.kernels.sharding import mesh as mesh_of
from prob_transformer.transformer.network import Transformer

Tree = TypeVar("Tree")

# Arrays (B, ...) with their sequences over "data".
OVER_DATA = PartitionSpec("data")
SITE_SPECS: dict[Site, PartitionSpec] = {
    "embedding": OVER_DATA,
    "layers": PartitionSpec(None, "heads", "data"),
}
_OF_HEADS = ("query", "key", "value", "output")


def connect(coordinator: str, processes: int, process_id: int) -> None:
    """Join `processes` processes into one JAX run; process 0 listens at coordinator, HOST:PORT.

    To be called before JAX is used. Raises ValueError naming the option; JAX's own error if the others do not answer.
    Where one process alone fails later, JAX stops the others once its time limit of five minutes is over.
    """
    for is_right, message in (
        (re.fullmatch(r".+:\d+", coordinator), f"--coordinator: got {coordinator!r}; pass HOST:PORT of process 0."),
        (processes >= 1, f"--processes: got {processes}; pass an integer of at least 1."),
        (
            0 <= process_id < processes,
            f"--process-id: got {process_id}; pass 0 to {processes - 1}, each to one of the processes.",
        ),
    ):
        if not is_right:
            raise ValueError(message)
    jax.distributed.initialize(coordinator, processes, process_id)


def parse_mesh(text: str) -> tuple[int, int]:
    """Devices along data and heads from "data=D,heads=H". Raises ValueError for anything else."""
    found = re.fullmatch(r"data=([1-9]\d*),heads=([1-9]\d*)", text)
    if found is None:
        raise ValueError(f"--mesh: got {text!r}; pass data=D,heads=H where D * H is the number of devices.")
    return int(found[1]), int(found[2])


def mesh_for(config: Config, data: int, heads: int) -> Mesh:
    """The mesh of all devices. Raises ValueError if they are not data * heads, or split batch or heads unevenly."""
    for option, given, axis, parts in (("batch", config.batch, "data", data), ("heads", config.heads, "heads", heads)):
        if given % parts:
            raise ValueError(f"--{option}: got {given} for --mesh {axis}={parts}; pass a multiple of {parts}.")
    return mesh_of(data, heads)


def require_agreement(**given: Any) -> None:
    """Wait for all processes. Raises ValueError, in all of them, if what they were given differs."""
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).digest()
    everyone = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8)).reshape(-1, len(digest))
    if (everyone != everyone[0]).any():
        raise ValueError(
            f"--processes: the processes differ in {', '.join(given)}; start all with the same options but for "
            "--process-id, and an --out that all of them see."
        )


def specs(tree: Tree) -> Tree:
    """The PartitionSpec of every leaf of a state, a model or anything else that holds models."""

    def spec(path: tuple[Any, ...], _: Any) -> PartitionSpec:
        names = [getattr(entry, "name", None) for entry in path]
        return PartitionSpec("heads") if "blocks" in names and names[-1] in _OF_HEADS else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def _shardings(tree: Tree, mesh: Mesh) -> Tree:
    return jax.tree.map(partial(NamedSharding, mesh), specs(tree))


def placed(tree: Tree, mesh: Mesh | None) -> Tree:
    """Arrays that every process holds whole, spread over the mesh; unchanged without one."""
    if mesh is None:
        return tree

    def place(x: ArrayLike, sharding: NamedSharding) -> Array:
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(place, tree, _shardings(tree, mesh))


def constrained(tree: Tree, mesh: Mesh | None, spec: PartitionSpec | None = None) -> Tree:
    """Inside jit: the tree where `placed` would put it, so that a step leaves things as it found them, or by `spec`."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, _shardings(tree, mesh) if spec is None else NamedSharding(mesh, spec))


_copied = jax.jit(partial(constrained, spec=PartitionSpec()), static_argnums=1)


def gathered(tree: Tree, mesh: Mesh | None) -> Tree:
    """The inverse of `placed`, to be called by all processes: whole arrays on each one's first device."""
    return tree if mesh is None else jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), _copied(tree, mesh))


def at_site(function: Callable[..., Tree], site: Site, mesh: Mesh | None) -> Callable[..., Tree]:
    """`function(model, embeddings, inputs)` of a site's densities, every device doing its own heads and sequences."""
    if mesh is None:
        return function

    def sharded(model: Transformer, embeddings: Float[Array, "B n d"], inputs: Float[Array, "L B n d"]) -> Tree:
        in_specs = specs(model), OVER_DATA, PartitionSpec(None, "data")
        # Unchecked for the reason given in prob_transformer/kernels/sharding.py.
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=SITE_SPECS[site], check_vma=False)(
            model, embeddings, inputs
        )

    return sharded
