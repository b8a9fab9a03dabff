"""The policy: our model behind LeRobot's methods."""

from __future__ import annotations

import logging
import math
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION
from torch import Tensor, nn

from vla_adapter_hf.checkpoints.lerobot.checkpoint import LeRobotCheckpoint
from vla_adapter_hf.checkpoints.lerobot.layout import POLICY_TYPE
from vla_adapter_hf.checkpoints.model_card import fill_model_card
from vla_adapter_hf.modeling.modeling_vla_adapter import VLAAdapterForActionPrediction
from vla_adapter_hf.modeling.normalization_vla_adapter import select_norm_stats
from vla_adapter_hf.robots import normalized_values
from vla_adapter_hf.training.presets import ADAPTER_NAME, merged_state_dict
from vla_adapter_hf.utils.files import write_text

from .configuration_vla_adapter import VLAAdapterConfig
from .processor_vla_adapter import MODEL_INPUT
from .starting import check_fixed_options, load_for_training, refuse_rename_map, stored_config


logger = logging.getLogger(__name__)

# Answers of rtc that came too late in succession, after which a rollout ends. A model that warms up is late once or
# twice.
LATE_ANSWERS = 3


class VLAAdapterPolicy(PreTrainedPolicy):
    """VLA-Adapter as a policy of LeRobot.

    Batches are those of the policy's own preprocessor. Actions are in physical units; the postprocessor turns them
    into the robot's convention.

    Args:
        config ([`VLAAdapterConfig`]): with the model's own configuration, as a checkpoint has it.
        model (`nn.Module`, *optional*): the loaded model; with random weights by default.
        dataset_stats, dataset_meta: accepted and not used; see [`from_pretrained`].

    Raises:
        ValueError: when the configuration has no model, or features that do not fit it.
    """

    config_class = VLAAdapterConfig
    name = POLICY_TYPE

    def __init__(
        self,
        config: VLAAdapterConfig,
        dataset_stats: Any = None,
        dataset_meta: Any = None,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(config)
        self.model = VLAAdapterForActionPrediction(config.model_config()) if model is None else model
        if not config.input_features:
            config.use_features_of_model()
        config.validate_features()
        self._last_seconds = self._slowest_seconds = 0.0  # of predictions
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        dataset_stats: Any = None,
        dataset_meta: Any = None,
        **options: Any,
    ) -> VLAAdapterPolicy:
        """A policy from a checkpoint of our own layout, a published one, or one that LeRobot wrote.

        With `dataset_meta`, as `lerobot-train` gives it, the model gets the dataset's cameras, sizes and exact
        statistics, and what `config.preset` says trains. `config.pretrained_path` is cleared then: LeRobot takes it
        for a folder with processors, which belong to the former statistics.

        Args:
            pretrained_name_or_path: folder or Hub id.
            config ([`VLAAdapterConfig`]): of the policy; by default that of the checkpoint, which LeRobot wrote then.
            revision: on the Hub.
            dataset_stats: not used; they are averages over episodes.
            dataset_meta (`LeRobotDatasetMetadata`): of the dataset to train on.
            options: as in `PreTrainedConfig.from_pretrained`; `token`, `cache_dir` and `local_files_only` are used,
                not in training.

        Raises:
            ValueError: when checkpoint, dataset and options do not fit together.
        """
        source = str(pretrained_name_or_path)
        hub = {name: value for name, value in options.items() if name != "strict"}
        if config is None:
            config = PreTrainedConfig.from_pretrained(source, revision=revision, **hub)
        if dataset_meta is not None:
            refuse_rename_map()
            model, processor = load_for_training(source, config, dataset_meta, revision)
            config.pretrained_path = config.pretrained_revision = None
        else:
            known = {name: hub[name] for name in ("token", "cache_dir", "local_files_only") if hub.get(name)}
            start = config.open_start(source, revision, **known)
            check_fixed_options(config, start)
            processor = start.load_processor()
            model = start.load_model(config.dtype)
            config.model = stored_config(model)
            if not isinstance(start, LeRobotCheckpoint):
                # LeRobot looks for processors there and finds none: it builds them from the configuration.
                config.base_checkpoint, config.base_revision = source, start.commit
                config.pretrained_path = config.pretrained_revision = None
                config.use_features_of_model()
        config._loaded_processor = processor
        return cls(config, model=model).to(config.device).eval()

    @property
    def network(self) -> VLAAdapterForActionPrediction:
        """The model without the wrapper of LoRA."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write weights under the names of our own layout; with LoRA the merged ones, and the adapter next to them."""
        self.config._save_pretrained(save_directory)
        has_adapter = self.network is not self.model
        if state_dict is not None:
            if has_adapter:
                raise ValueError("preset=lora does not go with FSDP: no process has the merged weights; use full.")
            state_dict = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
        elif has_adapter:
            state_dict = merged_state_dict(self.model)
            self.model.save_pretrained(save_directory, selected_adapters=[ADAPTER_NAME])
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".weights-") as folder:
            self.network.save_pretrained(folder, state_dict=state_dict)
            for path in Path(folder).glob("model*.safetensors*"):
                path.replace(save_directory / path.name)
        # After PEFT, which writes a card that describes an adapter alone.
        summary = f"Trained with LeRobot, preset `{self.config.preset}`, {self.config.trained_batches} batches."
        base = [self.config.base_checkpoint] if self.config.base_checkpoint else []
        card = fill_model_card(self.network.config, "VLA-Adapter", summary, base_model=base)
        write_text(save_directory / "README.md", card)

    def get_optim_params(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def wrap_with_peft(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the policy has its own LoRA.

        Raises:
            ValueError: always.
        """
        raise ValueError("--peft wraps the whole policy, which cannot be merged; use --policy.preset=lora.")

    def reset(self) -> None:
        """Forget the chunk. LeRobot calls it at the beginning of every episode."""
        self._queue: deque[Tensor] = deque()
        self._thread: int | None = None  # which the queue is for
        self._late_answers = 0

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[Tensor, dict | None]:
        """The loss of a batch: mean absolute error in normalised space. Steps past an episode's end do not count.

        Raises:
            ValueError: for losses per sample.
        """
        if reduction != "mean":
            raise ValueError(f"the loss is a mean over the batch; reduction={reduction!r} (sample weights) is not.")
        inputs = {**_model_inputs(batch), "actions": batch[ACTION]}
        if not (self.training and torch.is_grad_enabled()):
            return self.model(**inputs, return_dict=True).loss, None
        with _seeded(self.config.augmentation_seed, self.config.trained_batches, self.network.device):
            loss = self.model(**inputs, return_dict=True).loss
        self.config.trained_batches += 1
        return loss, None

    def supports_rtc(self) -> bool:
        """True: [`predict_action_chunk`] continues the chunk that is being executed."""
        return True

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """A chunk of actions in physical units, float32 `(batch, chunk, values)`.

        Args:
            batch: from the preprocessor.
            inference_delay: control steps of the slowest answer so far. LeRobot drops the actions of the steps that
                went by.
            prev_chunk_left_over: actions `(steps, values)` of the chunk before that were not executed when the
                observation was taken, in physical units. LeRobot cuts them, or fills them up with zeros, to
                `--inference.rtc.execution_horizon` steps. Actions about which both chunks say something are blended.
            kwargs: not used.

        Raises:
            ValueError: answers take as long as a chunk lasts, so that LeRobot drops one after the other whole.
        """
        self._check_delay(inference_delay, prev_chunk_left_over)
        inputs = _model_inputs(batch)
        start = time.perf_counter()
        actions = self.network.predict_action(**inputs, unnorm_key=self.config.unnorm_key)
        self._last_seconds = time.perf_counter() - start
        self._slowest_seconds = max(self._slowest_seconds, self._last_seconds)
        chunk = torch.from_numpy(actions).to(self.network.device, torch.float32)
        rtc = getattr(self.config, "rtc_config", None)  # lerobot-rollout sets it
        if prev_chunk_left_over is None or (rtc is not None and not rtc.enabled):
            return chunk
        _, stats = select_norm_stats(self.network.config.norm_stats, self.config.unnorm_key)
        blended = torch.tensor(normalized_values(stats["action"]), device=chunk.device)
        return blend_chunks(chunk, prev_chunk_left_over.to(chunk), self.config.blend, blended)

    def _check_delay(self, slowest: int | None, left_over: Tensor | None) -> None:
        """Refuse to go on when nothing of several chunks in succession reached the robot. Before that it is a warning.

        LeRobot tells how many control steps the slowest answer took, and not how many the last one did: that is
        estimated by the time of the predictions.

        Raises:
            ValueError: see above.
        """
        chunk_size = self.network.config.chunk_size
        spent = left_over is not None and not left_over.any()
        steps = math.ceil((slowest or 0) * self._last_seconds / self._slowest_seconds) if self._slowest_seconds else 0
        self._late_answers = self._late_answers + 1 if spent and steps >= chunk_size else 0
        if not self._late_answers:
            return
        message = (
            f"an answer takes {steps} control steps and a chunk has {chunk_size} actions: the robot stands still, "
            f"because LeRobot drops the actions of the steps that went by. Use --inference.type=sync, a lower --fps, "
            f"or a policy trained with --policy.chunk_size of at least {2 * steps}."
        )
        if self._late_answers >= LATE_ANSWERS:
            raise ValueError(message)
        logger.warning(message)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action `(batch, values)`. The model is asked when the actions of the last chunk are used up.

        Raises:
            ValueError: two threads ask about their own robots, which would mix up their chunks.
        """
        thread = threading.get_ident()
        if not self._queue:
            chunk = self.predict_action_chunk(batch)
            if not self._queue:  # else another thread was quicker
                self._thread = thread
                self._queue.extend(chunk.transpose(0, 1)[: self.config.n_action_steps])
        if self._thread != thread:
            raise ValueError(
                "two threads ask this policy for actions at once, and it keeps the chunk of one robot. Give "
                "--env.max_parallel_tasks=1, or reset() the policy before another thread uses it."
            )
        return self._queue.popleft()


@contextmanager
def _seeded(seed: int, batch: int, device: torch.device) -> Iterator[None]:
    """Random numbers that depend on the batch and the process alone, for a while.

    LeRobot restores the generator when a training is resumed. Its data loader then draws once more than in a training
    that was not interrupted.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    drawn = np.random.SeedSequence((seed, batch, rank)).generate_state(1)[0]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(drawn))
        yield


def blend_chunks(chunk: Tensor, left_over: Tensor, share: float, blended: Tensor | None = None) -> Tensor:
    """A chunk that continues the one before.

    Args:
        chunk: the new one, `(batch, steps, values)`; its first action belongs to the step of the observation.
        left_over: actions of the one before from that step on, `(steps, values)`; rows of zeros at its end are
            LeRobot's filling.
        share: of the new chunk where both say something.
        blended: which of the values are blended, boolean `(values,)`; by default all. Of the others, such as a gripper
            with two values, the new chunk's are taken.
    """
    said = left_over.any(dim=-1).nonzero()
    count = min(int(said[-1]) + 1 if len(said) else 0, chunk.shape[1])
    weights = torch.full((chunk.shape[-1],), share, device=chunk.device, dtype=chunk.dtype)
    if blended is not None:
        weights[~blended] = 1
    continued = chunk.clone()
    continued[:, :count] = weights * chunk[:, :count] + (1 - weights) * left_over[:count]
    return continued


def _model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    inputs = {name.removeprefix(MODEL_INPUT): batch[name] for name in batch if name.startswith(MODEL_INPUT)}
    if not inputs:
        raise ValueError(
            "the batch has no inputs of the model; it must come from the policy's own preprocessor, see "
            "make_vla_adapter_pre_post_processors."
        )
    return inputs


__all__ = ["VLAAdapterPolicy"]
