"""`locum verify`: a good checkpoint passes, and each thing that can be wrong is one failed line and exit code 1."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import fisher_exact

import locum
from locum.checkpoints.load import set_dtype
from locum.checkpoints.patch import load_adapter
from locum.engines.engines import ENGINES, Answer, Engine, ask, chosen_engines
from locum.errors import CheckpointError, EngineError, LocumError, OptionError
from locum.measure.repetition import ends_in_loop, more_than_chance
from locum.models.families import find_layers
from locum.plans.plan import KEPT, NOTHING, LayerPlan
from locum.verification import verify as verification
from locum.verification.folder import FAILED, OK, SKIPPED
from locum.verification.verify import Promise, check_engine, compare_likeliest, compare_logits, compare_tokens
from making.broken import DAMAGES, change_weights
from making.checkpoints import locum as command
from making.checkpoints import write_checkpoint, write_tokenizer
from making.tiny_models import CONFIGS, tiny_model

FEW = {"prompts": 2, "new_tokens": 6, "long_tokens": 20}


def failures(checks) -> list[tuple[str, str]]:
    return [(check.check, check.engine) for check in checks if check.result == FAILED]


@pytest.fixture(scope="module")
def verified(small):
    """What `locum verify` says of a compressed checkpoint, from Python."""
    return locum.verify(small, engine="transformers", **FEW)


def test_a_good_checkpoint_passes(verified):
    assert failures(verified) == []
    said = {(check.check, check.engine): check.detail for check in verified if check.result == OK}
    names = "original files config plan tensors size tokenizer loops routing"
    assert {(name, "") for name in names.split()} <= set(said)
    assert "the original with the plan carried out again" in said["logits", "transformers"]
    assert "2 x 6 tokens are the same" in said["greedy tokens", "transformers"]
    assert "as the plan promised" in said["size", ""]
    assert "as the original's" in said["tokenizer", ""]
    assert {check.check for check in verified if check.result == SKIPPED} <= {"chat template", "tool calls"}


NO_LOCUM = "raise ImportError('this checkpoint must do without Locum')\n"


@pytest.mark.journeys
@pytest.mark.parametrize("name", ["pruned", "small"])
def test_a_stock_checkpoint_is_opened_without_locum(name, request, tmp_path, monkeypatch):
    (tmp_path / "locum").mkdir()
    (tmp_path / "locum" / "__init__.py").write_text(NO_LOCUM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    checks = locum.verify(request.getfixturevalue(name), engine="transformers", **FEW)
    if name == "pruned":
        assert failures(checks) == []
        assert ("greedy tokens", "transformers") in {(c.check, c.engine) for c in checks if c.result == OK}
    else:
        assert failures(checks) == [("logits", "transformers")]
        assert "must do without Locum" in checks[-1].detail


@pytest.mark.journeys
def test_wrong_weights_do_not_keep_the_promise(small, tmp_path):
    """Right names, shapes and sizes: only running it shows."""
    folder = Path(shutil.copytree(small, tmp_path / "wrong"))
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("dense.down_NDF"))
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = command(
        "verify", folder, "--engine", "transformers", "--prompts", 2, "--new-tokens", 4, "--long-tokens", 4, "--json"
    )
    assert result.exit_code == 1
    checks = {(c["check"], c["engine"]): c for c in json.loads(result.stdout)}
    assert {key for key, c in checks.items() if c["result"] == FAILED} >= {("logits", "transformers")}
    assert checks["tensors", "transformers"]["result"] == OK


# --- what was trained since, and other precisions -------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory) -> Path:
    """Vectors that were trained: as an adapter over the original, and in a whole checkpoint."""
    root = tmp_path_factory.mktemp("trained")
    original = write_checkpoint(root / "original", num_experts_per_tok=4)
    small = locum.compress(original, method="compressed-experts", out=root / "small")
    options = {"how": "vectors", "data": [str(words)], "steps": 2, "length": 32, "learning_rate": 0.01}
    locum.recover(small, out=root / "whole", **options)
    locum.recover(small, out=root / "adapter", adapter_only=True, **options)
    return root


ALWAYS = (("adapter", "bf16"),)  # the others are among the journeys
EVERY = [
    pytest.param(name, precision, marks=() if (name, precision) in ALWAYS else pytest.mark.journeys)
    for name in ("adapter", "whole")
    for precision in ("fp32", "bf16", "fp16")
]


@pytest.mark.journeys
@pytest.mark.parametrize(("name", "precision"), EVERY)
def test_what_was_recovered_passes(name, precision, trained):
    checks = locum.verify(trained / name, engine="transformers", precision=precision, **FEW)
    assert failures(checks) == []
    said = {check.check: check.detail for check in checks if check.engine == "transformers" and check.result == OK}
    assert {"tensors", "logits", "greedy tokens"} <= said.keys()
    assert "it was trained since" in said["logits"]


@pytest.mark.journeys
def test_what_an_adapter_computes_is_compared(trained, monkeypatch):
    def changed(*arguments):
        model = load_adapter(*arguments)
        for layer in find_layers(model):
            layer.experts.offsets_NV.data.add_(0.5)
        return model

    monkeypatch.setattr(
        "locum.checkpoints.patch.load_adapter", changed
    )  # of the promise alone: the engine is another process
    checks = locum.verify(trained / "adapter", engine="transformers", **FEW)
    assert failures(checks) == [("logits", "transformers"), ("greedy tokens", "transformers")]


def test_engines_without_adapters_say_what_to_do(trained):
    *_, last = locum.verify(trained / "adapter", engine="llamacpp", **FEW)
    assert (last.engine, last.result) == ("llamacpp", FAILED)
    assert "--adapter-only" in last.detail or "not there" in last.detail


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_has_the_types_that_loading_gives_it(model_type, dtype, tmp_path):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    expected = type(model).from_pretrained(tmp_path, dtype=dtype).state_dict()
    found = set_dtype(model, dtype).state_dict()
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# --- broken on purpose ----------------------------------------------------------------------------------------------


def with_one_more(folder: Path) -> tuple[str, str]:
    change_weights(folder, lambda tensors: tensors.update({"model.extra": torch.ones(3)}))
    return "tensors", "have no place in the model"


def of_another_plan(folder: Path) -> tuple[str, str]:
    plan = locum.load_plan(folder / "plan.json")
    layers = [LayerPlan(x.layer, (KEPT,) * len(x.slots)) for x in plan.layers]
    locum.save_plan(dataclasses.replace(plan, layers=tuple(layers)), folder / "plan.json")
    return "plan", "is not what the checkpoint was made with"


def of_a_forged_plan(folder: Path) -> tuple[str, str]:
    """The notes agree with the plan, the weights do not."""
    plan = locum.load_plan(folder / "plan.json")
    layer = plan.layers[0]
    kept = next(e for e, slot in enumerate(layer.slots) if slot.is_kept)
    slots = tuple(NOTHING if e == kept else slot for e, slot in enumerate(layer.slots))
    forged = dataclasses.replace(plan, layers=(dataclasses.replace(layer, slots=slots), *plan.layers[1:]))
    locum.save_plan(forged, folder / "plan.json")
    notes = json.loads((folder / "locum.json").read_text())
    (folder / "locum.json").write_text(json.dumps(notes | {"plan": forged.id}))
    return "plan", "in another way than plan.json says"


def with_a_damaged_plan(folder: Path) -> tuple[str, str]:
    (folder / "plan.json").write_text((folder / "plan.json").read_text()[:-40])
    return "plan", "not valid JSON"


def of_another_original(folder: Path) -> tuple[str, str]:
    """Beside it lies one of the name."""
    notes = json.loads((folder / "locum.json").read_text())
    write_checkpoint(folder.with_name("another"))
    said = {"original": "another", "original_fingerprint": "0" * 16}
    (folder / "locum.json").write_text(json.dumps(notes | said))
    return "original", "is not what"


def with_another_tokenizer(folder: Path) -> tuple[str, str]:
    write_tokenizer(folder, seed=7)
    return "tokenizer", "cuts text in another way"


def without_a_tokenizer(folder: Path) -> tuple[str, str]:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    return "tokenizer", "no usable tokenizer"


def with_a_template(folder: Path) -> tuple[str, str]:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return "chat template", "is not the original's"


def with_other_settings(folder: Path) -> tuple[str, str]:
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": 1.5}))
    return "generation config", "repetition_penalty=1.5"


BROKEN = (
    *(with_one_more, of_another_plan, of_a_forged_plan, with_a_damaged_plan, of_another_original),
    *(with_another_tokenizer, without_a_tokenizer, with_a_template, with_other_settings),
)
FOUND_BY = {"of_another_version": "config", "of_another_layout": "config", "truncated": "files"}


@pytest.mark.parametrize("damage", [*BROKEN, *DAMAGES.values()], ids=lambda damage: damage.__name__)
def test_what_is_broken_is_one_line(damage, small, tmp_path):
    folder = Path(shutil.copytree(small, tmp_path / "broken"))
    check, *words = damage(folder) if damage in BROKEN else (FOUND_BY.get(damage.__name__, "tensors"), *damage(folder))
    result = command("verify", folder, "--engine", "transformers", "--json")
    assert result.exit_code == 1
    assert result.stderr == ""
    checks = json.loads(result.stdout)
    failed = [c for c in checks if c["result"] == FAILED]
    assert [c["check"] for c in failed] == [check]
    assert all(word in failed[0]["detail"] for word in words)
    assert "\n" not in failed[0]["detail"]
    assert checks[-1]["result"] == SKIPPED  # no engine is started on what is broken


def test_wrong_arguments_are_one_line(small, tmp_path):
    for arguments, words in (
        ([tmp_path / "nowhere"], "no such folder"),
        ([small, "--engine", "vlm"], "did you mean 'vllm'"),
        ([small, "--precision", "int8"], "fp32, bf16, fp16"),
        ([small, "--prompts", "0"], "--prompts is 0"),
        ([small, "--long-tokens", "-1"], "--long-tokens is -1"),
    ):
        result = command("verify", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.count("\n") == 1
        assert words in result.stderr


# --- engines --------------------------------------------------------------------------------------------------------


def test_an_engine_that_is_not_there_fails_only_by_name(monkeypatch):
    nowhere = Engine("x", "X", "no_such_package", "LOCUM_X_PYTHON", ".venv-no-such-folder")
    (skipped,) = check_engine(nowhere, None, None, "fp32", 4, named=False)
    (failed,) = check_engine(nowhere, None, None, "fp32", 4, named=True)
    assert (skipped.result, failed.result) == (SKIPPED, FAILED)
    assert "not there" in skipped.detail
    assert "LOCUM_X_PYTHON" in skipped.detail
    monkeypatch.setenv("LOCUM_X_PYTHON", sys.executable)
    assert nowhere.python() == Path(sys.executable)
    monkeypatch.setenv("LOCUM_X_PYTHON", "/no/such/python")
    with pytest.raises(OptionError, match="LOCUM_X_PYTHON=/no/such/python is not there"):
        nowhere.python()


def test_no_interpreter_is_taken_from_the_current_folder(tmp_path, monkeypatch):
    """It may be a checkpoint's, which anybody may have made."""
    for _, engine in ENGINES.items():
        python = tmp_path / (engine.folder or "none") / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text("#!/bin/sh")
        python.chmod(0o755)
    before = {name: engine.python() for name, engine in ENGINES.items()}
    monkeypatch.chdir(tmp_path)
    assert {name: engine.python() for name, engine in ENGINES.items()} == before
    assert not [path for path in before.values() if path and path.is_relative_to(tmp_path)]


