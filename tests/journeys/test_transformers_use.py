"""A compressed checkpoint in users' hands: what transformers, PEFT and TRL offer for any model works on one with containers.

That decoding compiles into one graph is in test_products.py.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

import locum
from locum.containers.container import StandInExperts
from making.tiny_models import tiny_ids

NEW = 6
PROMPTS = ("The red fox ran over the hills", "Seven old trees")


@pytest.fixture
def accelerate_state():
    """Trainer sets accelerate up for the whole process, in its own precision; other tests use another."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def model(small):
    """Tests leave it as it is."""
    return AutoModelForCausalLM.from_pretrained(small).eval()


@pytest.fixture(scope="module")
def tokenizer(small):
    return AutoTokenizer.from_pretrained(small, padding_side="left")


def containers(model) -> list[StandInExperts]:
    return [module for module in model.modules() if isinstance(module, StandInExperts)]


def alone(model, tokenizer, prompt: str, **settings) -> list[int]:
    ids = tokenizer(prompt, return_tensors="pt")
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW} | settings
    return model.generate(**ids, **settings)[0, ids["input_ids"].shape[1] :].tolist()


def test_pipeline(small, model, tokenizer):
    assert containers(model)
    write = pipeline("text-generation", model=str(small))
    assert containers(write.model)
    said = write(PROMPTS[0], do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, return_full_text=False)
    assert said[0]["generated_text"] == tokenizer.decode(alone(model, tokenizer, PROMPTS[0]), skip_special_tokens=True)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_padded_batch_is_what_each_prompt_is_alone(model, tokenizer, settings):
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    assert (batch["attention_mask"] == 0).any()
    out = model.generate(**batch, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, **settings)
    for row, prompt in zip(out[:, batch["input_ids"].shape[1] :].tolist(), PROMPTS, strict=True):
        assert row == alone(model, tokenizer, prompt, **settings)


@pytest.mark.parametrize("compressed_helps", [True, False])
def test_assisted_generation(checkpoint, model, tokenizer, compressed_helps):
    """Drafts of a cheaper model change nothing of what is written, whichever of the two is compressed."""
    original = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    writer, helper = (original, model) if compressed_helps else (model, original)
    assert alone(writer, tokenizer, PROMPTS[0], assistant_model=helper) == alone(writer, tokenizer, PROMPTS[0])


def test_device_map(small, model):
    placed = AutoModelForCausalLM.from_pretrained(small, device_map="auto")
    with torch.no_grad():
        ours = placed(tiny_ids().to(placed.device)).logits.cpu()
        assert torch.allclose(ours, model(tiny_ids()).logits, atol=1e-4)


def test_a_layer_on_disk(small, model, tmp_path):
    """One that does not fit is read for each call of its modules, and let go."""
    where = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    placed = AutoModelForCausalLM.from_pretrained(
        small, device_map={**where, "model.layers.1": "disk"}, offload_folder=tmp_path / "kept"
    ).eval()
    with torch.no_grad():
        assert torch.allclose(placed(tiny_ids()).logits, model(tiny_ids()).logits, atol=1e-5)


def test_pickle(model):
    """torch.save of a whole model, spawned workers, Ray."""
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    again = torch.load(kept, weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(tiny_ids()).logits, model(tiny_ids()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions(small, model, dtype):
    loaded = AutoModelForCausalLM.from_pretrained(small, dtype=dtype)
    assert {p.dtype for module in containers(loaded) for p in module.parameters()} == {dtype}
    with torch.no_grad():
        ours, exact = loaded(tiny_ids()).logits.float(), model(tiny_ids()).logits
    assert ours.isfinite().all()
    if dtype is torch.float32:
        assert torch.equal(ours, exact)
    else:  # routing of near ties may differ at single tokens
        assert float((ours - exact).abs().median()) < 0.05 * float(exact.std())


def test_a_lora_adapter_on_attention(small, model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(small)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and "self_attn" in name for name in trained)
    adapted(tiny_ids(), labels=tiny_ids()).loss.backward()
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p += 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        changed = adapted.eval()(tiny_ids()).logits
        assert not torch.allclose(changed, model(tiny_ids()).logits)
        adapted.save_pretrained(tmp_path)
        fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small), tmp_path).eval()
        assert torch.equal(fresh(tiny_ids()).logits, changed)


def test_steps_of_trainer(small, tmp_path, accelerate_state):
    """All of the container's parameters learn (A from the second step on, as B starts at zero), and what is saved loads as it was."""
    live = AutoModelForCausalLM.from_pretrained(small)
    before = {name: p.detach().clone() for name, p in live.named_parameters()}
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), learning_rate=1e-2, use_cpu=True, disable_tqdm=True, **settings)
    rows = [{"input_ids": row, "labels": row} for row in tiny_ids(batch=4)]
    Trainer(live, arguments, train_dataset=rows).train()
    same = {name for name, p in live.named_parameters() if torch.equal(p, before[name])}
    assert not {name for name in same if ".experts." in name}
    live.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    with torch.no_grad():
        assert torch.equal(again(tiny_ids()).logits, live.eval()(tiny_ids()).logits)


