"""Which URLs and addresses are allowed: the list of RELIABILITY.md section 5.2."""

from ipaddress import ip_address
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.service.errors import ConfigError
from router.fetch.fetcher import FetchLimits, MediaFetcher
from router.fetch.policy import Blocked, FetchPolicy, Target, is_public, parse_domain
from router.settings import RouterSettings

ANY = FetchPolicy()
LISTED = FetchPolicy(frozenset({("allowed.com", 443), ("allowed.com", 8443)}))
SERVERS = ["--vision", "a:1", "--language", "b:1"]


@pytest.mark.parametrize(
    ("url", "host", "path"),
    [
        ("https://a.com", "a.com", "/"),
        ("HTTPS://A.Com:443/X.png", "a.com", "/X.png"),
        ("https://a.com?x=/y@z", "a.com", "/?x=/y@z"),
        ("https://a.com/x#@b.com/", "a.com", "/x"),
        ("https://a.com/%5c/../%2e?q=%00", "a.com", "/%5c/../%2e?q=%00"),
        ("https://a.com/ä?ö", "a.com", "/%C3%A4?%C3%B6"),
        ("https://bücher.example/", "xn--bcher-kva.example", "/"),
        ("https://a。com/", "a.com", "/"),
        ("https://my_bucket.s3.a.com/k", "my_bucket.s3.a.com", "/k"),
    ],
)
def test_a_url_is_taken_apart_once(url, host, path):
    assert ANY.parse(url) == Target(host, 443, path)


RELATIVE = ["", "/etc/passwd", "//a.com/", "https:a.com", "https:/a.com", "https://", "https:///x", "https://?x"]
NO_URLS = [
    "http://a.com/", "ftp://a.com/", "file:///etc/passwd", "data:,x", "https://a..com/", "https://.a.com/",
    "https://-a.com/", "https://a.com./", " https://a.com/", "https://a.com/ x", "https://a.com/\tx", "https://a.com\n/",
    "https://a.com/\r\nHost: b.com", "https://a.com/\0", "https://a.com/\x7f", "https://a.com/\u00a0",
    "https://a.com/\u2028", "https://a.com/\ud800", "https://a.com/" + "x" * 9000, f"https://{'a.' * 200}com/",
    f"https://{'a' * 64}.com/",
]  # fmt: skip
PARSERS_DISAGREE = [
    "https://allowed.com\\@evil.com/", "https://allowed.com@evil.com/", "https://user:pass@allowed.com/",
    "https://:@allowed.com/", "https://@allowed.com/", "https://evil.com#@allowed.com", "https://evil.com?@allowed.com",
    "https://evil.com\\.allowed.com/", "https://allowed.com%5c.evil.com/", "https://allowed%2ecom/",
    "https://allowed.com%2f@evil.com/", "https://allowed.com%00.evil.com/", "https://allowed.com\t.evil.com/",
    "https://allowed.com\n.evil.com/", "https://аllowed.com/", "https://allowed.com.evil.com/",
    "https://evil-allowed.com/", "https://sub.allowed.com/", "https://allowed.com\u200b/", "https://allowed。com。evil。com/",
    "https://ａllowed.com/", "https://allowed.com:80/", "https://allowed.com:/", "https://allowed.com:443:443/",
    "https://allowed.com:+443/", "https://allowed.com:４４３/", "https://allowed.com:0443443/", "https://[allowed.com]/",
]  # fmt: skip
NUMBERS = [
    "127.0.0.1", "127.1", "0", "0.0.0.0", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "127.0.0.1.",
    "127.0.0.0x1", "1.2.3.08", "169.254.169.254", "8.8.8.8", "[::1]", "[::]", "[::ffff:127.0.0.1]",
    "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1%25eth0]", "１２７.0.0.1", "127。0。0。1", "①②⑦.0.0.1",
]  # fmt: skip
NAMES_OF_THE_INSIDE = [
    "localhost", "localhost.", "LOCALHOST", "x.localhost", "localhost.localdomain", "metadata", "router",
    "metadata.google.internal", "metadata.google.internal.", "vision.default.svc.cluster.local", "printer.lan",
    "1.0.0.127.in-addr.arpa",
]  # fmt: skip
OUTSIDE_PORTS = ["https://a.com:80/", "https://a.com:8443/", "https://a.com:0/", "https://a.com:99999/"]


