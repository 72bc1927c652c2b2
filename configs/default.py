"""Every key of a run, once, with its unit. The other configs change a few lines of it; the command line changes more:

    python launch.py --config=configs/small.py --config.objective.beta=0.5 --workdir=runs/beta_half

The config is locked: a key that is not listed here is refused, in a config file as on the command line.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,  # of initialisation, data order, warm start, rollouts and probes
            "task": {
                "name": "arithmetic",  # which of the groups below is read
                "arithmetic": {
                    "operators": "+",  # any of + - *
                    "operand_max": 9,  # operands run from 0 to this
                    "left": (),  # instead: first, last and step of the left operand
                    "right": (),  # and of the right one
                    "prompt": placeholder(str),  # text with {sum}, for a model folder; unset: "a+b="
                },
                "stories": {
                    "path": placeholder(str),  # JSONL of {"prompt", "constraint"}; unset: built-in openings
                },
                "countdown": {
                    "num_examples": 1000,  # different puzzles
                    "num_numbers": 4,  # given in each
                    "max_number": 25,  # largest given number
                    "max_total": 100,  # largest number to make
                    "seed": 0,  # of the puzzles
                    "prompt": placeholder(str),  # text with {numbers} and {total}; unset: asks for <answer>…</answer>
                },
                "gsm8k": {
                    "path": placeholder(str),  # folder with the official train.jsonl and test.jsonl; unset: downloaded
                    "split": "train",  # train | test | a slice, train[:10%]
                    "prompt": placeholder(str),  # text with {question}; unset: as the verifier wants it
                    "verifier": "number_hash",  # number_hash | number_boxed | number_tag | number_last | math_verify | …
                    "data_dir": placeholder(str),  # where prepared data are kept; unset: ~/tensorflow_datasets
                },
                "dataset": {
                    "source": placeholder(str),  # .jsonl or .parquet file, folder of them, TFDS name
                    "split": "train",  # as TFDS writes splits: test[:10%]
                    "prompt": placeholder(str),  # text with fields of a row: "{question}\nAnswer:"
                    "target": placeholder(str),  # likewise, for the verifier: "{answer}"
                    "verifier": placeholder(str),  # a key of grpo_jax.tasks.VERIFIERS, or module:function
                    "data_dir": placeholder(str),  # as above
                },
                "reasoning_gym": {  # needs the package of that name
                    "name": placeholder(str),  # of an audited task
                    "num_examples": 1000,
                    "seed": 0,
                },
            },
            "model": {
                "path": placeholder(str),  # Hugging Face folder; unset: a random decoder of the sizes below
                "stop_ids": (),  # token ids that end a completion; empty: the tokenizer's EOS
                "stop_strings": (),  # texts that end a completion too, however they are split into tokens
                "dtype": "float32",  # of matrix products: float32 or bfloat16; parameters are always float32
                "remat": "none",  # what of a layer its gradient computes again: none, dots (all but weights' products), full
                "gather": "model",  # what a device that decodes holds whole of weights that fsdp spreads: model | layer
                "tokenizer": "characters",  # of a random decoder: characters (of the task) or bytes
                "num_layers": 2,
                "d_model": 64,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 16,
                "d_ff": 256,
            },
            "lora": {  # train two thin matrices beside each target, and leave the model as it is
                "rank": 0,  # of their product; 0: all parameters are trained
                "alpha": placeholder(float),  # the product is multiplied by alpha / rank; unset: by 2
                "targets": ("query", "key", "value", "output", "gate", "up", "down"),
            },
            "data": {
                "prompts_per_iteration": 100,  # P
                "max_prompt": 64,  # tokens of a prompt, chat template included; never cut
                "too_long": "error",  # longer prompts: error | drop (and count)
                "chat": False,  # put prompts into the chat template of the model's folder
                "system": placeholder(str),  # system prompt, with chat
                "enable_thinking": placeholder(bool),  # for templates that ask, with chat (Qwen3)
            },
            "warm_start": {  # supervised steps on the task's demonstrations; the result is frozen as the reference policy
                "max_steps": 2000,  # 0: none, the model is the reference as it is
                "target": 0.4,  # success probability at which to stop
                "interval": 5,  # steps between measurements of it
                "samples": 32,  # per prompt, for that measurement
                "batch": 64,  # demonstrations per step
                "learning_rate": 1e-3,  # of AdamW
            },
            "rollout": {
                "group_size": 8,  # G completions per prompt
                "max_completion": 8,  # T tokens, stop token included
                "temperature": 1.0,
                # What is cut off the distribution, to measure only: the loss scores the whole of it.
                "top_k": placeholder(int),  # keep the k likeliest tokens; unset: all
                "top_p": placeholder(float),  # keep the fewest tokens that hold this probability; unset: all
                "min_p": placeholder(float),  # keep tokens at least this share as likely as the likeliest; unset: all
            },
            "objective": {
                "name": "GRPO",  # a key of grpo_jax.objective.NAMED; the unset keys below are taken from it
                "beta": 1.0,  # weight of the KL to the reference, in units of advantage per nat; 0.0 where there is none
                # Or where the run is to end: β is chosen for it once the reference is measured, and objective.beta is not read.
                "target_success": placeholder(float),  # mean success probability
                "target_kl": placeholder(float),  # KL(π‖π_ref), nats
                "beta_mirror": 0.0,  # weight of the KL to the previous policy, for anchor previous and both
                "entropy_bonus": 0.0,  # weight of the entropy of the tokens, in units of advantage per nat
                "baseline": placeholder(str),  # mean | leave_one_out | none
                "scale": placeholder(str),  # std | mean | batch_std | none
                "epsilon": placeholder(float),  # smoothing of the std
                "ddof": placeholder(int),  # 0 | 1
                "epsilon_in": placeholder(str),  # variance | std
                "ratio": placeholder(str),  # sequence_product | sequence | token | none
                "surrogate": placeholder(str),  # clip | cispo | sapo
                "clip_low": placeholder(float),  # ratio clipped below 1 − this; 1.0 never clips
                "clip_high": placeholder(float),  # ratio clipped above 1 + this; 1e9 never clips
                "ratio_cap": placeholder(float),  # largest ratio of cispo; of clip, for failures
                "dual_clip": placeholder(float),  # failures weigh at most this many times their advantage
                "tau_plus": placeholder(float),  # temperature of sapo for successes
                "tau_minus": placeholder(float),  # and for failures
                "reduce": placeholder(str),  # sequence_sum | sequence_mean | token_mean | constant
                "constant_length": placeholder(int),  # that reduce=constant divides by, in tokens
                "kl": placeholder(str),  # sequence_reverse | token_reverse[_weighted] | token_forward | none
                "anchor": placeholder(str),  # reference | previous | both
                "correction": placeholder(str),  # weight for the sampler's rounding: token | sequence | none
                "correction_cap": placeholder(float),  # its largest weight
                "overlong": placeholder(str),  # completions that ran out of length: keep | ignore
            },
            "optimizer": {
                "learning_rate": 1e-3,  # peak, of AdamW
                "schedule": "cosine",  # cosine | linear (both reach 0 after the last update) | constant
                "warmup_updates": 10,  # linear from 0
                "b1": 0.9,
                "b2": 0.99,
                "weight_decay": 0.0,
                "max_grad_norm": 10.0,  # gradients are scaled down to this global norm
            },
            "train": {
                "iterations": 300,  # refreshes of the sampling policy
                # The share of the last iterations whose parameters are averaged, with equal weights; the average is measured
                # beside the last iterate. 0.0: none. It is for a rate that stays high: one that decays to 0 has let the noise die
                # out by itself, and an average then only reaches back towards the start.
                "average": 0.0,
                "inner_epochs": 1,  # passes over a rollout
                "minibatches": 1,  # updates per pass, on equal parts of the prompts
                "microbatch_tokens": 32768,  # completion tokens per device and gradient, a group at least: memory, same result
                "row_length": placeholder(int),  # completion tokens of a packed row; unset: max_completion, or up to 32
                "iterations_per_program": 10,  # run without touching the host, where the verifier is on the device
                "chunk_size": placeholder(int),  # positions whose logits exist at a time; unset: 64 MiB of them
                "profile": (),  # first and last iteration to trace with jax.profiler, into the run directory's profile/
                "watchdog": placeholder(
                    float
                ),  # seconds without a piece of work done until the run ends, with its stacks
                "without_success": False,  # train although no completion of the reference succeeded
                "stop_at_collapse": False,  # where success or entropy is next to nothing, or KL far beyond that of p*, twice
                "max_skipped": 10,  # updates in a row that may be skipped for a non-finite loss or gradient before the run stops
            },
            "evaluate": {
                "prompts": placeholder(int),  # that are measured, chosen by the seed; unset: all
                "held_out": 0,  # prompts that are never trained on, chosen by the seed, and measured beside the others
                "interval": 10,  # iterations between probes of the success probability
                "samples": 32,  # per prompt, at those probes
                "final_samples": 1024,  # per prompt, for p_ref, after training, and with --mode=evaluate
                "batch_samples": 64,  # per prompt, drawn at a time
                "confidence": 0.95,  # of every interval
                "examples": 8,  # prompts whose completions are shown before and after
                "kept_samples": 16,  # completions per prompt kept as text by --mode=evaluate, besides the greedy one
            },
            "attainable": {  # what the network lets through, measured before training: p† beside p*
                "samples": placeholder(int),  # per prompt, in 3 parts; unset: as many as cost 30 iterations
                "steps": 4,  # of conjugate gradients, each a gradient and two scorings of the samples; 0: it is left out
            },
            "verifier": {  # worker processes, for a task that verifies on the host
                "num_workers": 1,
                "deadline": 5.0,  # seconds for one completion; a backstop, counted as a verdict of its own
            },
            "checkpoint": {
                "interval": 50,  # iterations
                "keep": 2,  # newest ones kept
            },
            "mesh": {  # devices along each axis; their product is the number of devices
                "data": -1,  # -1: all that the others leave
                "fsdp": 1,
                "tensor": 1,
            },
        }
    ).lock()
