"""Several training runs after each other, as one job: their arguments, between words ``then``."""

from __future__ import annotations

import itertools
import sys

from esmeta.run import train

for same, words in itertools.groupby(sys.argv[1:], lambda word: word == "then"):
    if not same:
        assert train.main(list(words)) == 0
