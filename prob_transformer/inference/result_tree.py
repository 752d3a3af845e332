"""What every result of inference has in common, and its form on disk: an `xarray.DataTree` in ArviZ's groups.

    posterior, posterior_predictive, log_likelihood, sample_stats    dimensions chain, draw, then those of the site
    observed_data                                                    the dimensions of the site

The tree is built, saved and loaded by xarray alone: ArviZ 0.23 takes it as `for_arviz` converts it, ArviZ 1 as it is.
Only numbers and text are stored, so nothing is pickled. Zarr stores have format 2, whose consolidated metadata every
version reads without a warning.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from jaxtyping import Num, Shaped

from prob_transformer._extras import require
from prob_transformer.files import atomic_path, require_ending

if TYPE_CHECKING:
    from xarray import Dataset, DataTree
else:
    # Results are read and made without xarray, which belongs to an extra.
    DataTree = Dataset = Any

Group = Literal["posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data"]
Dims = Mapping[str, tuple[str, ...]]
Allow = Collection[IntEnum] | Literal[True]

_SITE_DIMS = {
    "embeddings": ("position", "embedding_dim"),
    "embeddings_noise": ("position", "embedding_dim"),
    "tokens": ("position",),
}
_REQUIRED_ATTRS = ("version", "seed", "objective")
# What both formats hold without conversion; bfloat16, float16 and complex numbers are refused rather than cast.
_DTYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")
ENGINES: dict[str, Literal["h5netcdf", "zarr"]] = {".nc": "h5netcdf", ".zarr": "zarr"}
_MODULES = {"h5netcdf": ("xarray", "h5netcdf", "h5py"), "zarr": ("xarray", "zarr")}


@runtime_checkable
class Result(Protocol):
    """What every method of inference returns: look at `status` first, which is 0 where nothing was found wrong.

    `posterior` by site, `to_datatree` the whole result. The tree is refused with the name of what is wrong and a remedy
    unless `allow` names it: it is a collection of statuses, or True for all that leave something to be kept.
    """

    @property
    def status(self) -> Any: ...
    @property
    def posterior(self) -> Mapping[str, Num[Any, "chain draw ..."]]: ...
    def to_datatree(self, dims: Dims | None = None, *, allow: Allow = ()) -> DataTree: ...


def require_allowed(problems: Mapping[Any, str], allow: Allow, never: Collection[IntEnum] = ()) -> None:
    """Raise ValueError with extent and remedy of each problem, unless all are in `allow` and none is in `never`."""
    refused = [problem for problem in problems if problem in never or (allow is not True and problem not in allow)]
    if refused:
        found = "; ".join(f"{problem.name.lower()} {problems[problem]}" for problem in refused)
        names = ", ".join(f"{type(problem).__name__}.{problem.name}" for problem in refused)
        keep = "" if set(refused) & set(never) else f". Pass allow=[{names}] to keep this result all the same"
        raise ValueError(f"status: {found}{keep}.")


def _site_dims(name: str, ndim: int, dims: Dims) -> tuple[str, ...]:
    """The names of a site's own dimensions: those given, those of the token model, or name_dim_0, name_dim_1, ..."""
    if name in dims:
        if isinstance(dims[name], str) or not len(set(dims[name])) == len(dims[name]) == ndim:
            raise ValueError(
                f"dims: names {dims[name]!r} for {name!r}, which has {ndim} dimensions; pass a tuple of so many "
                "different names."
            )
        return tuple(dims[name])
    known = _SITE_DIMS.get(name, ())
    if known and ndim in (len(known), len(known) + 1):
        return ("sequence", *known) if ndim > len(known) else known
    return tuple(f"{name}_dim_{axis}" for axis in range(ndim))


def _variables(group: str, arrays: Mapping[str, Shaped[Any, "..."]]) -> dict[str, Shaped[Any, "..."]]:
    """The arrays by their names in the tree, in which '/' separates groups: "transformer.head" for "transformer/head".

    Raises ValueError where two sites get the same name.
    """
    found = dict[str, Any]()
    for name, value in arrays.items():
        variable = name.replace("/", ".")
        if variable in found:
            raise ValueError(f"{group}/{name}: is stored as {variable!r}, which another site has; rename one of them.")
        found[variable] = value
    return found


def _dataset(group: str, arrays: Mapping[str, Shaped[Any, "..."]], observed: Mapping[str, Any], dims: Dims) -> Dataset:
    import xarray as xr

    outer = () if group == "observed_data" else ("chain", "draw")
    variables, sizes = {}, dict[str, int]()
    for name, value in arrays.items():
        label = f"{group}/{name}"
        array = np.asarray(value)
        if array.dtype.name not in _DTYPES:
            raise ValueError(f"{label}: has dtype {array.dtype}; pass one of {', '.join(_DTYPES)}.")
        own = array.ndim - len(outer)
        if own < 0:
            raise ValueError(f"{label}: has shape {array.shape}; pass (chain, draw, ...).")
        # The density of a site sums over its event, so its log-likelihood keeps the leading dimensions only.
        whole = max(own, np.ndim(observed[name])) if group == "log_likelihood" and name in observed else own
        names = (*outer, *_site_dims(name, whole, dims)[:own])
        for dim, size in zip(names, array.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(
                    f"{label}: has {size} entries along {dim!r}, which has {sizes[dim]} elsewhere in {group}; pass "
                    "arrays that agree, or `dims` with another name."
                )
        variables[name] = (names, array)
    taken = sorted(variables.keys() & sizes.keys())
    if taken:
        raise ValueError(f"{group}/{taken[0]}: has the name of a dimension; rename the site, or pass other `dims`.")
    return xr.Dataset(variables, coords={dim: np.arange(size) for dim, size in sizes.items()})


def _text(name: str, value: Any) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"attrs[{name!r}]: is not JSON ({error}); pass text, finite numbers or lists.") from None


