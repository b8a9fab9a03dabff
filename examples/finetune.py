"""Fine-tune VLA-Adapter on LeRobot demonstrations. Needs `pip install -e '.[lora,plot]'`.

The defaults train the package's small embedded policy on two recorded episodes, minutes on a CPU, to show the way:
    python examples/finetune.py --robot libero
For a policy take published weights, a GPU and your own dataset (folder or Hub id):
    python examples/finetune.py --checkpoint VLA-Adapter/LIBERO-Object-Pro --dataset me/pick --cameras front wrist
"""

import argparse
from pathlib import Path


import vla_adapter_hf as vla  # isort: skip  # before torch, so that its threads wait passively
from transformers import AutoConfig, AutoModel, AutoProcessor, set_seed

from vla_adapter_hf.training.presets import PRESETS
from vla_adapter_hf.utils.plotting import plot_chunks, plot_training, save_figure


ROOT = Path(__file__).parent.parent
parser = argparse.ArgumentParser(description="Fine-tune VLA-Adapter on LeRobot demonstrations.")
parser.add_argument("--checkpoint", default=str(ROOT / "src/vla_adapter_hf/embedded/checkpoint"))
parser.add_argument("--dataset", default=str(ROOT / "tests/fixtures/demos/lerobot_v30_image"))
parser.add_argument("--cameras", nargs="+", default=["image", "wrist_image"], help="in the order the model sees them")
parser.add_argument("--robot", help="libero, calvin, ...: whose gripper and state conventions apply; none by default")
parser.add_argument("--output", default="outputs/finetuned")
parser.add_argument("--steps", type=int, default=40)
args = parser.parse_args()
set_seed(0)

# 1. Demonstrations, and the start with this robot's cameras, sizes and statistics. Layers of other sizes are new.
config = AutoConfig.from_pretrained(args.checkpoint)
dataset = vla.VLAAdapterDataset.from_lerobot(args.dataset, args.cameras, config.chunk_size, args.robot)
fields = {"cameras": dataset.camera_names, "action_dim": dataset.action_dim, "proprio_dim": dataset.state_dim}
fields |= {"action_names": dataset.action_names, "state_names": dataset.state_names, "fps": dataset.fps}
fields |= {"norm_stats": dataset.norm_stats, "constant_dims": "zero", "image_center_crop": 0.9}
fields |= {"image_jpeg_round_trip": dataset.source.frames_are_jpeg()}
fields["norm_type"] = vla.get_robot(args.robot).norm_type if args.robot else config.norm_type
fields["policy_task_tokens"] = config.policy_task_tokens if len(args.cameras) == config.num_cameras else None
model = AutoModel.from_pretrained(args.checkpoint, dtype="float32", ignore_mismatched_sizes=True, **fields)
tokenizer = AutoProcessor.from_pretrained(args.checkpoint).tokenizer
processor = vla.VLAAdapterProcessor.from_model_config(model.config, tokenizer)

# 2. Frames are augmented with random crops. The held-out episode has the centre crop that inference has.
dataset.image_transform = vla.ImageAugmentation.from_model_config(model.config)
train, held_out = dataset.split_by_episode(1, validation_transform=vla.ImageResize.from_model_config(model.config))

# 3. Training: LoRA on towers and language model, the policy in full. Every checkpoint loads with AutoModel.
every = {"logging_steps": 5, "eval_strategy": "steps", "eval_steps": 0.25, "save_steps": 0.25}
settings = vla.VLAAdapterTrainingArguments(args.output, max_steps=args.steps, **every, **PRESETS["lora"])
collator, metrics = vla.VLAAdapterDataCollator(processor, model.config), vla.make_compute_metrics(model.config)
lora = vla.apply_preset(model, "lora")
trainer = vla.VLAAdapterTrainer(lora, settings, collator, train, held_out, compute_metrics=metrics)
trainer.train()
# 4. One plain model, and what it predicts for the episode that it has not seen.
merged = vla.merge_lora(lora)
merged.save_pretrained(args.output)
processor.save_pretrained(args.output)
save_figure(plot_training(trainer.state.log_history), f"{args.output}/training.png")
save_figure(plot_chunks(merged, processor, [held_out]), f"{args.output}/chunks.png")
