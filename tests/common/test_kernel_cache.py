"""Processes that start together keep what they compile in the same place."""

import threading
from pathlib import Path
from typing import Any

import pytest

from common.kernels.compiler import KeptCode


class Slow(KeptCode):
    """Says when it has taken a number, and writes the code when told to."""

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory), "f", "stamp")
        self.has_a_number = threading.Event()
        self.may_write = threading.Event()

    def _save_data(self, name: str, data: Any) -> None:
        self.has_a_number.set()
        assert self.may_write.wait(10)
        super()._save_data(name, data)


def test_two_that_save_at_once_do_not_take_one_number(tmp_path):
    first, second = Slow(tmp_path), Slow(tmp_path)
    second.may_write.set()
    threads = [threading.Thread(target=cache.save, args=(key, key)) for cache, key in ((first, "a"), (second, "b"))]
    threads[0].start()
    assert first.has_a_number.wait(10)
    threads[1].start()
    assert not second.has_a_number.wait(0.2)
    first.may_write.set()
    for thread in threads:
        thread.join(10)
    assert {key: KeptCode(str(tmp_path), "f", "stamp").load(key) for key in "ab"} == {"a": "a", "b": "b"}


def test_nobody_reads_a_number_before_its_code_is_there(tmp_path):
    writer, reader = Slow(tmp_path), KeptCode(str(tmp_path), "f", "stamp")
    found: list[str] = []
    saving = threading.Thread(target=writer.save, args=("a", "code"))
    loading = threading.Thread(target=lambda: found.append(reader.load("a")))
    saving.start()
    assert writer.has_a_number.wait(10)
    loading.start()
    loading.join(0.2)
    assert loading.is_alive()
    writer.may_write.set()
    for thread in (saving, loading):
        thread.join(10)
    assert found == ["code"]


@pytest.mark.parametrize("missing", ["f", "not there/f"])
def test_nothing_is_kept_yet(tmp_path, missing):
    directory = tmp_path / Path(missing).parent
    assert KeptCode(str(directory), "f", "stamp").load("a") is None
