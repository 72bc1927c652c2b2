"""GSM8K, verified exactly, for any model folder.

    python launch.py --config=configs/gsm8k.py --config.model.path=FOLDER [--config.task.gsm8k.path=FOLDER]

FOLDER is a Hugging Face folder; the task's has the official train.jsonl and test.jsonl, and without it they are downloaded once.
tensorflow-datasets keeps them: pip install ".[data]".
Sized to run through on 2 CPU cores in minutes with a model of a few hundred thousand parameters; such a model solves nothing,
and the run says so: success 0, every group dead, no gradient. For a model that can, see configs/qwen_gsm8k.py.
Measure the test problems:

    python launch.py --config=configs/gsm8k.py --config.model.path=FOLDER --mode=evaluate --config.task.gsm8k.split=test
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.task.name = "gsm8k"
    config.warm_start.max_steps = 0  # the model is the reference as it is
    config.data.prompts_per_iteration = 8
    config.data.max_prompt = 320
    config.data.too_long = "drop"
    config.rollout.group_size = 8
    config.rollout.max_completion = 96
    config.train.iterations = 10
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_updates = 2
    config.optimizer.b2 = 0.999
    config.evaluate.prompts = 64
    config.evaluate.interval = 5
    config.evaluate.samples = 8
    config.evaluate.final_samples = 16
    config.evaluate.batch_samples = 8
    config.checkpoint.interval = 5
    return config
