"""Bad HDF5 input by kind: each ends in a UserError naming the file and the array or attribute."""

import json

import h5py
import numpy as np
import pytest

from worldenv.data.episodes import EpisodeWriter, read_episodes
from worldenv.runtime.errors import UserError

TASK = "turn_on_the_stove"
STEPS = 24

ARRAYS = {  # of a foreign demonstration: name, sane shape
    "actions": (STEPS, 7),
    "dones": (STEPS,),
    "obs/agentview_rgb": (STEPS, 16, 16, 3),
    "obs/eye_in_hand_rgb": (STEPS, 16, 16, 3),
    "obs/ee_pos": (STEPS, 3),
    "obs/ee_ori": (STEPS, 3),
    "obs/gripper_states": (STEPS, 2),
    "obs/joint_states": (STEPS, 7),
}


def put(demo, name, values):
    if name in demo:
        del demo[name]
    demo[name] = values


def scaled(name, factor, offset=0.0):
    def change(demo):
        put(demo, name, demo[name][()] * factor + offset)

    return change


def spoiled(name, value, at=(3, 1)):
    def change(demo):
        values = demo[name][()].astype(float)
        values[at] = value
        put(demo, name, values)

    return change


def group_instead(demo, name):
    del demo[name]
    demo.create_group(name)


def rows():
    """(id, change to demo_1, what the message must say besides file and demonstration)."""
    out = []
    for name, shape in ARRAYS.items():
        short, kind = name.rsplit("/", 1)[-1], np.uint8 if "rgb" in name else float

        def add(what, change, word=short, short=short):
            out.append((f"{short}-{what}", change, word))

        add("group", lambda d, n=name: group_instead(d, n))
        add("text", lambda d, n=name, s=shape: put(d, n, np.full(s, b"left")))
        add("complex", lambda d, n=name, s=shape: put(d, n, np.zeros(s, complex)))
        add("scalar", lambda d, n=name, k=kind: put(d, n, k(1)))
        add("empty", lambda d, n=name, k=kind: put(d, n, h5py.Empty(k)))
        add("no-rows", lambda d, n=name, s=shape, k=kind: put(d, n, np.zeros((0, *s[1:]), k)))
        add("cut-off", lambda d, n=name, s=shape, k=kind: put(d, n, np.zeros((9, *s[1:]), k)))
        if name != "dones":
            add("one-axis", lambda d, n=name, k=kind: put(d, n, np.zeros(STEPS, k)))
            add("narrow", lambda d, n=name, s=shape, k=kind: put(d, n, np.zeros((*s[:-1], 1), k)))
        add("one-axis-more", lambda d, n=name, s=shape, k=kind: put(d, n, np.zeros((*s, 1), k)))
        if name != "obs/joint_states":
            add("absent", lambda d, n=name: d.pop(n))
        if "rgb" in name:
            continue
        place = (3,) if len(shape) == 1 else (3, 1)
        add("nan", spoiled(name, np.nan, place))
        add("infinite", spoiled(name, np.inf, place))
        add("huge", spoiled(name, 1e30, place))
    return out


