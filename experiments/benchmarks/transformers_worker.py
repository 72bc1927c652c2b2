"""The peers on the same card, transformers' ``generate`` and its continuous batching, as workers of `race`.

Runs in an interpreter of its own, with torch for the card and transformers, and nothing of this project's: the request holds the
numbers of the model. Weights are random in bfloat16; ours are float32 and cast once in each repetition, which counts. What ends a
completion is the same.
"""

import time
from typing import Any

import torch
import transformers
from worker import Prepared, serve  # beside this file: the package needs jax


def prepare(request: dict[str, Any]) -> Prepared:
    """What the worker answers first, and its repetition."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**request["config"], dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
    _scale(model)
    prompts = torch.randint(0, config.vocab_size, (request["rows"] // request["group"], request["prompt"]))
    prompts = prompts.repeat_interleave(request["group"], 0)
    stops = list(range(request["stops"])) or None
    generation = transformers.GenerationConfig(
        max_new_tokens=request["completion"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=stops,
        pad_token_id=0,
        use_cache=True,
    )

    def generate() -> list[int]:
        inputs = prompts.to(device)
        mask = torch.ones_like(inputs)
        with torch.inference_mode():
            generated = model.generate(inputs, attention_mask=mask, generation_config=generation)[
                :, prompts.shape[1] :
            ].cpu()
        return [_length(row, len(stops or ())) for row in generated.tolist()]

    def generate_batch() -> list[int]:
        # Not in inference mode: the thread that generates is in none, and could not write what was made here.
        generated = model.generate_batch(prompts.tolist(), generation_config=generation, persistent_manager=True)
        lengths = [len(output.generated_tokens) for output in generated.values() if output.error is None]
        if len(lengths) != len(prompts) or not all(lengths):
            raise RuntimeError(f"continuous batching has finished {len(lengths)} of {len(prompts)} completions")
        return lengths

    run = {"generate": generate, "continuous batching": generate_batch}[request["form"]]

    def repeat() -> dict[str, Any]:
        start = time.perf_counter()
        lengths = run()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        return {"inside": seconds, "lengths": [lengths], "peak": peak}

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"versions": versions, "check": [], "device": device}, repeat


def _scale(model: Any) -> None:
    """Variance 1 / D of the embedding, so that tied logits have unit variance as in the models compared with."""
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.normal_(0.0, weight.shape[1] ** -0.5)


def _length(row: list[int], stops: int) -> int:
    """Tokens up to the first that ends the completion, which counts."""
    return next((i + 1 for i, token in enumerate(row) if token < stops), len(row))


if __name__ == "__main__":
    serve(prepare)
