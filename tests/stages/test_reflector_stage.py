"""What the reflector is trained on: successes, near misses and any failures, a third each."""

import torch

from worldenv.runtime.seeds import generator
from worldenv.stages.reflector import NEAR, _BalancedFrames


def data() -> dict:
    """Episode 0 succeeds at frame 7 of 9, episode 1 fails after 6 frames."""
    valid = torch.zeros(2, 12, dtype=torch.bool)
    valid[0, :9] = valid[1, :6] = True
    success = torch.zeros_like(valid)
    success[0, 7:9] = True
    return {"success": success, "valid": valid}


def test_near_misses_precede_success_and_end_failures():
    near = _BalancedFrames(data()).pools[1].tolist()
    assert NEAR == 4
    assert near == [[0, 3], [0, 4], [0, 5], [0, 6], [1, 2], [1, 3], [1, 4], [1, 5]]


def test_a_batch_has_a_third_of_each_and_true_labels():
    frames = _BalancedFrames(data())
    episode, frame, label = frames.draw(48, generator("frames"))
    assert len(label) == 48
    assert label.sum() == 16
    truth = frames.data["success"][episode, frame]
    assert torch.equal(label, truth.float())
    assert frames.data["valid"][episode, frame].all()


def test_no_task_has_more_successes_or_failures_than_another():
    """A judge that can read which task it is would else answer by that alone."""
    valid = torch.ones(6, 10, dtype=torch.bool)
    success = torch.zeros_like(valid)
    success[0, 9:] = True  # the only success of task 0
    success[3:, 2:] = True  # task 1 nearly always succeeds
    tasks = [0, 0, 0, 1, 1, 1]
    frames = _BalancedFrames({"success": success, "valid": valid}, tasks)
    episode, frame, label = frames.draw(6000, generator("frames"))
    assert torch.equal(label, success[episode, frame].float())
    for kind in (0.0, 1.0):
        share = (torch.tensor(tasks)[episode[label == kind]] == 0).float().mean()
        assert abs(float(share) - 0.5) < 0.03


def test_one_task_is_drawn_from_as_it_always_was():
    g, frames = generator("frames"), _BalancedFrames(data(), [8, 8])
    expected = [pool[torch.randint(len(pool), (4,), generator=g)] for pool in frames.pools]
    found = frames.draw(12, generator("frames"))
    assert torch.equal(torch.cat(expected), torch.stack(found[:2], 1))


def test_without_any_success_every_frame_is_a_failure():
    batch = data()
    batch["success"][:] = False
    episode, frame, label = _BalancedFrames(batch).draw(7, generator("frames"))
    assert len(episode) == len(frame) == 7
    assert label.sum() == 0
