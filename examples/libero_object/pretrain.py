"""Pretraining: a new model learns to see the objects, then to read which of them the instruction names.

The published model starts from a DINOv2, a SigLIP and a Qwen2.5 that were trained on internet data, and from a VLM
made of them. A small model from nothing has to learn this too. Here it learns from single frames of simulated scenes
(`vla_adapter_hf.recording.scenes`), in two stages:

1. **see**: which patch shows which object. Each tower has a head for it. The projector learns it by the words of the
   object's name: the embeddings of `milk` and of a patch with milk get the same direction, as in SigLIP.
2. **read**: the language model, asked for an object, predicts where it is.

Both predict a patch, by a softmax over a camera's patches and "in none". make_policy.py runs this.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from vla_adapter_hf import VLAAdapterForActionPrediction, VLAAdapterProcessor
from vla_adapter_hf.simulation.libero.suite import object_instruction
from vla_adapter_hf.utils.files import visible_files


UNDER_THE_HAND = 0.83  # below that part of the wrist camera's frames is the hand itself
SHIFT = 6  # pixels that frames move by while the model learns to see
READ_LAYERS = 3  # the last layers of the language model must know the place, for the policy reads all layers
PLACE_WEIGHT = 0.3  # of the loss of patches that do not know which they are
LOUD = 2.5  # times transformers' initialisation
LOOK = 14.0  # how much more a name looks at what it names than at other patches, before the exponential
STAGES = {
    "see": {"max_steps": 1800, "per_device_train_batch_size": 48, "learning_rate": 1e-3, "weight_decay": 0.05},
    "read": {"max_steps": 1600, "per_device_train_batch_size": 32, "learning_rate": 1e-3, "weight_decay": 0.02},
}
COMMON = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "adam_beta2": 0.99,
    "optim": "adamw_torch_fused",
    "logging_steps": 50,
    "save_steps": 300,
    "save_total_limit": 1,
    "report_to": "none",
}


class Scenes(torch.utils.data.Dataset):
    """Recorded scenes, decoded once.

    A sample is frames, the positions of all `names`, and a name that is in the scene.
    """

    def __init__(self, folder: Path, names: list[str], shift: int = 0):
        self.names, self.shift = names, shift
        self.frames, places = [], []
        for path in visible_files(folder, "*.parquet"):
            for row in pq.read_table(path).to_pylist():
                frames = [np.asarray(Image.open(io.BytesIO(row[column]))) for column in ("image", "wrist_image")]
                self.frames.append(np.stack(frames))
                order = [names.index(name.rsplit("_", 1)[0].replace("_", " ")) for name in row["objects"]]
                place = np.full((len(names), 2, 2), np.nan)
                place[order] = row["places"]
                places.append(place)
        self.places = np.stack(places).astype(np.float32)  # (scenes, names, cameras, 2)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> dict[str, Any]:
        frames, places = self.frames[index], self.places[index]
        if self.shift:
            size = frames.shape[1]
            moves = np.random.randint(-self.shift, self.shift + 1, size=2)  # the same for both cameras; x, y
            rows, columns = (np.clip(np.arange(size) - move, 0, size - 1) for move in moves[::-1])
            frames, places = frames[:, rows][:, :, columns], places + (moves / size).astype(np.float32)
        there = np.flatnonzero(np.isfinite(places).any(axis=(1, 2)))
        return {"frames": frames, "places": places, "asked": int(np.random.choice(there))}


class SceneCollator:
    """Batches for both stages, prepared by the processor as in training."""

    def __init__(self, model: VLAAdapterForActionPrediction, processor: VLAAdapterProcessor, names: list[str]):
        self.config, self.processor = model.config, processor
        self.instructions = [object_instruction(f"{name.replace(' ', '_')}_1") for name in names]

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.processor(
            images=[list(sample["frames"]) for sample in samples],
            text=[self.instructions[sample["asked"]] for sample in samples],
            padding=True,
            return_tensors="pt",
        )
        places = torch.from_numpy(np.stack([sample["places"] for sample in samples]))
        grid = self.config.image_size // self.config.dinov2_config.patch_size
        targets, asked = patch_targets(places, grid), torch.tensor([sample["asked"] for sample in samples])
        return {**batch, "targets": targets, "asked": asked}


def patch_targets(places: torch.Tensor, grid: int) -> torch.Tensor:
    """Positions `(batch, names, cameras, 2)` as probabilities `(batch, names, cameras, patches + 1)`, the last "in
    none".

    A position is shared among the four nearest patches by bilinear weights, so it is known better than to a patch.
    """
    limit = torch.tensor([[1.0, 1.0], [1.0, UNDER_THE_HAND]])[:, None].flatten(1)  # (cameras, 2)
    seen = ((places > 0) & (places < limit)).all(-1)  # not a number is in none
    position = (places.nan_to_num(0.0) * grid - 0.5).clamp(0, grid - 1)
    low = position.long().clamp(max=grid - 2)
    part = position - low
    targets = torch.zeros(*places.shape[:-1], grid * grid + 1)
    for right in (0, 1):
        for down in (0, 1):
            weight = (part[..., 0] if right else 1 - part[..., 0]) * (part[..., 1] if down else 1 - part[..., 1])
            patch = (low[..., 1] + down) * grid + low[..., 0] + right
            targets.scatter_add_(-1, patch[..., None], (weight * seen)[..., None])
    targets[..., -1] = (~seen).float()
    return targets


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -(targets * logits.float().log_softmax(-1)).sum(-1).mean()


class Seeing(nn.Module):
    """Stage 1: every patch predicts the objects it shows, by each tower's head and by the words of their names."""

    def __init__(self, model: VLAAdapterForActionPrediction, processor: VLAAdapterProcessor, names: list[str]):
        super().__init__()
        config = model.config
        self.model = model
        widths = (config.dinov2_config.hidden_size, config.siglip_config.hidden_size)
        self.heads = nn.ModuleList([nn.Linear(width, len(names)) for width in widths])
        self.own_place = nn.Linear(config.text_config.hidden_size, config.num_patch_tokens)
        self.in_none = nn.Parameter(torch.zeros(len(widths) + 1, len(names), config.num_cameras, 1))
        self.widths = widths
        self.words = [torch.tensor(processor.tokenizer(f" {name}")["input_ids"]) for name in names]

    def forward(self, pixel_values: torch.Tensor, targets: torch.Tensor, **unused: Any) -> dict[str, torch.Tensor]:
        seen = self.model.get_image_features(pixel_values)
        towers = seen.last_hidden_state.split(self.widths, dim=-1)
        scores = [head(features) for head, features in zip(self.heads, towers, strict=True)]
        words = torch.stack([self.model.get_input_embeddings()(word).mean(0) for word in self.words])
        scores.append(seen.pooler_output @ words.T / words.shape[-1] ** 0.5)
        loss = 0.0
        for score, in_none in zip(scores, self.in_none, strict=True):
            by_camera = score.unflatten(1, (self.model.config.num_cameras, -1)).permute(0, 3, 1, 2)
            nowhere = in_none.expand(by_camera.shape[0], -1, -1, -1)
            loss = loss + cross_entropy(torch.cat((by_camera, nowhere), dim=-1), targets) / len(scores)
        return {"loss": loss + PLACE_WEIGHT * self.place_loss(seen.pooler_output)}

    def place_loss(self, patches: torch.Tensor) -> torch.Tensor:
        """Makes every patch know its position and camera: attention learns a position from nothing else."""
        places = torch.arange(patches.shape[1]).expand(len(patches), -1)
        return nn.functional.cross_entropy(self.own_place(patches).float().flatten(0, 1), places.flatten())


