"""Cores that others want are left to them, and looked for again."""

from vision_server.free_cores import FreeCores


def test_who_is_alone_uses_all():
    cores = FreeCores(4)
    for _ in range(20):
        assert cores.num_threads() == 4
        cores.observe(4, 1.0, 3.9)


def test_who_is_put_off_uses_what_there_was_and_looks_again():
    cores = FreeCores(4)
    cores.observe(4, 1.0, 2.3)
    seen = []
    for _ in range(14):
        seen.append(cores.num_threads())
        cores.observe(seen[-1], 1.0, min(seen[-1], 2.3))
    assert set(seen) == {2, 4}
    assert seen[0] == 2 and 1 <= seen.count(4) <= 3


def test_one_thread_is_the_least():
    cores = FreeCores(2)
    cores.observe(2, 1.0, 0.3)
    assert cores.num_threads() == 1


def test_cores_that_are_free_again_are_taken():
    cores = FreeCores(2)
    cores.observe(2, 1.0, 0.8)
    while cores.num_threads() == 1:
        cores.observe(1, 1.0, 1.0)
    cores.observe(2, 1.0, 1.9)
    assert [cores.num_threads() for _ in range(3)] == [2, 2, 2]


def test_a_round_with_fewer_threads_teaches_nothing():
    cores = FreeCores(4)
    cores.observe(3, 1.0, 0.5)
    cores.observe(4, 0.0, 0.0)
    assert cores.num_threads() == 4


def test_a_look_waits_for_a_round_that_has_work_for_all():
    cores = FreeCores(4)
    cores.observe(4, 1.0, 1.3)
    for _ in range(10):
        assert cores.num_threads(may_look=False) == 1
        cores.observe(1, 1.0, 1.0)
    assert cores.num_threads() == 4
