"""What is said where a method misses a target: why, and options that the method has and that meet it."""

from __future__ import annotations

import dataclasses
import re

import pytest

from locum.budgets.target import Target
from locum.errors import LocumError, PlanError
from locum.methods import METHODS, TARGETED
from locum.methods.levers import REMOVE_LESS, REMOVE_MORE, levers
from locum.options import option_fields
from locum.plans.plan import Plan
from locum.stages.planning import decide
from making.handmade import make_statistics, toy_shape

SHAPES = {"usual": toy_shape(layers=2, experts=8), "all": toy_shape(layers=2, experts=4, top_k=4)}
SHAPES["one"] = toy_shape(layers=2, experts=1, top_k=1)
FROM_STATISTICS = [
    name for name in METHODS if METHODS[name].saves in TARGETED and not METHODS[name].reads_weights and name != "auto"
]  # auto's `error_price` and the like are bytes, of which there is a step for everybody


def planned(name: str, shape: str, remove: float, **options: object) -> Plan:
    chosen = dataclasses.replace(METHODS[name](), **options)
    return decide(chosen, make_statistics(SHAPES[shape]), SHAPES[shape], Target(remove=remove))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FROM_STATISTICS)
def test_a_plan_removes_or_the_reason_names_what_the_method_has(name: str, shape: str) -> None:
    """And what is to be given meets the target, given alone."""
    if (name, shape) == ("moe-i2", "one"):
        pytest.skip("what its search found is made up, and drops the only expert")
    own = {"--" + field.name.replace("_", "-") for field in option_fields(METHODS[name])}
    for remove in (0.04, 0.5, 0.97):
        try:
            plan = planned(name, shape, remove)
        except PlanError as error:
            said = str(error)
        except LocumError:  # a search that this model has no statistics of
            continue
        else:
            assert plan.removed(SHAPES[shape]) > 0 or remove < 0.07  # nearer to nothing than to one expert of eight
            continue
        named = set(re.findall(r"--[a-z-]+", said.partition(";")[2]))
        assert named <= own, (name, said)
        assert not {"rank", "bases"} & set(re.findall(r"\w+", said)) or {"--rank", "--bases"} & own
        known = REMOVE_LESS if "too little" in said else REMOVE_MORE
        for option, (words, value) in known.items():
            if f"give {words}" in said:
                field = next(item for item in option_fields(METHODS[name]) if item.name == option)
                planned(name, shape, remove, **{option: field.metadata["at_least"] if value is None else value})


def test_the_reason_is_the_routers_where_it_is() -> None:
    with pytest.raises(
        PlanError, match=r"can remove none .* keeps as many experts as its router selects \(4\); give --lower-top-k, or"
    ):
        planned("prune", "all", 0.5)
    with pytest.raises(PlanError, match=r"0\.7500 .* router selects \(2\); ask for less, or give --lower-top-k, or"):
        planned("prune", "usual", 0.85)
    with pytest.raises(
        PlanError, match=r"can remove none .* router selects \(1\); choose a method that makes experts smaller"
    ) as caught:
        planned("prune", "one", 0.5)
    assert "lower-top-k" not in str(caught.value)
    assert planned("narrow", "one", 0.5).removed(SHAPES["one"]) == pytest.approx(0.5, abs=0.13)


def test_half_an_expert_is_near_enough_but_not_to_none() -> None:
    """The nearest step of one expert is none at all, which is not what was asked for."""
    with pytest.raises(PlanError, match=r"--remove 0\.5 is out of reach"):
        planned("mone", "all", 0.5, floor=4)


def test_levers_are_those_that_work() -> None:
    chosen = dataclasses.replace(METHODS["prune"](), floor=3)

    def meet(other: object) -> None:
        if other.floor:
            raise PlanError("missed")

    assert levers(chosen, REMOVE_MORE, meet) == ["give a lower --floor"]
    assert levers(METHODS["naee"](), REMOVE_MORE, meet) == ["search again with a higher --most"]
    assert levers(METHODS["prune"](), REMOVE_MORE, lambda other: None) == ["give --lower-top-k", "give --no-protect"]
    assert levers(METHODS["leave-one-out"](), REMOVE_LESS, lambda other: None) == ["give --budget uniform"]


@pytest.mark.parametrize("name", {**REMOVE_MORE, **REMOVE_LESS})
def test_every_lever_is_an_option_of_some_method(name: str) -> None:
    owners = [method for method in METHODS if name in {field.name for field in option_fields(METHODS[method])}]
    assert owners
