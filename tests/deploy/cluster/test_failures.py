"""A slot whose servers fail in a row waits twice as long each time, up to a minute."""

from deploy.cluster.failures import Failures


def test_pauses_double_up_to_a_minute():
    failures, pauses = Failures(), []
    for count in range(1, 12):
        assert failures.note(("vision", 0), "it ended", 100.0, is_first=False) == count
        pauses.append(next(second for second in range(100) if failures.may_retry(("vision", 0), 100.0 + second)))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60]


def test_after_a_good_time_it_begins_anew():
    failures = Failures()
    for _ in range(5):
        failures.note(("vision", 0), "it ended", 0.0, is_first=False)
    assert failures.note(("vision", 0), "it ended", 0.0, is_first=True) == 1
    assert failures.may_retry(("vision", 0), 1.0)


def test_slots_do_not_wait_for_each_other():
    failures = Failures()
    failures.note(("vision", 0), "it ended", 0.0, is_first=False)
    assert failures.may_retry(("vision", 1), 0.0) and failures.may_retry(("language", 0), 0.0)
    assert [(slot, failure.reason) for slot, failure in failures] == [(("vision", 0), "it ended")]
