"""SIGTERM (a preemption, a requeue) and SIGINT (Ctrl-C) as a request that is granted where nothing is lost.

    outside of `deferred`     Interrupted is raised at once; the `with` blocks end the engines
    within                    the callback is told, and has `grace_s` to save and leave; then, or at a second signal,
                              Interrupted is raised wherever the driver is

The exit code says what happened: 75 (EX_TEMPFAIL: run me again) after SIGTERM, 130 after SIGINT.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

REQUEUE, INTERRUPTED = 75, 130
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.signum, self.message = signum, message

    @property
    def exit_code(self) -> int:
        return REQUEUE if self.signum == signal.SIGTERM else INTERRUPTED


class Stop:
    def __init__(self, grace_s: float):
        self._grace_s = grace_s
        self._tell: Callable[[], None] | None = None
        self._raised: Interrupted | None = None
        self.signum: int | None = None  # of the request that has not been granted yet

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take over the signals. Where Ray waits in C++ it makes a plain KeyboardInterrupt of whatever a handler raises; it
        leaves the block as the Interrupted that it was."""
        self._install()
        try:
            yield
        except Interrupted:
            raise
        except KeyboardInterrupt as error:
            raise self._raised or error from None

    def _install(self) -> None:
        for signum in SIGNALS:
            signal.signal(signum, self._handle)
        signal.signal(signal.SIGALRM, self._late)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around `ray.init`, which installs a handler of its own: a SIGTERM that comes then would exit with 15."""
        try:
            yield
        except SystemExit as end:
            if end.code == signal.SIGTERM:
                raise Interrupted(signal.SIGTERM) from end
            raise
        finally:
            self._install()

    @contextmanager
    def deferred(self, tell: Callable[[], None]) -> Iterator[None]:
        """Within the block a signal calls `tell`, from a handler: it must do next to nothing."""
        self._tell = tell
        try:
            yield
        finally:
            self._tell = None
            if self.signum is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._tell is None or self.signum is not None:
            self._raise(signum)
        self.signum = signum
        signal.setitimer(signal.ITIMER_REAL, self._grace_s)
        self._tell()

    def _late(self, signum: int, frame: FrameType | None) -> None:
        self._raise(
            self.signum or signal.SIGTERM,
            f"not done within checkpoint.grace_s ({self._grace_s:.0f} s): what happened since the last commit is lost",
        )

    def _raise(self, signum: int, message: str = "") -> NoReturn:
        self._raised = Interrupted(signum, message)
        raise self._raised
