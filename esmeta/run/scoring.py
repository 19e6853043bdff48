"""What scores are of: the published task, whatever training aids theta was trained with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from esmeta.run.config import Config
from esmeta.tasks import aids, published, remarks


def training_aids(config: Config) -> dict[str, tuple[Any, Any]]:
    """Training aids of task and objective in use: option -> its value, and the published one."""
    sections = {"task": config.task.instance, "objective": config.objective.instance}
    return {f"{s}.{k}": v for s, options in sections.items() for k, v in aids(options).items()}


def scored_config(
    config: Config, keep: Collection[str] = (), *, as_trained: bool | None = None
) -> Config:
    """The configuration that scores are of: without training aids but for those in ``keep``.

    Itself if there is none to leave out, or if it is scored ``as_trained`` (by default as
    ``run.evaluate_as_trained`` says).
    """
    as_trained = config.run.evaluate_as_trained if as_trained is None else as_trained
    if as_trained or not training_aids(config):
        return config
    sections = {
        name: replace(section, instance=published(section.instance, keep))
        for name, section in (("task", config.task), ("objective", config.objective))
    }
    return replace(config, **sections)


def variant(trained: Config, scored: Config) -> str:
    """How the tasks that scores are of differ from those of training, for a sentence."""
    used, left = training_aids(trained), training_aids(scored)
    dropped = [f"{name} = {value!r}" for name, (value, _) in used.items() if name not in left]
    kept = [f"{name} = {value!r}" for name, (value, _) in left.items()]
    kept += [f"objective.{words}" for words in remarks(scored.objective.instance)]
    words = (("without", dropped), ("with", kept))
    return "".join(f", {word} {', '.join(names)}" for word, names in words if names)
