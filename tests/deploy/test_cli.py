"""``dvd`` runs the right program with the right flags, and answers mistakes with one line and status 2."""

import subprocess
import sys

import pytest

from common.service.errors import CheckpointError, ConfigError
from deploy import cli
from deploy.settings import NANO, ServeSettings, model_directory


def one_line_on_stderr(capsys):
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err.strip()


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == cli.main([]) == 0
    shown = capsys.readouterr().out
    for command in ("serve", "vision", "language", "router", "chat", "generate", "doctor", "demo"):
        assert f"\n  {command} " in shown


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dvd 0.")


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["serv", "nano"], "unknown command serv; did you mean serve?"),
        (["serve", "nano", "--prot", "80"], "unknown flag --prot; did you mean --port?"),
        (["serve", "nano", "--port", "many"], "port: Input should be a valid integer"),
        (["serve"], "--model is required"),
        (["serve", "one", "two"], "unrecognized arguments: one two"),
        (["serve", "/nowhere"], "model /nowhere: no such directory"),
        (["serve", "/"], "model /: no config.json in this directory"),
        (["serve", "nano", "--vision-cores", "0-x"], "expected cores such as 0-3,8"),
        (["vision", "nano", "--dtyp", "float32"], "unknown flag --dtyp; did you mean --dtype?"),
        (["language", "nano", "--block-sise", "16"], "unknown flag --block-sise; did you mean --block-size?"),
        (["router", "--visoin", "a:1"], "unknown flag --visoin; did you mean --vision?"),
        (["chat", "--ulr", "x"], "unknown flag --ulr; did you mean --url?"),
        (["chat", "--url", "localhost:8000"], "url localhost:8000: expected http://HOST:PORT"),
        (["doctor", "--modle", "x"], "unknown flag --modle; did you mean --model?"),
        (["demo", "nano"], "unrecognized arguments: nano"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, argv, expected):
    assert cli.main(argv) == 2
    assert expected in one_line_on_stderr(capsys)


def test_an_unknown_key_of_the_file(capsys, tmp_path):
    (tmp_path / "dvd.yaml").write_text("max_num_sequences: 8\n")
    assert cli.main(["serve", "nano", "--config", str(tmp_path / "dvd.yaml")]) == 2
    assert "unknown key max_num_sequences; did you mean max_num_seqs?" in one_line_on_stderr(capsys)


def test_an_unknown_variable(capsys, monkeypatch):
    monkeypatch.setenv("DVD_MAX_NUM_SEQ", "8")
    assert cli.main(["doctor"]) == 2
    assert "unknown variable DVD_MAX_NUM_SEQ; did you mean DVD_MAX_NUM_SEQS?" in one_line_on_stderr(capsys)


@pytest.mark.parametrize(
    "argv",
    [["nano", "--port", "0"], ["--port", "0", "nano"], ["--port=0", "nano"], ["--model", "nano", "--port", "0"]],
)
def test_the_model_may_stand_anywhere(argv):
    settings = ServeSettings.load(cli.model_first(ServeSettings, argv))
    assert (settings.model, settings.port) == ("nano", 0)


def test_a_switch_takes_no_value():
    settings = ServeSettings.load(cli.model_first(ServeSettings, ["--enable-per-request-metrics", "nano"]))
    assert (settings.model, settings.enable_per_request_metrics) == ("nano", True)


def test_the_programs_get_the_directory_of_nano(monkeypatch):
    given: list[list[str]] = []
    monkeypatch.setattr("vision_server.__main__.main", given.append)
    assert cli.main(["vision", "nano", "--device", "cpu"]) == 0
    assert given == [[f"--model={model_directory(NANO)}", "--device=cpu"]]


def test_errors_of_a_program_keep_their_status(monkeypatch, capsys):
    def fail(argv):
        raise CheckpointError("tensor 'x' is missing")

    monkeypatch.setattr("language_server.__main__.main", fail)
    assert cli.main(["language", "/somewhere"]) == 2
    assert one_line_on_stderr(capsys) == "dvd: error: tensor 'x' is missing"
    monkeypatch.setattr("language_server.__main__.main", lambda argv: 1)
    assert cli.main(["language", "/somewhere"]) == 1


def test_a_hub_name_gets_told_what_to_do():
    with pytest.raises(ConfigError, match="download the checkpoint first"):
        model_directory("OpenGVLab/InternVL3_5-1B-HF")


def test_the_router_never_imports_torch():
    """It runs on machines that have none."""
    source = (
        "import sys; from deploy import cli; status = cli.main(['router', '--nonsense']); "
        "sys.exit(3 if 'torch' in sys.modules or 'transformers' in sys.modules else status)"
    )
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2, result.stderr
