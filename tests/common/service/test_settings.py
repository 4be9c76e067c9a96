"""Flag > variable > file > default, and an unknown name always names the nearest known one."""

import pytest
from pydantic import Field, SecretStr

from common.service.errors import ConfigError
from common.service.settings import Settings, check_environment


class Example(Settings):
    """An example program."""

    program = "dvd example"

    model: str = Field(..., description="directory of the checkpoint")
    max_num_seqs: int = Field(4, ge=1, description="sequences in a batch")
    vision: list[str] = Field([], description="addresses")
    is_quiet: bool = Field(False, description="say less")
    api_key: list[SecretStr] = Field([], description="accepted keys")


@pytest.fixture
def config_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "dvd.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_flag_beats_variable_beats_file_beats_default(monkeypatch, config_file):
    path = config_file("max-num-seqs: 7\n")
    assert Example.load(["--model", "m"]).max_num_seqs == 4
    assert Example.load(["--model", "m", "--config", path]).max_num_seqs == 7
    monkeypatch.setenv("DVD_MAX_NUM_SEQS", "9")
    assert Example.load(["--model", "m", "--config", path]).max_num_seqs == 9
    assert Example.load(["--model", "m", "--config", path, "--max-num-seqs", "11"]).max_num_seqs == 11


def test_lists_come_from_commas_repetition_and_yaml(monkeypatch, config_file):
    assert Example.load(["--model", "m", "--vision", "a,b", "--vision", "c"]).vision == ["a", "b", "c"]
    assert Example.load(["--model", "m", "--config", config_file("vision: [x, y]")]).vision == ["x", "y"]
    monkeypatch.setenv("DVD_VISION", "p,q")
    assert Example.load(["--model", "m"]).vision == ["p", "q"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--model", "m", "--max-num-seq", "3"], "did you mean --max-num-seqs?"),
        (["--model", "m", "--max-num-seqs", "0"], "max_num_seqs: Input should be greater than or equal to 1"),
        (["--model", "m", "--max-num-seqs", "many"], "max_num_seqs"),
        (["--model", "m", "stray"], "stray"),
        ([], "--model is required"),
        (["--model", "m", "--config", "/does/not/exist.yaml"], "No such file"),
    ],
)
def test_a_wrong_command_line_is_one_clear_error(argv, says):
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        Example.load(argv)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_num_sequences: 3", "did you mean max_num_seqs"),
        ("[1, 2]", "expected keys"),
        ("a: b: c", "not YAML"),
        ("max_num_seqs: -1", "max_num_seqs"),
    ],
)
def test_a_wrong_file_is_one_clear_error(config_file, text, says):
    with pytest.raises(ConfigError, match=says):
        Example.load(["--model", "m", "--config", config_file(text)])


def test_an_unknown_variable_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean DVD_MAX_NUM_SEQS"):
        check_environment([Example], {"DVD_MAX_NUM_SEQ": "3", "PATH": "x"})
    check_environment([Example], {"DVD_MAX_NUM_SEQS": "3"})


def test_dump_masks_secrets(capsys):
    with pytest.raises(SystemExit) as exit_info:
        Example.load(["--model", "m", "--api-key", "hunter2", "--dump-config"])
    printed = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert "model: m" in printed
    assert "hunter2" not in printed
