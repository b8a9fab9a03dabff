"""The official openpi client, run with the Python of an environment of its own (it pins numpy < 2).

Each line of input names an .npz file with the arrays and texts of an observation; names with a dot are nested
(`images.cam_high`). The answer, an .npz file of what `infer` returned, is written next to it, and its name printed. An
error is printed after `error: `. With `--resize` frames go through openpi's own `resize_with_pad` first, as its LIBERO
client does.
"""

import sys

import numpy as np
from openpi_client import image_tools
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def read(path, resize):
    observation = {}
    with np.load(path) as arrays:
        for name in arrays.files:
            value = arrays[name]
            if value.ndim == 0:
                value = value.item()
            elif value.ndim == 3 and resize:
                value = image_tools.convert_to_uint8(image_tools.resize_with_pad(value, 224, 224))
            part, _, inner = name.partition(".")
            if inner:
                observation.setdefault(part, {})[inner] = value
            else:
                observation[name] = value
    return observation


def main():
    port, resize = int(sys.argv[1]), "--resize" in sys.argv
    print(f"numpy {np.__version__}", flush=True)
    client = WebsocketClientPolicy("127.0.0.1", port)
    print(sorted(client.get_server_metadata()), flush=True)
    for line in sys.stdin:
        path = line.strip()
        try:
            answer = client.infer(read(path, resize))
        except RuntimeError as error:
            print(f"error: {error}".replace("\n", " "), flush=True)
            client = WebsocketClientPolicy("127.0.0.1", port)
            continue
        assert answer["server_timing"]["infer_ms"] > 0
        np.savez(path + ".answer.npz", actions=answer["actions"])
        print(path + ".answer.npz", flush=True)


main()
