"""Deprecated name of :mod:`esmeta.ranks.comm`; goes with the next release."""

import warnings

from esmeta.ranks.comm import *  # noqa: F403

warnings.warn("esmeta.comm is now esmeta.ranks.comm", DeprecationWarning, stacklevel=2)
