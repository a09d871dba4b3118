"""Run a script in a process that ends with the one that started it, even where that one was killed.

``python child.py DIRECTORY SCRIPT ARGUMENTS`` runs the script. Its stdin is a pipe whose other end the parent holds and
never writes to: when it closes, the parent is gone, and DIRECTORY, in which the two worked, goes too. Only the standard
library is imported here, before anything that takes long.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import threading


def _follow(directory: str) -> None:
    """End this process when the parent has ended."""
    while os.read(0, 1):
        pass
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_follow, args=(sys.argv[1],), daemon=True).start()
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
