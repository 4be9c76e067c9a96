"""All servers behind this router: who they are, which of them may be used, and which of those gets the next work.

Servers come and go while requests run (``router.discovery``). One that comes is followed at once and used as soon as it
is READY with the checkpoint served here. One that goes gets no new work once others are ready in its place, and is let
go of when the calls it has are at their end. Knows nothing of HTTP, images or prompts.
"""

import asyncio
import logging
import random
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Final, TypeVar

from common.service import metrics
from common.service.errors import DvdError, Unavailable
from common.service.keys import Keys
from protos.status_pb2 import ModelInfo, WorkerStatus
from protos.vision_pb2 import EncodeReply
from router import policy
from router.admission import share
from router.discovery import difference
from router.hedging import EncodeTimes
from router.outliers import is_slow
from router.quarantine import Quarantine
from router.retry_budget import RetryBudget
from router.turns import Turns
from router.workers import REFUSALS, LanguageWorker, LossKind, ServerLost, Tier, VisionWorker, Worker

log = logging.getLogger(__name__)

WorkerT = TypeVar("WorkerT", bound=Worker)

_FIRST_BACKOFF_SECONDS: Final = 0.1
_MAX_BACKOFF_SECONDS: Final = 2.0
_CANCEL_SECONDS: Final = 5.0
"""For the owners of cancelled calls to notice."""
_STAND_IN_SECONDS: Final = 10.0
"""One that was replaced works on for so long at most until its successor is ready."""
RETURN_SECONDS: Final = 10.0
"""A server that was lost is expected back for so long: what needs it waits, later requests are refused at once."""
LAST_STUCK_SECONDS: Final = 30.0
"""The last usable server of a tier may be without progress for so long: giving it up helps nobody sooner."""
_BATCHES_UNDER_WAY: Final = 4
"""For each vision server: one that it computes, one that it decodes, and two that language servers read."""
_LOSS_KINDS: Final[dict[str, LossKind]] = {"reset": "reset", "heartbeat": "heartbeat", "closed": "closed"}
_CIRCUIT_STATES: Final = {"closed": 0, "half_open": 1, "open": 2}


class Reminder:
    """When to say that something is still missing: after a while, then now and then. Pure; times are in seconds."""

    def __init__(self, first: float = 3.0, every: float = 60.0) -> None:
        self._first = first
        self._every = every
        self._due: float | None = None

    def is_due(self, now: float) -> bool:
        """Whether to say it now. The first call starts the clock."""
        if self._due is None:
            self._due = now + self._first
        if now < self._due:
            return False
        self._due = now + self._every
        return True

    def reset(self) -> None:
        """It is there."""
        self._due = None


