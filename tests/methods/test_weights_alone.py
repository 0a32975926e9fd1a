"""Planning by a score of weights: from a folder, without any text, and the same as calibration collects."""

from __future__ import annotations

import pytest

import locum
from locum.errors import OptionError, StatisticsError
from making.checkpoints import locum as command

OPTIONS = {"method": "prune", "remove": 0.25, "protect": False}


@pytest.mark.parametrize("score", ["aimer", "rwn_max"])
def test_a_folder_is_enough_and_gives_what_calibration_gives(checkpoint, words, tmp_path, score):
    alone = locum.plan(checkpoint, score=score, **OPTIONS)
    also = ("weight_mass", "weight_square", "router_norm")
    seen = locum.calibrate(
        checkpoint, data=[str(words)], out=tmp_path / "s", gram=False, also=also, tokens=512, length=32
    )
    assert alone.layers == locum.plan(seen, score=score, **OPTIONS).layers
    assert 0.1 < alone.removed(locum.read_shape(checkpoint)) < 0.4
    assert seen.names and alone.provenance["model_fingerprint"] == locum.inspect(checkpoint)["fingerprint"]


def test_super_experts_need_text_and_the_error_says_so(checkpoint, tmp_path):
    with pytest.raises(OptionError, match=r"tells the Super Experts that prune keeps; .* --no-protect"):
        locum.plan(checkpoint, method="prune", score="aimer", remove=0.25)
    with pytest.raises(OptionError, match="plans from statistics files; make one with locum calibrate"):
        locum.plan(checkpoint, method="prune", score="reap", remove=0.25)


def test_statistics_of_earlier_versions_plan_without_protection(statistics_file):
    seen = locum.load_statistics(statistics_file)
    for named in seen.layers.values():
        named.pop("output_peak")
    with pytest.raises(StatisticsError, match=r"no statistic 'output_peak'.*or plan with --no-protect"):
        locum.plan(seen, method="prune", remove=0.25)
    assert locum.plan(seen, **OPTIONS).provenance.get("super_experts") is None


def test_compress_by_weights_alone_takes_no_data(checkpoint, tmp_path):
    line = ("compress", checkpoint, "--method", "prune", "--score", "aimer", "--no-protect", "--remove", "0.25")
    result = command(*line, "--out", tmp_path / "small")
    assert result.exit_code == 0, result.stderr
    assert locum.inspect(tmp_path / "small")["parameters"] < locum.inspect(checkpoint)["parameters"]
