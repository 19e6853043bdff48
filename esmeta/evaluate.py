"""``python -m esmeta.evaluate``: score a run's theta; see :mod:`esmeta.run.evaluate`."""

import sys

from esmeta.run.evaluate import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
