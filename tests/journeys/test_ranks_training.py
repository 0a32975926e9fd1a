"""Several ranks train what one trains: the same losses, of the same batches, with a part of the weights on each of them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import locum
from locum.checkpoints.skeleton import read_shape
from locum.plans.bits import FewBits
from locum.plans.plan import make_plan
from locum.plans.plan_file import load_plan
from making.checkpoints import tree
from making.ranks import Ranks, killed, on_ranks, stops_in

pytestmark = pytest.mark.journeys
TRAINED = ("--length", 32, "--steps", 4, "--batch-size", 3, "--validate-every", 2, "--validation-tokens", 512)


@pytest.fixture
def said(tmp_path_factory):
    """A folder for what ranks say."""
    return tmp_path_factory.mktemp("said")


def log_of(folder):
    return [json.loads(line) for line in (folder / "recovery.jsonl").read_text().splitlines()]


def losses(folder):
    """Training and validation losses in their order, and tokens seen."""
    keys = ("loss", "validation_loss", "balance_loss", "kept_loss")
    return [entry[key] for entry in log_of(folder) for key in keys if key in entry]


def counted(folder):
    keys = ("event", "step", "tokens", "trainable_parameters", "kept_step")
    return [{key: entry.get(key) for key in keys} for entry in log_of(folder)]


@pytest.mark.parametrize(
    ("how", "ranks", "more"),
    [
        ("lora", 2, ()),
        ("lora", 4, ("--accumulate", 2)),  # one rank has no block of a batch
        ("annealed", 2, ("--end-fraction", 0.5, "--clip", 0.1)),
        ("full", 3, ("--weight-decay", 0.1)),
        ("esft", 2, ("--threshold", 0.5)),
        ("router", 2, ("--patience", 1)),
    ],
)
def test_ranks_follow_the_losses_of_one(how, ranks, more, small, checkpoint, words, said, tmp_path):
    asked = ("recover", small, "--original", checkpoint, "--data", words, "--how", how, *TRAINED, *more)
    on_ranks(1, said, *asked, "--out", tmp_path / "one")
    on_ranks(ranks, said, *asked, "--out", tmp_path / "more")
    assert counted(tmp_path / "more") == counted(tmp_path / "one")
    one, more = losses(tmp_path / "one"), losses(tmp_path / "more")
    assert one[0] != one[-1]
    torch.testing.assert_close(torch.tensor(more), torch.tensor(one), rtol=1e-5, atol=1e-5)
    one, more = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "more"))
    assert {name: (t.shape, t.dtype) for name, t in one.items()} == {n: (t.shape, t.dtype) for n, t in more.items()}
    distance = sum(float((one[name] - more[name]).square().sum()) for name in one) ** 0.5
    before = load_file(small / "model.safetensors")
    moved = sum(float((one[name] - before[name]).square().sum()) for name in one) ** 0.5
    assert moved > 0 and distance < 1e-2 * moved
    assert set(tree(tmp_path / "more")) == set(tree(tmp_path / "one"))
    assert {path.name for path in tmp_path.iterdir()} == {"one", "more"}


def test_ranks_leave_the_bytes_of_what_is_in_few_bits(checkpoint, plan_file, statistics_file, words, said, tmp_path):
    plan, shape = load_plan(plan_file), read_shape(checkpoint)
    layers = FewBits("int4-g32", "nearest").applied(plan.layers, shape)
    few = locum.apply(checkpoint, plan=make_plan(shape, layers), statistics=statistics_file, out=said / "few")
    asked = ("recover", few, "--data", words, "--how", "lora", *TRAINED)
    on_ranks(1, said, *asked, "--out", tmp_path / "one")
    on_ranks(2, said, *asked, "--out", tmp_path / "more")
    assert counted(tmp_path / "more") == counted(tmp_path / "one")
    one, more = (torch.tensor(losses(tmp_path / name)) for name in ("one", "more"))
    torch.testing.assert_close(more, one, rtol=1e-3, atol=1e-3)  # a code at half a step may be rounded either way
    came, now = (load_file(folder / "model.safetensors") for folder in (few, tmp_path / "more"))
    rows = [name for name in came if ".dense_int4" in name]
    assert rows and all(torch.equal(came[name], now[name]) for name in rows)


def test_each_rank_holds_its_part(small, words, said, tmp_path):
    """What is trained with its moments, and all parameters, lie in parts on the ranks."""

    def look(rank):
        loop = sys.modules["locum.training.loop"]
        run = loop._run

        def and_look(running, hooks):
            run(running, hooks)
            tensors = list(running.trained.values())
            tensors += [state[key] for state in running.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
            here = [sum(t.to_local().numel() for t in tensors), sum(t.numel() for t in tensors)]
            running.model.reshard()  # which has the weights that are in no decoder layer
            here += [sum(p.to_local().numel() for p in running.model.parameters())]
            here += [sum(p.numel() for p in running.model.parameters())]
            (said / f"held-{rank}").write_text(json.dumps(here))

        loop._run = and_look

    asked = ("recover", small, "--data", words, "--how", "lora", *TRAINED, "--out", tmp_path / "out")
    started = Ranks(2, said, *asked, first=look)
    assert started.wait() == [0, 0], started.said
    held = [json.loads((said / f"held-{rank}").read_text()) for rank in (0, 1)]
    for part, all_of_it in ((0, 1), (2, 3)):
        assert held[0][part] + held[1][part] == held[0][all_of_it] == held[1][all_of_it] > 0
        assert max(held[0][part], held[1][part]) < 0.7 * held[0][all_of_it]


def test_states_of_ranks_are_gone_on_from(small, words, said, tmp_path):
    """As many ranks go on to the same bits; one goes on from what two left."""

    def stop(rank):
        loop = sys.modules["locum.training.loop"].Loop
        step = loop.one_step

        def until(self, parts):
            if self.step == 3:
                raise KeyboardInterrupt
            step(self, parts)

        loop.one_step = until

    asked = ("recover", small, "--data", words, "--how", "lora", *TRAINED, "--checkpoint-every", 2)
    on_ranks(2, said, *asked, "--out", tmp_path / "whole")
    for name in ("two", "one"):
        assert Ranks(2, said, *asked, "--out", tmp_path / name, first=stop).wait() == [2, 2]
        assert [path.name for path in sorted(tmp_path.glob(".*"))] == [f".{name}.recover"]
        on_ranks({"two": 2, "one": 1}[name], said, *asked, "--out", tmp_path / name)
        assert any(entry["event"] == "resume" and entry["resumed_at"] == 2 for entry in log_of(tmp_path / name))
    whole, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "two"))
    assert all(torch.equal(whole[name], two[name]) for name in whole)
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "one")), torch.tensor(losses(tmp_path / "whole")), rtol=1e-5, atol=1e-5
    )
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "one", "two"}


@pytest.mark.parametrize("dies", [0, 1])
def test_training_of_which_a_rank_dies_goes_on(dies, small, words, said, tmp_path):
    asked = ("recover", small, "--data", words, "--how", "lora", *TRAINED, "--checkpoint-every", 2)
    killed(
        said,
        dies,
        lambda: stops_in(sys.modules["locum.training.loop"].Loop, "one_step", 3),
        *asked,
        "--out",
        tmp_path / "out",
    )
    assert {".out.recover"} == {path.name for path in tmp_path.iterdir()} - {".out.lock"}
    on_ranks(2, said, *asked, "--out", tmp_path / "out")
    assert any(entry["event"] == "resume" and entry["resumed_at"] == 2 for entry in log_of(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_way_that_ranks_cannot_share_is_refused(small, checkpoint, words, said, tmp_path):
    asked = ("recover", small, "--original", checkpoint, "--data", words, "--how", "layerwise", "--out", tmp_path / "o")
    started = Ranks(2, said, *asked)
    assert started.wait() == [2, 2]
    assert all("--how layerwise trains in one process, these are 2; start one, or use" in s for s in started.said)
    assert not list(tmp_path.iterdir())


def test_ranks_compress_and_recover(checkpoint, words, said, tmp_path):
    asked = ("--remove", 0.4, "--rank", 2, "--data", words, "--tokens", 2048, "--length", 64, "--recover", "lora")
    asked = (*asked, "--recover-steps", 2, "--recover-length", 32, "--recover-batch-size", 2)
    on_ranks(2, said, "compress", checkpoint, *asked, "--out", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert [entry["step"] for entry in log_of(tmp_path / "out") if entry["event"] == "step"] == [1, 2]
    locum.inspect(tmp_path / "out")
