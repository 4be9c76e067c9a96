"""A deployment on this machine that nobody has to look after: a thread of its own starts it, watches it, stops it.

Linux ends the servers with the thread that started them (``deploy.launch``), and whoever calls from Python may be on
any thread: a pool's, a test's, one of a notebook.
"""

import threading

from common.service.errors import InternalError
from deploy.local import LocalDeployment
from deploy.process import Echo
from deploy.settings import ServeSettings


class BackgroundDeployment:
    """``dvd serve`` behind a Python object.

    Args:
        settings: as ``dvd serve`` has them.
        echo: takes the stderr of all servers; None discards it.

    Raises:
        ConfigError: the model is not a directory with a checkpoint.
    """

    def __init__(self, settings: ServeSettings, echo: Echo | None = None) -> None:
        self._deployment = LocalDeployment(settings, echo)
        self._settled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dvd deployment", daemon=True)
        self.failure: Exception | None = None
        """Why it does not serve, or no longer."""

    @property
    def address(self) -> str:
        return self._deployment.address

    def start(self) -> None:
        """Return when it serves.

        Raises:
            StartupError: a server ended or the deadline passed; nothing is left running.
        """
        self._thread.start()
        try:
            self._settled.wait()
        except BaseException:  # Ctrl-C
            self.stop(at_once=True)
            raise
        if self.failure is not None:
            raise self.failure

    def stop(self, *, at_once: bool = False) -> None:
        """Return when nothing runs any more; ``at_once`` does not wait for answers. Harmless when it has ended."""
        try:
            self._deployment.request_stop()
            if at_once:
                self._deployment.request_stop()
            self._join()
        except BaseException:  # Ctrl-C once more
            self._deployment.request_stop()
            self._join()
            raise

    def wait_ended(self, seconds: float) -> Exception | None:
        """Give a server that has just died the time to be noticed; returns why the system ended, None while it runs."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            return self.failure
        return self.failure or InternalError("the deployment was closed")

    def _join(self) -> None:
        # A forgotten deployment is stopped by whichever thread collects the garbage, which may be its own.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._deployment.start()
            self._settled.set()
            self._deployment.watch()
        except Exception as error:  # noqa: BLE001 - the seam between threads: raised again where somebody waits
            self.failure = error
        finally:
            try:
                self._deployment.stop()
            finally:
                self._settled.set()
