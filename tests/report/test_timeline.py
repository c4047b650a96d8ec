from __future__ import annotations

from itertools import pairwise

from batchpipe.report.timeline import FIRST_INTERVAL_SECONDS, MOST_SAMPLES, Sample, Timeline


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def sample(seconds: float) -> Sample:
    return Sample(
        seconds=seconds, rows=0, prompt_tokens=0, output_tokens=0, running=0, waiting=0, device_blocks=0,
        host_blocks=0, busy_seconds=0.0,
    )  # fmt: skip


def test_samples_are_few_and_even_however_long_a_run_is() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    for _ in range(100_000):
        timeline.tick(sample)
        clock.seconds += 0.1
    samples = timeline.ended(sample)
    assert MOST_SAMPLES / 2 <= len(samples) <= MOST_SAMPLES + 1
    assert samples[0].seconds == 0 and abs(samples[-1].seconds - 10_000) < 1
    gaps = [after.seconds - before.seconds for before, after in pairwise(samples[:-1])]
    assert max(gaps) < 2.1 * min(gaps)


def test_a_short_run_has_its_beginning_and_its_end() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    for _ in range(5):
        timeline.tick(sample)
        clock.seconds += FIRST_INTERVAL_SECONDS / 4
    assert [one.seconds for one in timeline.ended(sample)] == [0, 0.25, 0.3125]
