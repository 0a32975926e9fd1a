"""Times one model in vLLM or llama.cpp. A script, run by the interpreter of the engine's environment:

    python -P timing.py ENGINE

It answers as speed/run.py does: questions are lines of JSON, {"do": name, ...}, each answered with a line, {"answer": ...} or
{"error": [type, message]}. The first question is "load", whose answer has the engine's version and may have the bytes of its weights;
the others are "generate". Nothing of Locum is imported.

Letters: B blocks (here prompts), S tokens of a block (a prompt and what follows it).
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from typing import Any

PASS = 512  # tokens that llama.cpp computes at a time, as it is unless told otherwise


class LlamaCpp:
    """A GGUF file. As in transformers, the model goes on with a given text, all prompts in one batch."""

    def load(self, folder: str, ids: list[list[int]], prompt: int, threads: int, **_: Any) -> dict[str, Any]:
        import llama_cpp as library

        self.library, self.ids_BS, self.prompt = library, ids, prompt
        self.quiet = library.llama_log_callback(lambda *_: None)
        library.llama_log_set(self.quiet, None)
        library.llama_backend_init()
        of_model = library.llama_model_default_params()
        of_model.n_gpu_layers = 0
        model = library.llama_model_load_from_file(folder.encode(), of_model)
        if not model:
            raise ValueError(f"llama.cpp cannot load {folder}")
        tokens = len(ids) * len(ids[0])
        settings = library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = len(ids) * -(-len(ids[0]) // 256) * 256  # each prompt's part in whole 256
        settings.n_ubatch, settings.n_seq_max = PASS, len(ids)
        settings.n_threads = settings.n_threads_batch = threads
        self.context = library.llama_init_from_model(model, settings)
        if not self.context:
            raise ValueError(f"llama.cpp has no room for {len(ids)} prompts of {len(ids[0])} tokens")
        self.batch = library.llama_batch_init(tokens, 0, 1)
        return {"version": library.__version__, "bytes": library.llama_model_size(model)}

    def generate(self, batch: int, **_: Any) -> dict[str, Any]:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        length = len(self.ids_BS[0])
        times = [time.perf_counter()]
        for begin, end in itertools.pairwise((0, *range(self.prompt, length))):
            self._read(batch, begin, end)
            times.append(time.perf_counter())
        return {"prefill": times[1] - times[0], "decode": times[-1] - times[1], "peak_bytes": None}

    def _read(self, batch: int, begin: int, end: int) -> None:
        """These positions of each prompt; logits of the last one."""
        of = self.batch
        of.n_tokens = batch * (end - begin)
        for i, (b, s) in enumerate(itertools.product(range(batch), range(begin, end))):
            of.token[i], of.pos[i], of.n_seq_id[i], of.logits[i] = self.ids_BS[b][s], s, 1, s == end - 1
            of.seq_id[i][0] = b
        if code := self.library.llama_decode(self.context, of):
            raise RuntimeError(f"llama_decode gave {code}")
        self.library.llama_synchronize(self.context)


class Vllm:
    """A folder. The model goes on with its own likeliest tokens: vLLM cannot be told others."""

    def load(
        self, folder: str, ids: list[list[int]], prompt: int, threads: int, dtype: str, **_: Any
    ) -> dict[str, Any]:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        import vllm

        self.vllm, self.ids_BS, self.prompt = vllm, ids, prompt
        self.engine = vllm.LLM(
            model=folder,
            dtype=dtype,
            max_model_len=len(ids[0]) + 8,
            max_num_seqs=len(ids),
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            seed=0,
        )
        return {"version": vllm.__version__}

    def generate(self, batch: int, **_: Any) -> dict[str, Any]:
        """Twice: to the first token of every prompt, and to the last."""
        prefill, whole = (self._seconds(batch, new) for new in (1, len(self.ids_BS[0]) - self.prompt))
        return {"prefill": prefill, "decode": max(whole - prefill, 1e-9), "peak_bytes": None}

    def _seconds(self, batch: int, new_tokens: int) -> float:
        asked = self.vllm.SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=new_tokens)
        prompts = [{"prompt_token_ids": row[: self.prompt]} for row in self.ids_BS[:batch]]
        start = time.perf_counter()
        self.engine.generate(prompts, asked, use_tqdm=False)
        return time.perf_counter() - start


ENGINES = {"llamacpp": LlamaCpp, "vllm": Vllm}


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks gets Ctrl-C, and ends this process
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    subject = ENGINES[sys.argv[1]]()
    for line in sys.stdin:
        question = json.loads(line)
        try:
            said = {"answer": getattr(subject, question.pop("do"))(**question)}
        except Exception as error:  # engines fail in any way they like; whoever asked wants to read how
            said = {"error": [type(error).__name__, str(error)]}
        answers.write(json.dumps(said) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
