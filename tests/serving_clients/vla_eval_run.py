"""vla-eval's own orchestrator, run with the Python of an environment of its own, on a benchmark of recorded frames."""

import json
import sys

import numpy as np
from vla_eval import api
from vla_eval.benchmarks.base import StepBenchmark, StepResult


STEPS = 11


class RecordedFrames(StepBenchmark):
    """Shows one recorded observation again and again, and keeps the actions."""

    actions = []

    def __init__(self, path, send_wrist_image=False, send_state=False, quat_no_antipodal=False):
        super().__init__()
        assert send_wrist_image and send_state and quat_no_antipodal, "the server did not ask for what it needs"
        self.recorded = dict(np.load(path))
        self.count = 0

    def get_tasks(self):
        return [{"name": str(self.recorded["instruction"]), "suite": "recorded"}]

    def reset(self, task):
        self.count = 0
        self.actions.append([])
        return self.recorded

    def step(self, action):
        self.count += 1
        self.actions[-1].append(np.asarray(action["actions"]).tolist())
        return StepResult(obs=self.recorded, reward=0.0, done=self.count == STEPS, info={})

    def make_obs(self, raw_obs, task):
        return {
            "images": {"agentview": raw_obs["full_image"], "wrist": raw_obs["wrist_image"]},
            "states": raw_obs["state"],
            "task_description": task["name"],
        }

    def get_step_result(self, step_result):
        return {"success": step_result.done}


def main():
    url, path = sys.argv[1:]
    benchmark = {"benchmark": f"{__name__}:RecordedFrames", "episodes_per_task": 2, "params": {"path": path}}
    results = api.run({"benchmarks": [benchmark]}, server_url=url, no_save=True)
    print(json.dumps({"actions": sys.modules[__name__].RecordedFrames.actions, "results": str(results)}))


if __name__ == "__main__":
    main()
