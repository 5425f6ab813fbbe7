"""A player's episode: driven, followed, beside reality, saved."""

from dataclasses import replace

import numpy as np
import pytest
from small_world import Beside, made_up

from worldenv.data.episodes import DatasetWriter, read_episodes
from worldenv.data.windows import chunk_sequences
from worldenv.play import session as module
from worldenv.play.session import Session, World
from worldenv.runtime.errors import UserError

RIGHT = np.array([0, -0.5, 0, 0, 0, 0, -1], np.float32)


@pytest.fixture
def beside(monkeypatch):
    made = []
    monkeypatch.setattr(module, "make_env", lambda config: made.append(Beside(config)) or made[-1])
    return made


def test_every_frame_before_the_last_is_a_place_to_begin(world):
    session, own = Session(world), made_up()
    assert [(o.name, o.places) for o in world.origins] == [("attempt 1", 5), ("demonstration 1", 5)]
    for place in range(5):
        frame = session.begin(0, place)
        assert np.array_equal(frame.image, own.images[place])
        assert frame.facts["hand"] == pytest.approx(own.proprio[place, :3].tolist())
        assert (frame.facts["left"], frame.facts["chunks"]) == (5 - place, 0)
        grip = np.clip(own.actions[8 * place - 1, -1], -1, 1) if place else -1
        assert frame.facts["grip"] == pytest.approx([grip])


def test_what_is_held_moves_the_hand_and_the_same_keys_do_the_same(world):
    session = Session(world)
    begun = session.begin(0, 1)
    left = session.advance(-RIGHT, False)
    session.begin(0, 1)
    right = session.advance(RIGHT, False)
    assert begun.facts["hand"] != right.facts["hand"] != left.facts["hand"]
    assert 0 < right.facts["reward"] < 1
    other = Session(world)
    other.begin(0, 1)
    again = other.advance(RIGHT, False)
    assert np.array_equal(again.image, right.image)
    assert again.facts["reward"] == right.facts["reward"]


def test_following_adds_to_what_the_episode_did_until_it_ends(world):
    session, own = Session(world), made_up().actions.reshape(5, 8, 7)
    session.begin(0, 3)
    frames = [session.advance(np.array([0.25, 0, 0, 0, 0, 0, 1], np.float32), True) for _ in "123"]
    expected = own[3:].copy()
    expected[..., 0] += 0.25
    for done, asked in zip(session.actions, expected.clip(-1, 1), strict=False):
        assert done == pytest.approx(asked, abs=1e-6)
    assert [f.facts["followed"] for f in frames] == [True, True, False]
    assert frames[1].facts["grip"] == pytest.approx([float(expected[1, -1, -1].clip(-1, 1))])
    assert session.actions[2][:, 0] == pytest.approx([0.25] * 8)
    assert frames[2].facts["grip"] == [1.0]


def test_a_saved_episode_loads_as_what_was_seen(world, tmp_path):
    session = Session(world)
    session.begin(0, 2)
    with pytest.raises(UserError, match="got none"):
        session.episode()
    seen = [session.frame] + [session.advance(RIGHT, False) for _ in range(3)]
    session.rewards[1] = 0.95  # as if the reflector had been won over
    with DatasetWriter(tmp_path) as writer:
        writer.append(session.episode())
    (episode,) = read_episodes(tmp_path)
    assert np.array_equal(episode.images, np.stack([f.image for f in seen]))
    assert np.array_equal(episode.actions, np.concatenate(session.actions))
    assert (episode.source, episode.task, episode.seed, episode.success) == ("play", 8, 3, True)
    assert np.flatnonzero(episode.dones).tolist() == [15]
    assert episode.meta["begins"] == {"episode": "attempt 1", "step": 16}
    (sequence,) = chunk_sequences([episode])
    assert len(sequence) == 4


def test_an_episode_has_an_end(world, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 2)
    session = Session(world)
    session.begin(0, 0)
    for _ in range(2):
        session.advance(RIGHT, False)
    with pytest.raises(UserError, match="at most 2 chunks"):
        session.advance(RIGHT, False)
    assert len(session.episode()) == 16


def test_reality_comes_to_where_the_episode_is_and_does_the_same(world, beside):
    session, own = Session(world), made_up().actions.reshape(5, 8, 7)
    session.begin(0, 2)
    session.advance(RIGHT, False)
    frame = session.show_real(True)
    (real,) = beside
    assert (real.starts[0].task, real.starts[0].index, real.starts[0].seed) == (8, None, 3)
    assert np.array_equal(np.stack(real.chunks[:2]), own[:2])
    assert np.array_equal(real.chunks[2], session.actions[0])
    assert (frame.real == 10).all()
    assert frame.facts["real_won"] is True
    assert (session.advance(RIGHT, False).real == 11).all()
    frame = session.begin(0, 1)
    assert (frame.real == 8).all()
    assert frame.facts["real_won"] is False
    assert session.show_real(False).real is None
    session.advance(RIGHT, False)
    assert len(real.chunks) == 1
    session.close()
    assert real.closed


def test_reality_is_refused_where_it_cannot_come(world, beside):
    session = Session(world)
    session.begin(1, 0)
    session.show_real(True)
    with pytest.raises(UserError, match="demonstration 1: expected to begin at its first frame"):
        session.begin(1, 2)
    assert session.frame.real is None
    assert session.frame.facts["place"] == 2
    assert session.advance(RIGHT, False).real is None
    data = replace(world.config.data, paths=("some/file.hdf5",))
    recorded = [("demonstration 1", made_up("demonstration"))]
    config = replace(world.config, data=data)
    session = Session(World(config, world.robot, world.simulator, world.reflector, recorded, 0))
    session.begin(0, 0)
    with pytest.raises(UserError, match="the start is not known"):
        session.show_real(True)