def test_steps_of_trl(small, tmp_path, accelerate_state):
    """Supervised fine-tuning of an adapter on the attention, from text."""
    trl = pytest.importorskip("trl")
    live, tokenizer = AutoModelForCausalLM.from_pretrained(small), AutoTokenizer.from_pretrained(small)
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}
    settings |= {"learning_rate": 1e-2, "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_length": 32}
    texts = Dataset.from_list([{"text": text} for text in PROMPTS * 2])
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    arguments = trl.SFTConfig(str(tmp_path), **settings)
    trainer = trl.SFTTrainer(live, args=arguments, train_dataset=texts, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(fresh(tiny_ids()).logits, trainer.model.eval()(tiny_ids()).logits, atol=1e-5)
        assert not torch.allclose(fresh(tiny_ids()).logits, fresh.unload()(tiny_ids()).logits)


# --- without `import locum`, as `locum export --to remote-code` allows ------------------------------------------------

IMPORTS_NOTHING = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert "locum" not in sys.modules
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[2])
model.save_pretrained(sys.argv[2])
with torch.no_grad():
    torch.save(model(torch.arange(2, 40)[None]).logits, sys.argv[3])
"""


@pytest.fixture(scope="module")
def remote(small, tmp_path_factory):
    """`small` in the form that loads with trust_remote_code=True. Tests only read it."""
    out = tmp_path_factory.mktemp("remote") / "small"
    locum.export(small, to="remote-code", out=out)
    return out


@pytest.mark.journeys
def test_a_tool_that_imports_nothing_loads_it_and_saves_it(remote, small, model, tmp_path):
    saved, logits = tmp_path / "saved", tmp_path / "logits.pt"
    run = [sys.executable, "-c", IMPORTS_NOTHING, str(remote), str(saved), str(logits)]
    done = subprocess.run(run, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        assert torch.allclose(torch.load(logits), model(ids).logits, atol=1e-4)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(saved)(ids).logits, model(ids).logits)
    config = json.loads((saved / "config.json").read_text())  # an ordinary checkpoint of Locum again, without code
    assert "auto_map" not in config
    assert config["quantization_config"] == json.loads((small / "config.json").read_text())["quantization_config"]
    assert not list(saved.glob("*.py"))


def test_it_is_trusted_only_when_asked(remote, model, tmp_path):
    """With Locum imported, nothing of the folder is run, and what is saved names no file that is not there."""
    live = AutoModelForCausalLM.from_pretrained(remote)
    with torch.no_grad():
        assert torch.equal(live(tiny_ids()).logits, model(tiny_ids()).logits)
    live.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not any(name.startswith("transformers_modules") for name in sys.modules)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def asked(port: int, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://localhost:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.journeys
def test_transformers_serve_imports_nothing(remote, model, tokenizer, tmp_path):
    pytest.importorskip("fastapi")
    port, log = free_port(), tmp_path / "log"
    line = [os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", str(remote), "--trust-remote-code"]
    line += ["--device", "cpu", "--dtype", "float32", "--port", str(port)]
    with log.open("w") as out:
        server = subprocess.Popen(line, stdout=out, stderr=out, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)})
    try:
        until = time.monotonic() + 120
        while True:
            try:
                assert asked(port, "/health") == {"status": "ok"}
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
                time.sleep(0.2)
        body = {"model": str(remote), "prompt": PROMPTS[0], "max_tokens": NEW, "temperature": 0}
        said = asked(port, "/v1/completions", body)["choices"][0]["text"]
    finally:
        server.terminate()
        server.wait()
    written = alone(model, tokenizer, PROMPTS[0], min_new_tokens=None)
    assert said == tokenizer.decode(written, skip_special_tokens=True)


QUESTIONS = [
    {"query": "The red fox", "choices": [" ran over the blue hills", " slept", " and then"], "gold": 0},
    {"query": "Seven old", "choices": [" trees", " blue", " the"], "gold": 2},
    {"query": "Then under the", "choices": [" hills and old trees", " fox", " red ran"], "gold": 1},
    {"query": "Blue hills", "choices": [" then slept", " over over", " seven and seven"], "gold": 1},
]
TASK = """
task: questions
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@torch.no_grad()
def likelihood(model, tokenizer, query: str, choice: str) -> float:
    """The log-likelihood of an answer after its question."""
    start, ids = len(tokenizer(query)["input_ids"]), torch.tensor(tokenizer(query + choice)["input_ids"])
    log_SV = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return float(log_SV.gather(1, ids[1:, None])[start - 1 :].sum())


@pytest.mark.journeys
def test_lm_evals_own_command_imports_nothing(remote, model, tokenizer, tmp_path):
    """Its tasks by name do not import Locum, and neither does this task; it passes trust_remote_code on."""
    pytest.importorskip("lm_eval")
    data, task, out = tmp_path / "questions.json", tmp_path / "questions.yaml", tmp_path / "out"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task.write_text(TASK % data)
    line = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "1"]
    line += ["--model_args", f"pretrained={remote},dtype=float32,trust_remote_code=True"]
    homes = {"HF_MODULES_CACHE": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    line += ["--tasks", str(task), "--output_path", str(out)]
    done = subprocess.run(line, env={**os.environ, **homes}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (saved,) = out.rglob("results_*.json")
    scores = [[likelihood(model, tokenizer, q["query"], choice) for choice in q["choices"]] for q in QUESTIONS]
    right = [row.index(max(row)) == q["gold"] for row, q in zip(scores, QUESTIONS, strict=True)]
    assert json.loads(saved.read_text())["results"]["questions"]["acc,none"] == sum(right) / len(right)
