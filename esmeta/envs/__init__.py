"""Hosts of batched environments; see :class:`esmeta.types.BatchedEnv`."""
