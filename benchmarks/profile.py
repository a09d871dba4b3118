"""What profiling costs; see profiling.py, which this runs.

    python benchmarks/profile.py [--quick] [--json FILE] ...

Python finds this file first where torch imports the standard library's ``profile``, since it lies beside the script
that runs. To an import it therefore is that module.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
import sysconfig
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("profiling.py")), run_name="__main__")
else:
    spec = importlib.util.spec_from_file_location(__name__, Path(sysconfig.get_path("stdlib")) / "profile.py")
    assert spec is not None and spec.loader is not None
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