class Fleet:
    """The servers of both tiers. Belongs to the event loop.

    Args:
        leave_timeout: seconds after which the calls of a server that has left are given up; no call lives longer than
            a request may take.
        hedge_quantile: of encode times, after which a second vision server tries; 0: never.
        num_sharers: router processes that keep these servers busy together.
        keys: of this program; None: servers are believed without.
    """

    def __init__(
        self,
        leave_timeout: float = 600.0,
        hedge_quantile: float = 0.0,
        num_sharers: int = 1,
        keys: Keys | None = None,
    ) -> None:
        self.fingerprint: bytes | None = None
        self.model: ModelInfo | None = None  # last known, so that /v1/models answers without any server
        self.quarantine = Quarantine()
        self.turns = Turns(self._max_tiles_under_way)
        self.encode_times = EncodeTimes(hedge_quantile)
        self.budgets: dict[Tier, RetryBudget] = {"vision": RetryBudget(), "language": RetryBudget()}
        self._leave_timeout = leave_timeout
        self._num_sharers = num_sharers
        self._keys = keys
        self._vision: dict[str, VisionWorker] = {}
        self._language: dict[str, LanguageWorker] = {}
        self._watchers: dict[Worker, asyncio.Task[None]] = {}
        self._leaving: dict[Worker, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    @property
    def vision(self) -> list[VisionWorker]:
        """Every vision server we are in touch with, those that are leaving included."""
        return list(self._vision.values())

    @property
    def language(self) -> list[LanguageWorker]:
        """Every language server, likewise."""
        return list(self._language.values())

    @property
    def workers(self) -> list[Worker]:
        return [*self._vision.values(), *self._language.values()]

    @property
    def is_ready(self) -> bool:
        """At least one vision and one language server are warm."""
        return self.has_vision and self.has_language

    @property
    def has_vision(self) -> bool:
        return any(worker.is_usable for worker in self._vision.values())

    @property
    def has_language(self) -> bool:
        return any(worker.is_usable for worker in self._language.values())

    def may_have(self, tier: Tier) -> bool:
        """There is a usable server, or one was usable lately and may be again in a moment."""
        workers = self._vision if tier == "vision" else self._language
        return any(_is_expected(worker) for worker in workers.values())

    def _max_tiles_under_way(self) -> int:
        """Batches that keep every vision server busy while others are on their way to it, or are read as prompts."""
        loads = [worker.status.vision for worker in self.vision if worker.is_usable and worker.status is not None]
        return share(sum(_BATCHES_UNDER_WAY * load.max_batch_tiles for load in loads), self._num_sharers)

    def set_vision(self, addresses: Iterable[str]) -> None:
        """These are the vision servers from now on."""
        self._set_members(self._vision, VisionWorker, addresses)

    def set_language(self, addresses: Iterable[str]) -> None:
        """These are the language servers from now on."""
        self._set_members(self._language, LanguageWorker, addresses)

    async def close(self) -> None:
        """Stop following and hang up."""
        waiting = [task for worker, task in self._leaving.items() if worker in self.workers]
        for task in [*self._watchers.values(), *waiting]:
            task.cancel()
        # Whoever is no longer among the workers is hanging up already.
        await asyncio.gather(*self._watchers.values(), *self._leaving.values(), return_exceptions=True)
        await asyncio.gather(*(worker.close() for worker in self.workers))

    async def wait_ready(self) -> None:
        """Return once ``is_ready`` holds; the caller sets the deadline."""
        while not self.is_ready:
            await self.wait_changed()

    async def wait_changed(self) -> None:
        """Return at the next status message, loss, arrival or departure of any server."""
        await self._changed.wait()

    def pick_language(
        self, request_id: bytes, exclude: Collection[str] = (), prefix: bytes | None = None
    ) -> LanguageWorker | None:
        """A usable language server not named in ``exclude``: the one that knows the prefix, else one with little to do.

        Args:
            prefix: what ``affinity.prefix_key`` says of the request.
        """
        candidates = _trusted(self._language.values(), exclude)
        loads = {name: worker.total_load for name, worker in candidates.items()}
        chosen = policy.pick_language(request_id if prefix is None else prefix, request_id, loads)
        return None if chosen is None else candidates[chosen]

    def pick_vision(
        self,
        image_hash: bytes,
        exclude: Collection[str] = (),
        prefer: str | None = None,
        num_tiles: int = 1,
    ) -> VisionWorker | None:
        """A usable vision server not named in ``exclude``: the one preferred, else the one on which equal images meet.

        Args:
            prefer: address of a server that has done part of the work already.
            num_tiles: of the work.
        """
        candidates = _trusted(self._vision.values(), exclude)
        if prefer in candidates:
            return candidates[prefer]
        loads = {name: worker.total_load for name, worker in candidates.items()}
        chosen = policy.pick_vision(image_hash, loads, num_tiles)
        return None if chosen is None else candidates[chosen]

    async def find_vision(
        self, image_hash: bytes, tried: Collection[str], refused: Collection[str], prefer: str | None, num_tiles: int
    ) -> VisionWorker | None:
        """Like ``pick_vision``, and while a server may come back, wait for one rather than give up.

        Args:
            tried: addresses of those that failed or were lost; others are asked first.
            refused: those among them that live, and said no.
        """
        vision = self.pick_vision(image_hash, tried, prefer, num_tiles)
        while vision is None:
            vision = self.pick_vision(image_hash, refused, prefer, num_tiles)
            expected = [w for w in self._vision.values() if _is_expected(w) and w.address not in refused]
            if vision is not None or not expected:
                return vision
            patience = max(worker.usable_until for worker in expected) + RETURN_SECONDS - time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, patience)):
                    await self.wait_changed()
            except TimeoutError:
                return None
        return vision

    def note_request(self, tier: Tier) -> None:
        """A tier gets new work; retries are a share of it."""
        self.budgets[tier].note_request(time.monotonic())

    def may_retry(self, tier: Tier, error: DvdError) -> bool:
        """Whether what failed so may be tried elsewhere.

        A lost server's work always may, and what a server refused that comes or goes; the rest has a budget.
        """
        if isinstance(error, ServerLost) or error.code in REFUSALS:
            return True
        if self.budgets[tier].try_retry(time.monotonic()):
            return True
        metrics.RETRY_BUDGET_EXHAUSTED.labels(tier).inc()
        return False

    def observe_encode(self, vision: VisionWorker, num_tiles: int, seconds: float, reply: EncodeReply) -> None:
        """An image was encoded in ``seconds``: what is usual in this tier, and whether this server still is."""
        metrics.ENCODE_REPLIES.labels("cache" if reply.cache_hit else "model").inc()
        if reply.cache_hit:
            return
        self.encode_times.observe(num_tiles, seconds)
        on_trial = vision.circuit.state != "closed"
        sample = vision.speed.observe(num_tiles, seconds - reply.timings.queue_ms / 1e3)
        others = [worker.speed.seconds_per_tile for worker in self._vision.values() if worker is not vision]
        if is_slow(sample if on_trial else vision.speed.seconds_per_tile, others):
            vision.circuit.eject(time.monotonic())
            vision.speed.reset()
            self._on_ejected(vision, "latency")

    # --- coming and going

    def _set_members(self, workers: dict[str, WorkerT], make: type[WorkerT], addresses: Iterable[str]) -> None:
        members = [address for address, worker in workers.items() if not worker.is_leaving]
        came, went = difference(members, addresses)
        for address in came:
            if address in workers:
                self._welcome_back(workers[address])
            else:
                workers[address] = worker = make(address, self._keys)
                worker.on_ejected = self._on_ejected
                self._watch_over(worker)
        for address in went:
            self._bid_farewell(workers, workers[address])
        self._compare_fingerprints()
        self._notify()

    def _watch_over(self, worker: Worker) -> None:
        watcher = asyncio.create_task(self._watch(worker), name=f"watch {worker.address}")
        watcher.add_done_callback(lambda task: self._on_watcher_ended(worker, task))
        self._watchers[worker] = watcher

    def _bid_farewell(self, workers: dict[str, WorkerT], worker: WorkerT) -> None:
        """No new work once it is relieved; none of its calls is touched."""
        log.info("%s server %s (%s) is leaving: %d calls open", *_names(worker), worker.num_calls)
        worker.is_leaving = True
        worker.stands_in = True
        self._leaving[worker] = asyncio.create_task(self._see_off(workers, worker), name=f"see off {worker.address}")

    def _welcome_back(self, worker: Worker) -> None:
        """It was gone from the list, and is on it again before its last call has ended."""
        log.info("%s server %s (%s) is back", *_names(worker))
        worker.is_leaving = worker.stands_in = False
        self._leaving.pop(worker).cancel()

    async def _see_off(self, workers: dict[str, WorkerT], worker: WorkerT) -> None:
        await self._stand_in(worker)
        if not await _ends_in_time(worker, self._leave_timeout):
            log.warning("%s server %s (%s) has left: %d calls are cut off", *_names(worker), worker.num_calls)
            worker.cancel_calls("left")
            await _ends_in_time(worker, _CANCEL_SECONDS)
        # From here on the address is free: whoever is listed there again is a new server to us.
        del workers[worker.address]
        watcher = self._watchers.pop(worker)
        watcher.cancel()
        self._forget_name(worker, worker.name)
        log.info("%s server %s (%s) has left", *_names(worker))
        self._notify()
        await asyncio.gather(watcher, return_exceptions=True)
        await worker.close()
        del self._leaving[worker]

    async def _stand_in(self, worker: Worker) -> None:
        """Until a successor is ready."""
        try:
            async with asyncio.timeout(_STAND_IN_SECONDS):
                while worker.stands_in:
                    await self.wait_changed()
        except TimeoutError:
            log.warning("%s server %s (%s) leaves, and none that replaces it is ready", *_names(worker))
            worker.stands_in = False
            self._notify()

    def _relieve(self, workers: Collection[Worker]) -> None:
        """Who leaves is not needed once a successor is ready, where there is none, or if he serves something else."""
        staying = [worker for worker in workers if not worker.is_leaving]
        is_over = not staying or any(worker.is_usable for worker in staying)
        for worker in workers:
            if is_over or worker.status is None or _fingerprint(worker) != self.fingerprint:
                worker.stands_in = False

    # --- following

    async def _watch(self, worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        backoff, reminder = _FIRST_BACKOFF_SECONDS, Reminder()
        while True:
            try:
                async for status in worker.follow_status():
                    backoff = _FIRST_BACKOFF_SECONDS
                    reminder.reset()
                    self._update(worker, status)
            except Unavailable as error:
                self._lose(worker, error)
                if reminder.is_due(loop.time()) and not worker.is_leaving:
                    log.warning("waiting for %s server %s: %s", worker.tier, worker.address, error.message)
            await asyncio.sleep(random.uniform(backoff / 2, backoff))
            backoff = min(backoff * 2, _MAX_BACKOFF_SECONDS)

    def _update(self, worker: Worker, status: WorkerStatus) -> None:
        state, name, before = worker.state_name, worker.name, worker.incarnation
        if worker.take(status):
            log.warning("%s server %s (%s) has restarted", *_names(worker))
        elif state == "lost" and before:
            self.quarantine.forgive(before)  # the connection was lost, not the process
        self._judge_progress(worker)
        self._compare_fingerprints()
        if worker.name != name:
            self._forget_name(worker, name)
        _export_circuit(worker)
        if worker.state_name != state:
            log.info("%s server %s (%s) is %s", *_names(worker), worker.state_name)
        self._notify()

    def _lose(self, worker: Worker, error: Unavailable) -> None:
        if worker.status is not None:
            log.warning("%s server %s (%s) is lost: %s", *_names(worker), error.message)
            self._count_loss(worker, error.code, worker.heard_at)
        worker.lose(_LOSS_KINDS.get(error.code, "closed"))
        self._compare_fingerprints()
        self._notify()

    def _judge_progress(self, worker: Worker) -> None:
        """Who speaks and gets nowhere is as good as lost, once there is somebody else or it has lasted for long."""
        if worker.is_stuck or not worker.has_no_progress:
            return
        peers = self._vision.values() if worker.tier == "vision" else self._language.values()
        has_others = any(peer.is_usable for peer in peers if peer is not worker)
        if has_others or worker.heard_at - worker.grew_at >= LAST_STUCK_SECONDS:
            log.warning("%s server %s (%s) is stuck: it has work and makes no progress", *_names(worker))
            metrics.WATCHDOG_STALLS.labels(worker.tier).inc()
            self._count_loss(worker, "progress", worker.grew_at)
            worker.is_stuck = True
            worker.cancel_calls("progress")

    def _count_loss(self, worker: Worker, kind: str, alive_at: float) -> None:
        metrics.SERVER_EJECTIONS.labels(worker.tier, worker.name, kind).inc()
        metrics.FAILURE_DETECTION_SECONDS.labels(worker.tier, kind).observe(time.monotonic() - alive_at)

    def _on_ejected(self, worker: Worker, reason: str = "failures") -> None:
        """Its circuit has opened."""
        log.warning("%s server %s (%s) is ejected for a while: %s", *_names(worker), reason)
        metrics.SERVER_EJECTIONS.labels(worker.tier, worker.name, reason).inc()
        _export_circuit(worker)

    def _on_watcher_ended(self, worker: Worker, task: asyncio.Task[None]) -> None:
        """A bug of ours: what we no longer follow must not be used."""
        if not task.cancelled() and task.exception() is not None:
            log.critical("%s died", task.get_name(), exc_info=task.exception())
            self._lose(worker, Unavailable("is not followed any more", code="internal_error"))

    def _compare_fingerprints(self) -> None:
        """Refuse servers of another checkpoint, and remember what the accepted ones serve. Who leaves has no vote."""
        known = [worker for worker in self.workers if worker.status is not None and not worker.is_leaving]
        elected = policy.elect_fingerprint(self.fingerprint, [_fingerprint(worker) for worker in known])
        self.fingerprint = elected if elected is not None else self.fingerprint
        for worker in known:
            is_refused = _fingerprint(worker) != self.fingerprint
            if is_refused and not worker.is_refused:
                log.error(
                    "%s server %s (%s) serves another checkpoint: fingerprint %s, expected %s; it gets no work",
                    *(*_names(worker), _fingerprint(worker).hex(), (elected or b"").hex()),
                )
                metrics.SERVER_EJECTIONS.labels(worker.tier, worker.name, "fingerprint").inc()
            worker.is_refused = is_refused
        accepted = [worker for worker in known if worker.tier == "language" and not worker.is_refused]
        infos = [worker.status.model for worker in accepted if worker.status is not None]
        if infos:
            # A request must fit on whichever server it is sent to.
            self.model = min(infos, key=lambda info: info.max_model_len)

    def _notify(self) -> None:
        self._relieve(self.vision)
        self._relieve(self.language)
        self._count_states()
        self.turns.grant()
        # Wakes every waiter; the next one waits on a fresh event.
        self._changed.set()
        self._changed = asyncio.Event()

    def _count_states(self) -> None:
        tiers: dict[Tier, Sequence[Worker]] = {"vision": self.vision, "language": self.language}
        for tier, workers in tiers.items():
            names = [worker.state_name for worker in workers]
            for state in ("starting", "ready", "draining", "refused", "stuck", "lost", "leaving"):
                metrics.SERVERS.labels(tier, state).set(names.count(state))

    def _forget_name(self, worker: Worker, name: str) -> None:
        """Series of servers that are gone would pile up; two servers of one name share theirs."""
        if not any(other.name == name for other in self.workers if other.tier == worker.tier):
            metrics.forget_server(worker.tier, name)


async def _ends_in_time(worker: Worker, seconds: float) -> bool:
    """Whether its calls did."""
    try:
        async with asyncio.timeout(seconds):
            await worker.wait_idle()
    except TimeoutError:
        return False
    return True


def _usable(workers: Iterable[WorkerT], exclude: Collection[str]) -> dict[str, WorkerT]:
    return {worker.address: worker for worker in workers if worker.is_usable and worker.address not in exclude}


def _trusted(workers: Iterable[WorkerT], exclude: Collection[str]) -> dict[str, WorkerT]:
    """Usable ones whose circuit is closed; where there is none, those that are ejected have to do."""
    candidates, now = _usable(workers, exclude), time.monotonic()
    return {name: worker for name, worker in candidates.items() if worker.circuit.allows(now)} or candidates


def _is_expected(worker: Worker) -> bool:
    """Usable, or lately so and still one of ours."""
    is_ours = (not worker.is_leaving or worker.stands_in) and not worker.is_refused
    return worker.is_usable or (is_ours and time.monotonic() - worker.usable_until < RETURN_SECONDS)


def _export_circuit(worker: Worker) -> None:
    metrics.CIRCUIT_STATE.labels(worker.tier, worker.name).set(_CIRCUIT_STATES[worker.circuit.state])


def _fingerprint(worker: Worker) -> bytes:
    return b"" if worker.status is None else worker.status.fingerprint


def _names(worker: Worker) -> tuple[str, str, str]:
    return worker.tier, worker.name, worker.address
