"""Objects that live in code which is not ours: `module:name`, or `path/to/file.py:name`."""

import importlib
import sys
import traceback
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from worldenv.runtime.errors import UserError, nearest


def load(spec: str, default: str = "", what: str = "object") -> Any:
    """The object that `spec` names; default: its name where a file's path says none. Modules are
    looked for where one is, too.

    UserError for a module that is not there or does not import, and for a name that it lacks.
    """
    place, _, name = spec.rpartition(":") if ":" in spec else (spec, "", default)
    if not place or not name:
        raise UserError(
            f"{what} {spec!r}: expected module:name or path/to/file.py:name, got "
            f"{'no module' if not place else 'no name'}. Name both."
        )
    module = _module(place, f"{what} {spec!r}")
    try:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        names = [n for n in vars(module) if not n.startswith("_")]
        guess = nearest(name, names)
        raise UserError(
            f"{what} {spec!r}: expected a name that {place} has, got {name!r}."
            + (f" Did you mean {guess!r}?" if guess else f" It has {', '.join(names[:12])}.")
        ) from None
    return found


def _module(place: str, what: str) -> Any:
    file = Path(place) if place.endswith(".py") else None
    if file is not None and not file.is_file():
        raise UserError(f"{what}: expected a file, got no such file as {file}. Check the path.")
    folder, name = (str(file.resolve().parent), file.stem) if file else (str(Path.cwd()), place)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        spec = sys.modules[name].__spec__ if name in sys.modules else find_spec(name)
    except (ImportError, ValueError):  # a package above it that is none, or does not import
        spec = None
    if spec is None or (file and not _is(spec, file)):
        got = "no such module" if spec is None else f"another of this name, {spec.origin}"
        raise UserError(
            f"{what}: expected a module that can be imported, got {got}. Install its package, "
            "name the file (path/to/file.py:name), or give it a name of its own."
        )
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever it is, it is that module's
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{what}: expected a module that imports, got {type(error).__name__}: {error} "
            f"({frame.filename}, line {frame.lineno}). Mend the module, or install what it needs."
        ) from error


def _is(spec: ModuleSpec, file: Path) -> bool:
    return spec.origin is not None and Path(spec.origin).resolve() == file.resolve()
