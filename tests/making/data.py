"""A tokenizer with a chat template, and rows of data files."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from locum.data.tokens import load_tokens

CHAT = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + ('<|end|>\n' if m.role == 'assistant' else '\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Like Qwen3: only the last answer shows its (empty) thoughts, so history is edited by what follows it.
THINKING = CHAT.replace("m.content", "('<think></think>\n' if m.role == 'assistant' and loop.last else '') + m.content")
TALK = [
    {"role": "user", "content": "red or blue?"},
    {"role": "assistant", "content": "blue it is"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "red"},
]


def make_tokenizer(folder, template=CHAT, bos=None):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>"] + ([bos] if bos else [])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the red fox and the blue dog then ran over the hill"] * 4, trainer)
    if bos:
        head = (bos, backend.token_to_id(bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[head])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>", bos_token=bos)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def many(path, count=60, word="fox"):
    return write_rows(path, [{"text": f"{word} number {i} ran over the hill"} for i in range(count)])


def load(specs, tokenizer, **options):
    return load_tokens(specs, tokenizer, **({"split": "all", "length": 16} | options))
