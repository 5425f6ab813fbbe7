"""Windows never leave their episode, are drawn reproducibly, and pad as documented."""

import numpy as np
import pytest
import torch

from worldenv.data.windows import (
    ActionWindows,
    FrameWindows,
    chunk_sequences,
    from_first_step,
    padded_chunks,
)
from worldenv.runtime.errors import UserError
from worldenv.runtime.seeds import generator


def marked(make_episode, number, steps, every, **options):
    """An episode whose pixels, proprio and actions spell out episode number and step."""
    episode = make_episode(steps, every, size=2, task=number % 10, **options)
    episode.images[:] = number
    episode.proprio[:, 0], episode.proprio[:, 1] = number, episode.frame_steps
    episode.actions[:, 0], episode.actions[:, 1] = number + 1, np.arange(steps)
    return episode


def test_sparse_episode_yields_one_sequence_with_a_padded_tail(make_episode):
    episode = make_episode(20, 8, success_at=18)
    (sequence,) = chunk_sequences([episode])
    assert sequence.steps.tolist() == [0, 8, 16, 20]
    assert sequence.success.tolist() == [False, False, False, True]
    assert np.array_equal(sequence.actions[0], episode.actions[:8])
    tail = sequence.actions[2].numpy()
    assert np.array_equal(tail[:4], episode.actions[16:])
    assert (tail[4:, :6] == 0).all()
    assert (tail[4:, 6] == episode.actions[-1, 6]).all()


def test_success_counts_actions_before_the_frame_only(make_episode):
    (sequence,) = chunk_sequences([make_episode(24, 8, success_at=8)])
    assert sequence.success.tolist() == [False, False, True, True]
    (sequence,) = chunk_sequences([make_episode(24, 8, success_at=7)])
    assert sequence.success.tolist() == [False, True, True, True]


def test_dense_episode_yields_every_offset(make_episode):
    episode = make_episode(20, 1)
    sequences = chunk_sequences([episode])
    assert [s.steps.tolist() for s in sequences] == [
        [o, o + 8, *([o + 16] if o <= 4 else []), *([20] if o != 4 else [])] for o in range(8)
    ]
    for s in sequences:
        assert np.array_equal(s.images, episode.images[s.steps])
        assert np.array_equal(s.actions[0], episode.actions[s.steps[0] : s.steps[0] + 8])


def test_one_sequence_of_an_episode_begins_with_it(make_episode):
    episodes = [make_episode(20, 4), make_episode(16, 8)]
    first = from_first_step(chunk_sequences(episodes))
    assert [(s.episode, s.steps.tolist()) for s in first] == [(0, [0, 8, 16, 20]), (1, [0, 8, 16])]


def test_no_transition_anywhere_is_an_error(make_episode):
    with pytest.raises(UserError, match="8 actions apart, got frames at steps"):
        chunk_sequences([make_episode(25, 12, final=False)])
    assert chunk_sequences([]) == []


def test_frame_windows_never_cross_episodes(make_episode):
    rng = np.random.default_rng(0)
    for trial in range(20):
        episodes = [
            marked(
                make_episode,
                i,
                int(rng.integers(9, 60)),
                int(rng.choice([1, 2, 4, 8])),
                final=bool(rng.integers(2)),
                seed=i,
            )
            for i in range(int(rng.integers(1, 7)))
        ]
        frames = int(rng.integers(1, 6))
        windows = FrameWindows(chunk_sequences(episodes), frames)
        batch = windows.batch(torch.arange(len(windows)))
        proprio, action, valid = batch["proprio"], batch["action"], batch["valid"]
        number, step = proprio[..., 0], proprio[..., 1]
        assert (number == number[:, :1]).all()
        assert (batch["image"] == number[..., None, None, None, None]).all()
        assert (batch["episode"] == number[:, 0]).all()
        assert (batch["task"] == number[:, 0] % 10).all()
        assert (batch["steps"] == step).all()
        assert valid[:, -1].all()
        assert (valid.int().diff(dim=1) >= 0).all(), "padding lies on the left only"
        assert (action[:, 0] == 0).all()
        for f in range(1, frames):
            led = valid[:, f] & valid[:, f - 1]
            assert (action[~led, f] == 0).all()
            assert (action[led, f, 0, 0] == number[led, f] + 1).all()
            assert (action[led, f, 0, 1] == step[led, f - 1]).all()
            gap = (step[:, f] - step[:, f - 1])[led]
            assert ((gap > 0) & (gap <= 8)).all()
            # Padding repeats the first frame of the sequence.
            assert (step[~valid[:, f - 1], f - 1] == step[~valid[:, f - 1], f]).all()
        if frames > 1:
            assert valid[:, -2:].all()
        expected = sum(len(s) - (frames > 1) for s in chunk_sequences(episodes))
        assert len(windows) == expected, trial


def test_unpadded_windows_lie_wholly_inside(make_episode):
    sequences = chunk_sequences([make_episode(40, 8), make_episode(16, 8)])
    windows = FrameWindows(sequences, 4, padded=False)
    assert len(windows) == 3
    assert windows.batch(torch.arange(3))["valid"].all()
    assert (
        FrameWindows(sequences, 6, [1.0, 0.0], padded=False).batch(torch.tensor([0]))["valid"].all()
    )
    with pytest.raises(UserError, match="at least 7 frames, got none longer than 6"):
        FrameWindows(sequences, 7, padded=False)