MORE = [
    ("joint-states-of-6", lambda d: put(d, "obs/joint_states", np.zeros((STEPS, 6))), "joint"),
    ("quaternion", lambda d: put(d, "obs/ee_ori", np.full((STEPS, 4), 0.5)), "not quaternions"),
    ("degrees", scaled("obs/ee_ori", 180 / np.pi), "ee_ori: expected values within"),
    ("millimetres", scaled("obs/ee_pos", 1000), "ee_pos: expected values within"),
    ("gripper-in-mm", scaled("obs/gripper_states", 1000), "gripper_states: expected values"),
    ("actions-in-metres", scaled("actions", 0.05), "as if they were metres"),
    ("actions-beyond-1", scaled("actions", 3), "actions: expected values within -1..1"),
    ("gripper-0-1", lambda d: put(d, "actions", d["actions"][()].clip(0, 1)), "as if 0 and 1"),
    ("float-images", scaled("obs/agentview_rgb", 1 / 255), "agentview_rgb: expected uint8"),
    ("oblong", lambda d: put(d, "obs/agentview_rgb", np.zeros((STEPS, 16, 20, 3), "u1")), "H, H"),
    ("grey", lambda d: put(d, "obs/agentview_rgb", np.zeros((STEPS, 16, 16, 1), "u1")), "H, 3"),
    ("other-wrist", lambda d: put(d, "obs/eye_in_hand_rgb", np.zeros((STEPS, 8, 8, 3), "u1")), "H"),
    ("no-obs", lambda d: d.pop("obs"), "expected a group `obs`"),
    ("obs-an-array", lambda d: put(d, "obs", np.zeros(3)), "expected a group `obs`, got a dataset"),
    ("dones-of-2", lambda d: put(d, "dones", np.full(STEPS, 2)), "zeros and ones"),
    ("more-actions", lambda d: put(d, "actions", np.zeros((STEPS + 1, 7))), "T = 25"),
    ("steps-unsorted", lambda d: put(d, "frame_steps", np.arange(STEPS)[::-1]), "frame_steps"),
    ("steps-negative", lambda d: put(d, "frame_steps", np.arange(STEPS) - 5), "frame_steps"),
    ("steps-real", lambda d: put(d, "frame_steps", np.arange(STEPS) + 0.5), "whole numbers"),
    ("steps-few", lambda d: put(d, "frame_steps", np.arange(5)), "frame_steps"),
    ("final-empty", lambda d: d.create_group("final_obs"), "final_obs"),
    ("final-an-array", lambda d: put(d, "final_obs", 1), "final_obs"),
    ("when-a-number", lambda d: d.attrs.__setitem__("observations", 3), "`observations`"),
    ("when-a-word", lambda d: d.attrs.__setitem__("observations", "during"), "'during'"),
    ("link-to-nothing", lambda d: put(d, "actions", h5py.SoftLink("/nowhere")), "actions"),
    ("link-outside", lambda d: put(d, "actions", h5py.ExternalLink("no.h5", "/a")), "actions"),
]


@pytest.mark.parametrize(
    ("change", "words"), [pytest.param(c, w, id=i) for i, c, w in [*rows(), *MORE]]
)
def test_bad_arrays_are_named(tmp_path, make_foreign, change, words):
    path = tmp_path / "libero_goal" / f"{TASK}_demo.hdf5"
    make_foreign(path, "after", demos=2, steps=STEPS)
    with h5py.File(path, "a") as file:
        change(file["data/demo_1"])
    with pytest.raises(UserError) as caught:
        read_episodes(path, 8)
    for word in (path.name, "demo_1", words):
        assert word in str(caught.value)


@pytest.mark.parametrize("states", [np.zeros(STEPS), np.zeros((STEPS, 30), complex), b"moved", 1.5])
def test_bad_states_are_named(tmp_path, make_foreign, states):
    path = tmp_path / f"{TASK}_demo.hdf5"
    make_foreign(path)
    with h5py.File(path, "a") as file:
        put(file["data/demo_0"], "states", states)
    with pytest.raises(UserError, match=rf"{TASK}_demo.hdf5: demo_0/states: expected"):
        read_episodes(path)


@pytest.mark.parametrize("name", ["problem_info", "bddl_file_name"])
@pytest.mark.parametrize("value", [3, 2.5, np.arange(3), h5py.Empty("f"), np.void(b"\x00\x01")])
def test_attributes_of_another_type_are_named(tmp_path, make_foreign, name, value):
    path = tmp_path / f"{TASK}_demo.hdf5"
    make_foreign(path)
    with h5py.File(path, "a") as file:
        file["data"].attrs[name] = value
    with pytest.raises(UserError, match=f"{TASK}_demo.hdf5: attribute `{name}`: expected text"):
        read_episodes(path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "3", "null", *(f'{{"language_instruction": {v}}}' for v in
     ("null", "3", "true", "[1, 2]", '["put", null]', '{"en": "put"}'))],
)  # fmt: skip
def test_an_instruction_that_is_none_is_named(tmp_path, make_foreign, text):
    path = tmp_path / f"{TASK}_demo.hdf5"
    make_foreign(path)
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = text
    with pytest.raises(UserError, match=f"{TASK}_demo.hdf5: attribute `problem_info`"):
        read_episodes(path)


def test_an_instruction_may_be_a_list_of_words(tmp_path, make_foreign):
    path = tmp_path / "some_demo.hdf5"
    make_foreign(path)
    for words in (["turn", "on", "the", "stove"], list("turn on the stove"), "turn on the stove"):
        with h5py.File(path, "a") as file:
            file["data"].attrs["problem_info"] = json.dumps({"language_instruction": words})
        (episode,) = read_episodes(path)
        assert episode.instruction == "turn on the stove"
        assert (episode.suite, episode.task) == ("libero_goal", 7)


FACTS = ["id", "suite", "task", "instruction", "start", "seed", "source", "success", "meta"]


