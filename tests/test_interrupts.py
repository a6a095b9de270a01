"""An interrupt ends the job where Python cannot hear it and somebody waits, and nowhere else."""

from __future__ import annotations

import pytest
from launch import launch

PROGRAM = """
import ctypes, os, signal, socket, sys, threading, time
from gossip_hvd import interrupts
from gossip_hvd.waits import Facts, waiting

interrupts.UNHEARD = 0.3
WAIT = Facts("rank 3 waits for rank 4")
ENDED, WENT_ON = 7, 8

def listen():
    interrupts.end_on_unheard_interrupts(3, lambda why, code: os._exit(ENDED))

def later(seconds, what, *arguments):
    timer = threading.Timer(seconds, what, arguments)
    timer.daemon = True
    timer.start()

def interrupt(after=0.3):
    later(after, os.kill, os.getpid(), signal.SIGINT)
    later(after + 1.5, os._exit, WENT_ON)

def deep():
    # Two locks of one mutex: in C for ever, whatever signals come.
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex), lock(mutex)
"""

CASES = {
    "deep in a wait it ends": (
        "listen()\ninterrupt()\nwith waiting(WAIT):\n    deep()",
        7,
        "rank 3 was interrupted; the job ends. rank 3 waits for rank 4, and cannot break off.",
    ),
    "deep where another thread waits it ends": (
        "def wait():\n"
        "    with waiting(WAIT):\n"
        "        time.sleep(9)\n"
        "threading.Thread(target=wait, daemon=True).start()\n"
        "listen()\ninterrupt()\ndeep()",
        7,
        "rank 3 was interrupted",
    ),
    "deep where nobody waits it goes on": ("listen()\ninterrupt()\ndeep()", 8, ""),
    "heard it is an exception": (
        "listen()\ninterrupt()\nwith waiting(WAIT):\n    time.sleep(9)",
        -2,  # as Python itself ends
        "KeyboardInterrupt",
    ),
    "caught while another thread waits it goes on": (
        "listen()\ninterrupt()\nwith waiting(WAIT):\n"
        "    try:\n"
        "        time.sleep(9)\n"
        "    except KeyboardInterrupt:\n"
        "        time.sleep(9)",
        8,
        "",
    ),
    "where lines must not be parted it waits for their end": (
        "listen()\ninterrupt()\n"
        "try:\n"
        "    with interrupts.put_off():\n"
        "        for _ in range(60):\n"
        "            time.sleep(0.01)\n"
        "        done = True\n"
        "except KeyboardInterrupt:\n"
        "    os._exit(9 if done else 10)",
        9,
        "",
    ),
    "another thread's lines delay nothing": (
        "def work():\n"
        "    with interrupts.put_off():\n"
        "        time.sleep(9)\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "listen()\ninterrupt()\n"
        "with waiting(WAIT):\n"
        "    time.sleep(9)",
        -2,
        "KeyboardInterrupt",
    ),
    "a handler of the user's own is left alone": (
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        "listen()\ninterrupt()\nwith waiting(WAIT):\n    deep()",
        8,
        "",
    ),
    "a handler that came later is left alone": (
        "listen()\nsignal.signal(signal.SIGINT, lambda *_: None)\n"
        "interrupt()\nwith waiting(WAIT):\n    deep()",
        8,
        "",
    ),
    "what a child hears is its own": (
        "listen()\n"
        "if os.fork() == 0:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "later(1.5, os._exit, WENT_ON)\n"
        "with waiting(WAIT):\n    deep()",
        8,
        "",
    ),
    "whoever listened before still does": (
        "ours, theirs = socket.socketpair()\n"
        "theirs.setblocking(False)\n"
        "signal.set_wakeup_fd(theirs.fileno())\n"
        "listen()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "os._exit(ours.recv(9)[0])",
        10,  # SIGUSR1
        "",
    ),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_an_interrupt(case: str) -> None:
    body, code, words = CASES[case]
    outcome = launch(PROGRAM + body, 1, launcher="python")
    assert outcome.code == code, outcome.text
    assert words in outcome.text
    assert ("was interrupted" in outcome.text) == (code == 7)
    assert not outcome.left
