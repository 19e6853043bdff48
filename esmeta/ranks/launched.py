"""What launchers tell a process in its environment: how many were started, and which one it is."""

from __future__ import annotations

import os
from collections.abc import Mapping

ALONE = "ESMETA_RANKS"
"""Set to 1, a process is a run of its own, whatever has started it beside others."""

_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK_VARIABLES = (
    "PMIX_RANK",
    "PMI_RANK",
    "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_RANK",
    "PALS_RANKID",
)
_LOCAL_RANK_VARIABLES = (
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "SLURM_LOCALID",
)
# Slurm's numbers of steps that are no job steps: batch scripts, shells of salloc.
_SPECIAL_STEPS = 0xFFFFFFF0


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    return int(text) if text.isdecimal() else None


def _is_task(env: Mapping[str, str]) -> bool:
    """Whether srun started this process as a task of a job step, with or without an MPI.

    Batch scripts, and shells that salloc has opened, have ``SLURM_NTASKS`` of the allocation too,
    but no step, or a special one.
    """
    step, task = _number(env, "SLURM_STEP_ID"), _number(env, "SLURM_PROCID")
    if task is None or (step is not None and step >= _SPECIAL_STEPS):
        return False
    return step is not None or task > 0


def launched_ranks(env: Mapping[str, str]) -> int:
    """How many ranks were started together: 1 without a launcher, 0 if it does not say.

    ``SLURM_*`` counts in tasks of a job step only. ``ESMETA_RANKS=1`` counts before all.
    """
    if env.get(ALONE) == "1":
        return 1
    sizes = [size for name in _SIZE_VARIABLES if (size := _number(env, name))]
    if sizes:
        return max(sizes)
    if not (_is_task(env) or any(name in env for name in _RANK_VARIABLES)):
        return 1
    return _number(env, "SLURM_STEP_NUM_TASKS") or _number(env, "SLURM_NTASKS") or 0


def launched_rank(env: Mapping[str, str]) -> int:
    """The number of this process among those that were started together; 0 without a launcher."""
    names = (*_RANK_VARIABLES, *(["SLURM_PROCID"] if _is_task(env) else []))
    found = (_number(env, name) for name in names)
    return next((rank for rank in found if rank is not None), 0)


def local_rank(env: Mapping[str, str] | None = None) -> int:
    """Number of this rank among the ranks of its machine; 0 without a launcher."""
    env = os.environ if env is None else env
    found = (_number(env, name) for name in _LOCAL_RANK_VARIABLES)
    return next((rank for rank in found if rank is not None), 0)


def speaks(env: Mapping[str, str]) -> bool:
    """Whether this rank says what all of them meet before there is an MPI.

    The first one; where their number is not known the second, as the first may be the only one.
    """
    rank = launched_rank(env)
    return launched_ranks(env) == 1 or rank == 0 or (rank == 1 and launched_ranks(env) == 0)
