"""The stages together: the same bytes by every way, sizes kept, checkpoints that load in a fresh process."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import locum
from locum.checkpoints.read import fingerprint_checkpoint
from locum.training.loop import Loop
from making.checkpoints import tree, write_checkpoint, write_rows, write_text
from making.tiny_models import CONFIGS, tiny_ids

SHORT = {"tokens": 2048, "length": 64}


def weights_on_disk(folder):
    """Bytes of the tensors in a checkpoint's files, from the files themselves."""
    total = 0
    for file in folder.glob("*.safetensors"):
        size = file.stat().st_size
        total += size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    return total


def test_compress_is_calibrate_plan_apply(checkpoint, words, tmp_path):
    asked = {"method": "lightmoe", "remove": 0.4, "rank": 2}
    locum.compress(checkpoint, data=str(words), out=tmp_path / "one", seed=3, **asked, **SHORT)
    locum.calibrate(checkpoint, data=str(words), out=tmp_path / "stats", seed=3, **SHORT)
    locum.plan(tmp_path / "stats", out=tmp_path / "plan.json", **asked)
    locum.apply(checkpoint, plan=tmp_path / "plan.json", out=tmp_path / "three", seed=3)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    assert locum.load_plan(tmp_path / "one" / "plan.json").id == locum.load_plan(tmp_path / "plan.json").id
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "plan.json", "stats", "three"]


def test_compress_writes_the_statistics_it_is_told_to_and_uses_them_again(checkpoint, words, tmp_path, monkeypatch):
    asked = {"data": str(words), "method": "mone", "remove": 0.25, "statistics": tmp_path / "stats", **SHORT}
    locum.compress(checkpoint, out=tmp_path / "one", **asked)
    before = (tmp_path / "stats").read_bytes()
    monkeypatch.setattr("locum.stages.calibration.calibrate_model", None)
    locum.compress(checkpoint, out=tmp_path / "two", **asked)
    assert (tmp_path / "stats").read_bytes() == before
    assert load_file(tmp_path / "one" / "model.safetensors").keys()
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()
    plan = locum.load_plan(tmp_path / "one" / "plan.json")
    assert plan.needs
    assert plan.provenance["statistics_file"] == "stats"


@pytest.fixture(scope="module")
def cut_short(checkpoint, words, tmp_path_factory):
    """A `compress` that failed after calibration, and what it was asked. Tests copy its folder."""
    folder = tmp_path_factory.mktemp("cut")
    asked = {"data": str(words), "method": "prune", "remove": 0.25, **SHORT}
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("locum.stages.application.resumable", _press)
        locum.compress(checkpoint, out=folder / "out", **asked)
    assert [p.name for p in folder.iterdir()] == [".out.statistics.safetensors"]
    return folder, asked


def _press(*given, **named):
    raise KeyboardInterrupt


def test_compress_goes_on_from_the_statistics_that_it_made(checkpoint, cut_short, tmp_path, monkeypatch):
    folder, asked = cut_short
    locum.compress(checkpoint, out=tmp_path / "whole", **asked)
    shutil.copytree(folder, tmp_path / "again")
    monkeypatch.setattr("locum.stages.calibration.calibrate_model", None)
    locum.compress(checkpoint, out=tmp_path / "again" / "out", **asked | {"remove": 0.25})
    one, two = (tmp_path / place / "model.safetensors" for place in ("whole", "again/out"))
    assert one.read_bytes() == two.read_bytes()
    assert [p.name for p in (tmp_path / "again").iterdir()] == ["out"]


