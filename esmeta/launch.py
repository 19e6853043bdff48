"""``python -m esmeta.launch``: train on many ranks; see :mod:`esmeta.run.launch`."""

import sys

from esmeta.run.launch import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
