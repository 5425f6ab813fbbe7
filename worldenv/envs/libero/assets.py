"""Finds LIBERO's asset files, points LIBERO at them and picks a GL backend; nothing here simulates.

Liberties: LIBERO (hf-libero 0.1.4) ignores the `assets` key of its own config, asks a question
when first imported and downloads assets when it finds none. We write its config ourselves, into our
cache folder, and set its module-level asset path, so none of that can happen.
"""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Literal

from worldenv.envs.libero import official_assets
from worldenv.envs.libero.primitive_assets import (
    PRIMITIVE_SUITES,
    STAMP_FILE,
    pack_version,
    write_pack,
)
from worldenv.runtime import graphics, places
from worldenv.runtime.errors import UserError, nearest

ASSETS_VARIABLE = "WORLDENV_LIBERO_ASSETS"
OFFICIAL = "official"  # in place of a folder: the files that were fetched
ASSETS_ORIGIN = (
    "the folder libero/libero/assets of LIBERO's GitHub repository, Lifelong-Robot-Learning/LIBERO "
    "(a clone has it), or the asset set that the package hf-libero downloads from its hub"
)
_ATTEMPTS = 20  # to put a pack in its place while others do
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
LIBERO_INSTALL = (
    'pip install "mujoco<3.9" robosuite==1.4.0 bddl==1.0.1 gymnasium easydict cloudpickle '
    "matplotlib pyyaml h5py tqdm termcolor future\n"
    "  pip install --no-deps hf-libero==0.1.4"
)

# Where a category's XML may lie, and which scene each kind of problem loads.
_OBJECT_PATHS = (
    "stable_scanned_objects/{0}/{0}.xml",
    "stable_hope_objects/{0}/{0}.xml",
    "turbosquid_objects/{0}/{0}.xml",
    "articulated_objects/{0}.xml",
)
_SCENES = {  # problem name: scene, and the floor and wall textures LIBERO puts into it
    "libero_tabletop_manipulation": (
        "libero_tabletop_base_style.xml", "light-gray-floor-tile.png", "light-gray-plaster.png"),
    "libero_floor_manipulation": (
        "libero_floor_base_style.xml", "light-gray-floor-tile.png", "light-gray-plaster.png"),
    "libero_kitchen_tabletop_manipulation": (
        "libero_kitchen_tabletop_base_style.xml",
        "gray_ceramic_tile.png", "yellow_linen_wall_texture.png"),
    "libero_living_room_tabletop_manipulation": (
        "libero_living_room_tabletop_base_style.xml",
        "seamless_wood_planks_floor.png", "light-gray-plaster.png"),
    "libero_study_tabletop_manipulation": (
        "libero_study_base_style.xml", "light-gray-floor-tile.png", "light-gray-plaster.png"),
}  # fmt: skip
# Fixtures that are part of the scene, not files of their own.
_SCENE_FIXTURES = {
    "table", "floor", "kitchen_table", "living_room_table", "study_table", "coffee_table",
}  # fmt: skip


@dataclass(frozen=True)
class AssetSource:
    """A folder LIBERO can load a suite from, and whose geometry it holds."""

    path: Path
    kind: Literal["official", "primitive"]
    version: str = ""
    """Of our pack, or the repository and commit that files were fetched from."""

    def __str__(self) -> str:
        kind = "LIBERO's official files" if self.kind == "official" else "our primitive pack"
        return f"{kind}, {self.version or self.path}"


def libero_root() -> Path:
    """The `libero/libero` folder of the installed hf-libero, whatever else is named libero.

    Found without importing it. Raises UserError if hf-libero is absent.
    """
    try:
        root = Path(importlib.metadata.distribution("hf-libero").locate_file("libero/libero"))
        if (root / "bddl_files").is_dir():
            return root
    except importlib.metadata.PackageNotFoundError:
        pass
    spec = importlib.util.find_spec("libero")
    raise UserError(
        "The LIBERO benchmark is not installed: expected the package hf-libero, found "
        f"{f'another package named libero ({_place(spec)})' if spec else 'none'}. Install it with\n"
        f"  {LIBERO_INSTALL}"
    )


def _place(spec: ModuleSpec) -> str:
    return spec.origin or ", ".join(spec.submodule_search_locations or ())


def _prefer(root: Path) -> None:
    """Loads hf-libero's package where `import libero` would find another of that name."""
    loaded = sys.modules.get("libero")
    spec = loaded.__spec__ if loaded else importlib.util.find_spec("libero")
    found = [Path(place).resolve() for place in spec.submodule_search_locations or ()]
    if found[:1] == [root.parent.resolve()]:
        return
    if loaded:
        raise UserError(
            f"Another package named libero is loaded: {_place(spec)}. Expected hf-libero's, "
            f"{root.parent}. Take the other off PYTHONPATH."
        )
    own = importlib.util.spec_from_file_location(
        "libero", root.parent / "__init__.py", submodule_search_locations=[str(root.parent)]
    )
    package = importlib.util.module_from_spec(own)  # the path stays: others may mind its order
    sys.modules["libero"] = package
    if Path(own.origin).is_file():
        own.loader.exec_module(package)


