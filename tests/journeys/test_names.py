"""What a run writes may be published: nothing in it says where it was made, or by whom; yet everything is found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import locum
from locum.checkpoints.notes import named_original, original_of
from locum.checkpoints.read import fingerprint_checkpoint
from locum.places import remember
from making.checkpoints import locum as command
from making.checkpoints import tree, write_checkpoint, write_rows, write_text

USER = "zaphodbeeblebrox"
SHORT = "--length 32 --batch-size 1"
CHAIN = f"""
calibrate MODEL --data code=WORK/a.txt@2 --data WORK/b.jsonl --tokens 1024 {SHORT} --out WORK/stats.safetensors
plan WORK/stats.safetensors --method lightmoe --remove 0.4 --rank 2 --out WORK/plan.json
apply MODEL --plan WORK/plan.json --out WORK/small
recover WORK/small --how lora --data WORK/a.txt --steps 1 {SHORT} --validation-tokens 64 --out WORK/recovered
eval WORK/recovered --data code=WORK/a.txt --tokens 128 {SHORT} --resamples 5 --out WORK/results.jsonl
report WORK/results.jsonl WORK/stats.safetensors --out WORK/report.html
compress MODEL --method compressed-experts --main 1 --out WORK/routed
recover WORK/routed --how vectors --adapter-only --data WORK/a.txt --steps 1 {SHORT} --validation-tokens 64
 --out WORK/adapter
"""
MORE = f"""
search MODEL --data WORK/a.txt --tokens 512 {SHORT} --sample 64 --generations 1 --population 4 --out WORK/searched
eval WORK/adapter --data WORK/a.txt --tokens 128 {SHORT} --resamples 5 --out WORK/results.jsonl --append --card
export WORK/recovered --to stock --out WORK/whole
export WORK/recovered --to remote-code --out WORK/remote
compress MODEL --method prune --data WORK/b.jsonl --tokens 1024 {SHORT} --remove 0.25 --recover lora --recover-steps 1
 --recover-length 32 --out WORK/pruned
compress MODEL --method mone --data WORK/b.jsonl --tokens 1024 {SHORT} --remove 0.25 --statistics WORK/named --out WORK/mone
bench WORK/small --against MODEL --rounds 1 --new-tokens 2 --prompt 4 --batch-sizes 1 --out WORK/bench.json
 --picture WORK/bench.html
"""


def run(lines: str, folder: Path) -> None:
    """Commands in process, with whole paths, by a user with a name of its own."""
    home = folder.parent
    with pytest.MonkeyPatch.context() as patched:
        for name in ("USER", "LOGNAME", "USERNAME"):
            patched.setenv(name, USER)
        patched.setenv("HOME", str(home))
        for line in lines.strip().replace("\n ", " ").splitlines():
            words = line.replace("MODEL", str(home / "models" / "original")).replace("WORK", str(folder)).split()
            patched.setattr("sys.argv", ["locum", *words])
            result = command(*words)
            assert result.exit_code == 0, (line, result.output)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder in which the commands of CHAIN ran. The original lies elsewhere."""
    folder = tmp_path_factory.mktemp("homes") / USER / "work"
    folder.mkdir(parents=True)
    write_checkpoint(folder.parent / "models" / "original", num_experts_per_tok=2)
    write_text(folder / "a.txt")
    write_rows(folder / "b.jsonl")
    run(CHAIN, folder)
    return folder


def check_nothing_is_told(folder: Path) -> None:
    """Paths begin with the folder of the tests; the home folder is below it, and its name is the user's."""
    made = tree(folder)
    private = (USER.encode(), str(folder.parents[1]).encode())
    assert [name for name, content in made.items() if any(words in content for words in private)] == []
    kinds = ("config.json", "README.md", "locum.json", "plan.json", "recovery.jsonl", ".safetensors", ".html")
    assert all(any(name.endswith(kind) for name in made) for kind in kinds)


def test_nothing_that_was_made_says_where_or_by_whom(work):
    check_nothing_is_told(work)


@pytest.mark.journeys
def test_nothing_that_any_command_made_says_where_or_by_whom(work, tmp_path):
    folder = Path(shutil.copytree(work.parent, tmp_path / "homes" / USER)) / "work"
    run(MORE, folder)
    check_nothing_is_told(folder)
    checks = locum.verify(folder / "mone", engine="llamacpp", prompts=1, new_tokens=1, long_tokens=1)
    assert ("original", "ok") in {(check.check, check.result) for check in checks}


def test_the_notes_name_what_a_thing_comes_from(work):
    notes = json.loads((work / "small" / "locum.json").read_text())
    assert notes["original"] == "original" and "--plan plan.json --out small" in notes["command"]
    assert json.loads((work / "recovered" / "locum.json").read_text())["recovered_from"] == "small"
    assert json.loads((work / "plan.json").read_text())["provenance"]["statistics_file"] == "stats.safetensors"
    assert "code=a.txt@2" in locum.load_statistics(work / "stats.safetensors").provenance["command"]
    row = json.loads((work / "results.jsonl").read_text().splitlines()[-1])
    assert row["model"] == "recovered" and row["provenance"]["statistics_file"] == "stats.safetensors"
    assert row["provenance"]["evaluation"]["data"]["sources"][0]["path"] == "a.txt"


