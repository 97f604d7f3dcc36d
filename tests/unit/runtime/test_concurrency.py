"""Counting of active requests."""

import pytest

from coprs_deploy.errors import QueueFullError
from coprs_deploy.runtime.concurrency import ConcurrencyLimit


def test_slot_beyond_the_queue_is_refused_until_another_is_released():
    limit = ConcurrencyLimit(concurrency=1, max_queue_size=1)
    with limit.slot():
        with limit.slot():
            message = "2 requests are active: the policy serves 1 at once and max_queue_size is 1"
            with pytest.raises(QueueFullError, match=message), limit.slot():
                raise AssertionError("the slot was granted")
            assert limit.num_active == 2
        with limit.slot():
            assert limit.num_active == 2
    assert limit.num_active == 0


def test_slot_is_released_after_an_error():
    limit = ConcurrencyLimit(1, 0)
    for _ in range(3):
        with pytest.raises(KeyError), limit.slot():
            raise KeyError
    assert limit.num_active == 0