def resolve_assets(explicit: Path | None, suite: str, cache_dir: Path | None = None) -> AssetSource:
    """Chooses the asset folder for `suite`: explicit, else $WORLDENV_LIBERO_ASSETS, else our pack
    for libero_spatial, else the official files that were fetched.

    The primitive pack is written into `cache_dir` (default: the user's cache) once per version. It
    is libero_spatial's also where official files have been fetched, so that results do not change
    unnoticed; they are meant by the word `official` in place of a folder. Raises UserError for an
    unknown suite, a folder that lacks files the suite loads, or official files that are not here.
    """
    if suite not in SUITES:
        raise UserError(
            f"Unknown LIBERO suite {suite!r}: expected one of {', '.join(SUITES)}; "
            f"nearest: {nearest(suite, SUITES)}."
        )
    named = explicit if explicit is not None else os.environ.get(ASSETS_VARIABLE)
    if named and str(named) != OFFICIAL:
        origin = "the assets folder given" if explicit is not None else f"${ASSETS_VARIABLE}"
        path = Path(named).expanduser().resolve()
        check_assets(path, suite, origin)
        return AssetSource(path, "primitive" if is_primitive(path) else "official")
    if not named and suite in PRIMITIVE_SUITES:
        pack = _cached_pack(cache_dir or places.cache_dir())
        return AssetSource(pack, "primitive", pack_version())
    fetched = official_assets.required(
        suite,
        f"or get them otherwise: {ASSETS_ORIGIN}. Then set {ASSETS_VARIABLE} to the folder that "
        "holds scenes/ and articulated_objects/, or pass it (worldenv-train --env.assets, "
        f"worldenv-collect --assets). Without them only {', '.join(PRIMITIVE_SUITES)} runs, on our "
        "primitive pack.",
    )
    lacking = missing_files(Path(fetched.folder), suite)
    if lacking:
        raise UserError(
            f"{fetched.folder}, fetched from {official_assets.REPOSITORY}, lacks {lacking[0]} "
            f"({len(lacking)} file(s) in all), which {suite} loads. Fetch what was removed with "
            f"`{official_assets.COMMAND}`."
        )
    return AssetSource(Path(fetched.folder), "official", str(fetched))


def is_primitive(path: Path) -> bool:
    """True if `path` is a pack of ours (it carries our stamp)."""
    return (Path(path) / STAMP_FILE).is_file()


def check_assets(path: Path, suite: str, origin: str = "the assets folder") -> None:
    """Raises UserError naming the first files of `suite` that `path` lacks."""
    if not path.is_dir():
        raise UserError(
            f"{origin} is {path}, which is not a folder. Expected LIBERO's assets folder, the one "
            "that holds scenes/ and articulated_objects/."
        )
    missing = missing_files(path, suite)
    if missing:
        shown = "\n  ".join(missing[:5])
        more = f"\n  ... and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"{origin} ({path}) lacks files that {suite} loads:\n  {shown}{more}\n"
            "Expected LIBERO's assets folder, the one that holds scenes/ and articulated_objects/. "
            f"Name the right folder, or name none and unset {ASSETS_VARIABLE} to use the primitive "
            f"pack (suites: {', '.join(PRIMITIVE_SUITES)})."
        )


def missing_files(path: Path, suite: str) -> list[str]:
    """The files below `path` that the tasks of `suite` load and that do not exist, sorted."""
    categories, problems = _suite_contents(suite)
    missing: set[str] = set()
    for problem in problems:
        scene, floor, wall = _SCENES[problem]
        _check_xml(path, f"scenes/{scene}", missing, replaced=("texplane", "tex-wall"))
        for texture in (floor, wall):
            if not (path / "textures" / texture).is_file():
                missing.add(f"textures/{texture}")
    for category in categories - _SCENE_FIXTURES:
        candidates = [pattern.format(category) for pattern in _OBJECT_PATHS]
        found = [name for name in candidates if (path / name).is_file()]
        if found:
            _check_xml(path, found[0], missing)
        else:
            missing.add(" or ".join(candidates))
    return sorted(missing)


def _suite_contents(suite: str) -> tuple[set[str], set[str]]:
    """Object and fixture categories, and problem names, in the suite's BDDL files."""
    categories: set[str] = set()
    problems: set[str] = set()
    for file in sorted((libero_root() / "bddl_files" / suite).glob("*.bddl")):
        text = file.read_text(encoding="utf-8")
        problems |= {name.lower() for name in re.findall(r"\(problem\s+(\w+)\)", text)}
        for section in re.findall(r"\(:(?:objects|fixtures)(.*?)\)", text, re.DOTALL):
            categories |= set(re.findall(r"-\s+(\w+)", section))
    return categories, problems


