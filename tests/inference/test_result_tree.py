"""The form of results on disk, and in the installed ArviZ."""

import io
import os
import sys
from importlib.metadata import version

import arviz
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr

from prob_transformer import Attention, LinearDecoder
from prob_transformer.files import provenance
from prob_transformer.inference import (
    MapStatus,
    NutsStatus,
    ParticleStatus,
    find_map,
    for_arviz,
    load,
    nuts,
    particle_filter,
    save,
)
from prob_transformer.inference.laplace import laplace
from prob_transformer.inference.result_tree import Result, datatree

ATTRS = provenance(7, {"steps": 5, "rate": 0.1}, "python -m x") | {"objective": "negative log joint"}
ENDINGS = [".nc", ".zarr"]
RNG = np.random.default_rng(0)
GROUPS = {
    "posterior": {
        "embeddings": RNG.normal(size=(2, 3, 4, 5)),
        "scale": np.array([[0.0, -0.0, 1.0], [np.nan, np.inf, -np.inf]]),
        "loc": RNG.normal(size=(2, 3, 2)).astype(np.float32),
    },
    "posterior_predictive": {"tokens": np.arange(24).reshape(2, 3, 4)},
    "log_likelihood": {"tokens": RNG.normal(size=(2, 3))},
    "sample_stats": {"diverging": RNG.normal(size=(2, 3)) > 0, "steps": np.zeros((2, 3), np.int32)},
    "observed_data": {"tokens": np.array([0, 3, 1, 0])},
}


def saved(tmp_path, ending):
    path = tmp_path / f"result{ending}"
    save(datatree(GROUPS, None, ATTRS), path)
    return path


def test_groups_dimensions_coordinates_and_attributes():
    tree = datatree(GROUPS, None, ATTRS)
    assert set(tree.children) == set(GROUPS)
    dims = {
        "posterior/embeddings": ("chain", "draw", "position", "embedding_dim"),
        "posterior/loc": ("chain", "draw", "loc_dim_0"),
        "posterior_predictive/tokens": ("chain", "draw", "position"),
        "log_likelihood/tokens": ("chain", "draw"),
        "observed_data/tokens": ("position",),
    }
    assert {name: tree[name].dims for name in dims} == dims
    for dim, size in {"chain": 2, "draw": 3, "position": 4, "embedding_dim": 5, "loc_dim_0": 2}.items():
        np.testing.assert_array_equal(tree.posterior[dim], np.arange(size))
    assert (tree.attrs["seed"], tree.attrs["objective"]) == ("7", "negative log joint")
    assert tree.attrs["version"] == ATTRS["version"]
    assert tree.attrs["configuration"] == '{"steps": 5, "rate": 0.1}'


def test_batches_are_sequences_and_names_can_be_given():
    groups = {
        "posterior": {"embeddings": jnp.ones((1, 2, 6, 4, 5)), "weight": np.ones((1, 2, 7, 5))},
        "log_likelihood": {"tokens": np.ones((1, 2, 6)), "y": np.ones((1, 2, 4)), "z": np.ones((1, 2, 4))},
        "observed_data": {"tokens": np.ones((6, 4), int), "y": np.ones((4, 9))},
    }
    dims = {"weight": ("token", "embedding_dim"), "y": ("case", "feature")}
    tree = datatree(groups, dims, ATTRS)
    found = {
        "posterior/embeddings": ("chain", "draw", "sequence", "position", "embedding_dim"),
        "posterior/weight": ("chain", "draw", "token", "embedding_dim"),
        "observed_data/tokens": ("sequence", "position"),
        # The density sums over the event: one number a sequence, one a case.
        "log_likelihood/tokens": ("chain", "draw", "sequence"),
        "log_likelihood/y": ("chain", "draw", "case"),
        "log_likelihood/z": ("chain", "draw", "z_dim_0"),
    }
    assert {name: tree[name].dims for name in found} == found


