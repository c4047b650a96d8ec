import gc

import pytest

from batchpipe.runner.gc_tuning import RUN_THRESHOLDS, calm_collector


def test_the_collector_is_as_before_also_after_an_error() -> None:
    before = gc.get_threshold()
    with pytest.raises(ZeroDivisionError), calm_collector():
        assert gc.get_threshold() == RUN_THRESHOLDS
        assert gc.get_freeze_count() > 0
        _ = 1 / 0
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