def test_engines_by_name():
    assert list(chosen_engines(None)) == list(ENGINES) == ["llamacpp", "transformers", "vllm"]
    assert list(chosen_engines("llamacpp, transformers")) == ["llamacpp", "transformers"]


def test_what_an_engine_says_before_it_dies_is_told(tmp_path):
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho first >&2\necho out of luck >&2\nexit 3\n")
    dying.chmod(0o755)
    with pytest.raises(EngineError, match=r"ended with code 3: first \| out of luck"):
        ask(ENGINES["vllm"], dying, {}, tmp_path)


def test_a_container_is_nothing_for_llamacpp(small):
    result = command(
        "verify", small, "--engine", "llamacpp", "--prompts", 1, "--new-tokens", 1, "--long-tokens", 0, "--json"
    )
    *_, last = json.loads(result.stdout)
    assert (last["engine"], last["result"], result.exit_code) == ("llamacpp", FAILED, 1)


# --- comparing ------------------------------------------------------------------------------------------------------


def promise_of(steps_BSV: torch.Tensor) -> Promise:
    tokens = steps_BSV.argmax(-1).tolist()
    return Promise("the test", torch.zeros(len(tokens), 3), steps_BSV, tokens, steps_BSV)


def answer_of(values: torch.Tensor, tokens=(), ids=None) -> Answer:
    return Answer("1", values, ids, list(tokens), {}, None, None, 0.0)


