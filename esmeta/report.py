"""``python -m esmeta.report``: tables and figures of runs; see :mod:`esmeta.run.report`."""

import sys

from esmeta.run.report import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
