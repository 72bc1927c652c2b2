"""Qwen2.5-0.5B-Instruct on GSM8K, for one accelerator of 80 GB or a mesh of smaller ones.

    python launch.py --config=configs/qwen_gsm8k.py --config.model.path=FOLDER [--config.mesh.fsdp=4]
    python launch.py --config=configs/qwen_gsm8k.py:paper --config.model.path=FOLDER

GSM8K is kept by tensorflow-datasets: pip install ".[data]". Before anything is spent, this says
what each device needs (on any machine; FOLDER needs config.json only, and the task its data):

    python launch.py --config=configs/qwen_gsm8k.py --config.model.path=FOLDER --mode=estimate --devices=1

The first regime, ours, holds whole completions to the reference at a β whose p* is interior, so that the run can be compared with
its prediction. `paper` is the setting of arXiv 2503.06639, App. A: TRL's objective at β = 0.1 with its k3 term, clip 0.2, ten
passes over a rollout, G = 16, 28 prompts, 200 tokens, sampling temperature 0.1, one epoch; they report 21 % → 37.5 % on the test
problems. Its β predicts p* ≈ 1 for every problem that is ever solved, which one epoch does not reach. Not run here: no
accelerator was at hand.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(regime: str = "ours") -> ConfigDict:
    config = default.get_config()
    config.task.name = "gsm8k"
    config.task.gsm8k.verifier = "number_boxed"
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.warm_start.max_steps = 0
    config.data.chat = True
    config.data.system = "Please reason step by step, and put your final answer within \\boxed{}."
    config.task.gsm8k.prompt = "{question}"
    config.data.max_prompt = 256
    config.data.too_long = "drop"
    config.rollout.group_size = 16
    config.optimizer.schedule = "constant"
    config.evaluate.prompts = 256
    config.evaluate.samples = 4
    config.evaluate.final_samples = 16
    config.evaluate.batch_samples = 16
    config.verifier.num_workers = 4
    if regime == "ours":
        config.objective.beta = 1.0
        config.data.prompts_per_iteration = 32
        config.rollout.max_completion = 320
        config.train.iterations = 1000
        config.train.microbatch_tokens = 40960  # a quarter of the 32 · 16 · 320
        config.optimizer.learning_rate = 1e-6
        config.optimizer.b2 = 0.999
        config.optimizer.max_grad_norm = 1e3  # a sum over 320 tokens, not their mean
        config.evaluate.interval = 50
    elif regime == "paper":
        config.objective.name = "GRPO_TRL"
        config.objective.beta = 0.1
        config.data.prompts_per_iteration = 28
        config.rollout.max_completion = 200
        config.rollout.temperature = 0.1
        config.train.inner_epochs = 10
        config.train.iterations = 7473 // 28  # one epoch
        config.train.microbatch_tokens = 22400  # a quarter of the 28 · 16 · 200
        config.optimizer.learning_rate = 5e-6
        config.optimizer.max_grad_norm = 1.0
        config.evaluate.interval = 15  # every 150 steps
    else:
        raise ValueError(f"configs/qwen_gsm8k.py:{regime} is unknown; there are ours, paper")
    return config
