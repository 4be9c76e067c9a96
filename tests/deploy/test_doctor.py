"""The doctor finds what is there, and says what is not."""

import importlib.metadata
import shutil

import pytest

from common.model import memory
from deploy import doctor
from deploy.cli import main
from deploy.settings import NANO, model_directory


def test_this_machine_can_run_it(capsys):
    assert main(["doctor", "nano"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "warn") for line in lines)
    subjects = {line[5:19].strip() for line in lines}
    assert {"python", "packages", "cpu", "memory", "gpu", "triton", "loopback", "unix sockets", "model"} <= subjects
    assert "hf format, qwen3" in lines[-1]


def test_a_model_that_is_not_there(capsys):
    assert main(["doctor", "/nowhere"]) == 1
    assert "fail model         model /nowhere: no such directory" in capsys.readouterr().out


def test_a_model_with_a_truncated_shard(tmp_path):
    shutil.copytree(model_directory(NANO), tmp_path / "model")
    shard = tmp_path / "model" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    (finding,) = doctor.check_model(str(tmp_path / "model"))
    assert finding.verdict == "fail"
    assert "model.safetensors" in finding.detail


def test_a_model_that_does_not_fit_here(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    warnings = [finding.detail for finding in doctor.check_model(NANO) if finding.verdict == "warn"]
    assert [warning.split(" needs")[0] for warning in warnings] == ["the vision server", "the language server"]


def test_a_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["grpcio", "no-such-package>=1", "numpy>=99"])
    findings = [finding for finding in doctor.check_packages() if finding.verdict == "fail"]
    assert ["no-such-package is missing" in findings[0].detail, ">=99 needed" in findings[1].detail] == [True, True]


def test_versions_other_than_tested_are_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "_tested_versions", lambda: {"numpy": "0.1"})
    (finding,) = doctor.check_packages()
    assert finding.verdict == "warn"
    assert "(0.1)" in finding.detail


@pytest.mark.parametrize("verdicts, status", [(["ok", "warn"], 0), (["ok", "fail"], 1)])
def test_the_exit_status_says_whether_it_can_run(monkeypatch, verdicts, status):
    monkeypatch.setattr(doctor, "examine", lambda model: [doctor.Finding(verdict, "x", "y") for verdict in verdicts])
    assert main(["doctor"]) == status
