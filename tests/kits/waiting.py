"""How tests wait: on a condition, with a limit that only a fault reaches, however busy the machine is. No test asserts how long something took."""

import asyncio
import contextlib
import time

import psutil

LONG = 300  # seconds; for a wait that takes its limit as a number


def wait_for(condition, seconds=LONG, what="", progress=lambda: None):
    "What the condition gives as soon as that is true; the limit counts from the last time that `progress` gave something new."
    seen, until = progress(), time.monotonic() + seconds
    while not (found := condition()):
        if (now := progress()) != seen:
            seen, until = now, time.monotonic() + seconds
        assert time.monotonic() < until, f"{what or 'what the test waits for'} did not come within {seconds} s"
        time.sleep(0.05)
    return found


def until(page, script, milliseconds=1000 * LONG):
    "Until a page gives something for a script. Playwright's own waiting needs `eval` in the page, which its policy forbids."
    end = time.monotonic() + milliseconds / 1000
    while not page.evaluate(script):
        assert time.monotonic() < end, f"{script} did not become true within {milliseconds} ms"
        page.wait_for_timeout(50)


async def reached(condition):
    "The same inside an event loop."
    async with asyncio.timeout(LONG):
        while not condition():
            await asyncio.sleep(0.001)


def gone(process):
    "Whether a process (or that of a number) has ended, also if nobody has taken note of its end yet."
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(process) if isinstance(process, int) else process
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True
