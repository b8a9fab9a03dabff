"""How an evaluation is run. Every default stands here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from vla_adapter_hf.robot.strategies import ChunkStrategy, StrategySettings
from vla_adapter_hf.simulation.shards import Shard


DEFAULT_EPISODES = 50  # per task, where a suite does not say otherwise
CONTROL_RATE = 20  # steps per second in LIBERO
CALVIN_RATE = 30  # the same in CALVIN
DELAY_STRATEGIES = ("sync", "async", "async-rolled")  # what a robot does meanwhile; `ensemble` is a setting of its own


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of [`~vla_adapter_hf.simulation.evaluate.evaluate`]. The defaults are the published protocol.

    Args:
        tasks: task numbers, as in 3 or 0,2,5-7; by default all tasks.
        episodes: how many episodes per task, or their numbers, as in 40-49. LIBERO's episode e starts from initial
            state e modulo 50; two episodes in which nothing differs are refused. By default 50, for CALVIN its 1,000
            sequences.
        placement: LIBERO only, but neither libero_90 nor LIBERO-PRO: `official`, `jitter`, `shuffle` or `both`.
        seed: seed of the placements. The simulator's own seed is 0, as published.
        hard_reset: LIBERO only: rebuild the simulation before each episode, which takes longer and gives the same.
        processes: environments in parallel, one process each; 0 runs a single environment in this process.
        ray: address of a Ray cluster on which the `processes` run, such as `auto` or `HOST:6379`; needs the extra ray.
            By default they run here.
        replicas: with `ray`, copies of the policy on the cluster, each with a GPU if `device` is one; 0 runs it here.
        execute: actions of a chunk that are executed before the next query; by default the whole chunk, as
            published.
        ensemble: temporal ensembling: how much less newer chunks count; 0 is their mean. It needs `execute`.
        strategy: `sync`, `async` or `async-rolled`: what the robot does during a `delay`.
        delay: control steps that the world goes on while the policy thinks; 0 stops the world, as published.
        step_limit: steps after which an episode has failed, those of delays among them; by default the suite's own.
        schedule: calvin_abc_d only: `published`, or `open-loop` for whole chunks, which the other suites always play.
        renderer: calvin_abc_d only: `egl`, or `cpu` for machines without a driver, whose scores are not comparable.
        black_images: a control: the policy sees black frames.
        instruction: a control: the policy gets this text instead of the task's instruction. `other` asks for something
            else in view, another object or another task of the suite, and success is then that. So it is for a text
            that is the instruction of such a task. In calvin_abc_d `other` gives another subtask's instruction, and
            success stays the subtask's own.
        shard: play a part of the episodes only, such as 3/8 for the third of eight, in a folder of its own inside the
            output. `vla-adapter scores OUTPUT` joins them.
        rollouts: episodes of each task to save as a film and a contact sheet (PNG). Episodes that an earlier call
            played are not played again for this.
        rollout_format: `gif` or `mp4`.
        save_actions: save the executed actions of every episode, so that they can be replayed.
        unnorm_key: checkpoints only: which statistics to use. By default those with the suite's name.
        device: checkpoints only: such as `cuda`; by default the CPU.
        dtype: checkpoints only: such as `bfloat16`; by default float32 on the CPU and the checkpoint's own on a GPU.

    Raises:
        ValueError: a number out of range, an unknown format, or `ensemble` without overlapping chunks.
    """

    tasks: Sequence[int] | None = None
    episodes: int | Sequence[int] | None = None
    placement: str = "official"
    seed: int = 0
    hard_reset: bool = False
    processes: int = 1
    ray: str | None = None
    replicas: int = 0
    execute: int | None = None
    ensemble: float | None = None
    strategy: str = "sync"
    delay: int = 0
    step_limit: int | None = None
    schedule: str = "published"
    renderer: str = "egl"
    black_images: bool = False
    instruction: str | None = None
    shard: str | None = None
    rollouts: int = 0
    rollout_format: str = "gif"
    save_actions: bool = False
    unnorm_key: str | None = None
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.processes < 0:
            raise ValueError(f"processes must be 0 or more, got {self.processes}")
        if self.replicas < 0:
            raise ValueError(f"replicas must be 0 or more, got {self.replicas}")
        if self.replicas and self.ray is None:
            raise ValueError(f"replicas={self.replicas} are copies of the policy on a Ray cluster; give ray=ADDRESS")
        if self.rollout_format not in ("gif", "mp4"):
            raise ValueError(f"rollout_format must be 'gif' or 'mp4', got {self.rollout_format!r}")
        if self.rollouts < 0:
            raise ValueError(f"rollouts must be 0 or more films of each task, got {self.rollouts}")
        if not self.episode_numbers or min(self.episode_numbers) < 0:
            raise ValueError(f"episodes must be a positive number or numbers of 0 or more, got {self.episodes!r}")
        if self.delay < 0:
            raise ValueError(f"delay must be 0 or more control steps, got {self.delay}")
        if self.step_limit is not None and self.step_limit < 1:
            raise ValueError(f"step_limit must be at least 1 step, got {self.step_limit}")
        if self.strategy not in DELAY_STRATEGIES:
            advice = "; give ensemble=0 instead, which averages chunks" if self.strategy == "ensemble" else ""
            raise ValueError(f"strategy must be one of {', '.join(DELAY_STRATEGIES)}, got {self.strategy!r}{advice}")
        self.chunk_strategy()
        if self.shard is not None:
            Shard.parse(self.shard)

    @property
    def episode_numbers(self) -> list[int]:
        """The episodes of each task, each once."""
        episodes = DEFAULT_EPISODES if self.episodes is None else self.episodes
        return list(range(episodes)) if isinstance(episodes, int) else list(dict.fromkeys(episodes))

    def timing(self) -> dict[str, Any]:
        """What differs from the published protocol in time; runs that differ here are not merged."""
        chosen = {"strategy": self.strategy, "delay": self.delay, "step_limit": self.step_limit}
        published = {"strategy": "sync", "delay": 0, "step_limit": None}
        return {} if chosen == published else {"time": chosen}

    def chunk_strategy(self, averaged: np.ndarray | None = None) -> ChunkStrategy:
        """A new strategy that executes chunks as these settings say.

        Args:
            averaged: which of an action's values may be averaged, see `ChunkStrategy`.

        Raises:
            ValueError: `ensemble` with an asynchronous strategy, or without overlapping chunks.
        """
        if self.ensemble is None:
            return ChunkStrategy(StrategySettings(self.strategy, self.execute), averaged)
        if self.strategy != "sync":
            raise ValueError(f"ensemble={self.ensemble:g} does not go with strategy={self.strategy!r}")
        return ChunkStrategy(StrategySettings("ensemble", self.execute, self.ensemble), averaged)


