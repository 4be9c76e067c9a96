"""An hour (or five minutes, or thirty seconds) in the life of a system to which everything happens.

    python -m tests.faults.chaos --seconds 300 --seed 1

Faults come one at a time from a seeded schedule, which is printed, under steady load with known answers: servers are
killed, stopped, drained and restarted, and the links between them slow down, lose, cut and damage what they carry.
While one server of a tier is lost another one lives, so no request may fail, and no answer may be wrong, ever. At the
end all must be as it was. The same seed is the same schedule; ``--only`` replays some of its faults.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tests.faults.load import Load, Phase
from tests.faults.proxy import Mischief
from tests.faults.system import System

_SERVERS: Final = ("vision-a", "vision-b", "language-a", "language-b")
_LINKS: Final = (*_SERVERS, "language-a features", "language-b features")
_GRACE: Final = 60.0
_LONGEST_SECONDS: Final = 4.0
_MAX_GROWTH_MIB: Final = 200.0
"""Of one process, from the first quarter to the end: allocators wander; in an hour, a leak of 10 KiB a request would be
more."""

MISCHIEF: Final[dict[str, Mischief]] = {
    "is slow": Mischief(delay=0.05, jitter=0.05),
    "is lossy": Mischief(loss=0.1),
    "is narrow": Mischief(rate=1e6),
    "is silent": Mischief(blocks=True),
    "is cut": Mischief(cut_after=20_000),
}
DAMAGE: Final[dict[str, Mischief]] = {
    "flips bits": Mischief(corrupt=0.1),
    "repeats and reorders": Mischief(duplicate=0.05, reorder=0.05),
}
"""Where a checksum protects what is carried: on the feature plane."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One entry of a schedule."""

    number: int
    victim: str
    kind: str
    seconds: float

    def __str__(self) -> str:
        return f"#{self.number} {self.victim} {self.kind} for {self.seconds:.1f} s"


def schedule(seed: int, number: int) -> Fault:
    """The fault of that number: known without those before it."""
    dice = random.Random(f"chaos {seed} {number}")
    seconds = dice.uniform(0.5, _LONGEST_SECONDS)
    if dice.random() < 0.6:
        return Fault(number, dice.choice(_SERVERS), dice.choice(list(ACTIONS)), seconds)
    link = dice.choice(_LINKS)
    kinds = [*MISCHIEF, *DAMAGE] if link.endswith("features") else list(MISCHIEF)
    return Fault(number, link, dice.choice([*kinds, "is reset"]), seconds)


def _kill(system: System, name: str, seconds: float) -> None:
    system[name].kill()
    time.sleep(seconds)
    system[name].start()


def _stop(system: System, name: str, seconds: float) -> None:
    system[name].stop()
    time.sleep(seconds)
    system[name].go_on()


def _drain(system: System, name: str, seconds: float) -> None:
    status = system[name].drain(_GRACE)
    assert status == 0, f"{name} ended with {status}:\n{system[name].log[-4000:]}"
    time.sleep(seconds)
    system[name].start()


def _leave(system: System, name: str, seconds: float) -> None:
    """Gone from the list, ended once it is idle, back again."""
    tier = system[name].tier
    members = [server.name for server in system.of(tier)]
    system.set_members(tier, [member for member in members if member != name])
    time.sleep(seconds)
    system.set_members(tier, members)


ACTIONS: Final[dict[str, Callable[[System, str, float], None]]] = {
    "is killed": _kill,
    "is stopped": _stop,
    "drains": _drain,
    "leaves": _leave,
}


def strike(system: System, fault: Fault) -> None:
    """Do it, and undo it."""
    if fault.kind in ACTIONS:
        return ACTIONS[fault.kind](system, fault.victim, fault.seconds)
    link = system.links[fault.victim]
    if fault.kind == "is reset":
        return link.reset()
    link.misbehave((MISCHIEF | DAMAGE)[fault.kind])
    time.sleep(fault.seconds)
    return link.heal()


@dataclass(slots=True)
class Chaos:
    """What came of it."""

    num_faults: int
    phase: Phase
    growth_mib: dict[str, float]

    def __str__(self) -> str:
        growth = ", ".join(f"{name} {mib:+.0f}" for name, mib in self.growth_mib.items())
        return f"{self.num_faults} faults: {self.phase}; memory in MiB: {growth}"

    def check(self) -> None:
        """Raises AssertionError if a promise was broken."""
        bad = [str(outcome) for outcome in self.phase.outcomes if outcome.state != "right"]
        assert not bad, f"{self}\n" + "\n".join(bad[:20])
        assert all(mib <= _MAX_GROWTH_MIB for mib in self.growth_mib.values()), str(self)


def run(
    system: System, load: Load, *, seconds: float, seed: int, only: Sequence[int] = (), echo: Callable[[str], None]
) -> Chaos:
    """Faults for so many seconds, each mended before the next; then all must be as it was.

    Raises:
        AssertionError: a server does not come back, or something is left behind. What became of the requests is for
            ``Chaos.check``.
    """
    load.pause()
    system.baseline()
    started = time.monotonic()
    early: dict[int, float] | None = None
    load.go_on()
    numbers = iter(only or range(sys.maxsize))
    num_faults = 0
    while time.monotonic() < started + seconds and (number := next(numbers, None)) is not None:
        fault = schedule(seed, number)
        since = time.monotonic()
        echo(f"{since - started:7.1f} s  {fault}")
        strike(system, fault)
        system.until_ready()
        load.wait(4)
        num_faults += 1
        if early is None and time.monotonic() > started + seconds / 4:
            early = _memory(system)
        for outcome in load.since(since):
            if outcome.state != "right":
                echo(f"           {outcome}")
    load.pause()
    system.assert_baseline()
    late, names = _memory(system), {server.pid: server.name for server in system.servers.values()}
    grown = {names[pid]: late[pid] - mib for pid, mib in (early or {}).items() if pid in late}
    return Chaos(num_faults, Phase(load.since(started)), grown)


def _memory(system: System) -> dict[int, float]:
    """MiB of each process."""
    return {s.pid: s.metrics()["process_resident_memory_bytes"] / 2**20 for s in system.servers.values()}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.chaos", description="random faults under load")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="*", default=[], help="numbers of faults, instead of all")
    arguments = parser.parse_args(argv)
    print(f"seed {arguments.seed}, {arguments.seconds:g} s", flush=True)
    with System(proxied=True) as system, Load(system) as load:
        chaos = run(
            system,
            load,
            seconds=arguments.seconds,
            seed=arguments.seed,
            only=arguments.only,
            echo=lambda line: print(line, flush=True),
        )
        print(chaos)
        chaos.check()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
