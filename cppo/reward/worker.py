"""The worker process of a grader: calls a reward function, and answers over a socket.

One JSON value a line. To the worker: the set-up, then what the function is called with, item by
item. From it: {ready} or {unable}, then {reward, reason, detail}; a failure has a reason. It
imports no torch, so that it starts quickly.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import socket
import sys
import traceback

from cppo.reward.answers import same_answer
from cppo.reward.functions import NOTHING, Reward, default_reward, resolve
from cppo.reward.second_look import SECOND_LOOKS


def _as_reward(value: object) -> tuple[Reward, str, str]:
    """What a reward function returned, as (reward, reason, detail); no reason where it is one."""
    returned = f"returned {value!r:.200} ({type(value).__name__})"
    if callable(item := getattr(value, "item", None)):
        value = item()  # a numpy scalar, or a tensor of one number
    if isinstance(value, (int, float)):
        total = float(value) if abs(value) <= sys.float_info.max else math.nan
        value = Reward(total=total, accuracy=min(max(total, 0.0), 1.0), format=0.0)
    if not isinstance(value, Reward):
        return NOTHING, "not a number", f"{returned}; expected a finite float or a Reward"
    shares = (value.accuracy, value.format, value.second_look)
    parts = (value.total, *shares)
    if not all(isinstance(part, (int, float)) and math.isfinite(part) for part in parts):
        return NOTHING, "not a number", f"{returned}; its numbers must be finite"
    if not all(0 <= share <= 1 for share in shares):
        return NOTHING, "out of range", f"{returned}; all but the total lie in [0, 1]"
    return Reward(**{name: float(part) for name, part in vars(value).items()}), "", ""


def _confine(memory_bytes: int | None) -> None:
    """Keep what the reward function does away from the trainer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.dup2(2, 1)  # what it prints goes to stderr: the trainer's stdout stays clean
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard != resource.RLIM_INFINITY:
            memory_bytes = min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, hard))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, Linux ends this process and not the trainer


def serve(descriptor: int) -> None:
    """Answer requests on a socket until it closes: the main function of a worker process."""
    own_pid = os.getpid()
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)
    requests = channel.makefile("rb")

    def reply(**message: object) -> None:
        if os.getpid() != own_pid:
            os._exit(0)  # the reward function forked, and this is its child
        channel.sendall(json.dumps(message).encode() + b"\n")

    setup = json.loads(requests.readline())
    _confine(setup["memory_bytes"])
    try:
        function = resolve(setup["spec"])
        ours = [default_reward, *(look.grade for look in SECOND_LOOKS.values())]
        if function in ours:  # the parser's first uses take half a second
            same_answer(r"\frac{x}{\sqrt 2} + 2^3 \pi", r"8\pi + \frac{\sqrt{2}}{2} x")
            same_answer(r"8.5", r"\frac{17\sqrt{4}}{4}")
    except BaseException as error:  # noqa: BLE001 - told to the parent, which raises it
        reply(unable=str(error) if isinstance(error, ValueError) else traceback.format_exc())
        return
    reply(ready=True)
    # The parent kills a worker that is late. Should the parent be gone by then, the kernel does.
    alarm_seconds = 2 * setup["timeout_seconds"] + 1
    for line in requests:
        item = json.loads(line)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, alarm_seconds)
        try:
            reward, reason, detail = _as_reward(function(*item))
        except BaseException as error:  # noqa: BLE001 - counted and logged by the parent
            reward, reason = NOTHING, f"exception: {type(error).__name__}"
            detail = "".join(traceback.format_exception(error, limit=-8))[-4000:]
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(reward=vars(reward), reason=reason, detail=detail)
    os._exit(0)  # whatever threads the reward function left