class Reading(nn.Module):
    """Stage 2: where an object is. Half of the batch lists all names, the other half names one in the policy's prompt.

    The policy is not trained yet: its gradients are twenty times as large, and noise before the position is known.
    """

    def __init__(self, model: VLAAdapterForActionPrediction, processor: VLAAdapterProcessor, names: list[str]):
        super().__init__()
        config = model.config
        self.model = model
        patches = config.num_patch_tokens // config.num_cameras
        self.heads = nn.ModuleList(
            [nn.Linear(config.text_config.hidden_size, config.num_cameras * (patches + 1)) for _ in range(READ_LAYERS)]
        )
        self.start = processor.tokenizer("In:")["input_ids"]
        self.words = [processor.tokenizer(f" {name}")["input_ids"] for name in names]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.Tensor,
        targets: torch.Tensor,
        asked: torch.Tensor,
        **unused: Any,
    ) -> dict[str, torch.Tensor]:
        half = len(asked) // 2
        patches = self.model.get_image_features(pixel_values).pooler_output
        listed = self.list_loss(patches[:half], targets[:half])
        states, first_query = self.hidden_states(input_ids[half:], attention_mask[half:], patches[half:])
        # The policy reads from the token before the first query on.
        queries = first_query[:, None] - 1 + torch.arange(self.model.config.num_action_queries)
        named = targets[half:][torch.arange(len(queries)), asked[half:]][:, None]
        read = self.read(states, queries, named.expand(-1, queries.shape[1], -1, -1))
        return {"loss": listed + read}

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, patches: torch.Tensor):
        embeddings, first_query = self.model.embed_inputs(input_ids, attention_mask, patches)
        # With an attention mask the language model would look for padding in it; embed_inputs has put that last.
        states = self.model.language_model(inputs_embeds=embeddings, use_cache=False, output_hidden_states=True)
        return states.hidden_states, first_query

    def list_loss(self, patches: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(len(self.words)).tolist()
        tokens, ends = list(self.start), []
        for index in order:
            tokens += self.words[index]
            ends.append(len(tokens) - 1 + self.model.config.num_patch_tokens)
        states, _ = self.hidden_states(torch.tensor([tokens] * len(patches)), None, patches)
        return self.read(states, torch.tensor(ends).expand(len(patches), -1), targets[:, order])

    def read(self, hidden_states: tuple, positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = 0.0
        for head, states in zip(self.heads, hidden_states[-READ_LAYERS:], strict=True):
            there = states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))
            scores = head(there).unflatten(-1, (self.model.config.num_cameras, -1))
            loss = loss + cross_entropy(scores, targets) / READ_LAYERS
        return loss


