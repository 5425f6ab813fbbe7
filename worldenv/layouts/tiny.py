"""The models of preset `published-tiny`: one folder of each kind, where the preset looks for it."""

import shutil

from worldenv.config import Config
from worldenv.layouts import openvla, vae, vlm, wan
from worldenv.runtime.checkpoint import write_error


def prepare(config: Config) -> None:
    """Write the folders that `config` names and that are not there yet; a folder is whole or not
    there. UserError if the disk refuses.
    """
    world = config.simulator
    writers = {
        config.policy.folder: lambda at: openvla.write(at),
        world.folder: lambda at: (vae.wan_vae(at), wan.write(at / "transformer")),
        config.reflector.folder: lambda at: vlm.write(at, "qwen2_5_vl"),
    }
    for folder, write in writers.items():
        if folder.exists():
            continue
        draft = folder.with_name(f".{folder.name}.tmp")
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            write(draft)
            draft.rename(folder)
        except OSError as error:
            raise write_error(folder, error) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        print(f"random weights in the published layout: {folder}")
