"""What libraries read when they are imported: no threads that spin, no network, no screen, folders of our own.

And where the modules are that these tests share with those of vla-adapter-hf.
"""

import os
import sys
import tempfile
from pathlib import Path


os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
os.environ |= {"WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false", "MUJOCO_GL": "osmesa"}
# Caches and calibrations. The folder is deleted when the process ends.
HOME = tempfile.TemporaryDirectory(prefix="test-lerobot-")
os.environ |= {"HF_LEROBOT_HOME": f"{HOME.name}/lerobot", "VLA_ADAPTER_CACHE": f"{HOME.name}/cache"}
ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "examples")]
