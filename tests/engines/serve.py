"""Run with the interpreter of the vLLM environment: start an engine per job, one after another, and write what it says.

    python serve.py JOBS ANSWERS

JOBS is a JSON list of {"folder", "dtype"} and, as wanted, "generate": prompts (token ids) to continue greedily by 64
tokens; "score": texts (token ids) whose likeliest next tokens are wanted; "unchecked": the folder is taken for one that
was fetched by name, which is checked only as it loads; "more": further arguments of the engine. An answer is {"tokens",
"top", "bytes"}, or {"error": [type, message]} where the engine refused the checkpoint.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from unittest import mock

from vllm import LLM, SamplingParams, envs
from vllm.model_executor.layers.linear import LinearBase

LENGTH, NEW = 160, 64


def parameter_bytes(model) -> int:
    """What the engine's model holds in memory for its weights; tables such as those of rotary embeddings are none.

    On CPU vLLM hands the weights of linear layers to oneDNN, which packs them, and leaves an empty tensor behind.
    """
    tensors = {t.data_ptr(): t for t in model.parameters() if t.numel()}
    packed = [m for m in model.modules() if isinstance(m, LinearBase) and hasattr(m, "weight") and not m.weight.numel()]
    linear = sum(m.input_size * m.output_size * m.weight.element_size() for m in packed)
    return linear + sum(t.numel() * t.element_size() for t in tensors.values())


def prompts(ids: list[list[int]]) -> list[dict]:
    return [{"prompt_token_ids": row} for row in ids]


def run(job: dict) -> dict:
    if job.get("unchecked"):
        with mock.patch("locum.vllm_plugin.LocumQuantization.maybe_update_config"):
            return run({**job, "unchecked": False})
    engine = LLM(
        model=job["folder"],
        dtype=job["dtype"],
        max_model_len=LENGTH,
        max_num_seqs=8,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        seed=0,
        **{"enforce_eager": True, **job.get("more", {})},
    )
    in_process = not envs.VLLM_ENABLE_V1_MULTIPROCESSING
    answer: dict = {"bytes": engine.apply_model(parameter_bytes)[0] if in_process else None}
    if job.get("generate"):
        greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
        answer["tokens"] = [list(o.outputs[0].token_ids) for o in engine.generate(prompts(job["generate"]), greedy)]
    if job.get("score"):
        scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        outputs = engine.generate(prompts(job["score"]), scored)
        answer["top"] = [
            [min(step, key=lambda token: step[token].rank) for step in output.prompt_logprobs[1:]] for output in outputs
        ]
    engine.llm_engine.engine_core.shutdown()
    return answer


def main() -> None:
    jobs, answers = Path(sys.argv[1]), Path(sys.argv[2])
    done = []
    for job in json.loads(jobs.read_text()):
        try:
            done.append(run(job))
        except Exception as error:
            done.append({"error": [type(error).__name__, str(error)]})
        gc.collect()
        answers.write_text(json.dumps(done))


if __name__ == "__main__":
    main()