@pytest.mark.parametrize("url", RELATIVE)
def test_half_a_url_is_none(url):
    with pytest.raises(Blocked):
        ANY.parse(url)


@pytest.mark.parametrize(
    "url", [*NO_URLS, *OUTSIDE_PORTS, *(f"https://{host}/" for host in [*NUMBERS, *NAMES_OF_THE_INSIDE])], ids=ascii
)
def test_what_is_allowed_nowhere(url):
    with pytest.raises(Blocked):
        ANY.parse(url)
    with pytest.raises(Blocked):
        ANY.follow(Target("a.com", 443, "/"), url)


@pytest.mark.parametrize("url", PARSERS_DISAGREE, ids=ascii)
def test_a_listed_host_is_the_host_that_is_asked(url):
    with pytest.raises(Blocked):
        LISTED.parse(url)


PIECES = [
    "https://",
    "HTTPS:",
    "/",
    "//",
    "\\",
    "@",
    ":",
    "443",
    "?",
    "#",
    "%40",
    "%2f",
    "[",
    "]",
    "::1",
    ".",
    "..",
    "。",
    "-",
]
PIECES += [
    "allowed.com",
    "evil.com",
    "localhost",
    "127.1",
    "0x7f",
    "é",
    "K",
    "ſ",
    "\u00ad",
    " ",
    "\t",
    "\0",
    ";",
    "&",
    "_",
    "xn--",
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12).map("".join))
def test_no_two_parsers_disagree(rest):
    """What is sent means the same to others as it did here; all else is blocked, and never fails otherwise."""
    for policy in (ANY, LISTED):
        try:
            target = policy.parse(f"https://{rest}")
        except Blocked:
            continue
        assert target.url.isascii()
        split, url = urlsplit(target.url), httpx.URL(target.url)
        assert (split.scheme, split.hostname, split.port or 443) == ("https", target.host, target.port)
        assert (url.scheme, url.raw_host.decode(), url.port or 443) == ("https", target.host, target.port)
        assert policy.parse(target.url) == target


def test_a_list_may_name_ports_and_holds_behind_redirects():
    assert LISTED.parse("https://Allowed.com:8443/x").authority == "allowed.com:8443"
    here = LISTED.parse("https://allowed.com/a/b?c")
    assert here.authority == "allowed.com"
    assert LISTED.follow(here, "../d?e#f").url == "https://allowed.com/d?e"
    assert LISTED.follow(here, "//allowed.com:8443/").url == "https://allowed.com:8443/"
    for location in ("https://other.com/", "//other.com/", "http://allowed.com/", "file:///x", "data:,x", "https://[/"):
        with pytest.raises(Blocked):
            LISTED.follow(here, location)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255"),
        *("192.168.1.1", "100.64.0.1", "100.100.100.200", "169.254.169.254", "168.63.129.16", "192.0.0.192"),
        *("192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1", "224.0.0.1", "239.255.255.250"),
        *("240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1"),
        *("fd00:ec2::254", "ff02::1", "2001:db8::1", "2001::1", "3fff::1", "100::1", "4000::1", "::127.0.0.1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1"),
        *("64:ff9b:1::8.8.8.8", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:c0a8:101::", "2001:0:7f00:1::"),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(ip_address(address))
    with pytest.raises(Blocked):
        ANY.check(["8.8.8.8", address])  # one of them is enough


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::"],
)
def test_public_addresses(address):
    ANY.check([address, "1.1.1.1"])


