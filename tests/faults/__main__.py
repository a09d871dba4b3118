"""The long run: ``python -m tests.faults [--kills N] [--others N] [--seed S]`` stops every command again and again.

Prints a line for each command and one for all; exits with 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.harness import COMMANDS, SIGNALS, Figures, measure, serving, stop_once
from tests.faults.layer import ACTIONS
from tests.faults.layouts import Figures as Layouts
from tests.faults.layouts import run_layout
from tests.faults.pushes import NAME as PUSH
from tests.faults.pushes import pushing


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--others", type=int, default=0, help="of each: Ctrl-C, a full disk, a failing one")
    parser.add_argument("--layouts", type=int, default=0, help="of a user's files, in which commands run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="how commands' names begin, between commas")
    wanted = parser.parse_args()
    names = [name for name in (*COMMANDS, PUSH) if name.startswith(tuple(wanted.only.split(",")))]
    layouts = Layouts()
    totals = {action: Figures() for action in ACTIONS}
    began_s = time.monotonic()

    def stop_often(number: int, action: str, stop: Callable[[random.Random, Figures], None], about: str = "") -> None:
        """Stop the command of a number so often as is its share, and say what came of it."""
        figures, draw = Figures(), random.Random(f"{wanted.seed} {names[number]} {action}")
        count = wanted.kills if action == "kill" else wanted.others
        # a push meets no disk
        stopped = [name for name in names if name != PUSH or action in SIGNALS]
        share = count // len(stopped) + (stopped.index(names[number]) < count % len(stopped))
        while figures.counts["stopped"] < share and len(figures.lost) < 10:
            stop(draw, figures)
        if share:
            print(f"{names[number]}{about}, {action}: {figures.line()}", flush=True)
        for line in figures.lost:
            print(f"  LOST {line}", flush=True)
        totals[action].counts += figures.counts
        totals[action].lost += figures.lost

    with tempfile.TemporaryDirectory(prefix="modmoe-faults-") as home, serving(Path(home) / "room") as server:
        for number, name in enumerate(names):
            if name == PUSH:
                with pushing(Path(home) / "hub") as pushes:
                    for action in SIGNALS:
                        stop_often(number, action, partial(pushes.stop_once, action=action))
                continue
            command = measure(server, name)
            for action in ACTIONS:
                about = f" ({command.calls} calls)"
                stop_often(number, action, partial(stop_once, command, action=action), about)
        for number in range(wanted.layouts):
            run_layout(server, f"{wanted.seed} layout {number}", layouts, commands=2)
            if number % 100 == 99:
                print(layouts.line(), flush=True)
    for action, total in totals.items():
        print(f"{action}: {total.line()}")
    print(layouts.line())
    for line in layouts.faults:
        print(f"  FAULT {line}")
    print(f"in {time.monotonic() - began_s:.0f} s")
    return bool(layouts.faults) or any(total.lost for total in totals.values())


if __name__ == "__main__":
    sys.exit(main())
