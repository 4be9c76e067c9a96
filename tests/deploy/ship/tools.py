"""Tools that look at what we ship. ``make shipping`` installs them, beside what DvD itself needs."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]
TOOLS = ROOT / "build" / "shipping" / "bin"
CHART = ROOT / "deploy" / "kubernetes" / "helm" / "dvd"
VALUES = Path(__file__).parent / "values"


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run it from the root of the repository; what it says is not an error here."""
    assert (TOOLS / tool).exists(), f"{TOOLS / tool} is missing: make shipping"
    command = [str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def assert_clean(tool: str, *arguments: object) -> None:
    """It has nothing to say against what it is shown."""
    ran = run(tool, *arguments)
    assert ran.returncode == 0, ran.stdout + ran.stderr
