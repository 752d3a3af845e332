"""Cells on a mesh of 8 virtual devices, against the reference on one. Run as a script, this is what they do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from prob_transformer import Attention, barrier, barrier_penalty, residual_and_log_det
from prob_transformer.kernels import sharding
from prob_transformer.kernels.projections import Projections
from prob_transformer.kernels.tiling import Tiling

ROOT = Path(__file__).resolve().parents[2]
CASES = ((8, 1, "float64"), (4, 2, "float64"), (2, 4, "float64"), (4, 2, "float32"))
TILING = Tiling(8, 8)
HEADS_AND_SEQUENCES = PartitionSpec(None, "heads", "data")
# Sharded over "data" alone, so that the devices along "heads" repeat the work.
SEQUENCES = PartitionSpec(None, None, "data")
NAMES = ("query", "key", "embeddings")
EXCHANGES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
DRAWS = 1000
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def layers(dtype, sequences=8):
    """Queries and keys (L, H, p, d) = (2, 4, 3, 5) and embeddings (L, sequences, 12, 5) of each layer.

    One determinant is negative and none is near 0, where float32 would lose the digits that are asked for.
    """
    rng = np.random.default_rng(3)
    query, key = rng.normal(size=(2, 2, 4, 3, 5))
    embeddings = 0.5 * rng.normal(size=(2, sequences, 12, 5))
    return query.astype(dtype), key.astype(dtype), embeddings.astype(dtype)


def uneven_layer():
    """One layer whose barriers are all negative and grow within every shard of 4 sequences.

    Shards that drew alike would so err alike, and their errors would add up.
    """
    _, key, embeddings = (x[:1] for x in layers("float64", 16))
    return -key, key, embeddings * np.tile([0.2, 0.5, 1.0, 2.0], 4)[:, None, None]


def at_every_head(function, query, key, embeddings):
    """`function(attention, embeddings)` for every layer and head, alone and with identity values."""

    def one(query, key, embeddings):
        return function(Attention(query[None], key[None]), embeddings)

    return jax.vmap(jax.vmap(one, in_axes=(0, 0, None)))(query, key, embeddings)


# What the 8 devices do.


def on_devices(out):
    results = {}
    for data, heads, dtype in CASES:
        found = sharded_mean(sharding.mesh(data, heads), HEADS_AND_SEQUENCES, layers(dtype))
        results.update({f"{data}x{heads}/{dtype}/{name}": value for name, value in found.items()})
    mesh = sharding.mesh(4, 2)
    found = sharded_mean(mesh, SEQUENCES, layers("float64"))
    results.update({f"repeated/{name}": value for name, value in found.items()})
    results.update({f"subsampled/{name}": value for name, value in sharded_draws(mesh).items()})
    results.update(
        {f"penalty/{name}": value for name, value in sharded_penalty(jax.make_mesh((4, 2), ("data", "heads"))).items()}
    )
    np.savez(out, **results)


def sharded_penalty(mesh):
    """Both forms of the penalty of a layer on two batch axes, and what three sequences on four devices raise."""
    query, key, embeddings = (x[0] for x in layers("float64"))
    layer = Attention(query, key)
    found = {
        form: barrier_penalty([(layer, embeddings.reshape(4, 2, 12, 5))], form=form, mesh=mesh, tiling=TILING).mean
        for form in ("two-sided", "one-sided")
    }
    for form in list(found):
        try:
            barrier_penalty([(layer, embeddings), (layer, embeddings[:3])], form=form, mesh=mesh)
        except ValueError as error:
            found[f"{form} refused"] = str(error)
    return found


def sharded_mean(mesh, spec, parameters):
    """Mean barrier, its gradient, how that is spread, and the exchanges in the compiled code."""
    on_heads = spec[1]

    def mean(query, key, embeddings):
        found = sharding.sharded_mean_barrier(at_every_head(Projections.of, query, key, embeddings), mesh, spec, TILING)
        return found.mean, found

    specs = (PartitionSpec(None, on_heads), PartitionSpec(None, on_heads), PartitionSpec(None, "data"))
    placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(parameters, specs, strict=True)]
    compiled = jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2), has_aux=True)).lower(*placed).compile()
    (_, found), gradient = compiled(*placed)
    return {
        **found._asdict(),
        **dict(zip(NAMES, gradient, strict=True)),
        "shard": gradient[2].addressable_shards[0].data.shape,
        "devices": len({shard.device for shard in gradient[2].addressable_shards}),
        "exchanges": sorted(set(re.findall(EXCHANGES, compiled.as_text()))),
    }


def sharded_draws(mesh):
    """Many draws of a quarter of the cells, and one of all of them with its gradient."""
    spec = PartitionSpec("heads", "data")

    def draw(parameters, key, share):
        cells = jax.tree.map(lambda x: x[0], at_every_head(Projections.of, *parameters))
        return sharding.sharded_subsampled_barrier(key, cells, share, mesh, spec, TILING)

    @jax.jit
    def draws(parameters, keys):
        return jax.lax.map(lambda key: draw(parameters, key, 0.25), keys)

    found = draws(uneven_layer(), jax.random.split(jax.random.key(0), DRAWS))
    everything = jax.jit(jax.value_and_grad(lambda parameters: draw(parameters, jax.random.key(1), 1.0).mean))
    value, gradient = everything(uneven_layer())
    return {**found._asdict(), "all": value, **dict(zip(NAMES, gradient, strict=True))}


# What is expected of them.


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharding") / "found.npz"
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_ENABLE_X64": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(out)


@pytest.fixture(scope="module")
def truth():
    """The reference's mean barrier on one device, in float64, with its gradient and the share of det J <= 0."""

    def mean(query, key, embeddings):
        return at_every_head(barrier, query, key, embeddings).mean()

    parameters = [jnp.asarray(x) for x in layers("float64")]
    value, gradient = jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2)))(*parameters)
    sign = at_every_head(residual_and_log_det, *parameters).sign
    return {"mean": value, "negative_share": (sign <= 0).mean(), "gradient": gradient}


