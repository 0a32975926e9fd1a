"""The collapse gate: text in circles, routing that lost its spread, tool calls without form; each fails against the original alone."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

import locum
from locum.checkpoints.load import load_model
from locum.checkpoints.read import load_tokenizer
from locum.errors import CheckpointError
from locum.measure import repetition
from locum.measure.repetition import continuations, ends_in_loop, loops
from locum.models.families import find_layers
from locum.verification import tool_calls
from locum.verification.collapse import Behaviour, Questions, compare_counts, compare_uses
from locum.verification.folder import FAILED, OK, SKIPPED, NotApplicable
from locum.verification.tool_calls import tool_form, well_formed
from making.broken import change_weights
from making.tiny_models import tiny_ids, tiny_model


def questions(tokenizer, prompts=2, long_tokens=24):
    ids_BS = tiny_ids(prompts, 8, vocab=300)
    return Questions.of(tokenizer, ids_BS, long_tokens, 0)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def original(checkpoint):
    return load_model(checkpoint)


# --- loops ----------------------------------------------------------------------------------------------------------


def says_one_thing(model):
    """The model made to say token 0 for ever."""
    model = copy.deepcopy(model)
    model.get_output_embeddings().weight.data.zero_()
    return model


def test_greedy_text_is_not_gone_on_with_once_it_loops_for_good(original, monkeypatch):
    monkeypatch.setattr(repetition, "FOR_GOOD", 64)
    model, steps = says_one_thing(original), []
    model.register_forward_pre_hook(lambda *_: steps.append(1))
    rows = continuations(model, tiny_ids(2, 8, vocab=300), new_tokens=400)
    assert [len(row) for row in rows] == [64, 64] == [len(steps)] * 2 and all(map(ends_in_loop, rows))
    assert loops(model, tiny_ids(2, 8, vocab=300), new_tokens=40) == 2


def test_text_ends_where_the_context_does():
    model = tiny_model("olmoe", max_position_embeddings=20)
    model.generation_config.eos_token_id = None
    assert [len(row) for row in continuations(model, tiny_ids(2, 8), new_tokens=2048)] == [12, 12]


def test_greedy_text_is_the_likeliest_token_of_every_step(original):
    ids = tiny_ids(1, 8, vocab=300)
    (row,) = continuations(original, ids, new_tokens=6)
    with torch.no_grad():
        for token in row:
            assert int(original(ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_counts_fail_by_more_than_chance_alone():
    assert compare_counts(5, 3, "loop", 8) == "5 of 8 loop, 3 of the original's"
    assert "8 of 8 loop" in compare_counts(8, 8, "loop", 8)
    with pytest.raises(CheckpointError, match=r"8 of 8 loop, 1 of the original's \(by chance: p = 0.0007"):
        compare_counts(8, 1, "loop", 8)
    with pytest.raises(NotApplicable, match="no original"):
        compare_counts(8, None, "loop", 8)


# --- routing --------------------------------------------------------------------------------------------------------


def test_routers_that_send_all_text_to_two_experts_have_collapsed(original, tokenizer):
    asked, model = questions(tokenizer), copy.deepcopy(original)
    theirs = Behaviour(0, 0, asked.uses(original), 0)
    find_layers(model)[1].router.weight.data.zero_()  # a tie, which the first experts win
    ours = Behaviour(0, 0, asked.uses(model), 0)
    use = ours.uses[find_layers(model)[1].shape.name]
    assert (
        use.spread == pytest.approx(use.top_k / 8)
        and use.dead == 8 - use.top_k
        and use.router_entropy == pytest.approx(1)
    )
    found = {check.check: check for check in asked.checks(ours, theirs)}
    assert found["routing"].result == FAILED and "layers.1" in found["routing"].detail
    assert found["tool calls"].result == SKIPPED
    same = {check.check: check.result for check in asked.checks(theirs, theirs)}
    assert same == {"loops": OK, "long loops": OK, "routing": OK, "tool calls": SKIPPED}
    alone = {check.check: check.result for check in asked.checks(ours, None)}
    assert set(alone.values()) == {SKIPPED}


def test_an_original_that_has_collapsed_excuses_its_copy(original, tokenizer):
    model = copy.deepcopy(original)
    for layer in find_layers(model):
        layer.router.weight.data.zero_()
    uses = questions(tokenizer).uses(model)
    assert "12 of 16 experts see none" in compare_uses(uses, uses)
    active = sum(layer.shape.top_k * layer.shape.parameters() for layer in find_layers(model))
    assert f"experts of {active:,} parameters run for a token" in compare_uses(uses, uses)


@pytest.mark.journeys
def test_verify_finds_a_collapse_in_what_was_saved(small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "collapsed"))

    def collapse(tensors):
        for name in tensors:
            if name.endswith("mlp.gate.weight"):
                tensors[name] = torch.zeros_like(tensors[name])

    change_weights(folder, collapse)
    checks = {
        check.check: check for check in locum.verify(folder, engine="llamacpp", prompts=1, new_tokens=1, long_tokens=0)
    }
    assert checks["routing"].result == FAILED and "recover the model with --balance" in checks["routing"].detail
    assert checks["long loops"].result == SKIPPED and checks["loops"].result == OK


# --- tool calls -----------------------------------------------------------------------------------------------------

TALK = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}CALL{% endif %}<|end|>{% endfor %}"
ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
LIST = "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"
HERMES = (
    "{% for t in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ t.function.name }}", "arguments": {{ t.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
BARE = (
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
)
XML = (
    "{% for t in m.tool_calls %}<function={{ t.function.name }}>{% for k, v in t.function.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v }}\n</parameter>{% endfor %}</function>{% endfor %}"
)
TEXT = "[TOOL_CALLS]{{ m.tool_calls[0].function.name }}{{ '[ARGS]' + m.tool_calls[0].function.arguments }}"
FORMS = {
    "hermes": (HERMES, '<tool_call> {"name": "get_time", "arguments": {"city": "Rome"}}\n</tool_call>'),
    "bare": (BARE, '{"name": "get_weather", "parameters": {"city": "New York"}}'),
    "xml": (XML, "Let me look.<function=get_weather><parameter=city>\nRome\n</parameter></function>"),
    "arguments as text": (TEXT, '[TOOL_CALLS]get_time[ARGS]{"city": "Rome"}'),
}
WRONG = (
    "It is sunny in Rome.",
    '<tool_call>{"name": "get_time", "arguments": {"city": "Rome"',
    '{"name": "get_stock", "parameters": {"city": "Rome"}}',
    "<function=get_weather><parameter=place>Rome</parameter></function>",
    "[TOOL_CALLS]get_time",
)


def with_template(tokenizer, call):
    made = copy.deepcopy(tokenizer)
    made.chat_template = LIST + TALK.replace("CALL", call) + ASK
    return made


@pytest.mark.parametrize("name", FORMS)
def test_a_call_has_the_form_that_the_template_gives_it(name, tokenizer):
    call, right = FORMS[name]
    form = tool_form(with_template(tokenizer, call))
    assert form.call.search(right) and not any(form.call.search(text) for text in WRONG)
    assert len(set(form.prompts)) == 8 and all("get_weather" in prompt for prompt in form.prompts)


@pytest.mark.parametrize(
    "template", [None, TALK.replace("CALL", "") + ASK, LIST + TALK.replace("CALL", "") + ASK, "{{ oops("]
)
def test_a_template_without_tools_or_calls_asks_nothing(template, tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    assert tool_form(made) is None


def test_answers_are_counted_and_lost_form_fails(original, tokenizer, monkeypatch):
    made = with_template(tokenizer, FORMS["hermes"][0])
    answers = iter([FORMS["hermes"][1]] * 7 + [WRONG[0]] + [WRONG[0]] * 8)
    monkeypatch.setattr(tool_calls, "room_after", lambda model, prompt: 100)
    monkeypatch.setattr(tool_calls, "continuations", lambda *_, **__: [made(next(answers))["input_ids"]])
    asked = questions(made)
    counts = [well_formed(original, made, asked.form) for _ in range(2)]
    assert counts == [7, 0]
    uses = questions(tokenizer).uses(original)
    theirs, ours = (Behaviour(0, 0, uses, count) for count in counts)
    found = {check.check: check for check in asked.checks(ours, theirs)}
    assert found["tool calls"].result == FAILED and "8 of 8 answers lack a tool call" in found["tool calls"].detail
    assert {check.result for check in asked.checks(theirs, theirs)} == {OK}
