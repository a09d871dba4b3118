"""The long run: ``python -m tests.faults [--kills N] [--others N] [--seed S]`` stops every command again and again.

Prints a line for each command and one for all; exits with 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.harness import COMMANDS, Figures, measure, serving, stop_once
from tests.faults.layer import ACTIONS
from tests.faults.layouts import Figures as Layouts
from tests.faults.layouts import run_layout


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--others", type=int, default=0, help="of each: Ctrl-C, a full disk, a failing one")
    parser.add_argument("--layouts", type=int, default=0, help="of a user's files, in which commands run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="how commands' names begin, between commas")
    wanted = parser.parse_args()
    names = [name for name in COMMANDS if name.startswith(tuple(wanted.only.split(",")))]
    layouts = Layouts()
    totals = {action: Figures() for action in ACTIONS}
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="modmoe-faults-") as home, serving(Path(home) / "room") as server:
        for number, name in enumerate(names):
            command = measure(server, name)
            for action, total in totals.items():
                figures, draw = Figures(), random.Random(f"{wanted.seed} {name} {action}")
                count = wanted.kills if action == "kill" else wanted.others
                share = count // len(names) + (number < count % len(names))
                while figures.counts["stopped"] < share and len(figures.lost) < 10:
                    stop_once(command, draw, figures, action)
                if share:
                    print(f"{name} ({command.calls} calls), {action}: {figures.line()}", flush=True)
                for line in figures.lost:
                    print(f"  LOST {line}", flush=True)
                total.counts += figures.counts
                total.lost += figures.lost
        for number in range(wanted.layouts):
            run_layout(server, f"{wanted.seed} layout {number}", layouts)
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
