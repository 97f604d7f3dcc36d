"""How many answers may be under way."""

import pytest

from coprs_deploy.errors import QueueFullError
from coprs_deploy.runtime.concurrency import ConcurrencyLimit


def test_the_one_that_is_too_many_is_refused_and_a_place_that_is_left_is_free_again():
    admission = ConcurrencyLimit(decoded_together=1, max_queue_size=1)
    with admission.place():
        with admission.place():
            with (
                pytest.raises(QueueFullError, match=r"2 answers are under way and 1 may wait"),
                admission.place(),
            ):
                raise AssertionError("was let in")
            assert admission.taken == 2
        with admission.place():
            pass
    assert admission.taken == 0


def test_a_place_is_left_on_an_error_too():
    admission = ConcurrencyLimit(1, 0)
    for _ in range(3):
        with pytest.raises(KeyError), admission.place():
            raise KeyError
    assert admission.taken == 0
