"""schemathesis against a running nano with a key: the document is true, bad data is refused, no key is no way in.

Its examples are the same in every run. A finding is shown with a command that repeats it.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.local import LocalDeployment
from tests.end_to_end.conftest import serve

KEY = "sesame"
CHECKS = (
    "not_a_server_error",
    "negative_data_rejection",
    "ignored_auth",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "errors_tell_no_secrets",
    "the_schema_says_what_is_read",
    "streams_are_events",
)
NUM_EXAMPLES = 20
MAX_SECONDS = 30
"""Of one answer; a system that is well takes a tenth of one."""
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def guarded() -> Iterator[LocalDeployment]:
    with serve("nano", api_key=[KEY]) as deployment:
        yield deployment


def run_schemathesis(address: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as it is used: its pytest plugin would be with every other test."""
    options = {
        "--header": f"Authorization: Bearer {KEY}",
        "--checks": ",".join(CHECKS),
        "--phases": "examples,coverage,fuzzing",
        "--max-examples": str(NUM_EXAMPLES),
        "--max-response-time": str(MAX_SECONDS),
        "--request-timeout": str(MAX_SECONDS),
        "--output-sanitize": "false",
        "--warnings": "off",
    }
    program = "from schemathesis.cli import schemathesis; schemathesis()"
    command = [sys.executable, "-c", program, "run", f"{address}/openapi.json", "--no-color"]
    command += [
        "--generation-deterministic",
        "--continue-on-failure",
        *(text for pair in options.items() for text in pair),
    ]
    environment = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "tests.end_to_end.openapi_checks",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.timeout(300)
def test_the_document_is_true_and_keeps_everybody_out(guarded, tmp_path):
    done = run_schemathesis(guarded.address, tmp_path)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    generated = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert generated is not None, done.stdout
    assert int(generated[1]) > 1000
    for process in guarded.processes:
        assert process.exit_status() is None, process.failure()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}])
@pytest.mark.parametrize("host", ["router", "router/live", "router?/live", "live", "router#", "a" * 300])
def test_every_route_refuses_whoever_has_no_key(guarded, headers, host):
    """Also where ``Host`` would make another path of it (CVE-2026-48746)."""
    with httpx.Client(base_url=guarded.address, timeout=20) as http:
        document = http.get("/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
        for path, operations in document["paths"].items():
            for method in (*operations, "head", "options", "put"):
                reply = http.request(method, path.replace("{model_id}", "nano"), headers={**headers, "Host": host})
                if path in ("/live", "/health"):
                    assert reply.status_code in (200, 405), (method, path)
                else:
                    assert reply.status_code == 401, (method, path)
