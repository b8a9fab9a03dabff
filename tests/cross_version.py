"""Checkpoints written under one release of transformers give the same actions under another, in both directions.

    python tests/cross_version.py PYTHON OTHER_PYTHON

takes two interpreters that have this package installed, with different releases of transformers. Without them,

    python tests/cross_version.py

makes two virtual environments, with the oldest supported release and with the newest, in a folder that
`--environments` keeps for the next time. In each environment it loads the small published checkpoint of `fixtures/`
(or the one given as `--checkpoint`, with `--tolerance` to go with it), predicts and saves; then each loads what the
other has saved, with the package and, as code that travels with the weights, without it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path


TESTS = Path(__file__).parent
OLDEST = "5.4.0"
# Random weights amplify rounding, which may differ between releases; see test_goldens.py.
TOLERANCE = 3e-4

PREDICT = """
import sys
folder, recorded, result, saved = sys.argv[1:5]
trusted = {"trust_remote_code": True} if sys.argv[5] == "without the package" else {}
if trusted:
    sys.modules["vla_adapter_hf"] = None
else:
    import vla_adapter_hf
import numpy, torch
from transformers import AutoModel, AutoProcessor
torch.set_num_threads(1)
processor = AutoProcessor.from_pretrained(folder, **trusted)
model = AutoModel.from_pretrained(folder, dtype=torch.float32, **trusted)
with numpy.load(recorded) as observation:
    images = [observation["full_image"], observation["wrist_image"]]
    inputs = processor(images=images, text=str(observation["instruction"]), state=observation["state"])
numpy.save(result, model.predict_action(**inputs))
if saved != "-":
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="two interpreters (default: make environments)")
    parser.add_argument(
        "--environments", type=Path, help="where to make the two environments (default: a temporary place)"
    )
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint for two cameras instead of the small one")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="greatest difference of two actions")
    arguments = parser.parse_args()
    if len(arguments.pythons) not in (0, 2):
        parser.error("give two interpreters, or none")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pythons = arguments.pythons or make_environments(arguments.environments or folder / "environments")
        difference = compare(*pythons, folder, arguments.checkpoint)
    print(f"greatest difference of two actions: {difference:.2g} (at most {arguments.tolerance:.2g})")
    sys.exit(difference > arguments.tolerance)


def compare(python: str, other_python: str, folder: Path, checkpoint: Path | None = None) -> float:
    """The greatest difference between actions under the two interpreters, over all ways to save and load.

    Raises:
        RuntimeError: when something cannot be loaded or saved; the message ends in that process's own.
    """
    import numpy

    if checkpoint is None:
        from model_fixtures import write_published

        checkpoint = write_published(folder / "published", "pro")
    releases = {path: release_of(path) for path in (python, other_python)}
    if len(set(releases.values())) == 1:
        raise RuntimeError(f"both interpreters have transformers {releases[python]}; give two different releases")
    results = {}
    for path, release in releases.items():
        saved = folder / f"saved-{release}"
        results[f"published under {release}"] = predict(path, folder, checkpoint, saved)
    for writer, reader in ((python, other_python), (other_python, python)):
        saved = folder / f"saved-{releases[writer]}"
        for way in ("with the package", "without the package"):
            case = f"written under {releases[writer]}, read under {releases[reader]} {way}"
            again = folder / case.replace(" ", "-").replace(",", "")
            results[case] = predict(reader, folder, saved, again, way)
            # What the reader saves in its turn loads where the first file was written.
            results[f"{case}, and back"] = predict(writer, folder, again, None)
    first = next(iter(results.values()))
    differences = {case: float(numpy.abs(actions - first).max()) for case, actions in results.items()}
    for case, difference in differences.items():
        print(f"{difference:.2g}  {case}")
    return max(differences.values())


def predict(python: str, folder: Path, source: Path, saved: Path | None, way: str = "with the package"):
    """Actions for the recorded observation in a fresh process that knows nothing of earlier ones."""
    import numpy

    recorded = TESTS / "fixtures" / "libero_spatial_observation.npz"
    with tempfile.TemporaryDirectory(dir=folder) as home:
        result = Path(home) / "actions.npy"
        run(
            [python, "-c", PREDICT, source, recorded, result, saved or "-", way],
            env={**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        )
        return numpy.load(result)


def release_of(python: str) -> str:
    return run([python, "-c", "import transformers; print(transformers.__version__)"]).strip().splitlines()[-1]


def make_environments(folder: Path) -> list[str]:
    """Interpreters of two environments with the oldest supported transformers and the newest; they are made once."""
    pythons = []
    for name, requirement in (("oldest", f"transformers=={OLDEST}"), ("newest", "transformers>=5,<6")):
        python = folder / name / ("Scripts" if os.name == "nt" else "bin") / "python"
        if not python.exists():
            print(f"making an environment with {requirement} in {folder / name}")
            venv.create(folder / name, with_pip=True)
            run([python, "-m", "pip", "install", "--quiet", "--upgrade", requirement, "-e", TESTS.parent])
        pythons.append(str(python))
    return pythons


def run(command: list, env: dict[str, str] | None = None) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{result.stderr}")
    return result.stdout


if __name__ == "__main__":
    main()
