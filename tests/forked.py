"""Children to be killed that cost no imports: forked from one process that has imported what a run imports (preloaded.py) and
has used none of it, since torch forbids a fork after a backward pass."""

import multiprocessing
import os
import pkgutil
import signal
from multiprocessing import forkserver
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


def dying(owner: str, name: str, nth: int, act, args) -> None:
    """act(*args), ended by SIGKILL when it calls `name` of `owner` ("module" or "module:attribute") for the nth time."""
    place, calls = pkgutil.resolve_name(owner), []
    real = getattr(place, name)

    def called(*given, **more):
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **more)

    setattr(place, name, called)
    act(*args)


def killed(owner: str, name: str, nth: int, act, *args) -> int:
    """The exit code of a child that does `dying`: minus SIGKILL, or what else ended it. `act` is a module's function."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{TESTS}:{TESTS.parent}")  # Python 3.11 does not give it this process's sys.path
        forkserver.ensure_running()  # one in each test process, which ends with it
    child = context.Process(target=dying, args=(owner, name, nth, act, args))
    child.start()
    child.join(120)
    code = child.exitcode
    child.kill()
    child.join()
    child.close()
    return code