def assert_close(actual, expected, tolerance):
    """To the tolerance relative to the largest element: small ones carry the rounding of large ones."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "dtype"),
    [("repeated", "float64"), *[(f"{data}x{heads}/{dtype}", dtype) for data, heads, dtype in CASES]],
)
def test_mean_barrier_and_gradient_are_those_of_one_device(found, truth, prefix, dtype):
    assert found[f"{prefix}/mean"].dtype == dtype
    assert_close(found[f"{prefix}/mean"], truth["mean"], TOLERANCE[dtype])
    np.testing.assert_allclose(found[f"{prefix}/negative_share"], truth["negative_share"], rtol=1e-6)
    assert 0 < truth["negative_share"] < 0.5
    assert found[f"{prefix}/variance"] == 0
    for name, expected in zip(NAMES, truth["gradient"], strict=True):
        assert_close(found[f"{prefix}/{name}"], expected, TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize(("data", "heads", "dtype"), CASES)
def test_every_device_does_its_share_and_only_sums_are_exchanged(found, data, heads, dtype):
    prefix = f"{data}x{heads}/{dtype}"
    assert found[f"{prefix}/devices"] == 8
    assert tuple(found[f"{prefix}/shard"]) == (2, 8 // data, 12, 5)
    assert list(found[f"{prefix}/exchanges"]) == ["all-reduce"]


def draw_variance(sums):
    """Variance of the estimated total when 2 of the 8 cells in the last axis are drawn without replacement."""
    return 8 * (8 / 2 - 1) * sums.var(-1, ddof=1)


@pytest.mark.slow
def test_subsampled_barrier_is_unbiased_and_reports_the_variance_of_independent_draws(found):
    by_cell = np.asarray(at_every_head(barrier, *(jnp.asarray(x) for x in uneven_layer()))[0])
    means = found["subsampled/mean"]
    assert abs(means.mean() - by_cell.mean()) < 4 * np.sqrt(means.var(ddof=1) / DRAWS)
    # Every block of 8 queries has a draw of its own; a shard has 2 of 4 heads and 4 of 16 sequences.
    blocks = np.stack([by_cell[..., :8].sum(-1), by_cell[..., 8:].sum(-1)])
    shards = np.moveaxis(blocks.reshape(2, 2, 2, 4, 4), 2, 3).reshape(2, 8, 8)
    independent = draw_variance(shards).sum() / by_cell.size**2
    # The variance of 1000 draws has a standard error of about 4.5 %.
    np.testing.assert_allclose(means.var(ddof=1), independent, rtol=0.2)
    np.testing.assert_allclose(found["subsampled/variance"].mean(), independent, rtol=0.2)
    # What shards that drew alike would give is told apart from that.
    assert draw_variance(shards.sum(1)).sum() / by_cell.size**2 > 4 * independent


@pytest.mark.slow
@pytest.mark.parametrize("form", ["two-sided", "one-sided"])
def test_the_penalty_takes_several_batch_axes_and_names_a_layer_that_cannot_be_spread(found, form):
    query, key, embeddings = (x[0] for x in layers("float64"))
    alone = barrier_penalty([(Attention(query, key), embeddings)], form=form)
    np.testing.assert_allclose(found[f"penalty/{form}"], alone.mean, rtol=1e-12)
    assert "layer 1: sequences and heads: axis 0 has length 3 for 4 devices" in str(found[f"penalty/{form} refused"])


@pytest.mark.slow
def test_drawing_everything_gives_the_mean_and_its_gradient(found):
    parameters = [jnp.asarray(x) for x in uneven_layer()]
    mean = jax.jit(jax.value_and_grad(lambda parameters: at_every_head(barrier, *parameters).mean()))
    value, gradient = mean(parameters)
    np.testing.assert_allclose(found["subsampled/all"], value, rtol=1e-12)
    for name, expected in zip(NAMES, gradient, strict=True):
        assert_close(found[f"subsampled/{name}"], expected, 1e-11)


MORE = r"data, heads: got {} \* {} = .* pass a product of 1, or start JAX"
NONE = r"heads: got .* pass an integer of at least 1"


@pytest.mark.parametrize(
    ("data", "heads", "message"),
    [
        (2, 1, MORE.format(2, 1)),
        (1, 3, MORE.format(1, 3)),
        (1, 0, NONE),
        (1, -1, NONE),
        (1, 1.0, NONE),
        (1, True, NONE),
    ],
)
def test_a_mesh_of_more_devices_than_there_are_or_of_none_is_refused(data, heads, message):
    with pytest.raises(ValueError, match=message):
        sharding.mesh(data, heads)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (PartitionSpec(None, "heads", "data"), r"cells: axis 2 has length 6 for 4 devices along data; pass a multiple"),
        (PartitionSpec(None, None, ("heads", "data")), "cells: axis 2 has length 6 for 8 devices along heads, data"),
        (PartitionSpec("positions"), "spec: names positions; pass axes of the mesh: data, heads"),
        (PartitionSpec(None, None, None, "heads"), "spec: got .* pass at most one entry for each of the leading axes"),
    ],
)
def test_cells_that_cannot_be_spread_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        sharding.require_equal_shards("cells", (2, 4, 6), AbstractMesh((4, 2), ("data", "heads")), spec)


if __name__ == "__main__":
    on_devices(sys.argv[1])
