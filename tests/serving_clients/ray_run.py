"""Runs `examples/ray_replicas.py` on a local Ray, asks it, and prints which copies answered and the actions."""

import json
import sys

import numpy as np
import ray
import ray_replicas
from ray import serve

from vla_adapter_hf.serving.client import PolicyClient


def main():
    port, path = int(sys.argv[1]), sys.argv[2]
    observation = dict(np.load(path))
    images = {"image": observation["full_image"], "wrist_image": observation["wrist_image"]}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(ray_replicas.app)
    copies = serve.status().applications["default"].deployments["Policy"].replica_states
    with (
        PolicyClient(f"ws://127.0.0.1:{port}", session="arm") as first,
        PolicyClient(f"ws://127.0.0.1:{port}") as second,
    ):
        chunks = [
            client.predict(images, str(observation["instruction"]), observation["state"]).actions.tolist()
            for client in (first, second, first, second)
        ]
    answer = json.dumps({"copies": {str(state): count for state, count in copies.items()}, "chunks": chunks})
    serve.shutdown()
    ray.shutdown()
    print(answer)


main()