INSIDE = FetchPolicy(
    frozenset({("minio", 443), ("files.corp.internal", 8443), ("allowed.com", 443)}), allows_private=True
)
PRIVATE = ["10.0.0.1", "172.31.0.1", "192.168.1.1", "100.64.0.1", "127.0.0.1", "::1", "fd12::1", "::ffff:10.0.0.1"]
NEVER = [
    *("169.254.169.254", "fe80::1", "100.100.100.200", "::ffff:100.100.100.200", "fd00:ec2::254", "168.63.129.16"),
    *("0.0.0.0", "224.0.0.1", "::"),
]


def test_the_inside_needs_the_flag_and_a_place_on_the_list():
    assert INSIDE.parse("https://minio/a.png").url == "https://minio/a.png"
    assert INSIDE.parse("https://files.corp.internal:8443/").authority == "files.corp.internal:8443"
    INSIDE.check([*PRIVATE, "8.8.8.8"])
    for url in ("https://other/", "https://a.com/", "https://files.corp.internal/", "https://10.0.0.1/"):
        with pytest.raises(Blocked):
            INSIDE.parse(url)
    for address in NEVER:
        with pytest.raises(Blocked):
            INSIDE.check([address])
    for policy in (FetchPolicy(INSIDE.domains), FetchPolicy(allows_private=True)):
        for address in PRIVATE:
            with pytest.raises(Blocked):
                policy.check([address])
        with pytest.raises(Blocked):
            policy.parse("https://minio/")


@pytest.mark.parametrize("host", NUMBERS, ids=ascii)
def test_no_flag_makes_a_name_of_a_number(host):
    with pytest.raises(ValueError):
        parse_domain(host, may_be_inside=True)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--allow-private-media", "--allow-media-urls"], "allowed_media_domains"),
        (["--media-egress-proxy", "http://proxy:3128", "--allow-media-urls"], "allowed_media_domains"),
        (["--media-egress-proxy", "https://proxy:1", "--allowed-media-domains", "a.com"], "http://HOST:PORT"),
        (["--media-egress-proxy", "http://u:p@proxy:1", "--allowed-media-domains", "a.com"], "http://HOST:PORT"),
        (["--media-egress-proxy", "http://proxy:1/x", "--allowed-media-domains", "a.com"], "http://HOST:PORT"),
        (["--allowed-media-domains", "minio"], "--allowed-media-domains"),
    ],
)
def test_what_reaches_further_needs_a_list(options, error):
    with pytest.raises(ConfigError, match=error):
        RouterSettings.load([*SERVERS, *options])
    with pytest.raises(ConfigError):
        MediaFetcher(ANY, FetchLimits(), proxy="http://proxy:3128")


def test_settings_of_the_inside():
    inside = ["--allow-private-media", "--allowed-media-domains", "minio:9000"]
    settings = RouterSettings.load([*SERVERS, *inside, "--media-egress-proxy", "http://[::1]:3128"])
    assert MediaFetcher.of(settings) is not None


def test_settings():
    assert MediaFetcher.of(RouterSettings.load(SERVERS)) is None
    everywhere = MediaFetcher.of(RouterSettings.load([*SERVERS, "--allow-media-urls"]))
    assert everywhere is not None
    settings = RouterSettings.load([*SERVERS, "--allowed-media-domains", "A.com,bücher.example:8443"])
    assert list(map(parse_domain, settings.allowed_media_domains)) == [("a.com", 443), ("xn--bcher-kva.example", 8443)]
    listed = MediaFetcher.of(settings)
    assert listed is not None


@pytest.mark.parametrize(
    "entry", ["a", "10.0.0.1", "*.a.com", "a.com:0", "a.com:65536", "https://a.com", "a.local", "a.com/x"]
)
def test_a_list_names_public_hosts(entry):
    with pytest.raises(ConfigError, match="--allowed-media-domains"):
        RouterSettings.load([*SERVERS, "--allowed-media-domains", entry])
