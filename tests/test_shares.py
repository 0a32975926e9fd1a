"""What several ranks share, seen from one process that is one of them after the other (journeys/test_ranks.py has real ones)."""

from __future__ import annotations

import pytest
import torch

import locum
from locum import ranks
from locum.checkpoints.rewrite import Rewriting
from locum.checkpoints.shard_writer import ShardWriter
from locum.checkpoints.skeleton import open_source, read_shape
from locum.plans.plan_file import load_plan
from locum.training.sharding import share_of
from making.checkpoints import tree
from making.training import tiny_tokens


@pytest.fixture
def become(monkeypatch):
    """Be a rank, for which the others are always there and say what the first one has."""

    def be(number, count):
        monkeypatch.setattr(ranks, "number", lambda: number)
        monkeypatch.setattr(ranks, "count", lambda: count)
        monkeypatch.setattr(ranks, "wait", lambda: None)

    return be


@pytest.mark.parametrize("count", [2, 3, 7])
def test_every_tensor_is_written_by_one_rank(
    count, checkpoint, statistics_file, plan_file, become, tmp_path, monkeypatch
):
    """All together they write what one writes, and they save at the same steps: nobody waits for ever."""
    shape, plan = read_shape(checkpoint), load_plan(plan_file)
    made = Rewriting(open_source(checkpoint), shape, plan, locum.load_statistics(statistics_file))
    for name in ("one", "shared"):
        (tmp_path / name).mkdir()
    made.write(tmp_path / "one", 50_000)
    written, saved, write = [], [], ShardWriter.write

    def noting(writer, name, *given):
        written[-1].add(name)
        write(writer, name, *given)

    monkeypatch.setattr(ShardWriter, "write", noting)
    for rank in range(count):
        become(rank, count)
        written.append(set())
        saved.append([])
        made.write(tmp_path / "shared", 50_000, save=saved[-1].append)
    assert tree(tmp_path / "shared") == tree(tmp_path / "one")
    assert sum(map(len, written)) == len(set().union(*written)) == sum(len(step.entries) for step in made.steps)
    assert all(numbers == saved[0] for numbers in saved)


def test_items_are_divided_and_come_back_in_order(become):
    assert ranks.divide("abc", str.upper) == ["A", "B", "C"]
    become(1, 2)
    assert list(ranks.share(range(5))) == [1, 3]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_ranks_share_the_blocks_of_a_batch(count, become):
    """Every block is one rank's; one that has none left runs a block without loss."""
    batch, seen = tiny_tokens(blocks=4), []
    for rank in range(count):
        become(rank, count)
        mine = share_of(batch)
        assert len(mine.ids_BS) > 0
        seen += [ids_S for ids_S, loss_S in zip(mine.ids_BS, mine.loss_mask_BS, strict=True) if bool(loss_S.any())]
    assert sorted(map(torch.Tensor.tolist, seen)) == sorted(batch.ids_BS.tolist())
    assert bool(batch.loss_mask_BS[0].any())


def test_a_fault_is_no_lost_rank(become):
    become(0, 2)
    with pytest.raises(RuntimeError, match="shapes"), ranks.meeting():
        raise RuntimeError("shapes do not fit")
    with pytest.raises(ranks.OtherRankEnded, match="another of the 2 ranks has ended"), ranks.meeting():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