def test_compress_goes_on_from_the_checkpoint_that_it_trains(checkpoint, words, tmp_path, monkeypatch):
    asked = {"data": str(words), "remove": 0.4, "rank": 2, "recover": "lora", "recover_steps": 2, **SHORT}
    asked |= {"recover_batch_size": 1, "recover_length": 64, "recover_checkpoint_every": 1}
    locum.compress(checkpoint, out=tmp_path / "whole" / "out", **asked)
    step = Loop.one_step
    with monkeypatch.context() as patched:
        patched.setattr(Loop, "one_step", lambda loop, parts: _press() if loop.step else step(loop, parts))
        with pytest.raises(KeyboardInterrupt):
            locum.compress(checkpoint, out=tmp_path / "out", **asked)
    assert {p.name for p in tmp_path.iterdir()} == {"whole", ".out.recover", ".out.unrecovered"}
    monkeypatch.setattr("locum.stages.application.Rewriting", None)  # neither calibrates nor applies again
    monkeypatch.setattr("locum.stages.calibration.calibrate_model", None)
    locum.compress(checkpoint, out=tmp_path / "out", **asked)
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "out"}
    one, two = (tmp_path / place / "model.safetensors" for place in ("whole/out", "out"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    "changed",
    [{"rank": 1}, *(pytest.param(x, marks=pytest.mark.journeys) for x in ({"remove": 0.3}, {"recover_steps": 3}))],
    ids=str,
)
def test_compress_trains_what_its_options_make(changed, checkpoint, words, tmp_path, monkeypatch, caplog):
    asked = {"data": str(words), "remove": 0.4, "rank": 2, "recover": "lora", "recover_steps": 2, **SHORT}
    asked |= {"recover_batch_size": 1, "recover_length": 64, "recover_checkpoint_every": 1}
    step = Loop.one_step
    with monkeypatch.context() as patched:
        patched.setattr(Loop, "one_step", lambda loop, parts: _press() if loop.step else step(loop, parts))
        with pytest.raises(KeyboardInterrupt):
            locum.compress(checkpoint, out=tmp_path / "out", **asked)
    locum.compress(checkpoint, out=tmp_path / "out", **asked | changed)
    assert "interrupted run of something else" in caplog.text
    locum.compress(checkpoint, out=tmp_path / "whole" / "out", **asked | changed)
    one, two = (tmp_path / place / "model.safetensors" for place in ("whole/out", "out"))
    assert one.read_bytes() == two.read_bytes()


OTHER_QUESTIONS = [
    ({"tokens": 512}, "data_fingerprint was"),
    ({"length": 32}, "data_fingerprint was"),
    ({"seed": 5}, "data_fingerprint was"),
    ({"batch_size": 3}, "batch_size was"),
    ({"data": "other"}, "data_fingerprint was"),
    ({"model": "other"}, "model_fingerprint was"),
    ({"method": "decompose", "start": "whitened"}, "needs was"),
    ({"method": "moe-i2"}, "method was None and is 'moe-i2'"),
]


@pytest.mark.parametrize(("changed", "said"), OTHER_QUESTIONS, ids=str)
def test_compress_calibrates_anew_for_another_question(
    changed, said, checkpoint, cut_short, tmp_path, monkeypatch, caplog
):
    shutil.copytree(cut_short[0], tmp_path / "again")
    asked = cut_short[1] | changed
    if changed.get("data"):
        asked["data"] = str(write_text(tmp_path / "b.txt", seed=9))
    model = write_checkpoint(tmp_path / "model", seed=9) if asked.pop("model", None) else checkpoint
    monkeypatch.setattr("locum.stages.calibration.calibrate_model", _press)
    with pytest.raises(KeyboardInterrupt):
        locum.compress(model, out=tmp_path / "again" / "out", **asked)
    assert said in caplog.text and "begins afresh" in caplog.text
    assert [p.name for p in (tmp_path / "again").iterdir()] == [".out.statistics.safetensors.aside"]


# --- statistics that are kept for the next run ------------------------------------------------------------------------

USED = "the statistics of an earlier run are used"


@pytest.fixture
def compressed_once(checkpoint, words, tmp_path, monkeypatch):
    """What was asked of a `compress` that ended; another one that calibrates is interrupted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = {"data": str(words), "method": "prune", "remove": 0.5, **SHORT}
    locum.compress(checkpoint, out=tmp_path / "first" / "out", **asked)
    assert [p.name for p in (tmp_path / "first").iterdir()] == ["out"]
    monkeypatch.setattr("locum.stages.calibration.calibrate_model", _press)
    return asked


def kept_files(tmp_path):
    return sorted((tmp_path / "cache" / "locum" / "statistics").iterdir())


def test_the_same_question_is_calibrated_once(compressed_once, checkpoint, tmp_path, monkeypatch, caplog):
    asked = compressed_once | {"remove": 0.25}
    out = locum.compress(checkpoint, out=tmp_path / "second" / "out", **asked)
    assert USED in caplog.text and [p.name for p in (tmp_path / "second").iterdir()] == ["out"]
    (file,) = kept_files(tmp_path)
    assert not file.stat().st_mode & 0o077
    locum.compress(checkpoint, out=tmp_path / "third", **asked | {"score": "frequency"})  # reads the same sums
    plan = locum.load_plan(out / "plan.json")
    assert plan.provenance["statistics"] == locum.load_statistics(file).id
    monkeypatch.undo()
    whole = locum.compress(checkpoint, out=tmp_path / "whole", statistics=tmp_path / "new", **asked)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("changed", [changed for changed, _ in OTHER_QUESTIONS], ids=str)
def test_another_question_is_calibrated_anew(changed, compressed_once, checkpoint, tmp_path, caplog):
    asked = compressed_once | changed
    if changed.get("data"):
        asked["data"] = str(write_text(tmp_path / "b.txt", seed=9))
    model = write_checkpoint(tmp_path / "model", seed=9) if asked.pop("model", None) else checkpoint
    with pytest.raises(KeyboardInterrupt):
        locum.compress(model, out=tmp_path / "again", **asked)
    assert USED not in caplog.text and len(kept_files(tmp_path)) == 1


@pytest.mark.parametrize("what", ["damaged", "of others", "other code", "gone"])
def test_what_cannot_be_trusted_is_calibrated_anew(what, compressed_once, checkpoint, tmp_path, monkeypatch):
    (file,) = kept_files(tmp_path)
    if what == "damaged":
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "of others":
        file.chmod(0o666)
    elif what == "gone":
        shutil.rmtree(tmp_path / "cache")
    else:
        monkeypatch.setattr("locum.stages.kept._code", lambda: "another version")
    with pytest.raises(KeyboardInterrupt):
        locum.compress(checkpoint, out=tmp_path / "again", **compressed_once)


def test_a_search_is_kept_too(checkpoint, words, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = {"data": str(words), "method": "moe-i2", "sample": 64, "generations": 1, "population": 4, **SHORT}
    locum.compress(checkpoint, out=tmp_path / "one", remove=0.5, **asked)
    monkeypatch.setattr("locum.stages.calibration.calibrate_model", _press)
    locum.compress(checkpoint, out=tmp_path / "two", remove=0.3, **asked)
    with pytest.raises(KeyboardInterrupt):
        locum.compress(checkpoint, out=tmp_path / "three", remove=0.3, **asked | {"generations": 2})


def test_only_the_newest_are_kept_and_none_that_are_too_large(checkpoint, words, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = {"data": str(words), "method": "prune", "remove": 0.5, **SHORT}
    monkeypatch.setattr("locum.stages.kept.MOST_FILES", 2)
    for tokens in (256, 512, 1024):
        locum.compress(checkpoint, out=tmp_path / f"{tokens}", **asked | {"tokens": tokens})
    assert [locum.load_statistics(file).tokens for file in sorted(kept_files(tmp_path), key=_changed)] == [512, 1024]
    first = kept_files(tmp_path)[0]
    monkeypatch.setattr("locum.stages.kept.MOST_BYTES", first.stat().st_size + 100)
    first.with_name(f".{first.name}.part-{2**22 + 1}").write_bytes(b"of a killed run")
    locum.compress(checkpoint, out=tmp_path / "2048", **asked | {"tokens": 2048})
    assert [locum.load_statistics(file).tokens for file in kept_files(tmp_path)] == [2048]
    monkeypatch.setattr("locum.stages.kept.MOST_BYTES", 100)
    locum.compress(checkpoint, out=tmp_path / "128", **asked | {"tokens": 128})
    assert "to keep them, name a file with --statistics" in caplog.text and len(kept_files(tmp_path)) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"cache", "128", "256", "512", "1024", "2048"}


def _changed(file):
    return file.stat().st_mtime_ns


def test_without_a_cache_nothing_is_kept_and_nothing_fails(checkpoint, words, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    asked = {"data": str(words), "method": "prune", "remove": 0.5, **SHORT}
    for out in ("one", "two"):
        locum.compress(checkpoint, out=tmp_path / out, **asked)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "one", "two"}


@pytest.mark.parametrize("content", [b"", b"half"])
def test_damaged_partial_statistics_are_set_aside_with_a_word(content, checkpoint, words, tmp_path, caplog):
    (tmp_path / ".out.partial").write_bytes(content)
    locum.calibrate(checkpoint, data=str(words), out=tmp_path / "out", **SHORT)
    assert {p.name for p in tmp_path.iterdir()} == {"out", ".out.partial.aside"}
    assert ".out.partial cannot be gone on from" in caplog.text and "begins afresh" in caplog.text


def test_statistics_files_add_up_in_a_plan(checkpoint, words, tmp_path):
    rows = write_rows(tmp_path / "b.jsonl")
    one = locum.calibrate(checkpoint, data=f"a={words}", out=tmp_path / "one", **SHORT)
    two = locum.calibrate(checkpoint, data=f"b={rows}", out=tmp_path / "two", **SHORT)
    plan = locum.plan([tmp_path / "one", tmp_path / "two"], remove=0.4, rank=2)
    assert plan.layers == locum.plan(one + two, remove=0.4, rank=2).layers
    assert plan.provenance["statistics_file"] == ["one", "two"]
    assert (one + two).domains == ("a", "b")


@pytest.mark.parametrize(
    ("method", "options", "share"),
    [
        ("prune", {"score": "reap"}, 0.8),
        ("prune", {"budget": "global"}, 0.85),
        ("lightmoe", {"rank": 2}, 0.85),
        ("replace", {"rank": 2, "shared": False}, 0.85),
        ("mone", {}, 0.8),
    ],
)
def test_what_was_to_fit_fits(method, options, share, checkpoint, statistics_file, tmp_path):
    limit = int(weights_on_disk(checkpoint) * share)
    plan = locum.plan(statistics_file, method=method, fit=str(limit), **options)
    out = locum.apply(checkpoint, plan=plan, statistics=statistics_file, out=tmp_path / "fits")
    assert weights_on_disk(out) <= limit
    assert weights_on_disk(out) == plan.size(locum.read_shape(checkpoint)).bytes == locum.inspect(out)["bytes"]


def test_the_largest_plan_that_fits_is_taken(checkpoint, statistics_file):
    shape = locum.read_shape(checkpoint)
    whole = locum.plan(statistics_file, method="prune", fit=str(shape.bytes))
    assert all(layer.is_identity for layer in whole.layers)
    smaller = locum.plan(statistics_file, method="prune", fit=str(shape.bytes - 1))
    assert [len(layer.survivors) for layer in smaller.layers] == [7, 7]


def test_a_fingerprint_is_of_the_content(checkpoint, tmp_path, monkeypatch):
    """Neither where a checkpoint lies nor how its path is written changes it; one weight does."""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    prints = {fingerprint_checkpoint(path) for path in (checkpoint, copy, "copy", "./copy/")}
    assert len(prints) == 1
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.gate.weight"] += 0.5
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert fingerprint_checkpoint(copy) not in prints


def test_a_plan_for_the_base_model_serves_its_fine_tune(plan_file, tmp_path):
    tuned = write_checkpoint(tmp_path / "tuned", seed=7)
    out = locum.apply(tuned, plan=plan_file, out=tmp_path / "small")
    assert locum.inspect(out)["compressed"]


def test_outputs_carry_their_provenance(small, plan_file, statistics_file, checkpoint):
    from locum.checkpoints.notes import read_notes

    print_of_model = fingerprint_checkpoint(checkpoint)
    notes, plan = read_notes(small), locum.load_plan(plan_file)
    assert notes["original_fingerprint"] == print_of_model
    assert notes["plan"] == plan.id == locum.load_plan(small / "plan.json").id
    assert plan.provenance["model_fingerprint"] == print_of_model
    statistics = locum.load_statistics(statistics_file)
    known = statistics.provenance
    assert statistics.origin.model_fingerprint == print_of_model
    for made in (notes, plan.provenance, known):
        assert {"versions", "command", "time"} <= set(made)
    card = (small / "README.md").read_text()
    assert "import locum" in card
    assert f"{locum.inspect(small)['bytes']:,}" in card


# --- recovery, evaluation and a fresh process -----------------------------------------------------------------------

FRESH = """
import sys
if {import_locum}:
    import locum
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
assert {import_locum} or "locum" not in sys.modules
with torch.no_grad():
    torch.save(model.eval()(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.fixture(scope="module")
def recovered(small, words, tmp_path_factory):
    out = tmp_path_factory.mktemp("recovered") / "recovered"
    said = locum.recover(small, data=str(words), length=64, batch_size=2, steps=3, out=out)
    assert said["out"] == str(out)
    return out


@pytest.fixture(scope="module")
def pruned_recovered(pruned, words, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned-recovered") / "recovered"
    locum.recover(pruned, how="lora", data=str(words), length=64, batch_size=2, steps=3, out=out)
    return out


def fresh_logits(folder, import_locum, tmp_path):
    torch.save(tiny_ids(), tmp_path / "ids.pt")
    code = FRESH.format(import_locum=import_locum)
    arguments = [sys.executable, "-c", code, folder, tmp_path / "ids.pt", tmp_path / "logits.pt"]
    subprocess.run(arguments, check=True, capture_output=True, text=True)
    return torch.load(tmp_path / "logits.pt")


def live_logits(folder):
    with torch.no_grad():
        return locum_model(folder)(tiny_ids()).logits


def locum_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.journeys
def test_a_recovered_checkpoint_loads_in_a_fresh_process(recovered, small, tmp_path):
    assert torch.equal(fresh_logits(recovered, True, tmp_path), live_logits(recovered))
    assert not torch.equal(live_logits(recovered), live_logits(small))
    assert weights_on_disk(recovered) == weights_on_disk(small)  # same layout, same plan
    assert locum.load_plan(recovered / "plan.json").id == locum.load_plan(small / "plan.json").id


@pytest.mark.journeys
def test_a_recovered_pruned_checkpoint_needs_no_locum(pruned_recovered, pruned, tmp_path):
    assert torch.equal(fresh_logits(pruned_recovered, False, tmp_path), live_logits(pruned_recovered))
    with (
        safe_open(pruned / "model.safetensors", "pt") as one,
        safe_open(pruned_recovered / "model.safetensors", "pt") as two,
    ):
        assert set(one.keys()) == set(two.keys())
    assert "quantization_config" not in (pruned_recovered / "config.json").read_text()


def test_evaluation_finds_the_original_by_itself(recovered, checkpoint, words, tmp_path):
    asked = {"data": f"code={words}", "length": 64, "tokens": 512}
    rows = locum.evaluate(recovered, out=tmp_path / "rows.jsonl", **asked)
    named = locum.evaluate(recovered, against=checkpoint, **asked)
    assert [(r.model, r.metric, r.value) for r in rows] == [(r.model, r.metric, r.value) for r in named]
    assert {row.model for row in rows} == {"original", "recovered"}
    assert {row.plan for row in rows if row.model == "recovered"} == {locum.load_plan(recovered / "plan.json").id}
    found = next(row.provenance for row in rows if row.model == "recovered")
    assert found["stage"] == "recovered"
    assert found["method"] == "lightmoe"
    assert found["bytes"] == weights_on_disk(recovered)
    assert found["recovery_log"] == "recovered/recovery.jsonl"
    page = locum.report(tmp_path / "rows.jsonl", out=tmp_path / "report.html").read_text()
    assert "recovered" in page


ALWAYS = ("deepseek_v2", "gpt_oss", "olmoe")  # the others are among the journeys


@pytest.mark.parametrize(
    "model_type", [pytest.param(x, marks=() if x in ALWAYS else pytest.mark.journeys) for x in sorted(CONFIGS)]
)
def test_the_whole_way_for_every_family(model_type, words, tmp_path):
    """Compressed, recovered and measured through files alone; sizes are what the plan promised."""
    model = write_checkpoint(tmp_path / "model", model_type)
    shape, data = locum.read_shape(model), str(words)
    assert locum.inspect(model)["bytes"] == weights_on_disk(model)
    for method, options in (("lightmoe", {"rank": 2, "remove": 0.4}), ("prune", {"remove": 0.25})):
        out = tmp_path / method
        locum.compress(model, data=data, method=method, out=out, statistics=tmp_path / "stats", **options, **SHORT)
        promised = locum.load_plan(out / "plan.json").size(shape)
        assert weights_on_disk(out) == promised.bytes == locum.inspect(out)["bytes"]
        assert locum.inspect(out)["expert_parameters"] == promised.expert_parameters
        how = "annealed" if method == "lightmoe" else "lora"
        again = tmp_path / f"{method}-recovered"
        locum.recover(out, how=how, data=data, length=64, batch_size=1, steps=1, out=again)
        assert weights_on_disk(again) == promised.bytes
        rows = locum.evaluate(again, data=data, length=64, tokens=256)
        assert {row.model for row in rows} == {"original", again.name}


def test_a_model_against_itself_differs_in_nothing(checkpoint, words):
    rows = locum.evaluate(checkpoint, against=checkpoint, data=str(words), length=64, tokens=512, name="same")
    values = {(row.model, row.metric): row.value for row in rows if row.domain == "all"}
    assert values["same", "kl"] == 0
    assert values["same", "top1_agreement"] == 1
    assert values["same", "loss"] == values["original", "loss"]


def test_recovery_goes_on_from_a_recovered_checkpoint(recovered, words, tmp_path):
    asked = {"data": str(words), "length": 64, "batch_size": 2, "steps": 1}
    again = locum.recover(recovered, how="lora", out=tmp_path / "again", **asked)
    assert again["steps"] == 1
    assert locum.inspect(tmp_path / "again")["bytes"] == weights_on_disk(recovered)


def test_validation_reads_no_more_than_it_is_given(small, words, tmp_path, monkeypatch):
    asked, load = {}, locum.data.tokens.load_tokens

    def count(*arguments, **options):
        tokens = load(*arguments, **options)
        asked[options["split"]] = int(tokens.attention_BS.sum())
        return tokens

    monkeypatch.setattr("locum.stages.recovery.load_tokens", count)
    recipe = {"data": str(words), "length": 64, "batch_size": 1, "steps": 1}
    locum.recover(small, out=tmp_path / "all", **recipe)
    everything = asked["validation"]
    locum.recover(small, out=tmp_path / "few", validation_tokens=100, **recipe)
    assert asked["validation"] <= 100 < everything


def test_annealing_that_has_ended_needs_no_original(small, words, tmp_path, monkeypatch):
    """With end_fraction 0 nothing of the original is used, so it need not be there, nor ever have been seen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = shutil.copytree(small, tmp_path / "copy")
    notes = (copy / "locum.json").read_text().replace('"original":', '"was":')
    (copy / "locum.json").write_text(notes)
    asked = {"data": str(words), "length": 64, "batch_size": 2, "steps": 1, "how": "annealed"}
    with pytest.raises(locum.OptionError, match="name the original checkpoint with --original"):
        locum.recover(copy, out=tmp_path / "no", **asked)
    locum.recover(copy, out=tmp_path / "yes", end_fraction=0.0, **asked)


def test_reading_changes_nothing(checkpoint, words, small, statistics_file, plan_file, tmp_path):
    before = [tree(folder) for folder in (checkpoint, small)]
    locum.inspect(small)
    locum.diff(plan_file, plan_file)
    locum.evaluate(small, data=str(words), length=64, tokens=256)
    assert [tree(folder) for folder in (checkpoint, small)] == before
