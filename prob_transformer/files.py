"""What every result carries, how every file is written (whole or not at all), and how every command ends."""

import contextlib
import hashlib
import io
import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

_REPORTED_PACKAGES = ("jax", "jaxlib", "numpyro", "equinox", "optax", "numpy", "scipy", "arviz")


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _REPORTED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def checkout() -> Path | None:
    """The root of this project's source that the package runs from; None if the package was put elsewhere alone."""
    root = Path(__file__).resolve().parent.parent
    try:
        settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return root if settings.get("project", {}).get("name") == "prob-transformer" else None


def _commit() -> str | None:
    """The checkout's commit, with "+changes" when tracked files differ from it; None outside a checkout."""
    root = checkout()
    if root is None:
        return None
    # With its folders named, git does not search the parents, which may be a repository of the user's. What a hook of
    # another repository exports (GIT_DIR, GIT_INDEX_FILE, ...) must not decide either.
    git = ["git", "--git-dir", str(root / ".git"), "--work-tree", str(root)]
    run = partial(
        subprocess.run, env={name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    )
    try:
        head = run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")


def provenance(seed: int | None, configuration: Mapping[str, Any], command: str | None = None) -> dict[str, Any]:
    """Version, commit, command, seed, configuration, package versions and machine of a result, ready for JSON."""
    from prob_transformer import __version__

    return {
        "version": __version__,
        "commit": _commit(),
        "command": command or shlex.join(["python", *sys.orig_argv[1:]]),
        "seed": seed,
        "configuration": dict(configuration),
        "packages": _package_versions(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def wheel_file(argument: str, distribution: str, name: str, sha256: str, remedy: str) -> Path:
    """Where an installed wheel keeps its file of that name. Nothing of the wheel is imported.

    Raises ValueError, naming `argument` and ending in `remedy`, if the file is missing or not the known one.
    """
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        raise ValueError(f"{argument}: the {distribution} wheel is not installed; {remedy}.") from None
    found = next((Path(str(file.locate())) for file in files if file.name == name), None)
    if found is None or not found.is_file():
        raise ValueError(f"{argument}: the installed {distribution} wheel has no {name}; {remedy}.")
    if file_sha256(found) != sha256:
        raise ValueError(f"{argument}: {name} is cut off or not the file this was written for; {remedy}.")
    return found


def read_user_text(argument: str, path: Path) -> str:
    """The text at `path`, byte order mark and line ends as they are.

    Raises ValueError, naming `argument`, if the file cannot be read, is not UTF-8 or is empty.
    """
    try:
        # Not "utf-8-sig", which would count the offset of a bad byte from behind the byte order mark.
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{argument}: {path} cannot be read ({error.strerror}); pass a UTF-8 text file.") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{argument}: {path} is not UTF-8 (byte {error.start}); convert it, for example with iconv -t utf-8."
        ) from None
    if not text.removeprefix("\ufeff").strip():
        raise ValueError(f"{argument}: {path} is empty; pass a UTF-8 text file.")
    return text


def _temporary_beside(path: Path, name: str) -> Path:
    if path.is_dir():
        raise ValueError(f"{name}: is a folder; pass the path of a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}-{secrets.token_hex(8)}{path.suffix}")
        # Not by tempfile, whose files are private: a result is as readable as any file its owner writes.
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise ValueError(f"{name}: cannot be written ({error.strerror}); pass a path in a writable folder.") from None
    return temporary


def require_ending(name: str, path: Path, endings: Collection[str]) -> None:
    """Raises ValueError, naming the argument, for a path that ends in none of these, such as ".nc"; case is ignored."""
    if path.suffix.lower() not in endings:
        raise ValueError(f"{name}: ends in {path.suffix!r}; pass a path ending in {' or '.join(endings)}.")


def require_writable(name: str, path: Path) -> None:
    """Raises the ValueError of `atomic_path`, with the name in place of the path, before any work; leaves nothing."""
    new = [folder for folder in path.parents if not folder.exists()]
    _temporary_beside(path, name).unlink()
    for folder in new:
        folder.rmdir()


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` to write to, renamed onto it on success and removed on failure.

    Raises ValueError naming the path if it is a folder, or if its own folder cannot be made or written.
    """
    path = Path(path)
    temporary = _temporary_beside(path, str(path))
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text to `path` whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, payload: Any) -> None:
    """Write JSON to `path` whole or not at all; NaN and inf are refused, for they are not JSON."""
    write_text(path, json.dumps(payload, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def writing_to_standard_output(done: str = "") -> Iterator[None]:
    """What is printed inside is written out; raises ValueError where it cannot be, ending in what is `done`."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # Python flushes once more at its end, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ValueError(f"standard output: cannot be written to ({error.strerror}){done}.") from None


def exit_status(command: Callable[[], int | None], *refused: type[Exception], interrupted: str) -> int:
    """Run a command: its own status or 0; 2 and one line for an error of those `refused`; 130 when interrupted.

    Standard output writes "?" for a character that its encoding lacks, so that no finished run ends in an error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        return command() or 0
    except refused as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return 130
