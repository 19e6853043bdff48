"""Trajectories of the MuJoCo that published results were made with; writes ``mujoco_330.npz``.

    python -m venv old && old/bin/pip install mujoco==3.3.0 gymnasium==1.4.0
    old/bin/python tests/mujoco_330.py

20 control steps of two worlds of each body, from noisy starts under random actions. Nothing of
esmeta is used, so that the numbers are MuJoCo's own.
"""

from __future__ import annotations

from pathlib import Path

import gymnasium
import mujoco
import numpy as np

ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
BODIES = {"ant.xml": 5, "half_cheetah.xml": 5, "hopper.xml": 4, "walker2d_v5.xml": 4}
STEPS, WORLDS = 20, 2


def run(name: str, substeps: int) -> dict[str, np.ndarray]:
    """Start, actions ``[T, W, nu]`` and states ``[T, W, nq + nv]`` of one body."""
    model = mujoco.MjModel.from_xml_path(str(ASSETS / name))
    rng = np.random.default_rng(0)
    start = rng.normal(size=(WORLDS, model.nq + model.nv)) * 0.02
    # Short decimals, so that the file is small and every machine starts alike.
    start = np.round(start, 4)
    actions = np.round(rng.uniform(-1, 1, size=(STEPS, WORLDS, model.nu)), 3)
    states = np.empty((STEPS, WORLDS, model.nq + model.nv))
    for world in range(WORLDS):
        data = mujoco.MjData(model)
        start[world, : model.nq] += data.qpos
        data.qpos, data.qvel = np.split(start[world], [model.nq])
        mujoco.mj_forward(model, data)
        for t in range(STEPS):
            data.ctrl = actions[t, world]
            mujoco.mj_step(model, data, nstep=substeps)
            states[t, world] = np.concatenate([data.qpos, data.qvel])
    return {"start": start, "actions": actions, "states": states}


if __name__ == "__main__":
    assert mujoco.__version__ == "3.3.0", f"this is {mujoco.__version__}; install mujoco==3.3.0"
    arrays = {
        f"{name}/{key}": value
        for name, substeps in BODIES.items()
        for key, value in run(name, substeps).items()
    }
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **arrays)
