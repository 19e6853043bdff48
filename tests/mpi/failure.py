"""One way to fail, named on the command line. Run under mpirun."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch

from esmeta.errors import UserError
from esmeta.ranks import transport
from esmeta.ranks.comm import install_excepthook, make_comm

mode, timeout_s = sys.argv[1], float(sys.argv[2])
if sys.argv[3:] == ["Messages"]:
    transport.SharedMemory = transport.Messages  # type: ignore[misc, assignment]
comm = make_comm(timeout_s=600.0)
install_excepthook(comm)
comm.sum_exact(torch.ones(3, dtype=torch.int64))  # all have started
comm.timeout_s = timeout_s
comm.label = "generation 12"
last = comm.rank == comm.size - 1
if mode == "user-error-everywhere":
    time.sleep(0.2 * comm.rank)
    raise UserError("run.seed = -1: must be an integer >= 0; write for example 0")
if mode == "user-error-on-last" and last:
    raise UserError("only here")
if mode == "user-error-on-first" and comm.rank == 0:
    raise UserError("only at the root")
if mode == "raise" and last:
    raise RuntimeError("a bug on one rank")
while mode == "hang" and last:
    time.sleep(60)
if mode == "exit" and last:
    sys.exit(0)
if mode == "kill" and last:
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "abort" and last:
    comm.abort(7, "enough")
comm.gather_rows(torch.zeros(1, 2, dtype=torch.float64), [1] * comm.size)
comm.barrier()
print("finished")
