"""``dvd keys``: what it makes, that it writes over nothing, and that nobody but its owner reads a private key."""

import stat

import pytest
from cryptography import x509

from common.service.errors import ConfigError
from common.service.keys import CA_FILE, CERTIFICATE_FILE, KEY_FILE, Keys
from common.service.roles import ROLES
from deploy import cli
from deploy.keys import CA_KEY_FILE


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def names_in(path):
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    return {
        str(name.value) for name in certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    }


@pytest.fixture
def root(tmp_path):
    assert cli.main(["keys", "init", str(tmp_path / "keys"), "--hosts", "gw.example.com,10.0.0.3"]) == 0
    return tmp_path / "keys"


def test_init_makes_a_pair_for_each_role_that_its_owner_alone_can_read(root):
    for role in ROLES:
        Keys(root, role)  # or it raises
        assert Keys(root / role, role) is not None
        assert names_in(root / role / CERTIFICATE_FILE) == {f"{role}.dvd.internal", "gw.example.com", "10.0.0.3"}
    private = [path for path in root.rglob("*") if path.name in (KEY_FILE, CA_KEY_FILE)]
    assert len(private) == len(ROLES) + 1
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    assert {stat.S_IMODE((root / role).stat().st_mode) for role in ROLES} == {0o700}


def test_init_says_which_directory_goes_where(tmp_path, capsys):
    assert cli.main(["keys", "init", str(tmp_path)]) == 0
    key, *pairs, end = capsys.readouterr().out.splitlines()
    assert key.startswith(f"{tmp_path / CA_KEY_FILE}: keep it to yourself")
    assert [line.partition(": to ")[0] for line in pairs] == [str(tmp_path / role) for role in ROLES]
    assert end.endswith(f"dvd keys renew {tmp_path} makes others in time")


def test_nothing_is_written_over(root, capsys):
    before = contents(root)
    assert cli.main(["keys", "init", str(root)]) == 2
    assert cli.main(["keys", "add", str(root), "vision", "--role", "vision"]) == 2
    assert contents(root) == before
    assert capsys.readouterr().err.count("nothing was changed") == 2


def test_another_pair_is_added_and_all_are_renewed_for_the_names_they_had(root):
    assert cli.main(["keys", "add", str(root), "vision-3", "--role", "vision", "--hosts", "fd00::3"]) == 0
    Keys(root / "vision-3", "vision")
    before = contents(root)
    names = {path: names_in(path) for path in root.glob(f"*/{CERTIFICATE_FILE}")}
    assert len(names) == len(ROLES) + 1
    assert cli.main(["keys", "renew", str(root), "--days", "9"]) == 0
    for path, found in names.items():
        assert names_in(path) == found
        assert path.read_bytes() != before[path.relative_to(root)]
    Keys(root / "vision-3", "vision")
    assert {name for name, content in contents(root).items() if before[name] == content} == {
        name for name in before if name.name in (CA_FILE, CA_KEY_FILE)
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected dvd keys init DIR"),
        (["make", "@"], "expected dvd keys init DIR"),
        (["init"], "expected dvd keys init DIR"),
        (["init", "@", "--role", "vision"], "--role is for dvd keys add"),
        (["init", "@", "--hosts", "a b"], "--hosts a b: expected a host name or an IP address"),
        (["init", "@", "--hosts", "router.dvd.internal"], "--hosts router.dvd.internal: expected"),
        (["add", "@", "vision-3"], "--role is required"),
        (["add", "@", "../x", "--role", "vision"], r"\.\./x: expected a name"),
        (["add", "@", "x", "--role", "vision"], "ca.crt: No such file or directory; dvd keys init makes it"),
        (["renew", "@", "--hosts", "a"], "--hosts is for init and add"),
        (["renew", "@"], "ca.crt: No such file or directory; dvd keys init makes it"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(tmp_path, words, message):
    with pytest.raises(ConfigError, match=message):
        cli._keys([word.replace("@", str(tmp_path / "keys")) for word in words])
    assert list(tmp_path.iterdir()) == []