def test_references_are_frames_of_the_episode_up_to_the_window(make_episode):
    episodes = [make_episode(64, 8, seed=i) for i in range(2)]  # nine frames each
    for number, episode in enumerate(episodes):
        episode.images[:] = (20 * number + np.arange(9))[:, None, None, None, None]
    windows = FrameWindows(chunk_sequences(episodes), 3, padded=False)
    batch = windows.sample(generator(0, "references"), 4000)
    reference = batch["reference"].flatten(1)[:, 0].long()
    begin = batch["image"].flatten(1)[:, 0].long()
    pairs = {(b, r) for b, r in zip(begin.tolist(), reference.tolist(), strict=True)}
    assert pairs == {
        (20 * n + b, 20 * n + r) for n in range(2) for b in range(7) for r in range(b + 1)
    }
    late = begin % 20 == 6
    share = (reference[late] % 20 == 0).float().mean()  # half always, and one in seven of the rest
    assert share == pytest.approx(0.5 + 0.5 / 7, abs=0.08)


def test_transitions_and_windows_know_what_was_before(make_episode):
    episodes = [marked(make_episode, i, 32, 8, seed=i) for i in range(2)]
    windows = FrameWindows(chunk_sequences(episodes), 2, padded=False)
    got = windows.transitions(generator(0, "transitions"), 500)
    number, step = got["proprio"][:, 0], got["proprio"][:, 1]
    assert set(zip(number.tolist(), step.tolist(), strict=True)) == {
        (n, s) for n in (0.0, 1.0) for s in (0.0, 8.0, 16.0, 24.0)
    }
    assert torch.equal(got["next_proprio"][:, :2], torch.stack([number, step + 8], 1))
    assert torch.equal(got["action"][:, 0, :2], torch.stack([number + 1, step], 1))
    began = step == 0
    earlier = torch.where(began, step, step - 8)
    assert torch.equal(got["previous_proprio"][:, :2], torch.stack([number, earlier], 1))
    assert (got["previous_action"][began] == 0).all()
    led = torch.stack([number + 1, earlier], 1)[~began]
    assert torch.equal(got["previous_action"][~began, 0, :2], led)
    batch = windows.batch(torch.arange(len(windows)))
    first = batch["steps"][:, 0]
    assert torch.equal(batch["previous_proprio"][:, 1], (first - 8).clamp_min(0).float())
    led = batch["previous_action"][:, 0, 1]
    assert torch.equal(led, (first - 8).clamp_min(0).float())


def test_action_windows_stay_inside_and_pad_the_tail(make_episode):
    episodes = [marked(make_episode, i, 11 + i, every, seed=i) for i, every in enumerate((1, 8, 3))]
    windows = ActionWindows(episodes, chunk=8)
    assert len(windows) == 11 + 2 + 5
    batch = windows.batch(torch.arange(len(windows)))
    for i in range(len(windows)):
        number, step = batch["proprio"][i, :2].int().tolist()
        episode = episodes[number]
        here = torch.from_numpy(episode.actions[step : step + 8])
        action = batch["action"][i]
        assert torch.equal(action[: len(here)], here)
        assert (action[len(here) :, :6] == 0).all()
        assert (action[len(here) :, 6] == float(episode.actions[-1, 6])).all()
        assert (batch["image"][i] == number).all()
        assert batch["task"][i] == number
    with pytest.raises(UserError, match="frames before their actions"):
        ActionWindows([])


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]])
def test_sampling_is_reproducible_and_weighted(make_episode, weights):
    episodes = [marked(make_episode, i, 64, 8, seed=i) for i in range(3)]
    for windows in (
        FrameWindows(chunk_sequences(episodes), 3, weights),
        ActionWindows(episodes, 8, weights),
    ):
        first = windows.sample(generator(0, "world", 7), 4000)
        again = windows.sample(generator(0, "world", 7), 4000)
        other = windows.sample(generator(0, "world", 8), 4000)
        assert all(torch.equal(first[k], again[k]) for k in first)
        assert not torch.equal(first["proprio"], other["proprio"])
        share = torch.bincount(first["task"], minlength=3) / 4000
        expected = torch.tensor([0.25, 0.0, 0.75] if weights else [1 / 3] * 3)
        assert torch.allclose(share, expected, atol=0.04)
        if weights:
            assert share[1] == 0


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]])
def test_bad_weights(make_episode, weights):
    sequences = chunk_sequences([make_episode(16, 8), make_episode(16, 8)])
    with pytest.raises(UserError, match="weights: expected 2"):
        FrameWindows(sequences, 2, weights)


def test_padded_chunks_beyond_the_end():
    actions = np.arange(14, dtype=np.float32).reshape(2, 7)
    chunk = padded_chunks(actions, np.array([1]), 3)[0]
    assert np.array_equal(chunk[0], actions[1])
    assert np.array_equal(chunk[1:], [[0, 0, 0, 0, 0, 0, 13]] * 2)