def _check_xml(path: Path, name: str, missing: set[str], replaced: tuple[str, ...] = ()) -> None:
    """Adds `name`, or the files it refers to, to `missing` where they do not exist.

    Of assets that share a name robosuite keeps the first; those in `replaced` get another file.
    """
    file = path / name
    if not file.is_file():
        missing.add(name)
        return
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise UserError(f"{file} is not readable as XML ({error}). Restore it.") from error
    seen = {("texture", texture) for texture in replaced}
    for element in root.iter():
        target, key = element.get("file"), (element.tag, element.get("name"))
        if target and key not in seen and not (file.parent / target).is_file():
            missing.add(os.path.relpath(file.parent / target, path))
        seen.add(key)


def _cached_pack(cache_dir: Path) -> Path:
    """The current primitive pack below `cache_dir`, written first if it is not there.

    Written beside its place and renamed, so a reader never sees half a pack, and of two processes
    that write at once the second finds the first's.
    """
    target = cache_dir / f"primitive-{pack_version()}"
    if _is_whole(target):
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".primitive-", dir=cache_dir))
        try:
            write_pack(scratch / "pack")
            (scratch / "pack").chmod(0o755)
            _put(scratch / "pack", target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"Could not write the primitive asset pack into {cache_dir}: {error}. Free some space, "
            f"or set {places.CACHE_VARIABLE} to a folder you may write to."
        ) from error
    return target


def _put(pack: Path, target: Path) -> None:
    """Renames `pack` to `target`, unless a whole pack is there; what is none moves beside `pack`.

    Other processes may do the same at any moment: every step may find that it is done.
    """
    for attempt in range(_ATTEMPTS):
        try:
            pack.rename(target)
            return
        except OSError as error:
            refusal = error
        if _is_whole(target):
            return
        with suppress(FileNotFoundError):  # another process moved it
            target.rename(pack.with_name(f"broken-{attempt}"))
    raise refusal


def _is_whole(path: Path) -> bool:
    """True if `path` is a pack of today's version: the stamp is the last file written."""
    try:
        return (path / STAMP_FILE).read_text(encoding="utf-8") == pack_version()
    except (OSError, UnicodeDecodeError):
        return False


def configure_libero(path: Path) -> None:
    """Points LIBERO at the assets in `path`, for this process. Idempotent.

    Picks a GL backend (before mujoco is imported), writes LIBERO's config.yaml into our cache
    folder, sets LIBERO_CONFIG_PATH and imports `libero.libero` with its asset path set.
    """
    root = libero_root()
    path = Path(path).expanduser().resolve()
    if not path.is_dir():
        raise UserError(f"The assets folder {path} does not exist. Name an existing folder.")
    graphics.adopt()
    os.environ.update(places.library_environment(os.environ))
    _prefer(root)
    import_robosuite()
    config = _write_config(root, path)
    os.environ["LIBERO_CONFIG_PATH"] = str(config.parent)
    try:
        import libero.libero as libero  # not at the top: importing it reads the config
    except ImportError as error:
        raise UserError(
            f"LIBERO is installed but does not import ({error}). Install what it needs with\n"
            f"  {LIBERO_INSTALL}"
        ) from error
    libero.libero_config_path = str(config.parent)
    libero.config_file = str(config)
    libero._assets_path_cache = str(path)


def robot_for(path: Path) -> str:
    """The robot LIBERO is to be asked for with these assets: "Panda", or its light twin.

    Call after `configure_libero(path)`. The twin differs in its visual only and is registered with
    robosuite by its import, which therefore has to wait until here.
    """
    if not is_primitive(path):
        return "Panda"
    from worldenv.envs.libero.light_robot import ROBOT

    return ROBOT


def _write_config(root: Path, assets: Path) -> Path:
    """Writes LIBERO's config.yaml for these folders (once) and returns its path."""
    values = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root.parent / "datasets",
        "assets": assets,
    }
    text = "".join(f"{key}: '{str(value).replace(chr(39), chr(39) * 2)}'\n"
                   for key, value in values.items())  # fmt: skip
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = places.cache_dir() / f"libero-config-{digest}"
    target = folder / "config.yaml"
    if target.is_file() and target.read_text(encoding="utf-8") == text:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=".config-", dir=folder)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(scratch, target)
    except OSError as error:
        raise UserError(
            f"Could not write LIBERO's config into {folder}: {error}. Free some space, or set "
            f"{places.CACHE_VARIABLE} to a folder you may write to."
        ) from error
    return target


def import_robosuite() -> None:
    """Imports robosuite without its log file, which would be /tmp/robosuite.log for every user."""
    if "robosuite" in sys.modules:
        return
    package = importlib.util.find_spec("robosuite")
    if package is None or package.origin is None:
        raise UserError(f"robosuite is not installed. Install it with\n  {LIBERO_INSTALL}")
    file = Path(package.origin).parent / "macros.py"
    spec = importlib.util.spec_from_file_location("robosuite.macros", file)
    macros = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL = None
    macros.ENABLE_NUMBA = True  # a user's macros_private may differ; step.py compiles with it
    sys.modules["robosuite.macros"] = macros
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # its advice about a macro file
    import robosuite

    robosuite.macros = macros