def test_logits_are_compared_one_by_one():
    promise = promise_of(torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)))
    off = promise.logits_BSV.clone()
    off[1, 2, 5] += 0.1
    compare_logits(promise, answer_of(off), 0.11)
    with pytest.raises(CheckpointError, match=r"at most 0\.1 \(allowed 0\.09\)"):
        compare_logits(promise, answer_of(off), 0.09)
    off[0, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="at most inf"):
        compare_logits(promise, answer_of(off), 1e9)
    with pytest.raises(CheckpointError, match="shape"):
        compare_logits(promise, answer_of(off[:, :2]), 1.0)


def test_log_probabilities_of_the_likeliest_are_compared():
    promise = promise_of(torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)))
    values, ids = promise.logits_BSV.log_softmax(-1).topk(4)
    assert "log-probabilities" in compare_logits(promise, answer_of(values, ids=ids), 1e-6)
    with pytest.raises(CheckpointError):
        compare_logits(promise, answer_of(values, ids=ids.flip(-1)), 1e-2)


def test_likeliest_tokens_are_compared_in_16_bits():
    logits_BSV = torch.tensor([[[5.0, 1.0, 0.0], [2.0, 1.999, 0.0], [0.0, 1.0, 7.0]]])
    promise = dataclasses.replace(promise_of(logits_BSV), agree=0.99)
    off = logits_BSV.clone()
    off[0, 1, 1] = 2.5  # which was nearly the likeliest: rounding to bfloat16 decides
    assert "100.0%" in compare_likeliest(promise, answer_of(off), torch.bfloat16)
    off[0, 0, 1] = 6.0
    with pytest.raises(CheckpointError, match=r"same in 66\.7% \(at least 99\.0%\)"):
        compare_likeliest(promise, answer_of(off), torch.bfloat16)
    less = dataclasses.replace(promise, agree=0.6)
    assert compare_likeliest(less, answer_of(off, ids=off.argsort(descending=True)), torch.bfloat16)
    off[0, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite"):
        compare_likeliest(less, answer_of(off), torch.bfloat16)


def test_tokens_may_part_at_a_tie_only():
    steps_BSV = torch.tensor([[[3.0, 2.995, 0.0], [0.0, 5.0, 1.0]]])
    promise = promise_of(steps_BSV)
    assert "the same" in compare_tokens(promise, answer_of(steps_BSV, [[0, 1]]), 0.01)
    assert "1 continuations that part at a tie" in compare_tokens(promise, answer_of(steps_BSV, [[1, 2]]), 0.01)
    with pytest.raises(CheckpointError, match="token 2 in place of 1 after 1 tokens"):
        compare_tokens(promise, answer_of(steps_BSV, [[0, 2]]), 0.01)


# --- loops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [1, 2, 5, 32])
def test_loops_are_found_at_the_end_alone(period):
    times = max(4, -(-16 // period))
    loop, before = list(range(period)) * times, list(range(100, 140))
    assert ends_in_loop(before + loop)
    assert not ends_in_loop(loop + before)
    assert not ends_in_loop(before + loop[: max(4 * period, 16) - 1])
    assert not ends_in_loop(before)


def test_chance_is_fishers():
    for ours, theirs in ((0, 0), (5, 0), (9, 3), (3, 9), (32, 32), (32, 0)):
        expected = fisher_exact([[ours, 32 - ours], [theirs, 32 - theirs]], alternative="greater").pvalue
        assert more_than_chance(ours, theirs, 32) == pytest.approx(expected, rel=1e-9)


def test_errors_are_locums():
    assert issubclass(EngineError, LocumError)


@pytest.mark.parametrize(
    ("of_original", "named", "result"), [(True, False, SKIPPED), (True, True, FAILED), (False, False, FAILED)]
)
def test_an_engine_that_refuses_the_original_too_says_nothing_of_the_checkpoint(
    of_original, named, result, small, monkeypatch
):
    asked = []

    def refuses(engine, python, job, workdir):
        if engine.name == "transformers":
            asked.append(job["folder"])
        if of_original or job["folder"] == str(small.resolve()):
            raise EngineError("it refused it: head_dim=8")

    monkeypatch.setattr(verification, "ask", refuses)
    checks = locum.verify(small, engine="transformers" if named else None, **FEW)
    (logits,) = (check for check in checks if (check.check, check.engine) == ("logits", "transformers"))
    assert logits.result == result and "head_dim=8" in logits.detail
    assert ("of the original" in logits.detail) == of_original
    assert asked[0] == str(small.resolve()) and len(asked) == 2 and asked[1] != asked[0]
