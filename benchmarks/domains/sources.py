"""Source files: Debian packages, downloaded and unpacked into a folder of ours (nothing is installed), and PyPI packages."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parent / ".cache"


class SourceError(ValueError):
    """A source that cannot be had, and what to do about it."""


def debian(package: str, cache: Path = CACHE) -> Path:
    """The folder with a Debian package's files, from a .deb in `cache`, which is downloaded if there is none."""
    root = cache / package
    if not root.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        archives = sorted(cache.glob(f"{package}_*.deb")) or _download(package, cache)
        unpacked = root.with_suffix(".part")
        shutil.rmtree(unpacked, ignore_errors=True)
        _run(["dpkg", "-x", str(archives[0]), str(unpacked)], f"cannot unpack {archives[0]}; delete it and try again")
        unpacked.rename(root)
    return root


def debian_version(package: str, cache: Path = CACHE) -> str:
    """The version of a package that `debian` has unpacked."""
    archive = sorted(cache.glob(f"{package}_*.deb"))[0]
    return _run(["dpkg-deb", "-f", str(archive), "Version"], f"cannot read {archive}").strip()


def _download(package, cache):
    _run(
        ["apt-get", "download", "-qq", package],
        f"cannot download the Debian package {package}: refresh the lists of packages (apt-get update), or, on a machine "
        f"without apt, put its .deb file (packages.debian.org/{package}) into {cache}",
        cwd=cache,
    )
    return sorted(cache.glob(f"{package}_*.deb"))


def available() -> str:
    """Debian's own description of all its packages, as `apt-cache dumpavail` prints it."""
    hint = "cannot read the list of Debian packages: run apt-get update first; on a machine without apt, leave out `packages`"
    text = _run(["apt-cache", "dumpavail"], hint)
    if not text.strip():
        raise SourceError(f"{hint} (apt-cache dumpavail printed nothing)")
    return text


def _run(command, hint, cwd=None):
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise SourceError(f"{hint} (no such command: {command[0]})") from error
    except subprocess.CalledProcessError as error:
        raise SourceError(f"{hint} ({error.stderr.strip()[-300:]})") from error
    return done.stdout


def pypi(name: str):
    """A module of the `domains` extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SourceError(f"{name} is not installed: pip install -e '.[domains]', or make domains ({error})") from error


def pypi_version(name: str) -> str:
    return version(name)