@dataclass(frozen=True)
class DelaySettings(EvaluationSettings):
    """Settings of [`~vla_adapter_hf.simulation.delays.evaluate_delays`]: [`EvaluationSettings`], and which cells.

    Args:
        delays: control steps that the world goes on while the policy thinks; 0 stops the world, as published. Several,
            as in 0,4,8, are played one after the other and make a table.
        strategies: `sync`, `async` or `async-rolled`: what the robot does during a delay. Several, as in sync,async,
            are played for each delay.

    Raises:
        ValueError: no delay, no strategy, or one that cannot be played.
    """

    delays: Sequence[int] = (0,)
    strategies: Sequence[str] = ("sync",)

    def __post_init__(self) -> None:
        if not self.delays or not self.strategies:
            raise ValueError(f"delays={self.delays!r} and strategies={self.strategies!r} must name at least one each")
        if self.delay or self.strategy != "sync":
            raise ValueError(f"give delays and strategies, not delay={self.delay} and strategy={self.strategy!r}")
        for strategy in self.strategies:
            self._cell(0, strategy)
        self.cells()

    def _cell(self, delay: int, strategy: str) -> EvaluationSettings:
        shared = {field.name: getattr(self, field.name) for field in fields(EvaluationSettings)}
        return EvaluationSettings(**{**shared, "delay": delay, "strategy": strategy})

    def cells(self) -> dict[str, EvaluationSettings]:
        """The settings of each cell, by the name of its folder. Without a delay all strategies are `sync`."""
        chosen = [
            (delay, strategy)
            for delay in dict.fromkeys(self.delays)
            for strategy in (dict.fromkeys(self.strategies) if delay else ("sync",))
        ]
        return {f"{strategy}_delay{delay}": self._cell(delay, strategy) for delay, strategy in chosen}


def choose_tasks(tasks: Sequence[int] | None, count: int) -> list[int]:
    """The task numbers to play, each once; None is all of them.

    Raises:
        ValueError: no task, or a number that is not in 0...count-1.
    """
    chosen = list(range(count)) if tasks is None else list(dict.fromkeys(tasks))
    if not chosen or any(not 0 <= task < count for task in chosen):
        raise ValueError(f"tasks must be among 0...{count - 1}, got {chosen}")
    return chosen
