"""The models of preset `published-tiny`: one folder of each kind, where the preset looks for it."""

import shutil
from dataclasses import replace
from pathlib import Path

from worldenv.config import Config
from worldenv.layouts import openvla, vae, vlm, wan
from worldenv.runtime.errors import write_error


def prepare(config: Config) -> None:
    """Write the folders that `config` names and that are not there yet; a folder is whole or not
    there. UserError if the disk refuses.
    """
    writers = {
        config.policy.folder: openvla.write,
        config.simulator.folder: _wan,
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


def moved(config: Config, folder: Path) -> Config:
    """The configuration with its models' folders in `folder`."""
    policy, wan_, judge = (folder / name for name in ("openvla-oft", "wan", "image-text"))
    return replace(
        config,
        policy=replace(config.policy, folder=policy),
        simulator=replace(config.simulator, folder=wan_, tokenizer_folder=wan_),
        reflector=replace(config.reflector, folder=judge),
    )


def _wan(folder: Path) -> None:
    """A pipeline's folder: the transformer, and the autoencoder of Wan 2.1 with its 16 channels."""
    made = vae.wan_vae(folder)
    channels = made.config.z_dim
    wan.write(folder / "transformer", in_channels=channels, out_channels=channels)
