"""``python -m esmeta.learn``: train agents by a hand-written loss; see :mod:`esmeta.run.learn`."""

import sys

from esmeta.run.learn import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