@pytest.mark.parametrize("ending", ENDINGS)
def test_sites_of_modules_are_stored_with_a_dot_for_the_slash_that_separates_groups(tmp_path, ending):
    groups = {
        "posterior": {"net/layers[0].weight": np.arange(6.0).reshape(1, 3, 2), "net/bias": np.arange(3.0)[None]},
        "log_likelihood": {"net/y": np.ones((1, 3, 4))},
        "observed_data": {"net/y": np.ones((4, 9))},
    }
    path = tmp_path / f"result{ending}"
    save(datatree(groups, {"net/y": ("case", "feature")}, ATTRS), path)
    found = load(path)
    weight = found.posterior["net.layers[0].weight"]
    np.testing.assert_array_equal(weight, groups["posterior"]["net/layers[0].weight"])
    assert weight.dims == ("chain", "draw", "net.layers[0].weight_dim_0")
    assert found.log_likelihood["net.y"].dims == ("chain", "draw", "case")
    assert found.observed_data["net.y"].dims == ("case", "feature")


@pytest.mark.parametrize("ending", [*ENDINGS, ".NC"])
def test_a_saved_tree_comes_back_with_every_value_dtype_dimension_and_attribute(tmp_path, ending):
    path = saved(tmp_path, ending)
    assert os.listdir(tmp_path) == [path.name]
    found = load(path)
    assert (found.attrs, set(found.children)) == (datatree(GROUPS, None, ATTRS).attrs, set(GROUPS))
    for group, arrays in GROUPS.items():
        assert set(found[group].data_vars) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[group][name].values, array, strict=True)
            np.testing.assert_array_equal(np.signbit(found[group][name]), np.signbit(array))
    assert found.identical(datatree(GROUPS, None, ATTRS))


@pytest.mark.parametrize("ending", ENDINGS)
def test_arviz_reads_the_files(tmp_path, ending):
    path = saved(tmp_path, ending)
    if arviz.__version__.startswith("0."):
        # ArviZ 0.23 reads netCDF itself, but refuses any store once zarr 3 is installed.
        found = arviz.from_netcdf(path) if ending == ".nc" else arviz.InferenceData.from_datatree(load(path))
    else:
        found = (arviz.from_netcdf if ending == ".nc" else arviz.from_zarr)(path)
    assert found.attrs["seed"] == "7"
    for group, arrays in GROUPS.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[group][name].values, array, strict=True)
    assert set(arviz.summary(found, var_names=["loc"], kind="stats").index) == {"loc[0]", "loc[1]"}
    found.close()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("death", [RuntimeError, KeyboardInterrupt])
def test_a_killed_save_leaves_what_was_there_and_no_litter(tmp_path, ending, death, monkeypatch):
    path = tmp_path / f"result{ending}"
    write = "to_netcdf" if ending == ".nc" else "to_zarr"
    whole = getattr(xr.DataTree, write)

    def half(tree, *args, **kwargs):
        whole(tree, *args, **kwargs)
        raise death("killed")

    with monkeypatch.context() as patch:
        patch.setattr(xr.DataTree, write, half)
        with pytest.raises(death, match="killed"):
            save(datatree(GROUPS, None, ATTRS), path)
    assert os.listdir(tmp_path) == []
    save(datatree({"posterior": {"scale": np.ones((1, 1))}}, None, ATTRS), path)
    with monkeypatch.context() as patch:
        patch.setattr(xr.DataTree, write, half)
        with pytest.raises(death, match="killed"):
            save(datatree(GROUPS, None, ATTRS), path)
    assert (os.listdir(tmp_path), set(load(path).children)) == ([path.name], {"posterior"})


@pytest.mark.parametrize("ending", ENDINGS)
def test_saving_again_replaces_the_whole(tmp_path, ending):
    path = saved(tmp_path, ending)
    save(datatree({"posterior": {"scale": np.ones((1, 1))}}, None, ATTRS), path)
    assert (set(load(path).children), os.listdir(tmp_path)) == ({"posterior"}, [path.name])


def test_nothing_is_pickled_and_both_formats_agree(tmp_path):
    files = [path for path in saved(tmp_path, ".zarr").rglob("*") if path.is_file()]
    assert files
    assert not any(b"pickle" in path.read_bytes() for path in files)
    saved(tmp_path, ".nc")
    assert load(tmp_path / "result.nc").identical(load(tmp_path / "result.zarr"))


