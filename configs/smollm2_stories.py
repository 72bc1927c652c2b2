"""Answers of two dozen tokens, judged as text: SmolLM2-135M-Instruct goes on with stories that must mention something.

    python launch.py --config=configs/smollm2_stories.py --config.model.path=FOLDER

FOLDER is the Hugging Face folder of HuggingFaceTB/SmolLM2-135M-Instruct (docs/models.md says how to get it). 16 openings with a
constraint each; the verifier works on text, in worker processes. All parameters are trained, and the last half is averaged.
On 2 CPU cores an iteration takes about 15 seconds.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.task.name = "stories"
    config.warm_start.max_steps = 0  # the model is the reference as it is
    config.data.prompts_per_iteration = 8
    config.rollout.group_size = 8
    config.rollout.max_completion = 24
    config.train.iterations = 60
    config.train.average = 0.5
    config.optimizer.learning_rate = 2e-6
    config.optimizer.b2 = 0.999
    config.optimizer.schedule = "constant"
    config.optimizer.max_grad_norm = 1e3
    config.attainable.samples = (
        48  # 256 completions a part, which two steps explain to the last: samples decide, not steps
    )
    config.attainable.steps = 3
    config.evaluate.interval = 20
    config.evaluate.samples = 8
    config.evaluate.final_samples = 64
    config.evaluate.batch_samples = 32
    config.checkpoint.interval = 20
    return config
