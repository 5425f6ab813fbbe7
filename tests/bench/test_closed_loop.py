"""What of imagined success is real: counts and paired differences of the second policy."""

from bench.closed_loop import compared


def test_a_gain_is_the_second_policys_on_the_firsts_starts():
    before, after = [True, False, False, False], [True, True, True, False]
    found = compared({"explored": before, "post-trained": after})
    assert (found["explored_successes"], found["post-trained_successes"]) == (1, 3)
    mean, low, high = found["points"]
    assert (mean, low < mean < high) == (50.0, True)
    assert found["explored"] == [1, 0, 0, 0]  # by start, as it was