# --- found again, or not -----------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Another machine: nothing was seen there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_original_is_found_beside_or_where_it_was_last_seen(work, elsewhere, words, tmp_path, caplog):
    small = shutil.copytree(work / "small", tmp_path / "small")
    assert names_measured(small, words) == {"small"}
    assert "original, is not there: nothing is compared; name it with --against" in caplog.text
    with pytest.raises(locum.OptionError, match=r"made from original, which is not beside it.*--original"):
        locum.recover(small, how="annealed", data=str(words), steps=1, out=tmp_path / "no")
    original = Path(shutil.copytree(work.parent / "models" / "original", tmp_path / "original"))
    assert names_measured(small, words) == {"small", "original"}
    small = Path(shutil.move(small, tmp_path / "deeper" / "small"))
    assert named_original(small).place is None
    assert original_of(small, original, "") == original  # it was given, and is noted
    assert named_original(small).place == original


def names_measured(model, words):
    return {row.model for row in locum.evaluate(model, data=str(words), tokens=64, length=32, resamples=2)}


def test_another_model_of_the_name_is_not_the_original(work, elsewhere, words, tmp_path, caplog):
    small = shutil.copytree(work / "small", tmp_path / "small")
    write_checkpoint(tmp_path / "original", seed=5)
    assert names_measured(small, words) == {"small"} and "or is another" in caplog.text
    with pytest.raises(locum.LocumError, match=r"is not what .* was made from, or has changed since"):
        locum.recover(small, how="annealed", data=str(words), steps=1, out=tmp_path / "no")


def test_notes_of_an_earlier_version_with_whole_paths_work_and_are_not_passed_on(work, elsewhere, words, tmp_path):
    far = Path(shutil.copytree(work.parent / "models" / "original", tmp_path / "far" / "was-here"))
    small = Path(shutil.copytree(work / "small", tmp_path / "small"))
    for name, key, value in (("locum.json", "original", str(far)), ("plan.json", "statistics_file", str(far / "s"))):
        said = json.loads((small / name).read_text())
        (said if name == "locum.json" else said["provenance"])[key] = value
        (small / name).write_text(json.dumps(said))
    asked = {"data": str(words), "steps": 1, "length": 32, "batch_size": 1, "validation_tokens": 64}
    locum.recover(small, how="lora", out=tmp_path / "out" / "recovered", **asked)
    locum.export(small, to="remote-code", out=tmp_path / "out" / "remote")
    made = {name: content for name, content in tree(tmp_path / "out").items() if name != "remote/plan.json"}
    assert not any(str(tmp_path).encode() in content for content in made.values())
    assert named_original(tmp_path / "out" / "recovered").place == far


def test_the_base_of_an_adapter_is_found_as_an_original_is(work, elsewhere, tmp_path):
    adapter = Path(shutil.copytree(work / "adapter", tmp_path / "deep" / "adapter"))
    with pytest.raises(locum.LocumError, match="original, which is not there; put the base beside it"):
        locum.load_model(adapter)
    base = Path(shutil.copytree(work.parent / "models" / "original", tmp_path / "deep" / "original"))
    locum.load_model(adapter)
    remember(fingerprint_checkpoint(base), shutil.move(base, tmp_path / "moved"))
    locum.load_model(adapter)


@pytest.mark.parametrize("where", ["beside", "seen", "given"])
def test_the_statistics_of_a_plan_are_found(where, work, elsewhere, statistics_file, tmp_path):
    model = work.parent / "models" / "original"
    (tmp_path / "plans").mkdir()
    named = shutil.copyfile(work / "stats.safetensors", tmp_path / "named")
    plan = locum.plan(named, method="mone", remove=0.25, out=tmp_path / "plans" / "plan.json")
    assert plan.needs
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(locum.PlanError, match=r"made from named, which is not beside it.*--statistics"):
        locum.apply(model, plan=tmp_path / "plans" / "plan.json", out=tmp_path / "no")
    beside, given = tmp_path / "plans" / "named", {}
    shutil.copyfile(statistics_file, beside)  # others of the name
    if where == "beside":
        shutil.move(named, beside)
    elif where == "seen":
        locum.plan(shutil.move(named, tmp_path / "renamed"), method="prune", remove=0.25)
    else:
        given = {"statistics": named}
    found = locum.apply(model, plan=tmp_path / "plans" / "plan.json", out=tmp_path / "small", **given)
    same = locum.apply(model, plan=plan, statistics=work / "stats.safetensors", out=tmp_path / "same")
    assert (found / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()
