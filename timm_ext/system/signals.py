"""Signals that ask a process to end: Ctrl-C, SIGTERM, and SIGHUP of a terminal that is gone."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_SAME = 1.0  # seconds within which further signals are one request: groups of processes get it twice
_MOST_REPEATS = 2
_SOON = 0.02
_PARENT = "TIMM_EXT_PARENT"  # tells a worker process by whom it was started
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end; whatever handles Ctrl-C handles it.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Watch:
    """What the main thread knows of signals while they are watched."""

    def __init__(self, numbers: tuple[signal.Signals, ...], *, held: bool) -> None:
        self.pid = os.getpid()
        self.first: int | None = None
        self.noted = 0.0
        self.raised: float | None = None
        self.depth = int(held)
        self.ending = False
        self.repeats = 0
        self.terminals = [number for number in (0, 1, 2) if os.isatty(number)]
        found = {number: signal.getsignal(number) for number in numbers}
        self._before = {number: handler for number, handler in found.items() if handler in _REPLACED}
        self._hook = sys.unraisablehook

    def begin(self) -> None:
        """Take over the signals that are nobody's."""
        sys.unraisablehook = self.unraisable
        for number in self._before:
            signal.signal(number, self.handle)

    def end(self) -> None:
        """Leave the signals as they were."""
        self.ending = True
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook

    def ignore(self) -> None:
        """Let no signal end this process any more: unlike a handler, this outlasts the interpreter."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal, and raise where nothing forbids it."""
        if os.getpid() != self.pid:  # a forked process that has not chosen its own handlers yet
            if number != signal.SIGINT:
                os._exit(128 + number)
            return
        if number == signal.SIGHUP:
            self._leave_terminals()
        now = time.monotonic()
        if self.first is None:
            self.first = number
        elif now - self.noted <= _SAME:
            return
        elif self.ending or self.depth:
            self.repeats += 1
            if self.repeats >= _MOST_REPEATS:
                os._exit(128 + self.first)
        self.noted = now
        if not self.ending and not self.depth:
            self.raise_it()

    def raise_it(self) -> None:
        assert self.first is not None
        self.raised = self.noted = time.monotonic()
        raise Interrupted(self.first)

    def unraisable(self, problem: "sys.UnraisableHookArgs") -> None:
        """Send a signal again that was raised where nothing can be, as in a destructor."""
        if problem.exc_type is not Interrupted or self.first is None:
            sys.__unraisablehook__(problem)
            return
        number, self.first, self.raised = self.first, None, None
        again = threading.Timer(_SOON, os.kill, (self.pid, number))
        again.daemon = True
        again.start()

    def is_due(self) -> bool:
        """Tell whether a signal waits, or was raised and swallowed."""
        if self.first is None or self.ending or self.depth:
            return False
        return self.raised is None or time.monotonic() - self.raised > _SAME

    def _leave_terminals(self) -> None:
        """Let output to a terminal that is gone go nowhere, rather than fail."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in self.terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)


_watch: _Watch | None = None


@contextmanager
def watched(numbers: tuple[signal.Signals, ...] = SIGNALS, *, held: bool = False) -> Iterator[None]:
    """Turn signals into `Interrupted`, in the main thread, for the length of the block.

    Signals that are ignored (`nohup`, a shell's background) stay so, and handlers of others are left alone.
    Within another `watched` it does nothing.

    Args:
        numbers: of the signals.
        held: only note them, but where `heard` lets them through.
    """
    global _watch
    if _watch is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _watch = _Watch(numbers, held=held)
    try:
        watch.begin()
        yield
    finally:
        watch.end()
        _watch = None


def watch_command() -> None:
    """Note signals from here to the very end of a command, and raise them where `heard` lets them through.

    A command that has told how it ended leaves with that status, whatever signals come. Does nothing in a
    process that uses the package as a library.
    """
    global _watch
    if _is_command():
        _watch = _Watch(SIGNALS, held=True)
        _watch.begin()
        atexit.register(_watch.ignore)  # behind it the interpreter is still busy, and has no handlers


@contextmanager
def heard() -> Iterator[None]:
    """Raise the signals that a watch holds, for the length of the block, and one that came before it."""
    watch = _watch
    if watch is None:
        yield
        return
    held, watch.depth = watch.depth, 0
    try:
        if watch.is_due():
            watch.raise_it()
        yield
    finally:
        watch.depth = held


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold signals back while a block leaves things half-done; they are raised behind it."""
    watch = _watch_of_thread()
    if watch is None:
        yield
        return
    if watch.is_due():
        watch.raise_it()
    watch.depth += 1
    try:
        yield
    finally:
        watch.depth -= 1
    if watch.is_due():
        watch.raise_it()


@contextmanager
def ending() -> Iterator[None]:
    """Clean up or save before the end.

    Where a signal asked for the end, further ones are ignored from here on; who asks twice more, a second
    later, ends the process at once.
    """
    watch = _watch_of_thread()
    if watch is not None:
        watch.ending = watch.first is not None
    with uninterrupted():
        yield


def _watch_of_thread() -> _Watch | None:
    return _watch if threading.current_thread() is threading.main_thread() else None


def received() -> int | None:
    """Return the number of the signal that asked this process to end, None where none did."""
    return None if _watch is None else _watch.first


def quiet_start() -> None:
    """Let a command that is still starting end with one line and no traceback.

    A worker process, which loads the package first, ends with its parent from here on. Does nothing in a
    process that uses the package as a library.
    """
    if (parent := os.environ.pop(_PARENT, "")).isdigit():
        _end_with_parent(int(parent))
    if _is_command():
        for number in SIGNALS:
            if signal.getsignal(number) in _REPLACED:
                signal.signal(number, _quit)


def follow_parent(parent: int, *, sigterm: bool = True) -> None:
    """Let this worker process end when its parent does, however that ends, and leave Ctrl-C to it.

    SIGTERM, by which parents end their workers, ends it.

    Args:
        parent: its process number.
        sigterm: set the action of SIGTERM, too; what has its own keeps it.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _end_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def wait_for_signal() -> None:
    """Give a signal time to come, when a worker has ended: one to all processes may meet a worker first."""
    time.sleep(_SAME / 2)


def _end_with_parent(parent: int) -> None:
    """Have the system kill this process when its parent ends (Linux)."""
    import ctypes  # what loads before the handlers are set is a moment without them

    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def children_start() -> Iterator[None]:
    """Keep signals from the worker processes that are started here, until they call `follow_parent`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.environ[_PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(_PARENT, None)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _quit(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, b"error: interrupted\n")
    os._exit(128 + number)


_REPLACED: tuple[object, ...] = (signal.SIG_DFL, signal.default_int_handler, _quit)


def _is_command() -> bool:
    """Tell whether this process is `timm-ext` or `python -m timm_ext`."""
    started = sys.orig_argv
    if "--multiprocessing-fork" in started:
        return False
    module = started[started.index("-m") + 1 :][:1] if "-m" in started else []
    script = os.path.basename(sys.argv[0]) if sys.argv else ""
    return module == ["timm_ext"] or script == "timm-ext"
