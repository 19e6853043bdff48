"""Two generations of evolution on simulated bodies; prints theta's hash after each body."""

from __future__ import annotations

from esmeta.ranks.comm import install_excepthook, make_comm
from esmeta.run import config as configs
from esmeta.run import train
from esmeta.tree import theta_sha256

comm = make_comm(60.0)
install_excepthook(comm)
for name in ("cheetah_dir", "hopper"):
    raw = {
        "task": {"name": name, "trials": 3, "horizon": 8},
        "policy": {"name": "metods", "neurons": 6, "hidden": [5], "head_hidden": 4},
        "optimizer": {"name": "openes", "popsize": 10},
        "budget": {"generations": 2},
    }
    parts = train.build(configs.resolve(raw), comm.size)
    state = parts.state
    for _ in range(2):
        state, _ = parts.optimizer.step(state, parts.objective, comm, parts.rng)
    digest = theta_sha256(parts.optimizer.theta(state))
    assert comm.same(bytes.fromhex(digest)), f"{name}: the ranks have different thetas"
    if comm.rank == 0:
        print(digest)
