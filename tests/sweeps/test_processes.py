"""Times out of the log of a run."""

from torchtune_kd.sweeps.processes import step_seconds


def test_seconds_follow_from_tokens_and_their_rate():
    """Two devices; the second step has no valid token, so that its rate is 0."""
    steps = [
        {"tokens_seen": 100, "tokens_per_second_per_gpu": 25.0},
        {"tokens_seen": 100, "tokens_per_second_per_gpu": 0.0},
        {"tokens_seen": 140, "tokens_per_second_per_gpu": 10.0},
    ]
    assert step_seconds(steps, 2) == [2.0, 0.0, 2.0]
