"""Pictures of single trials: frames of a trained agent, GIF and PNG files."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from esmeta import errors
from esmeta import rollout as loop
from esmeta.envs.trimmed import TrimmedEnv
from esmeta.policy import Policy
from esmeta.rng import Rng
from esmeta.tasks import Drawn, renderer
from esmeta.types import BatchedEnv, Hosted, Params, Task

if TYPE_CHECKING:
    from PIL.Image import Image

# As in PopulationEvaluator, which pads so that results do not depend on the batch: the trial that
# is shown is, bit for bit, the one that was scored.
_MEMBERS, _TRIALS = 2, 8
_SCALE = 24
_STRIP = 22
_GIF_BYTES = 300_000
_GIF_COLOURS = 64


@dataclass(frozen=True)
class Trial:
    """One trial of one member: ``T`` transitions between ``T + 1`` states of its environment.

    ``states[t]`` is a batch in which the trial is ``[0, 0]``; ``actions`` ``[T]`` or ``[T, k]``,
    ``rewards`` float64 ``[T]``; ``data`` holds what describes the task, leaves without P and B.
    """

    states: list[Any]
    actions: np.ndarray
    rewards: np.ndarray
    data: dict[str, np.ndarray]


@torch.no_grad()
def run_trial(
    policy: Policy, params: Params, task: Task, index: int = 0, split: str = "test", seed: int = 0
) -> Trial:
    """Run trial number ``index`` of a split on the CPU, the same one that is scored by number.

    ``params`` has leaves ``[P, ...]``; its first member is shown.
    """
    errors.non_negative_int("index", index)
    first = {name: leaf[:1].cpu() for name, leaf in params.items()}
    members = {name: leaf.expand(_MEMBERS, *leaf.shape[1:]) for name, leaf in first.items()}
    numbers = torch.full((_TRIALS,), index, dtype=torch.int64, device="cpu")
    tasks = task.sample(numbers, split, Rng(seed).fold("tasks"))
    env: BatchedEnv = task.make_env("cpu")
    if isinstance(env, Hosted):  # one simulator is enough for copies of one trial
        env = TrimmedEnv(env, 1, 1)
    begin = loop.start(policy, members, env, tasks, Rng(seed).fold("trials", split))
    kept = loop.Recorder(begin.state, heads=False)
    states: list[Any] = []
    path = kept.trajectory(loop.rollout(policy, env, begin, kept, watch=states.append))
    steps = int(path.active[:, 0, 0].sum())
    return Trial(
        states[: steps + 1],
        path.action[:steps, 0, 0].numpy(),
        path.reward[:steps, 0, 0].double().numpy(),
        {name: leaf[0, 0].numpy() for name, leaf in tasks.data.items()},
    )


def frame_rate(task: Task) -> float:
    """Steps per second that are right to look at: real time for a simulated body, else 8."""
    return task.frame_rate() if isinstance(task, Drawn) else 8.0


def trial_frames(
    policy: Policy,
    params: Params,
    task: Task,
    index: int = 0,
    split: str = "test",
    seed: int = 0,
    max_steps: int | None = None,
    every: int = 1,
) -> list[np.ndarray]:
    """Pictures uint8 ``[H, W, 3]`` of the states of a trial, with step and return underneath.

    The strip is green after a positive reward and red after a negative one. ``max_steps`` cuts
    the trial; of ``every`` so many states one is drawn, the first among them.
    """
    render = renderer(task)
    if render is None:
        raise errors.UserError(
            f"task {type(task).__module__}: has no function render(state, p, b, scale), so there "
            "is nothing to draw; choose a task that has one (harlow, maze, all simulated bodies) "
            "or write it"
        )
    errors.positive_int("every", every)
    if max_steps is not None:
        errors.positive_int("max_steps", max_steps, example=100)
    trial = run_trial(policy, params, task, index, split, seed)
    total = np.concatenate([[0.0], np.cumsum(trial.rewards)])
    rewards = np.concatenate([[0.0], trial.rewards])
    last = len(trial.states) if max_steps is None else max_steps + 1
    return [
        _captioned(render(state, 0, 0, _SCALE), f"step {t}   return {total[t]:.1f}", rewards[t])
        for t, state in list(enumerate(trial.states[:last]))[::every]
    ]


def _captioned(picture: np.ndarray, text: str, reward: float) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    colour = (30, 130, 60) if reward > 0 else (200, 60, 40) if reward < 0 else (245, 245, 245)
    strip = Image.new("RGB", (picture.shape[1], _STRIP), colour)
    draw = ImageDraw.Draw(strip)
    sign = f"   {reward:+.3g}" if reward else ""
    ink = (255, 255, 255) if reward else (40, 40, 40)
    draw.text((6, 4), text + sign, fill=ink, font=ImageFont.load_default(13))
    return np.concatenate([picture, np.asarray(strip)], axis=0)


def _images(frames: Sequence[np.ndarray]) -> list[Image]:
    """Frames with one common palette, so that unchanged pixels cost nothing."""
    from PIL import Image

    if not frames:
        raise errors.UserError("no frames to write; give at least one")
    pixels = np.concatenate([frame.reshape(-1, 3) for frame in frames]).astype(np.int32)
    packed = np.unique(pixels @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32))
    distinct = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=-1)[None]
    palette = Image.fromarray(distinct.astype(np.uint8)).quantize(
        _GIF_COLOURS, dither=Image.Dither.NONE
    )
    none = Image.Dither.NONE
    return [Image.fromarray(f).quantize(palette=palette, dither=none) for f in frames]


def write_gif(frames: Sequence[np.ndarray], path: Path, fps: float = 8.0) -> Path:
    """Write frames uint8 ``[H, W, 3]`` as an endless GIF of at most 300 kB; returns its path.

    ``fps`` is in frames per second. Where the file would be larger, every second frame is left
    out (as often as needed) and the others are shown longer.
    """
    errors.finite_positive("fps", fps, example=8)
    images = _images(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    every = 1
    while True:
        kept = images[::every]
        # GIF counts in hundredths of a second.
        duration = max(10 * round(100 * every / fps), 20)
        durations = [duration] * (len(kept) - 1) + [max(1500, duration)]
        kept[0].save(
            path, save_all=True, append_images=kept[1:], duration=durations, loop=0, optimize=False
        )
        if path.stat().st_size <= _GIF_BYTES or every >= len(images):
            return path
        every *= 2


def write_frames(frames: Sequence[np.ndarray], folder: Path) -> Path:
    """Write frames uint8 ``[H, W, 3]`` as ``0000.png``, ``0001.png``, ...; returns the folder."""
    for number, frame in enumerate(frames):
        write_png(frame, folder / f"{number:04d}.png")
    return folder


def write_mp4(frames: Sequence[np.ndarray], path: Path, fps: float = 20.0) -> Path:
    """Write frames uint8 ``[H, W, 3]`` as H.264 in an MP4 by ffmpeg; returns its path.

    ffmpeg is the one on PATH, or that of the package imageio-ffmpeg.
    """
    errors.finite_positive("fps", fps, example=20)
    if not frames:
        raise errors.UserError("no frames to write; give at least one")
    height, width = frames[0].shape[:2]
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [_ffmpeg(), "-loglevel", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-", "-an"]
    # Colours are stored for two by two pixels.
    command += ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p", str(path)]
    pixels = b"".join(frame.tobytes() for frame in frames)
    done = subprocess.run(command, input=pixels, capture_output=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        raise errors.UserError(f"{path}: ffmpeg could not write it ({reason}); write PNG instead")
    return path


def _ffmpeg() -> str:
    found = shutil.which("ffmpeg")
    if found:
        return found
    try:
        return importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise errors.UserError(
            "MP4 needs ffmpeg, which is not on PATH; install it (apt-get install ffmpeg, or: pip "
            "install imageio-ffmpeg), or write GIF or PNG"
        ) from error


def write_png(frame: np.ndarray, path: Path) -> Path:
    """Write one frame uint8 ``[H, W, 3]`` as a PNG; returns its path."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame).save(path, format="PNG", optimize=True)
    return path
