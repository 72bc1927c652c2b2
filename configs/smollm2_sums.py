"""A real language model on the predicted curve: SmolLM2-135M-Instruct adds two-digit numbers after three worked sums.

    python launch.py --config=configs/smollm2_sums.py --config.model.path=FOLDER
    python launch.py --config=configs/smollm2_sums.py --config.model.path=FOLDER --sweep="seed=0,1;objective.beta=0.5,1,3"

FOLDER is the Hugging Face folder of HuggingFaceTB/SmolLM2-135M-Instruct (docs/models.md says how to get it); any other model that
continues text will do. 100 sums, answers of about four tokens, each judged by its last number. All parameters are trained.
On 2 CPU cores an iteration takes about 15 seconds.
"""

from ml_collections import ConfigDict

from configs import default

WORKED = "Q: 5 + 7\nA: 12\nQ: 8 + 6\nA: 14\nQ: 21 + 13\nA: 34\n"


def get_config() -> ConfigDict:
    config = default.get_config()
    config.task.arithmetic.left = (11, 29, 2)
    config.task.arithmetic.right = (3, 21, 2)
    config.task.arithmetic.prompt = WORKED + "Q: {sum}\nA:"
    config.model.stop_strings = ("\n",)
    config.warm_start.max_steps = 0  # the model is the reference as it is
    config.data.prompts_per_iteration = 25
    config.rollout.group_size = 16
    config.rollout.max_completion = 5
    config.train.iterations = 50
    config.optimizer.learning_rate = 2e-6
    config.optimizer.b2 = 0.999
    config.optimizer.max_grad_norm = 1e3  # norms of 10 to 30 are normal
    config.attainable.samples = 24
    config.attainable.steps = 12  # R² ≥ .49 with 4, .57 with 8, .63 with 12
    config.evaluate.interval = 10
    config.evaluate.samples = 8
    config.evaluate.final_samples = 128
    config.evaluate.batch_samples = 32
    config.checkpoint.interval = 10
    return config
