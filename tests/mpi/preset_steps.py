"""A preset of every kind, made small, takes one step on all ranks; they must agree on theta."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_presets import KINDS, tiny

from esmeta.ranks.comm import install_excepthook, make_comm
from esmeta.run import train
from esmeta.tree import theta_sha256

comm = make_comm(600.0)
install_excepthook(comm)
for name in KINDS:
    comm.label = name
    parts = train.build(tiny(name))
    state, metrics = parts.optimizer.step(parts.state, parts.objective, comm, parts.rng)
    digest = bytes.fromhex(theta_sha256(parts.optimizer.theta(state)))
    assert comm.same(digest), f"{name}: the ranks have different thetas"
    assert metrics["env_steps"] > 0
if comm.rank == 0:
    print(f"{len(KINDS)} presets on {comm.size} ranks")
