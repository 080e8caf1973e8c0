"""Questions that are no check: what workers of the check are tested with."""

import os
import signal
import time


def pid(seconds: float) -> int:
    """Who answers, after a while."""
    time.sleep(seconds)
    return os.getpid()


def die(_: object) -> None:
    """No answer."""
    os.kill(os.getpid(), signal.SIGKILL)
