"""What we depend on, as a list for others (SBOM), and whether anybody has found fault with it.

    python -m deploy.supply_chain --tools build/audit/bin [--require-audit]

The list is CycloneDX, made of what is installed and checked against its schema. The audit asks PyPI's advisories about
every line of constraints.txt. A package that the service did not answer for was *not audited*: pip-audit calls that
"no known vulnerabilities", we say so, and ``--require-audit`` makes it an error.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

AUDIT_SECONDS: Final = 60
_SBOM_SECONDS: Final = 120
_SOCKET_SECONDS: Final = 5
_MAX_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Audit:
    """What the advisory service said.

    Args:
        num_audited: packages it knows.
        not_audited: the others' names; ``problem`` says why where it said nothing at all.
        findings: a line for each known vulnerability.
    """

    num_audited: int = 0
    not_audited: Sequence[str] = ()
    findings: Sequence[str] = ()
    problem: str = ""

    @classmethod
    def of(cls, report: str) -> "Audit":
        """Of what pip-audit writes as JSON."""
        try:
            packages = json.loads(report)["dependencies"]
        except (ValueError, KeyError, TypeError):
            return cls(problem="no advisory service reachable")
        audited = [package for package in packages if "skip_reason" not in package]
        return cls(
            num_audited=len(audited),
            not_audited=[package["name"] for package in packages if "skip_reason" in package],
            findings=[
                f"{package['name']} {package['version']}: {vulnerability['id']},"
                f" fixed in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
                for package in audited
                for vulnerability in package["vulns"]
            ],
        )

    @property
    def is_complete(self) -> bool:
        return self.num_audited > 0 and not self.not_audited

    def describe(self) -> str:
        """For people: one line, and one for each finding."""
        if not self.num_audited:
            return f"NOT AUDITED: {self.problem or 'the advisory service knows none of the packages'}"
        lines = [f"audited {self.num_audited} packages: {len(self.findings)} known vulnerabilities", *self.findings]
        if self.not_audited:
            shown = ", ".join(self.not_audited[:_MAX_SHOWN])
            more = "" if len(self.not_audited) <= _MAX_SHOWN else ", ..."
            lines.append(f"NOT AUDITED: {len(self.not_audited)} packages the service did not answer for: {shown}{more}")
        return "\n".join(lines)

    def exit_status(self, *, is_required: bool) -> int:
        """1 for a finding, or where an audit is required and has holes."""
        return 1 if self.findings or (is_required and not self.is_complete) else 0


def pinned(constraints: str) -> list[str]:
    """The lines ``name==version`` as advisories know them: without local parts such as ``+cpu``. Raises ValueError for
    a line that pins nothing."""
    lines = [line.split("#")[0].strip() for line in constraints.splitlines()]
    for line in filter(None, lines):
        name, separator, version = line.partition("==")
        if not (name and separator and version) or any(character in version for character in "*,; <>"):
            raise ValueError(f"not pinned to one version: {line}")
    return [line.partition("+")[0] for line in lines if line]


def write_sbom(tools: Path, path: Path) -> int:
    """Of the environment that runs this; returns the number of components. Raises CalledProcessError for an invalid
    one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [str(tools / "cyclonedx-py"), "environment", sys.executable, "--pyproject", "pyproject.toml"]
    options = ["--output-reproducible", "--validate", "-o", str(path)]
    subprocess.run([*command, *options], check=True, timeout=_SBOM_SECONDS)
    return len(json.loads(path.read_text("utf-8"))["components"])


def audit(tools: Path, constraints: Path) -> Audit:
    """Ask PyPI, for a minute at most."""
    with tempfile.TemporaryDirectory() as directory:
        requirements = Path(directory) / "requirements.txt"
        requirements.write_text("\n".join(pinned(constraints.read_text("utf-8"))) + "\n")
        command = [str(tools / "pip-audit"), "-r", str(requirements), "--no-deps", "--disable-pip", "-f", "json"]
        options = ["--progress-spinner", "off", "--timeout", str(_SOCKET_SECONDS)]
        try:
            done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=AUDIT_SECONDS)
        except subprocess.TimeoutExpired:
            return Audit(problem=f"the advisory service took more than {AUDIT_SECONDS} s")
    return Audit.of(done.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deploy.supply_chain", description=__doc__)
    parser.add_argument("--tools", type=Path, required=True, help="where pip-audit and cyclonedx-py are")
    parser.add_argument("--sbom", type=Path, default=Path("build/sbom.json"))
    parser.add_argument("--constraints", type=Path, default=Path("constraints.txt"))
    parser.add_argument("--require-audit", action="store_true", help="fail unless every package was audited")
    options = parser.parse_args(argv)
    print(f"{options.sbom}: {write_sbom(options.tools, options.sbom)} components", flush=True)
    found = audit(options.tools, options.constraints)
    print(found.describe(), file=sys.stderr, flush=True)
    return found.exit_status(is_required=options.require_audit)


if __name__ == "__main__":
    sys.exit(main())