@pytest.mark.parametrize("fact", FACTS)
@pytest.mark.parametrize("value", [..., [1], 1.5, 1e400, 2**70], ids=repr)
def test_bad_facts_of_ours_are_named(tmp_path, make_episode, fact, value):
    path = tmp_path / "task_demo.hdf5"
    with EpisodeWriter(path) as writer:
        writer.append(make_episode(4))
    with h5py.File(path, "a") as file:
        attributes = file["data/demo_0"].attrs
        facts = json.loads(attributes["worldenv"])
        facts[fact] = value
        if value is ...:
            del facts[fact]
        attributes["worldenv"] = json.dumps(facts)
    with pytest.raises(UserError, match=f"task_demo.hdf5: demo_0: attribute `worldenv`: {fact}"):
        read_episodes(path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '{"format": 2}', "[" * 100_000, 5, np.arange(3)],
    ids=lambda v: str(v)[:9],
)  # fmt: skip
def test_a_bad_record_of_ours_is_named(tmp_path, make_episode, text):
    path = tmp_path / "task_demo.hdf5"
    with EpisodeWriter(path) as writer:
        writer.append(make_episode(4))
    with h5py.File(path, "a") as file:
        file["data/demo_0"].attrs["worldenv"] = text
    with pytest.raises(UserError, match=r"task_demo.hdf5: demo_0: attribute `worldenv`: exp"):
        read_episodes(path)


FILES = [
    ("text", lambda p: p.write_text("not HDF5"), "complete HDF5 file"),
    ("nothing", lambda p: p.write_bytes(b""), "complete HDF5 file, got 0 bytes"),
    ("half", lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "complete HDF5"),
    ("absent", lambda p: p.unlink(), "no such file"),
]
CONTENTS = [
    ("no-data", lambda f: f.pop("data"), "expected a group `data`"),
    ("data-an-array", lambda f: put(f, "data", np.zeros(3)), "expected a group `data`"),
    ("no-demos", lambda f: f["data"].pop("demo_0"), "demo_0, demo_1"),
    ("named-otherwise", lambda f: f.move("data/demo_0", "data/trajectory_0"), "demo_0, demo_1"),
    ("named-in-no-text", lambda f: f.move("data/demo_0", b"data/demo_\xe9"), "demo_0, demo_1"),
    ("demo-an-array", lambda f: put(f, "data/demo_0", 1), "expected a group `demo_0`"),
    ("demo-a-dangling-link", lambda f: put(f, "data/demo_0", h5py.SoftLink("/x")), "`demo_0`"),
]


@pytest.mark.parametrize(("change", "words"), [pytest.param(*r[1:], id=r[0]) for r in FILES])
def test_bad_files_are_named(tmp_path, make_foreign, change, words):
    path = tmp_path / f"{TASK}_demo.hdf5"
    make_foreign(path)
    change(path)
    with pytest.raises(UserError, match=rf"{TASK}_demo.hdf5: expected.*{words}|{words}"):
        read_episodes(path)


@pytest.mark.parametrize(("change", "words"), [pytest.param(*r[1:], id=r[0]) for r in CONTENTS])
def test_bad_contents_are_named(tmp_path, make_foreign, change, words):
    path = tmp_path / f"{TASK}_demo.hdf5"
    make_foreign(path)
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(UserError, match=words) as caught:
        read_episodes(path)
    assert path.name in str(caught.value)


def test_a_name_and_an_attribute_that_disagree_are_named(tmp_path, make_foreign):
    path = tmp_path / f"{TASK}_demo.hdf5"
    make_foreign(path)
    with h5py.File(path, "a") as file:
        file["data"].attrs["bddl_file_name"] = (
            "bddl_files/libero_goal/put_the_bowl_on_the_plate.bddl"
        )
    with pytest.raises(UserError, match=r"expected one task, got 'turn_on_the_stove'.*bowl_on_the"):
        read_episodes(path)


def test_robomimics_mask_breaks_neither_reading_nor_appending(tmp_path, make_foreign, make_episode):
    path = tmp_path / "pick_up_the_black_bowl_on_the_cookie_box_and_place_it_on_the_plate_demo.hdf5"
    make_foreign(path, demos=12)
    with h5py.File(path, "a") as file:
        file["data/mask/train"] = [b"demo_0", b"demo_1"]
        file["mask/train"] = [b"demo_0"]
    with EpisodeWriter(path) as writer:
        writer.append(make_episode(9))
    assert [len(e) for e in read_episodes(path)] == [23] * 12 + [9]
    with h5py.File(path) as file:
        assert file["data"].attrs["num_demos"] == 13
        assert file["data/mask/train"][0] == b"demo_0"
