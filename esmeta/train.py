"""``python -m esmeta.train``: train what a configuration names; see :mod:`esmeta.run.train`."""

import sys

from esmeta.run.train import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
