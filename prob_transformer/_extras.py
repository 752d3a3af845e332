"""Packages that only some functions need: the extras of the distribution, and the error that names a missing one."""

import json
from importlib import metadata
from importlib.util import find_spec

from prob_transformer.files import checkout


class MissingExtraError(ImportError):
    """An optional package is not installed; the message ends with the command that installs it."""


def _source() -> str | None:
    """Where pip installed the distribution from, as a requirement's URL (PEP 610); None if from an index."""
    try:
        recorded = metadata.distribution("prob-transformer").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    if recorded is None:
        return None
    origin = json.loads(recorded)
    url, version_control = origin["url"], origin.get("vcs_info")
    if version_control:
        url = f"{version_control['vcs']}+{url}@{version_control['commit_id']}"
    return f"{url}#subdirectory={origin['subdirectory']}" if "subdirectory" in origin else url


def _install_command(extra: str) -> str:
    root = checkout()
    if root is not None:
        return f'pip install --editable "{root.as_uri()}[{extra}]"'
    source = _source()
    return f'pip install "prob-transformer[{extra}]{"" if source is None else f" @ {source}"}"'


def require(extra: str, *modules: str) -> None:
    """Raises MissingExtraError, with the command that installs `extra`, for the first of `modules` that is missing."""
    for module in modules:
        if find_spec(module) is None:
            raise MissingExtraError(f"{module} is not installed; run: {_install_command(extra)}", name=module)
