"""Local data under a name that no library below us can misread as a pattern, an address or more.

`datasets` and fsspec read what they are given: `[1]`, `*` and `?` as a glob, `a::b` and `x://` as
addresses, `~` and `$HOME` as folders. They know no way to quote all of it. A path that holds any
such sign is therefore shown to them under a plain name: links in a temporary folder.
"""

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path

# Nothing in them means anything to a shell, a glob, fsspec or a URL parser; `\w` is any letter.
_PLAIN = re.compile(r"[\w./\\ ,=+@-]*")
_DRIVE = re.compile(r"^[A-Za-z]:")
# Below a folder that is searched as a whole these still have a meaning, other signs do not.
_INSIDE = re.compile(r"::|\$|~|[A-Za-z]+://?")


def at_home(name: str) -> str:
    """Return `name` with a leading `~` as the home folder, unless it names something here."""
    return name if os.path.lexists(name) else os.path.expanduser(name)


def literal_path(path: Path) -> Path:
    """Return an absolute path to the same file or folder that stands for itself everywhere."""
    path = Path(os.path.abspath(path))
    if path.is_dir():
        odd = not _is_plain(path) or any(_INSIDE.search(name) for name in _names(path))
    else:
        odd = not _is_plain(path)
    return _alias(path) if odd else path


def is_alias(path: Path) -> bool:
    """Whether `literal_path` made it: what is derived from it has no use after this process."""
    return path.parent in _made


_made: set[Path] = set()


def _is_plain(path: Path) -> bool:
    return _PLAIN.fullmatch(_DRIVE.sub("", str(path))) is not None


def _names(folder: Path) -> list[str]:
    return [
        name for _, folders, files in os.walk(folder, followlinks=True) for name in folders + files
    ]


def _alias(path: Path) -> Path:
    """Make links to `path`, or to every file below it, in a folder that goes with this process."""
    home = Path(tempfile.mkdtemp(prefix="lisa-train-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    _made.add(home)
    if not path.is_dir():
        alias = home / f"data{path.suffix}"
        _link(path, alias)
        return alias
    alias = home / "data"
    for folder, _, files in os.walk(path, followlinks=True):
        inside = [_renamed(part) for part in Path(folder).relative_to(path).parts]
        target = alias.joinpath(*inside)
        target.mkdir(parents=True, exist_ok=True)
        for name in files:
            _link(Path(folder, name), _unused(target / _renamed(name)))
    return alias


def _renamed(name: str) -> str:
    return _INSIDE.sub("_", name)


def _unused(path: Path) -> Path:
    number = 1
    while path.exists():
        path = path.with_name(f"{path.stem}_{number}{path.suffix}")
        number += 1
    return path


def _link(path: Path, alias: Path) -> None:
    try:
        alias.symlink_to(path)
    except OSError:  # Windows lets few users make links
        shutil.copyfile(path, alias)