@pytest.mark.parametrize(
    ("groups", "dims", "attrs", "message"),
    [
        ({}, None, ATTRS, "groups: got none; pass some of posterior"),
        ({"prior": {}}, None, ATTRS, r"groups: got \['prior'\]"),
        (GROUPS, None, {"seed": 1, "version": "0"}, "attrs: lack objective"),
        (GROUPS, None, ATTRS | {"x": np.nan}, r"attrs\['x'\]: is not JSON"),
        (GROUPS, None, ATTRS | {"x": object()}, r"attrs\['x'\]: is not JSON"),
        (GROUPS, {"lok": ("a",)}, ATTRS, "dims: name lok, in none of the groups"),
        (GROUPS, {"loc": ("a", "b")}, ATTRS, "dims: names .* for 'loc', which has 1 dimensions"),
        ({"posterior": {"a": np.ones(3)}}, None, ATTRS, r"posterior/a: has shape \(3,\); pass \(chain, draw"),
        (
            {"posterior": {"a/b": np.ones((1, 3)), "a.b": np.ones((1, 3))}},
            None,
            ATTRS,
            r"posterior/a\.b: is stored as 'a\.b', which another site has",
        ),
        ({"posterior": {"a": np.ones((1, 3), object)}}, None, ATTRS, "posterior/a: has dtype object"),
        ({"posterior": {"a": jnp.ones((1, 3), jnp.bfloat16)}}, None, ATTRS, "posterior/a: has dtype bfloat16"),
        ({"posterior": {"a": np.ones((1, 3), complex)}}, None, ATTRS, "posterior/a: has dtype complex128"),
        (
            {"posterior": {"a": np.ones((1, 3)), "b": np.ones((1, 4))}},
            None,
            ATTRS,
            "posterior/b: has 4 entries along 'draw', which has 3 elsewhere in posterior",
        ),
        ({"posterior": {"draw": np.ones((1, 3))}}, None, ATTRS, "posterior/draw: has the name of a dimension"),
        ({"posterior": {"a": np.ones((1, 3, 2, 2))}}, {"a": ("x", "x")}, ATTRS, r"dims: names \('x', 'x'\) for 'a'"),
        ({"posterior": {"a": np.ones((1, 3, 2, 2))}}, {"a": ("x", "x", "y")}, ATTRS, "dims: names"),
        ({"posterior": {"a": np.ones((1, 3, 1))}}, {"a": "x"}, ATTRS, "dims: names 'x' for 'a'"),
    ],
)
def test_bad_input_is_refused_by_name(groups, dims, attrs, message):
    with pytest.raises(ValueError, match=message):
        datatree(groups, dims, attrs)


def save_groups(path):
    save(datatree(GROUPS, None, ATTRS), path)


# xarray first tells that there is no consolidated metadata.
UNCONSOLIDATED = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# Consolidated metadata of a store that are JSON, and are not what xarray expects.
DAMAGED = {"list": "[]", "null": "null", "short": '{"metadata": []}', "empty": '{"metadata": {}}'}