@torch.no_grad()
def look_for_what_is_named(
    model: VLAAdapterForActionPrediction,
    processor: VLAAdapterProcessor,
    names: list[str],
    batch: dict[str, torch.Tensor],
) -> None:
    """Make two heads of every layer attend to where the answer is, in place.

    After the first stage, linear maps can tell names, and patches that show what they name, from all others. Learning
    these maps by trial takes longer than everything else, because nothing improves until the position reaches the
    answer.
    So the first head starts by attending from a name to what it names: its queries start as "this is the name of" and
    its keys as "this patch shows". The second head attends from everywhere to the name. Both are fitted by least
    squares, in the dimensions whose rotary angles hardly change within a prompt. Their outputs start as large as the
    other heads'.

    Args:
        batch: of scenes, see `SceneCollator`.
    """
    config = model.config.text_config
    words = model.get_input_embeddings().weight
    is_name = torch.zeros(len(words), len(names))
    for index, name in enumerate(names):
        is_name[processor.tokenizer(f" {name}")["input_ids"], index] = 1.0
    patches = model.get_image_features(batch["pixel_values"]).pooler_output.flatten(0, 1)
    shows = (batch["targets"][..., :-1].flatten(2).transpose(1, 2).flatten(0, 1) > 0.2).float()
    # No word shows anything, not even its own name: -1 keeps words from looking at themselves.
    queries = _least_squares(words, is_name)
    name_weight, name_bias = _least_squares(words, is_name.amax(-1, keepdim=True))
    keys = _least_squares(torch.cat((patches, words)), torch.cat((shows, torch.full_like(is_name, -1.0))))

    head_dim = config.hidden_size // config.num_attention_heads
    slow = torch.tensor([*range(head_dim // 4, head_dim // 2), *range(3 * head_dim // 4, head_dim)])[: len(names)]
    scale = (LOOK * head_dim**0.5) ** 0.5
    for layer in model.language_model.layers:
        attention = layer.self_attn
        for projection, (weight, bias) in ((attention.q_proj, queries), (attention.k_proj, keys)):
            projection.weight[: 2 * head_dim] = 0.0
            projection.bias[: 2 * head_dim] = 0.0
            projection.weight[slow], projection.bias[slow] = scale * weight, scale * bias
        attention.q_proj.bias[head_dim + slow[0]] = scale
        attention.k_proj.weight[head_dim + slow[0]] = scale * name_weight[0]
        attention.k_proj.bias[head_dim + slow[0]] = scale * name_bias[0]
        attention.v_proj.weight[: 2 * head_dim].mul_(LOUD)
        attention.o_proj.weight[:, : 2 * head_dim].mul_(LOUD)


def _least_squares(states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias that map normed states `(rows, width)` to targets `(rows, outputs)` with the least error.

    Rows with a positive target weigh as much as all the others together.
    """
    states = states * states.square().mean(-1, keepdim=True).rsqrt()
    states = torch.cat((states, torch.ones(len(states), 1)), dim=1)
    positive = targets.amax(-1) > 0
    weights = torch.where(positive, (~positive).sum() / positive.sum(), 1.0)[:, None]
    matrix = (states * weights).T @ states + 1e-3 * weights.sum() * torch.eye(states.shape[1])
    solution = torch.linalg.solve(matrix, (states * weights).T @ targets)
    return solution[:-1].T, solution[-1]


def pretrain(
    model: VLAAdapterForActionPrediction,
    processor: VLAAdapterProcessor,
    scenes: Path,
    names: list[str],
    output: Path,
    settings: dict[str, Any],
) -> None:
    """Run both stages on `model`, in place, or go on with them.

    Args:
        model, processor: new, see `vla_adapter_hf.init.untrained.init_from_config`.
        scenes: what `record_scenes` wrote.
        names: of the objects, in words.
        output: for the checkpoints of the stages.
        settings: further `TrainingArguments`, over those of `STAGES`.
    """
    model.set_attn_implementation("eager")
    for stage, module_class in (("see", Seeing), ("read", Reading)):
        shown = Scenes(scenes, names, shift=SHIFT if stage == "see" else 0)
        collator = SceneCollator(model, processor, names)
        if stage == "read":
            some = np.random.default_rng(0).permutation(len(shown))[:256]
            look_for_what_is_named(model, processor, names, collator([shown[index] for index in some]))
        arguments = TrainingArguments(
            output_dir=str(output / stage), remove_unused_columns=False, **{**COMMON, **STAGES[stage], **settings}
        )
        trainer = Trainer(
            model=module_class(model, processor, names),
            args=arguments,
            train_dataset=shown,
            data_collator=collator,
        )
        last = last_checkpoint(output / stage)
        if last is not None and int(last.name.split("-")[1]) >= arguments.max_steps:
            trainer.model.load_state_dict(load_file(last / "model.safetensors"))
        else:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint. The trainer's state is written last, so one without it was interrupted."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
