"""Asks one engine about checkpoints, one after another. A script, run by the interpreter of the engine's environment:

    python -P run.py ENGINE JOBS ANSWERS

JOBS is a JSON list of objects: "folder" (a GGUF file for llamacpp), "adapter" (a folder to put over it, or none), "dtype",
"import_locum", "opens" (the class of transformers that loads it), "prompts" (rows of token ids, equally long), "texts" (to
be cut into tokens), "new_tokens" and "more" (further arguments of the engine). ANSWERS becomes a list of as many:

    version    of the engine
    values     name of a .npy file beside ANSWERS: float32 [B, S, V] logits, or log-probabilities [B, S, J] of "ids"
    ids        name of a .npy file [B, S, J]: the tokens that `values` are of, the likeliest first; not there where they are
               of the vocabulary
    tokens     [B][new_tokens] greedy continuations, which no end of text stops
    keys       what the engine says of tensors that are missing, unexpected or of another shape
    texts      tokens of the texts, as the engine's own tokenizer cuts them; not there where it has none
    bytes      that the engine holds in memory for the weights; not there where it cannot be asked

or {"error": [type, message]}. Nothing of Locum is imported unless a job says so: a stock checkpoint must do without.

Letters: B blocks (here prompts), S tokens of a block, V vocabulary, J likeliest tokens.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LIKELIEST = 10  # tokens whose log-probabilities vLLM is asked for at every position
MORE_ROOM = 8  # positions beyond prompt and continuation


def in_transformers(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """As a user loads it: AutoModelForCausalLM or another class, an adapter over it, then `generate` with its cache."""
    import torch
    import transformers

    if job["import_locum"]:
        import locum  # noqa: F401 (registers the loader)
    dtype = getattr(torch, job["dtype"])
    model, info = getattr(transformers, job["opens"]).from_pretrained(
        job["folder"],
        dtype="auto" if job["adapter"] else dtype,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if job["adapter"]:
        from locum.checkpoints.load import set_dtype  # absolute: a script has no package to be relative to
        from locum.checkpoints.patch import load_adapter

        set_dtype(load_adapter(model, job["adapter"]), dtype)
    model = model.to(job["device"]).eval()
    ids_BS = torch.tensor(job["prompts"], device=model.device)
    with torch.no_grad():
        np.save(out / "values.npy", model(ids_BS).logits.float().cpu().numpy())
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=job["new_tokens"], pad_token_id=0)
    model.generation_config = settings  # the checkpoint's own may stop at an end of text, or repeat less
    tokens_BS = model.generate(ids_BS, attention_mask=torch.ones_like(ids_BS))
    return {
        "version": transformers.__version__,
        "values": "values.npy",
        "tokens": tokens_BS[:, ids_BS.shape[1] :].tolist(),
        "keys": {what: sorted(map(str, names)) for what, names in info.items() if names and what.endswith("_keys")},
    }


def parameter_bytes(model: Any) -> int:
    """What vLLM's model holds in memory for its weights; tables such as those of rotary embeddings are none.

    On CPU vLLM hands the weights of linear layers to oneDNN, which packs them, and leaves an empty tensor behind.
    """
    from vllm.model_executor.layers.linear import LinearBase

    tensors = {t.data_ptr(): t for t in model.parameters() if t.numel()}
    packed = [m for m in model.modules() if isinstance(m, LinearBase) and hasattr(m, "weight") and not m.weight.numel()]
    linear = sum(m.input_size * m.output_size * m.weight.element_size() for m in packed)
    return linear + sum(t.numel() * t.element_size() for t in tensors.values())


def in_vllm(job: dict[str, Any], out: Path) -> dict[str, Any]:
    import vllm

    # vLLM 0.32's rotary kernel for CPU is wrong for interleaved pairs (DeepSeek) in float32; its PyTorch form is right. And on
    # processors with AMX it takes latent attention (DeepSeek) to a kernel that refuses float32.
    exact = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}, "attention_config": {"backend": "CPU_MLA"}}
    kernels = exact if job["dtype"] == "float32" else {}
    length = len(job["prompts"][0])
    engine = vllm.LLM(
        model=job["folder"],
        dtype=job["dtype"],
        max_model_len=length + job["new_tokens"] + MORE_ROOM,
        max_num_seqs=len(job["prompts"]),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_logprobs=LIKELIEST,
        seed=0,
        **{"enforce_eager": True, **kernels, **job["more"]},
    )
    settings = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    asked = vllm.SamplingParams(max_tokens=job["new_tokens"], prompt_logprobs=LIKELIEST, logprobs=LIKELIEST, **settings)
    outputs = engine.generate([{"prompt_token_ids": row} for row in job["prompts"]], asked)
    values_BSJ = np.zeros((len(outputs), length, LIKELIEST), dtype=np.float32)
    ids_BSJ = np.zeros(values_BSJ.shape, dtype=np.int64)
    for b, output in enumerate(outputs):
        for s, step in enumerate([*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]):
            best = sorted(step, key=lambda token: step[token].rank)[:LIKELIEST]
            ids_BSJ[b, s] = best
            values_BSJ[b, s] = [step[token].logprob for token in best]
    np.save(out / "values.npy", values_BSJ)
    np.save(out / "ids.npy", ids_BSJ)
    said = {"version": vllm.__version__, "values": "values.npy", "ids": "ids.npy", "keys": {}}
    said["tokens"] = [list(output.outputs[0].token_ids) for output in outputs]
    if not vllm.envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        (said["bytes"],) = engine.apply_model(parameter_bytes)
    engine.llm_engine.engine_core.shutdown()
    return said


def in_llamacpp(job: dict[str, Any], out: Path) -> dict[str, Any]:
    import llama_cpp

    length = len(job["prompts"][0])
    room = length + job["new_tokens"] + MORE_ROOM
    cache = dict.fromkeys(("type_k", "type_v"), llama_cpp.GGML_TYPE_F32)  # in 16 bits unless it is told
    settings = {"n_ctx": room, "n_batch": room, "logits_all": True, "verbose": False, **cache, **job["more"]}
    engine = llama_cpp.Llama(job["folder"], **settings)
    values_BSV, tokens = [], []
    for row in job["prompts"]:
        engine.reset()
        engine.eval(row)
        values_BSV.append(engine.scores[:length].copy())
        new: list[int] = []
        while len(new) < job["new_tokens"]:
            new.append(int(engine.scores[engine.n_tokens - 1].argmax()))
            engine.eval(new[-1:])
        tokens.append(new)
    np.save(out / "values.npy", np.stack(values_BSV).astype(np.float32))
    texts = [engine.tokenize(text.encode(), add_bos=False, special=False) for text in job["texts"]]
    version = llama_cpp.__version__
    return {"version": version, "values": "values.npy", "tokens": tokens, "keys": {}, "texts": texts}


ENGINES: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "transformers": in_transformers,
    "vllm": in_vllm,
    "llamacpp": in_llamacpp,
}


def main() -> None:
    answer_one, jobs, answers = ENGINES[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
    done = []
    for i, job in enumerate(json.loads(jobs.read_text(encoding="utf-8"))):
        out = answers.parent / str(i)
        out.mkdir()
        try:
            said = answer_one({"adapter": None, "opens": "AutoModelForCausalLM", "more": {}, **job}, out)
            said |= {name: f"{i}/{said[name]}" for name in ("values", "ids") if name in said}
        except Exception as error:  # engines fail in any way they like; whoever asked wants to read how
            said = {"error": [type(error).__name__, str(error)]}
        done.append(said)
        gc.collect()
    answers.write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    main()