@pytest.mark.parametrize(
    ("use", "name", "message"),
    [
        (save_groups, "result.pkl", r"result\.pkl: ends in '.pkl'; pass a path ending in .nc or .zarr"),
        (load, "result.pkl", r"result\.pkl: ends in '.pkl'"),
        *((load, f"gone{ending}", rf"gone\{ending}: is not there") for ending in ENDINGS),
        *((save_groups, f"file/x{ending}", rf"x\{ending}: cannot be written") for ending in ENDINGS),
        (save_groups, "own.zarr", r"own\.zarr: is there and is not a zarr store"),
        pytest.param(load, "broken.nc", "broken.nc: cannot be read with", marks=UNCONSOLIDATED),
        *(
            pytest.param(load, f"{name}.zarr", rf"{name}\.zarr: cannot be read with zarr", marks=UNCONSOLIDATED)
            for name in DAMAGED
        ),
        pytest.param(load, "own.zarr", "own.zarr: cannot be read with", marks=UNCONSOLIDATED),
    ],
)
def test_bad_paths_are_refused_by_name(tmp_path, use, name, message):
    (tmp_path / "file").write_text("text")
    (tmp_path / "broken.nc").write_text("not HDF5")
    for damaged, metadata in DAMAGED.items():
        (tmp_path / f"{damaged}.zarr").mkdir()
        (tmp_path / f"{damaged}.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
        (tmp_path / f"{damaged}.zarr" / ".zmetadata").write_text(metadata)
    (tmp_path / "own.zarr").mkdir()
    (tmp_path / "own.zarr" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=message):
        use(tmp_path / name)
    assert (tmp_path / "own.zarr" / "notes.txt").read_text() == "mine"


mpl.use("Agg")
Y = np.array([0.3, -0.2, 1.1])
ONE = np.ones((1, 1, 1))


def pair(y):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("cases", y.shape[0]):
        numpyro.sample("y", dist.Normal(z.sum(), 1.0), obs=y)


def with_map(max_steps=500):
    return find_map(pair, model_args=(Y,), space="unconstrained", key=0, max_steps=max_steps)


def with_nuts(draws=500):
    return nuts(0, pair, model_args=(Y,), warmup=200, draws=draws)


def with_laplace():
    return laplace(with_map(), key=1, draws=300)


def with_particles():
    decoder = LinearDecoder(jnp.array([[1.0], [-1.0]]), jnp.zeros(2))
    return particle_filter(0, Attention(-ONE, ONE), decoder, jnp.array([0, 1, 0]), particles=100)


@pytest.mark.parametrize(
    ("result", "failed", "status"),
    [
        (with_map, lambda: with_map(max_steps=1), MapStatus.MAX_STEPS),
        (with_nuts, lambda: with_nuts(draws=20), NutsStatus.NOT_MIXED),
        (
            with_particles,
            lambda: with_particles()._replace(status=ParticleStatus.PAST_BOUNDARY),
            ParticleStatus.PAST_BOUNDARY,
        ),
    ],
)
def test_every_result_has_one_protocol(result, failed, status):
    found, failed = result(), failed()
    assert isinstance(found, Result)
    assert (found.status, failed.status) == (0, status)
    for name, draws in found.posterior.items():
        np.testing.assert_array_equal(found.to_datatree()[f"posterior/{name}"], draws)
        np.testing.assert_array_equal(for_arviz(found.to_datatree()).posterior[name], draws)
    with pytest.raises(
        ValueError, match=rf"^status: {status.name.lower()} .*allow=\[{type(status).__name__}.{status.name}\]"
    ):
        failed.to_datatree()
    for allow in ([status], True):
        failed.to_datatree(allow=allow)


# ArviZ 0.23 with Matplotlib 3.11.
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
@pytest.mark.filterwarnings("ignore:Shape validation failed")
@pytest.mark.parametrize("method", [with_nuts, with_laplace, with_particles])
def test_arviz_summarises_and_draws_every_result(method):
    found = method()
    assert isinstance(found, Result)
    data, (draws,) = for_arviz(found.to_datatree()), found.posterior.values()
    assert isinstance(data, xr.DataTree if version("arviz") >= "1" else arviz.InferenceData)
    table = arviz.summary(data, round_to="none")
    np.testing.assert_allclose(table["mean"].astype(float), draws.mean((0, 1)).ravel(), rtol=1e-6)
    np.testing.assert_allclose(table["sd"].astype(float), draws.std((0, 1), ddof=1).ravel(), rtol=1e-2)
    assert "r_hat" in table
    arviz.plot_trace(data)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.slow
def test_nuts_shows_a_bar_on_a_terminal_and_nothing_elsewhere(monkeypatch):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        nuts(0, pair, model_args=(Y,), warmup=20, draws=80)
        assert ("nuts, compiling" in stream.getvalue()) == ("100/100" in stream.getvalue()) == shown
    monkeypatch.setattr(sys, "stderr", Terminal())
    nuts(0, pair, model_args=(Y,), warmup=20, draws=80, progress=False)
    assert sys.stderr.getvalue() == ""
