"""Options: declared once with their bounds; what is out of bounds, of another type or unknown is refused in words."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest

from locum.errors import OptionError
from locum.methods import METHODS
from locum.options import check_options, make_options, option, option_fields
from locum.training.options import make_recovery
from locum.training.ways import WAYS


@dataclass(frozen=True)
class Toy:
    word: str = option("a", "a word", choices=("a", "bee"))
    free: str = option("x", "any word")
    count: int = option(3, "a count", at_least=1, at_most=9)
    share: float = option(0.5, "a share", above=0, at_most=1)
    free_rate: float = option(0.0, "any number")
    flag: bool = option(False, "a flag")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"word": "bee"},
        {"count": 1},
        {"count": 9},
        {"share": 1},
        {"share": 1e-9},
        {"flag": True},
        {"free_rate": -3},
        {"free_rate": math.inf},
    ],
)
def test_allowed(given: dict) -> None:
    made = make_options(Toy, given)
    assert dataclasses.asdict(made) == {**dataclasses.asdict(Toy()), **given}
    check_options(made)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"word": "be"}, ("--word", "'be'", "did you mean 'bee'", "allowed: a, bee")),
        ({"word": 3}, ("--word is 3", "text")),
        ({"word": ["a"]}, ("--word is ['a']", "text")),
        ({"free": None}, ("--free is None", "text")),
        ({"count": 0}, ("--count is 0", "at least 1 and at most 9")),
        ({"count": 10}, ("--count is 10", "at most 9")),
        ({"count": 2.0}, ("--count is 2.0", "a whole number")),
        ({"count": "2"}, ("--count is '2'", "a whole number")),
        ({"count": True}, ("--count is True", "a whole number")),
        ({"share": 0}, ("--share is 0", "more than 0 and at most 1")),
        ({"share": 1.5}, ("--share is 1.5", "at most 1")),
        ({"share": math.nan}, ("--share is nan", "more than 0")),
        ({"share": "0.5"}, ("--share is '0.5'", "a number")),
        ({"share": False}, ("--share is False", "a number")),
        ({"free_rate": math.nan}, ("--free-rate is nan", "finite numbers")),
        ({"flag": 1}, ("--flag is 1", "true or false")),
        ({"flag": "no"}, ("--flag is 'no'", "true or false")),
        ({"cuont": 1}, ("toy has no option '--cuont'", "did you mean '--count'", "--free-rate")),
        ({"Free_Rate": 1.0}, ("'--Free-Rate'", "--free-rate")),
    ],
)
def test_refused(given: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(OptionError) as caught:
        make_options(Toy, given)
    assert [word for word in words if word not in str(caught.value)] == []


OWNERS = [*(METHODS[name]() for name in METHODS), *(WAYS[name]() for name in WAYS), make_recovery({})]


@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: type(owner).__name__)
def test_every_registered_option_has_help_and_an_allowed_default(owner: object) -> None:
    for item in option_fields(owner):
        assert item.metadata["help"] and item.metadata["help"][0] != " ", item.name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, item.name, None)
        if item.metadata["kind"] is int:
            with pytest.raises(OptionError, match="at most"):
                check_options(dataclasses.replace(owner, **{item.name: 10**30}))
    check_options(owner)


@pytest.mark.parametrize(
    ("method", "given", "words"),
    [
        ("lightmoe", {"rank": -1}, ("--rank is -1", "at least 0")),
        ("lightmoe", {"bases": 0}, ("--bases is 0", "at least 1")),
        ("lightmoe", {"selection": "adaptve"}, ("--selection", "did you mean 'adaptive'")),
        ("lightmoe", {"grouping": "kmean"}, ("did you mean 'kmeans'",)),
        ("lightmoe", {"clip": -0.1}, ("--clip is -0.1",)),
        ("lightmoe", {"alpha": math.inf}, ("--alpha is inf", "at most 100")),
        ("replace", {"rank": 0}, ("--rank is 0", "at least 1")),
        ("replace", {"start": "svg"}, ("did you mean 'svd'",)),
        ("prune", {"floor": -1}, ("--floor is -1", "at least 0")),
        ("prune", {"multiple": 0}, ("--multiple is 0", "at least 1")),
        ("mone", {"scores": "reap"}, ("method mone has no option '--scores'", "did you mean '--score'")),
    ],
)
def test_methods_refuse_nonsense(method: str, given: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(OptionError) as caught:
        make_options(METHODS[method], given)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("method", [name for name in METHODS if hasattr(METHODS[name], "score")])
def test_unknown_criterion_is_named_with_close_ones(method: str) -> None:
    with pytest.raises(OptionError, match="unknown criterion 'reep': did you mean 'reap'"):
        make_options(METHODS[method], {"score": "reep"}).needs()
