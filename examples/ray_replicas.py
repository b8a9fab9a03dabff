"""Two copies of a policy behind one address, with Ray Serve.

    pip install 'vla-adapter-hf[serve]' 'ray[serve]'
    CHECKPOINT=path/to/checkpoint serve run --app-dir examples ray_replicas:app

The address, its endpoints and its clients are those of `vla-adapter serve`. On GPUs give each copy one:
`ray_actor_options={"num_gpus": 1}` and `ServeSettings(device="cuda")`.
"""

import os

from ray import serve


def make_app():
    from vla_adapter_hf.serving.server import load_app
    from vla_adapter_hf.serving.settings import ServeSettings

    return load_app(os.environ.get("CHECKPOINT"), ServeSettings())


@serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 1})
@serve.ingress(make_app)
class Policy:
    """One copy; Ray Serve sends each connection to one of them."""


app = Policy.bind()
