"""The file of a result, and how a killed run goes on.

Until all its parts are there a run lives in FILE.partial, written anew after every part. A later run takes over from it
the parts measured by the same sources (a digest of the files that a figure depends on), with the same sizes, versions
and machine; otherwise it starts over. FILE itself, whole or not at all, is only replaced at the end.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from benchmarks.result_tables import Section, chosen, load_published, markdown
from prob_transformer._validation import require_seed
from prob_transformer.files import provenance, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("benchmarks", "models", "prob_transformer", "theory_checks")
_PACKAGES = ("jax", "jaxlib", "numpy", "equinox", "optax", "numpyro", "blackjax", "torch")

Part = dict[str, Any]


def digest_of_sources(root: Path = ROOT, folders: Iterable[str] = SOURCES) -> str:
    """sha256 over the names and texts of all Python files in these folders."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def machine() -> dict[str, Any]:
    """Processor, cores, bytes of memory, system, and the device that JAX computes on."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def device_peak() -> int | None:
    """The most bytes that the device has held since it started, where it says so."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def versions() -> dict[str, str | None]:
    """Versions of Python and of what does the work; None for what is not installed."""
    installed = {name: next((one.version for one in metadata.distributions(name=name)), None) for name in _PACKAGES}
    return {"python": platform.python_version(), **installed}


def record_of_run(seed: int, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What was run, where, and by what: a result without its parts."""
    return {
        "provenance": provenance(seed, configuration),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sources": digest_of_sources(),
        "machine": machine(),
        "versions": versions(),
    }


def resumed(
    path: Path,
    names: Sequence[str],
    identity: Any,
    run: Callable[[list[str]], Iterator[tuple[str, Part]]],
    whole: Callable[[dict[str, Part]], dict[str, Any]],
    option: str = "--out",
) -> dict[str, Any]:
    """Write `whole` of the named parts to a file and return it; `run` yields those that FILE.partial lacks.

    `identity` is what a part depends on: parts of another one are not taken over. Raises ValueError for a partial
    result that cannot be read, or a path that cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder; pass the path of a file.")
    partial, found = path.with_name(path.name + ".partial"), dict[str, Part]()
    if partial.is_file():
        try:
            kept = json.loads(partial.read_text(encoding="utf-8"))
            same, parts = kept["identity"] == json.loads(json.dumps(identity)), dict(kept["parts"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{option}: {partial} is not a partial result; delete it, or pass another path.") from None
        if same:
            found = parts
            print(f"going on from {partial}; kept: {', '.join(found) or 'nothing'}.", file=sys.stderr)
        else:
            said = "is of other sizes, sources, versions or another machine; everything is run"
            print(f"{partial} {said}.", file=sys.stderr)
    # Also finds out now, rather than after minutes, whether the path can be written.
    write_json(partial, {"identity": identity, "parts": found})
    for name, part in run([name for name in names if name not in found]):
        found[name] = part
        write_json(partial, {"identity": identity, "parts": found})
    result = whole({name: found[name] for name in names})
    write_json(path, result)
    # Parts that were not asked for this time stay there for the run that asks for them.
    if found.keys() == set(names):
        partial.unlink()
    return result


def command_line(command: str, description: str) -> argparse.ArgumentParser:
    """The options of a command that measures sections, or writes the page of saved results."""
    parser = argparse.ArgumentParser(prog=command, description=description)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--out", type=Path, metavar="FILE", help="measure, and write the result as JSON")
    task.add_argument("--page", type=Path, metavar="FILE", help="measure nothing, and write the page of the results")
    parser.add_argument(
        "--results", type=Path, nargs="+", metavar="RESULT.json", help="with --page: default, all committed ones"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, and no more")
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="NAME", help="only these sections; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn (default: %(default)s)")
    return parser


def measure(path: Path, sections: Sequence[Section], sizes: Any, quick: bool) -> dict[str, Any]:
    """Run the sections, write their result, and print its tables."""
    record = record_of_run(sizes.seed, {"quick": quick, **sizes._asdict()})
    identity = {"configuration": record["provenance"]["configuration"], **record, "provenance": None, "date": None}

    def run(missing: list[str]) -> Iterator[tuple[str, Part]]:
        for section in sections:
            if section.name in missing:
                started = datetime.now(UTC)
                found = section.run(sizes)
                finished = datetime.now(UTC)
                seconds = (finished - started).total_seconds()
                print(f"{section.name}: {seconds:.0f} s", file=sys.stderr)
                part = {"finished": finished.isoformat(timespec="seconds"), "wall_seconds": seconds}
                yield section.name, found | part

    names = [section.name for section in sections]
    result = resumed(path, names, identity, run, lambda parts: {**record, "sections": parts})
    print(f"{markdown(result, sections)}\n\nresult: {path}")
    return result


def measure_or_publish(
    arguments: Sequence[str] | None,
    command: str,
    description: str,
    sections: Sequence[Section],
    sizes_of: Callable[[bool, int], Any],
    committed: Path,
    page: Callable[[Path, dict[str, Any]], str],
) -> int:
    """Exit status of a command that measures sections in float64, or writes the page of one result.

    `sizes_of` (quick, seed); `page` gives the text of the page at a path. Raises ValueError for bad arguments.
    """
    options = command_line(command, description).parse_args(arguments)
    require_seed("--seed", options.seed, "all that is drawn")
    if options.page:
        results = options.results or [committed]
        if len(results) > 1:
            raise ValueError(f"--results: got {len(results)}; this page shows one result.")
        write_text(options.page, page(options.page, load_published(results[0], sections, command)))
        return 0
    asked = chosen("--only", options.only, {section.name: section for section in sections})
    jax.config.update("jax_enable_x64", True)
    measure(options.out, asked, sizes_of(options.quick, options.seed), options.quick)
    return 0
