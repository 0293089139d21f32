"""Threads that work beside the one that computes."""

import os
import sys
import threading


def stand_back() -> None:
    """Give the calling thread what the others leave of the processor (on Linux, where a priority is a thread's own).

    Torch computes with as many threads as there are cores, and they wait for each other hundreds of times in a forward
    pass. One more thread of the same priority costs them several times the processor time that it takes; and when they
    wait for what it makes, it has the processor anyway.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
