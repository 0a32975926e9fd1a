"""Whether a model still writes tool calls in the form of its own chat template.

The form is taken from the template: it renders a call of a known tool with a known argument, and what stands around the two has
to stand in what the model writes. So no format is known here by name.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

import torch

from ..measure.repetition import continuations, room_after

NEW_TOKENS = 96  # in which a call has to come
CITIES = ("Paris", "Oslo", "Lima", "Cairo", "Delhi", "Quito", "Seoul", "Accra")
ASKED = {"get_weather": "What is the weather in {} now?", "get_time": "What time is it in {}? Look it up."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name.replace('_', ' ')} of a city".capitalize(),
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The name of the city"}},
                "required": ["city"],
            },
        },
    }
    for name in ASKED
]


@dataclass(frozen=True)
class ToolForm:
    """Prompts that ask for a tool, and what a call of one looks like."""

    prompts: tuple[str, ...]
    call: re.Pattern[str]


def tool_form(tokenizer: Any) -> ToolForm | None:
    """None where the chat template has no tools, or says no calls."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    questions = [ASKED[name].format(city) for city, name in zip(CITIES, [*ASKED] * len(CITIES), strict=False)]
    try:
        prompts = tuple(_render(tokenizer, [{"role": "user", "content": text}], TOOLS, True) for text in questions)
        if prompts[0] == _render(tokenizer, [{"role": "user", "content": questions[0]}], None, True):
            return None
    except Exception:  # templates are programs, and fail as they like
        return None
    name, city = next(iter(ASKED)), CITIES[0]
    for arguments in ({"city": city}, json.dumps({"city": city})):
        function = {"type": "function", "id": "call00001", "function": {"name": name, "arguments": arguments}}
        answer = {"role": "assistant", "content": "", "tool_calls": [function]}
        try:
            talk = _render(tokenizer, [{"role": "user", "content": questions[0]}, answer], TOOLS, False)
        except Exception:
            continue
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(talk, prompts[0], strict=False))
        said = talk[sum(1 for _ in alike) :].partition(str(tokenizer.eos_token))[0]
        if name in said and city in said.partition(name)[2]:
            return ToolForm(prompts, _pattern(said, name, city))
    return None


def _render(tokenizer: Any, talk: list[dict[str, Any]], tools: list[Any] | None, ask: bool) -> str:
    return tokenizer.apply_chat_template(talk, tools=tools, tokenize=False, add_generation_prompt=ask)


def _pattern(said: str, name: str, city: str) -> re.Pattern[str]:
    """What is said before the name, between it and the argument, and after that, however it is spaced."""
    before, _, rest = said.partition(name)
    between, _, after = rest.partition(city)
    names = "|".join(map(re.escape, ASKED))
    return re.compile(
        f"{_spaced(before.lstrip())}(?:{names}){_spaced(between)}.{{1,80}}?{_spaced(after.rstrip())}", re.DOTALL
    )


def _spaced(text: str) -> str:
    return r"\s*".join(map(re.escape, re.split(r"\s+", text)))


def well_formed(model: Any, tokenizer: Any, form: ToolForm) -> int:
    """How many of the prompts a model answers, greedily, with a call in this form. A prompt that its context has no room for is not."""
    found = 0
    for prompt in form.prompts:
        ids_BS = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        if room_after(model, ids_BS.shape[1]) > 1:
            (row,) = continuations(model, ids_BS, new_tokens=NEW_TOKENS)
            found += form.call.search(tokenizer.decode(row, skip_special_tokens=False)) is not None
    return found
