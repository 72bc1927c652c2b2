"""A real pretrained model: a small Llama learns to mention a required word in its stories.

    python launch.py --config=configs/stories.py --config.model.path=FOLDER

FOLDER is a Hugging Face folder of Llama architecture (config.json, model.safetensors, tokenizer.json), such as a TinyStories
model of 260K parameters, for which the settings are chosen. The continuation of each opening must satisfy its constraint; the
verifier works on text, in worker processes. About half an hour on 2 CPU cores, a third of it to measure what this network lets
through; success rises from 0.24 to about 0.44. The rate stays as it is, and the parameters of the last three quarters are
averaged: noise in 64 tokens costs more KL than the success is worth, and an average of n iterations leaves about 1/n of it.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    config = default.get_config()
    config.task.name = "stories"
    config.model.stop_ids = (1, 2)  # TinyStories models end a story with BOS
    config.warm_start.max_steps = 0  # the pretrained model is the reference
    config.data.prompts_per_iteration = 16
    config.rollout.group_size = 16
    config.rollout.max_completion = 64
    config.train.iterations = 800
    config.train.average = 0.75
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "constant"
    config.optimizer.b2 = 0.999
    config.optimizer.max_grad_norm = 1e3  # 64 tokens' worth of score vectors: norms of 20 to 40 are normal
    config.attainable.samples = 768  # 4,096 completions a part: with fewer the fits explain their own samples alone
    config.attainable.steps = 12
    config.evaluate.interval = 100
    config.evaluate.samples = 16
    config.evaluate.final_samples = 128
    config.evaluate.batch_samples = 16
    return config
