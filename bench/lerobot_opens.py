"""Whether a folder that `LeRobotWriter` wrote opens in LeRobot itself, in a venv of its own.

    python -m bench.lerobot_opens FOLDER RUN           here: writes FOLDER/{av1,h264,*.npz} from
                                                       episodes of a finished run
    THEIRS/bin/python -P bench/lerobot_opens.py FOLDER there: compares, writes FOLDER/opens.json

Compared, every seventh row: action, state, task and success exactly; pictures of recorded rows with
those that our reader gave of the same videos. results/bench/lerobot-opens.json is one outcome.
"""

import importlib.metadata
import json
import platform
import sys
from pathlib import Path

import numpy as np

CODECS = ("av1", "h264")


def make(folder: Path, run: Path) -> None:
    """Demonstrations and attempts of sparse frames, one of them in other letters than ASCII."""
    from worldenv.data.episodes import read_episodes
    from worldenv.data.lerobot.layout import open_dataset
    from worldenv.data.lerobot.reader import Reader
    from worldenv.data.lerobot.writer import LeRobotWriter
    from worldenv.envs.libero.robot import embodiment

    episodes = [e for part in ("demonstrations", "explore-0")
                for e in read_episodes(run / "data" / part)[:3]]  # fmt: skip
    episodes[2].instruction = "öffne die Schublade 抽屉"
    robot = embodiment(episodes[0].images.shape[2])
    for codec in CODECS:
        with LeRobotWriter(folder / codec, robot, codec) as writer:
            for episode in episodes:
                writer.append(episode)
        parts: dict[str, list] = {"action": [], "state": [], "image": [], "seen": [], "done": []}
        for e in Reader(open_dataset(folder / codec), robot).read():
            seen = np.isin(np.arange(len(e)), e.frame_steps)
            row = np.cumsum(seen) - 1
            values = (e.actions, e.proprio[row], e.images[row], seen, e.dones)
            for part, value in zip(parts.values(), values, strict=True):
                part.append(value)
        text = np.array([e.instruction for e in episodes for _ in range(len(e))])
        arrays = {name: np.concatenate(part) for name, part in parts.items()}
        np.savez(folder / f"{codec}.npz", text=text, **arrays)


def check(folder: Path) -> dict:
    """What LeRobot reads against what was written."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    names = ("lerobot", "torch", "datasets", "av", "pyarrow")
    found: dict = {name: importlib.metadata.version(name) for name in names}
    found["python"] = platform.python_version()
    for codec in CODECS:
        kept = np.load(folder / f"{codec}.npz")
        data = LeRobotDataset("local/set", root=folder / codec, video_backend="pyav")
        worst = dict.fromkeys(("action", "state", "image_max", "image_mean"), 0.0)
        worst |= {"rows": 0, "pictures": 0, "other_task": 0, "other_success": 0}
        for k in range(0, len(data), 7):
            row = data[k]
            for name, key in (("action", "action"), ("state", "observation.state")):
                off = np.abs(row[key].numpy() - kept[name][k]).max()
                worst[name] = max(worst[name], float(off))
            worst["rows"] += 1
            worst["other_task"] += row["task"] != str(kept["text"][k])
            worst["other_success"] += bool(row["next.success"]) != bool(kept["done"][k])
            for view, key in enumerate(data.meta.camera_keys * bool(kept["seen"][k])):
                picture = row[key].permute(1, 2, 0).numpy() * 255
                off = np.abs(picture - kept["image"][k, view])
                worst["pictures"] += 1
                worst["image_max"] = max(worst["image_max"], round(float(off.max()), 3))
                worst["image_mean"] = max(worst["image_mean"], round(float(off.mean()), 3))
        found[codec] = {**worst, "of_rows": len(data), "episodes": data.num_episodes}
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1])
    if len(sys.argv) > 2:
        make(place, Path(sys.argv[2]))
    else:
        outcome = json.dumps(check(place), indent=1)
        (place / "opens.json").write_text(outcome + "\n")
        print(outcome)