def datatree(
    groups: Mapping[str, Mapping[str, Shaped[Any, "..."]]], dims: Dims | None, attrs: Mapping[str, Any]
) -> DataTree:
    """The tree of the given groups of arrays by site, all shaped (chain, draw, ...) but those of `observed_data`.

    `dims` names the dimensions of a site after chain and draw; without it "embeddings" are (position, embedding_dim),
    "tokens" (position,), both behind `sequence` when batched, and others (name_dim_0, ...). Every dimension has the
    coordinates 0, 1, .... A '/' in the name of a site is stored as '.'. `attrs` holds at least version, seed and
    objective: `provenance(...)` with an objective added; what is not text is stored as JSON. Raises ValueError naming
    the group and site, or the attribute, and MissingExtraError without xarray.
    """
    require("inference", "xarray")
    import xarray as xr

    dims = {} if dims is None else dims
    unknown = sorted(set(groups) - set(get_args(Group)))
    if unknown or not groups:
        raise ValueError(f"groups: got {unknown or 'none'}; pass some of {', '.join(get_args(Group))}.")
    missing = [name for name in _REQUIRED_ATTRS if name not in attrs]
    if missing:
        raise ValueError(f"attrs: lack {', '.join(missing)}; pass provenance(seed, configuration) and an objective.")
    unused = sorted(set(dims) - {name for arrays in groups.values() for name in arrays})
    if unused:
        raise ValueError(f"dims: name {', '.join(unused)}, in none of the groups; leave them out.")
    named = {group: _variables(group, arrays) for group, arrays in groups.items()}
    own, observed = _variables("dims", dims), named.get("observed_data", {})
    tree = xr.DataTree.from_dict({group: _dataset(group, arrays, observed, own) for group, arrays in named.items()})
    tree.attrs = {name: _text(name, value) for name, value in attrs.items()}
    return tree


def for_arviz(tree: DataTree) -> Any:
    """A tree as the installed ArviZ takes it, without a file in between: an InferenceData for 0.x, itself for 1.x.

    Raises MissingExtraError without ArviZ.
    """
    require("inference", "arviz")
    import arviz

    return tree if int(arviz.__version__.split(".")[0]) >= 1 else arviz.InferenceData.from_datatree(tree)


def _engine(path: Path) -> Literal["h5netcdf", "zarr"]:
    require_ending(str(path), path, ENGINES)
    engine = ENGINES[path.suffix.lower()]
    require("inference", *_MODULES[engine])
    return engine


def _save_zarr(tree: DataTree, path: Path) -> None:
    if path.exists() and not any((path / marker).exists() for marker in (".zgroup", "zarr.json")):
        raise ValueError(f"{path}: is there and is not a zarr store; pass another path.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem}-"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); pass a path in a writable folder.") from None
    new, old = aside / "new", aside / "old"
    try:
        tree.to_zarr(new, zarr_format=2)
        if path.exists():
            path.replace(old)
        try:
            new.replace(path)
        except OSError:
            if old.exists():
                old.replace(path)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def save(tree: DataTree, path: Path | str) -> None:
    """Write a tree to `path`, a netCDF file (.nc) or a zarr folder (.zarr), whole or not at all.

    It is written beside `path` and renamed. A folder cannot replace another in one step: a process killed between the
    two renames leaves an earlier store under a hidden name beside `path`, and none at `path`. Raises ValueError naming
    the path for another ending, one that cannot be written, or a folder that is not a zarr store, and MissingExtraError
    without the packages that write the format.
    """
    path = Path(path)
    if _engine(path) == "zarr":
        _save_zarr(tree, path)
        return
    with atomic_path(path) as temporary:
        tree.to_netcdf(os.fspath(temporary), engine="h5netcdf")


def load(path: Path | str) -> DataTree:
    """The tree that `save` wrote, in memory.

    Raises ValueError naming the path if it is not there or not readable, and MissingExtraError without the packages
    that read the format.
    """
    path = Path(path)
    engine = _engine(path)
    if not path.exists():
        raise ValueError(f"{path}: is not there; pass the path of a saved result.")
    import xarray as xr

    try:
        with xr.open_datatree(path, engine=engine) as tree:
            if not tree.children:
                raise ValueError("it has no groups")
            return tree.load()
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read with {engine} ({error!r}); pass a result written by save.") from error
