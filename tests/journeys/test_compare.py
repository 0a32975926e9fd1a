"""`compare`: the numbers are those of the single commands, an interrupt loses nothing, and nonsense is refused first."""

from __future__ import annotations

import json

import pytest

import locum
from locum.errors import PlanError
from locum.measure import residuals
from locum.measure.rows import read_rows
from locum.stages import comparison
from making.checkpoints import locum as run
from making.checkpoints import tree, write_text

SHORT = {"tokens": 2048, "length": 64, "measured": 2048}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return [f"{name}={write_text(folder / f'{name}.txt', seed=seed)}" for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def compared(checkpoint, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    asked = {"methods": "mone", "remove": "0.25,0.5", "seeds": 2, "leave_out": "two"}
    return out, asked, locum.compare(checkpoint, data=text, out=out, **asked, **SHORT)


def test_numbers_are_those_of_the_commands(checkpoint, text, compared, tmp_path):
    out, _, result = compared
    locum.calibrate(checkpoint, data=text[:1], out=tmp_path / "s", seed=1, tokens=2048, length=64, gram=False)
    statistics, shape = locum.load_statistics(tmp_path / "s"), locum.read_shape(checkpoint)
    fit = shape.bytes - shape.bytes_of_experts // 2
    locum.plan(statistics, method="mone", fit=str(fit), out=tmp_path / "plan")
    locum.apply(checkpoint, plan=tmp_path / "plan", statistics=tmp_path / "s", out=tmp_path / "small", seed=1)
    measured = {"length": 64, "tokens": 2048, "split": "test", "seed": 0}
    rows = locum.evaluate(tmp_path / "small", data=text, against=checkpoint, name="mone, 0.5", **measured)
    ours = {(r.model, r.domain, r.metric): r.value for r in read_rows(out / "results.jsonl") if r.seed == 1}
    assert len(rows) > 20
    for row in rows:
        if row.model != "original":
            assert ours[row.model, row.domain, row.metric] == row.value
    (group,) = (g for g in result["groups"] if g["remove"] == 0.5)
    (mone,) = (row for row in group["rows"] if row["name"] == "mone")
    lost = {row.domain: row.value for row in rows if row.metric == "loss_delta"}
    assert mone["by_seed"][1] == pytest.approx(lost["all"]) and mone["bytes"] <= fit
    assert mone["left_out"].keys() == {"two"} and mone["worst_domain"][0] in ("one", "two")
    of_seeds = [
        row.value
        for row in read_rows(out / "results.jsonl")
        if (row.model, row.domain, row.metric) == ("mone, 0.5", "one", "loss_delta")
    ]
    assert len(of_seeds) == 2 and mone["seen"][0] == pytest.approx(sum(of_seeds) / 2)


def test_what_it_says(compared):
    out, _, result = compared
    said = json.loads(json.dumps(result))
    assert json.loads((out / "comparison.json").read_text()) == {k: v for k, v in said.items() if k != "report"}
    assert sorted(path.name for path in out.iterdir()) == [
        "comparison.json",
        "measured.jsonl",
        "report.html",
        "results.jsonl",
    ]
    assert [group["remove"] for group in result["groups"]] == [0.25, 0.5]
    for group in result["groups"]:
        rows = {row["name"]: row for row in group["rows"]}
        assert rows.keys() == {"mone", "prune:score=random"}
        assert [row["loss_delta"][0] for row in group["rows"]] == sorted(row["loss_delta"][0] for row in group["rows"])
        assert [row["name"] for row in group["rows"] if row["against_random"] is None] == ["prune:score=random"]
        last = group["rows"][-1]
        assert last["better_than_next"] is None and all(0 <= r["better_than_next"] <= 1 for r in group["rows"][:-1])
    originals = {(r.domain, r.metric) for r in read_rows(out / "results.jsonl") if r.model == "original"}
    assert len([r for r in read_rows(out / "results.jsonl") if r.model == "original"]) == len(originals)


@pytest.mark.journeys
def test_methods_in_few_bits_have_the_same_bytes_and_a_chance_of_their_own(checkpoint, text, tmp_path):
    """Against the single commands: in 4 bits of a tiny model, whose groups are not full, more experts stay."""
    asked = {"methods": "prune:score=reap", "remove": "0.7", "bits": "4", "seeds": 1}
    result = locum.compare(checkpoint, data=text, out=tmp_path / "out", **asked, **SHORT)
    shape, (group,) = locum.read_shape(checkpoint), result["groups"]
    fit, rows = shape.bytes - int(0.7 * shape.bytes_of_experts), {row["name"]: row for row in group["rows"]}
    few = "prune:score=reap:bits=4"
    assert rows.keys() == {"prune:score=reap", few, "prune:score=random", "prune:score=random:bits=4"}
    assert all(row["bytes"] <= fit for row in rows.values())
    alone = {row["name"] for row in group["rows"] if row["against_random"] is None}
    assert alone == {"prune:score=random", "prune:score=random:bits=4"}
    given = {"data": text, "tokens": 2048, "length": 64, "seed": 0}
    locum.compress(checkpoint, method="prune", score="reap", fit=str(fit), bits="4", out=tmp_path / "small", **given)
    measured = {"length": 64, "tokens": 2048, "split": "test", "seed": 0}
    (lost,) = (
        row.value
        for row in locum.evaluate(tmp_path / "small", data=text, against=checkpoint, **measured)
        if (row.metric, row.domain) == ("loss_delta", "all")
    )
    assert rows[few]["by_seed"] == pytest.approx([lost])
    assert (
        rows[few]["kl"] < rows["prune:score=reap"]["kl"]
    )  # all experts in 4 bits are nearer to the original than few whole ones


@pytest.mark.journeys
def test_a_method_whose_statistics_this_model_has_not_is_refused_alone(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(residuals, "_norms", lambda *_: [])  # as of a family without a norm in front of its experts
    result = locum.compare(
        checkpoint, data=text, out=tmp_path / "out", methods="layer-drop,mone", remove="0.5", seeds=1, **SHORT
    )
    (group,) = result["groups"]
    assert {"mone", "prune:score=random"} <= {row["name"] for row in group["rows"] if "refused" not in row}
    said = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "no norm in front" in json.dumps(said) and "layer-drop" in json.dumps(said)


@pytest.mark.parametrize("after", [3, *(pytest.param(n, marks=pytest.mark.journeys) for n in (1, 5, 8))])
def test_an_interrupted_one_goes_on(checkpoint, text, compared, tmp_path, monkeypatch, after):
    out, asked, _ = compared
    steps = []
    stock = comparison.carry_out

    def interrupted(*given, **options):
        steps.append(1)
        if len(steps) == after:
            raise KeyboardInterrupt
        return stock(*given, **options)

    monkeypatch.setattr(comparison, "carry_out", interrupted)
    again = {"data": text, "out": tmp_path / "out", **asked, **SHORT}
    with pytest.raises(KeyboardInterrupt):
        locum.compare(checkpoint, **again)
    assert not (tmp_path / "out").exists()
    locum.compare(checkpoint, **again)
    assert len(steps) == 8 + 1  # 2 candidates, 2 amounts, 2 seeds; one of them twice
    ours, theirs = (json.loads((folder / "comparison.json").read_text()) for folder in (tmp_path / "out", out))
    assert ours == theirs
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tree(tmp_path / "out").keys() == tree(out).keys()


def test_with_recovery_and_what_a_method_refuses(checkpoint, text, tmp_path):
    asked = {"data": text, "remove": "0.5", "seeds": 1, **SHORT}
    training = {"recover": "lora", "recover_steps": 2, "recover_length": 64, "recover_batch_size": 2}
    methods = "lightmoe:rank=30:bases=5,naee:limit=1"
    result = locum.compare(checkpoint, out=tmp_path / "out", methods=methods, **asked, **training)
    assert [group["state"] for group in result["groups"]] == ["compressed", "recovered"]
    for group in result["groups"]:
        assert [row["name"] for row in group["rows"]] == ["prune:score=random"]
        assert "out of reach" in group["refused"]["lightmoe:rank=30:bases=5"]
        assert "naee tries all of them, --limit 1 at most" in group["refused"]["naee:limit=1"]
    before, after = (group["rows"][0]["loss_delta"][0] for group in result["groups"])
    assert before != after
    with pytest.raises(PlanError, match="can do what is asked here; prune:score=random, the first: "):
        locum.compare(checkpoint, out=tmp_path / "none", methods="prune:score=random", **asked | {"remove": "0.99"})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--methods prnue", "unknown method 'prnue': did you mean 'prune'"),
        ("--methods prune:scroe=ean", "has no option '--scroe'"),
        ("--methods lightmoe:rank=x", "rank=x: the value must be a whole number"),
        ("--methods compressed-experts", "saves active parameters"),
        ("--methods ,", "--methods names nothing"),
        ("--remove half", "--remove is 'half'; give fractions"),
        ("--remove 0.5,1.5", "--remove is 1.5"),
        ("--leave-out three", "unknown domain for --leave-out 'three'"),
        ("--leave-out one,two", "leaves no domain to calibrate on"),
        ("--seeds 0", "--seeds is 0"),
        ("--seeds 1" + "0" * 30, "whole numbers from 1 to 1000"),
        ("--recover-steps 3", "comes with --recover"),
        ("--bits 5", "--bits is 5; allowed: 2, 3, 4, 8"),
        ("--methods prune:group=64", "group without bits; give bits=4 too"),
        ("--methods prune:bits=4:group=x", "group=x: the value must be a whole number"),
        ("--methods moe-i2:bits=4:quantiser=gptq", "which a search does not collect; take quantiser=nearest"),
        ("--bits 4 --recover lora", "adds to the bytes of weights in few bits, as block-drop:bits=4 has"),
    ],
)
def test_nonsense_is_refused_before_any_work(checkpoint, text, tmp_path, given, said):
    data = [word for source in text for word in ("--data", source)]
    result = run("compare", checkpoint, *data, "--out", tmp_path / "out", *given.split())
    assert result.exit_code == 2 and said in result.output, result.output
    assert list(tmp_path.iterdir()) == []


def test_as_people_see_it(checkpoint, text, tmp_path):
    short = [word for name, value in SHORT.items() for word in (f"--{name}", value)]
    result = run(
        "compare",
        checkpoint,
        "--data",
        text[0],
        "--methods",
        "mone",
        "--remove",
        0.5,
        *short,
        "--seeds",
        1,
        "--out",
        tmp_path / "o",
    )
    assert result.exit_code == 0, result.output
    assert "50% of the expert bytes removed, compressed" in result.output and "prune:score=random" in result.output
