"""What `test_hub.py` runs in processes of their own, whose client knows only the Hub of `hub_server.py`.

    python hub_client.py online|offline OBSERVATION RESULTS

Each step's result, or its error's text, goes to the JSON file RESULTS. Actions are lists.
"""

import json
import os
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor

from vla_adapter_hf import VLAAdapterConfig, VLAAdapterForActionPrediction, open_checkpoint
from vla_adapter_hf.checkpoints.base_vlm import open_base
from vla_adapter_hf.checkpoints.convert import convert
from vla_adapter_hf.checkpoints.info import checkpoint_info


torch.set_num_threads(1)
PRIVATE = {"token": "secret"}
results: dict[str, Any] = {}


def step(run: Callable[[], Any]) -> None:
    """Run a step, keep its result, and mark the server's log where it begins."""
    if "HF_HUB_OFFLINE" not in os.environ:
        urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/_mark/{run.__name__}")
    try:
        results[run.__name__] = run()
    except Exception as error:
        results[run.__name__] = f"{type(error).__name__}: {error}"


def observation() -> dict[str, Any]:
    with np.load(sys.argv[2]) as recorded:
        images = [recorded["full_image"], recorded["wrist_image"]]
        return {"images": images, "text": str(recorded["instruction"]), "state": recorded["state"]}


def facts(model: Any) -> dict[str, Any]:
    """Which revision a model's weights and statistics are of."""
    return {"bias": model.policy.fc_out.bias.unique().tolist(), "stats": list(model.config.norm_stats)}


def predict(model: Any, processor: Any) -> list:
    return model.predict_action(**processor(**observation())).tolist()


def online() -> None:
    os.environ["HF_TOKEN"] = "secret"

    @step
    def info() -> dict:
        return checkpoint_info("someone/policy", revision="abc")

    del os.environ["HF_TOKEN"]

    @step
    def processor() -> str:
        return type(AutoProcessor.from_pretrained("someone/policy", **PRIVATE)).__name__

    @step
    def processor_of_a_revision() -> str:
        options = {"revision": "abc", "cache_dir": "elsewhere", **PRIVATE}
        return AutoProcessor.from_pretrained("someone/policy", **options).image_processor.cameras

    @step
    def default_revision() -> dict:
        return facts(AutoModel.from_pretrained("someone/policy", **PRIVATE))

    @step
    def auto_model_of_a_revision() -> dict:
        return facts(AutoModel.from_pretrained("someone/policy", revision="abc", **PRIVATE))

    @step
    def model_class_of_a_revision() -> dict:
        return facts(VLAAdapterForActionPrediction.from_pretrained("someone/policy", revision="abc", **PRIVATE))

    @step
    def overrides() -> dict:
        options = {"robot": "calvin", "policy_noise_std": 0.5, "revision": "abc", **PRIVATE}
        config = AutoModel.from_pretrained("someone/policy", **options).config
        return {"cameras": config.cameras, "noise": config.policy_noise_std, "stats": list(config.norm_stats)}

    @step
    def config_of_a_revision() -> list:
        return list(VLAAdapterConfig.from_pretrained("someone/policy", revision="abc", **PRIVATE).norm_stats)

    @step
    def config_of_another_revision() -> dict:
        config = VLAAdapterConfig.from_pretrained("someone/policy", **PRIVATE)
        return facts(AutoModel.from_pretrained("someone/policy", config=config, revision="abc", **PRIVATE))

    @step
    def config_of_the_same_revision() -> dict:
        config = VLAAdapterConfig.from_pretrained("someone/policy", revision="abc", **PRIVATE)
        return facts(AutoModel.from_pretrained("someone/policy", config=config, revision="abc", **PRIVATE))

    @step
    def subfolder() -> dict:
        checkpoint = open_checkpoint("someone/nested", subfolder="inner")
        checkpoint.load_processor()
        return facts(AutoModel.from_pretrained("someone/nested", subfolder="inner"))

    @step
    def structure_of_the_other() -> list:
        return list(open_checkpoint("someone/looked-at").config.norm_stats)

    @step
    def without_token() -> None:
        open_checkpoint("someone/policy")

    @step
    def unknown_revision() -> None:
        open_checkpoint("someone/policy", revision="xyz", **PRIVATE)

    @step
    def unknown_repository() -> None:
        open_checkpoint("someone/polity")

    @step
    def foreign_repository() -> None:
        checkpoint_info("someone/foreign")

    @step
    def base() -> list:
        return [open_base("someone/base").file_name, open_base("someone/base", step=200).file_name]

    # From here on the token is that of the environment, as after `hf auth login`.
    os.environ["HF_TOKEN"] = "secret"

    @step
    def auto_config() -> list:
        return list(AutoConfig.from_pretrained("someone/policy").norm_stats)

    @step
    def upload() -> list:
        folder = convert(
            "someone/policy", "converted", push_to_hub="someone/converted", report_progress=lambda line: None
        )
        return sorted(path.name for path in folder.iterdir())

    @step
    def info_of_our_layout() -> dict:
        return checkpoint_info("someone/converted")

    @step
    def prediction() -> list:
        checkpoint = open_checkpoint("someone/policy")
        return predict(checkpoint.load_model(), checkpoint.load_processor())

    @step
    def prediction_of_our_layout() -> list:
        checkpoint = open_checkpoint("someone/converted")
        return predict(checkpoint.load_model(), checkpoint.load_processor())


def offline() -> None:
    @step
    def prediction() -> list:
        return predict(AutoModel.from_pretrained("someone/policy"), AutoProcessor.from_pretrained("someone/policy"))

    @step
    def prediction_of_our_layout() -> list:
        checkpoint = open_checkpoint("someone/converted")
        return predict(checkpoint.load_model(), checkpoint.load_processor())

    @step
    def revision() -> dict:
        return facts(AutoModel.from_pretrained("someone/policy", revision="abc"))

    @step
    def base() -> str:
        return open_base("someone/base").file_name

    @step
    def only_headers_were_read() -> None:
        open_checkpoint("someone/looked-at")

    @step
    def never_downloaded() -> None:
        open_checkpoint("someone/other")

    @step
    def local_files_only() -> list:
        return list(open_checkpoint("someone/policy", revision="abc", local_files_only=True).config.norm_stats)


if __name__ == "__main__":
    {"online": online, "offline": offline}[sys.argv[1]]()
    Path(sys.argv[3]).write_text(json.dumps(results))
