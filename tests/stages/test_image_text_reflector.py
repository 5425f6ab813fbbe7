"""The stage trains a head on kept features, or calibrates a prompted judge, and either watches over
an imagined world."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from worldenv.config import PolicyConfig, ReflectorConfig, SimulatorConfig
from worldenv.data.episode import Episode
from worldenv.data.windows import chunk_sequences
from worldenv.envs.imagined import ImaginedVectorEnv, first_frames
from worldenv.envs.libero.robot import embodiment
from worldenv.layouts import vlm as published
from worldenv.models.vlm_reflector import ImageTextReflector
from worldenv.presets import preset
from worldenv.runtime.errors import UserError
from worldenv.runtime.logging import read_metrics
from worldenv.runtime.seeds import generator, numpy_generator
from worldenv.stages import features, reflector, store, thresholds
from worldenv.stages.run import Run
from worldenv.stages.thresholds import peaks, stopping

SIZE, CHUNK = 16, 8


def episode(number: int, success: bool, chunks: int = 5) -> Episode:
    """Pictures are noise; those after success are bright."""
    g = numpy_generator("episode", number)
    steps = chunks * CHUNK
    images = g.integers(0, 100, (chunks + 1, 2, SIZE, SIZE, 3)).astype(np.uint8)
    dones = np.zeros(steps, bool)
    if success:
        dones[3 * CHUNK - 1 :] = True
        images[3:] += 150
    return Episode(
        suite="libero_spatial",
        task=8,
        instruction=("lift the cup", "open it")[number % 2],
        start=number,
        seed=number,
        source="policy",
        actions=g.normal(size=(steps, 7)).astype(np.float32).clip(-1, 1),
        dones=dones,
        frame_steps=np.arange(chunks + 1) * CHUNK,
        images=images,
        proprio=g.normal(size=(chunks + 1, 8)).astype(np.float32),
        success=success,
    )


DEMONSTRATIONS = [episode(n, True) for n in range(2)]
EXPLORED = [episode(n, n % 2 == 0) for n in range(2, 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published.write(tmp_path_factory.mktemp("model") / "smolvlm", "smolvlm")


@pytest.fixture
def train(tmp_path, monkeypatch, folder):
    """The stage on toy episodes; changes: of the reflector. Returns its record and checkpoint."""
    for module in (reflector, thresholds):
        monkeypatch.setattr(
            module, "load_round", lambda run, n: (DEMONSTRATIONS, EXPLORED if n >= 0 else [], [])
        )
    base = preset("smoke")
    config = replace(
        base,
        env=replace(base.env, image_size=SIZE),
        policy=PolicyConfig(width=16, layers=1, heads=2, encoder_channels=8),
        simulator=SimulatorConfig(width=48, layers=1, heads=2, patch=8),
        run_dir=tmp_path / "run",
        device="cpu",
    )

    def stage(**changes):
        part = {"folder": folder, "precision": "float32", "width": 64, "batch": 48, "lr": 0.03}
        told = replace(config, reflector=ReflectorConfig(**{**part, **changes}))
        run = Run(told)
        try:
            torch.manual_seed(0)
            for kind, name in (("policy", "policy-sft"), ("simulator", "simulator-0")):
                path = run.path("checkpoints", f"{name}.safetensors")
                store.save(kind, store.build(kind, told), path)
            record = reflector.run(
                run, "mark", 0, run.path("checkpoints", "policy-sft.safetensors")
            )
            return record, run.path("checkpoints", "reflector-0.safetensors")
        finally:
            run.close()

    return stage


@pytest.fixture
def calls(monkeypatch):
    """How many sequences were encoded."""
    counted: list[int] = []
    encode = ImageTextReflector.encode

    def counting(self, image, instruction):
        counted.append(len(image))
        return encode(self, image, instruction)

    monkeypatch.setattr(ImageTextReflector, "encode", counting)
    return counted


def test_a_head_learns_from_kept_features(train, calls, tmp_path, monkeypatch):
    def replay(simulator, sequences, *_):
        return [replace(s, images=s.images + 1) for s in sequences]  # a world that is nearly true

    monkeypatch.setattr(reflector, "replay", replay)
    record, path = train(kind="vlm", steps=100, calibrate=False)
    losses = [
        row["loss"] for row in read_metrics(tmp_path / "run") if row["stage"] == "reflector-0"
    ]
    assert losses[-1] < 0.5 * losses[0]
    assert record["accuracy"] > 0.85
    assert record["sequences"] == 6
    assert record["imagined_sequences"] == 4
    assert len(calls) == 2 * (6 + 4)
    saved = load_file(path)
    head = {"norm.weight", "norm.bias", "hidden.weight", "hidden.bias", "out.weight", "out.bias"}
    assert set(saved) == {"threshold", "real_threshold", "proprio_mean", "proprio_std", *head}
    loaded = store.load("reflector", path)
    sequences = chunk_sequences(EXPLORED)
    scores = reflector.score(loaded, sequences)
    won, lost = scores[0][-1], scores[1][-1]
    assert won > 0.5 > lost

    calls.clear()
    again, path = train(kind="vlm", steps=100, calibrate=False)
    assert not calls  # everything was on the disk
    assert again == record
    assert all(torch.equal(tensor, saved[name]) for name, tensor in load_file(path).items())


def test_features_from_the_disk_are_those_computed(train, calls, tmp_path, capsys):
    train(kind="vlm", steps=1, calibrate=False)
    files = sorted((tmp_path / "run" / "features").rglob("*.safetensors"))
    before = {path: path.read_bytes() for path in files}
    assert len(files) == 10
    files[0].write_bytes(files[0].read_bytes()[:30])
    files[1].write_bytes(before[files[2]])  # another sequence's
    files[3].unlink()
    calls.clear()
    train(kind="vlm", steps=1, calibrate=False)
    assert len(calls) == 2 * 3
    assert capsys.readouterr().out.count("features are computed again") == 2
    assert {path: path.read_bytes() for path in files} == before
    calls.clear()
    train(kind="vlm", steps=1, calibrate=False, prompt="{first}{now}{instruction}?")
    assert len(calls) == 20


def test_a_stage_whose_folder_has_changed_is_another(folder, tmp_path):
    config = preset("smoke")
    settings = reflector.STAGE.settings
    small = settings(config, 0)
    assert small == (config.reflector, config.sampling_steps(0), "two thresholds")
    seen = []
    for seed in (0, 0, 1):
        place = published.write(tmp_path / "model", "llava", seed=seed)
        part = replace(config.reflector, kind="vlm", folder=place)
        seen.append(settings(replace(config, reflector=part), 0))
    assert seen[0] == seen[1] != seen[2]


def test_a_head_is_not_loaded_onto_another_model(train, tmp_path):
    place = published.write(tmp_path / "model", "idefics3")
    _, path = train(kind="vlm", folder=place, steps=1, calibrate=False)
    store.load("reflector", path)
    published.write(place, "idefics3", seed=1)
    with pytest.raises(
        UserError, match=r"was trained on another model than .* holds now"
    ) as caught:
        store.load("reflector", path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["vlm", "prompted"])
def test_it_watches_over_an_imagined_world(train, kind):
    record, path = train(kind=kind, steps=10, use_proprio=kind == "vlm", calibrate=True)
    judge = store.load("reflector", path)
    assert 0.5 <= record["threshold"] <= 0.99
    sequences = chunk_sequences(EXPLORED)
    scores = reflector.score(judge, sequences)  # of features anew, not of those that were kept
    assert record["real_threshold"] == pytest.approx(stopping(peaks(scores, sequences)), abs=1e-4)
    for name in ("threshold", "real_threshold"):
        low, high = record[f"{name}_interval"]
        assert low <= record[name] + 1e-4
        assert record[name] <= high + 1e-4
        assert record[name] == pytest.approx(float(getattr(judge, name)), abs=1e-4)
    assert bool(list(judge.parameters())) == (kind == "vlm")
    # Where nothing is trained nothing is replayed either.
    assert all((name in record) == (kind == "vlm") for name in ("loss", "imagined_sequences"))
    sequences = chunk_sequences(EXPLORED)
    torch.manual_seed(0)
    world = store.load("simulator", path.with_name("simulator-0.safetensors")).for_generation()
    env = ImaginedVectorEnv(
        world, judge, first_frames(sequences), 3, max_chunks=3, sampling_steps=1, terminate=False
    )
    first, _ = env.reset(seed=0)
    starts = first["image"].clone()
    frames, poses, rewards = [starts], [first["proprio"].clone()], []
    for _ in range(3):
        seen, reward, _, truncated, _ = env.step(torch.zeros(3, CHUNK, 7))
        frames.append(seen["image"].clone())
        poses.append(seen["proprio"].clone())
        rewards.append(reward)
    assert truncated.all()
    assert not env.step(torch.zeros(3, CHUNK, 7))[1].any()  # finished rows are not looked at
    with torch.no_grad():
        expected = judge(torch.stack(frames, 1), torch.stack(poses, 1), first["instruction"])
    torch.testing.assert_close(
        torch.stack(rewards, 1), expected.sigmoid()[:, 1:], atol=1e-6, rtol=0
    )


def test_rows_begin_anew_when_they_are_reset(folder):
    torch.manual_seed(0)
    judge = ImageTextReflector(
        ReflectorConfig(kind="vlm", folder=folder, precision="float32"), embodiment(SIZE)
    )
    g = generator("rows")
    image = torch.randint(256, (3, 2, 2, SIZE, SIZE, 3), dtype=torch.uint8, generator=g)
    proprio, words = torch.zeros(2, 8), ("lift the cup", "open it")
    everyone, one = torch.ones(2, dtype=torch.bool), torch.tensor([False, True])
    watcher, other = judge.onlooker(2), judge.onlooker(2)
    watcher.watch(image[0], proprio, words, everyone)
    watcher.reset(one)
    assert watcher.watch(image[1], proprio, words, one)[0] == 0
    got = watcher.watch(image[2], proprio, words, everyone)
    other.watch(torch.stack([image[0, 0], image[1, 1]]), proprio, words, everyone)
    expected = other.watch(image[2], proprio, words, everyone)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_without_the_library_it_is_said_what_to_install(train, monkeypatch):
    monkeypatch.setattr(store, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"expected transformers, .*pip install 'worldenv\[models"):
        train(kind="vlm")


def test_features_begin_late_as_often_as_pictures():
    assert features.LATE_START == reflector.LATE_START
