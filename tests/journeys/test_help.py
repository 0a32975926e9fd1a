"""What the command line says of itself: help that is whole, a method's options and no other's, `list` and `show`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
from dataclasses import dataclass

import click
import pytest
from click.testing import CliRunner

import locum
from locum.cli import cli
from locum.cli.command import RESUMABLE, Command
from locum.cli.parameters import Choice
from locum.criteria.criterion import CRITERIA
from locum.errors import OptionError
from locum.methods import METHODS, SearchingMethod, method
from locum.options import option, option_fields
from locum.registries import KINDS
from locum.registry import Registry
from making.checkpoints import locum as command

ORDER = "inspect calibrate search list show demo plan frontier apply compress recover eval compare verify bench report export clean"
CHOOSING = ("plan", "compress", "search")


@pytest.fixture(autouse=True, params=(80, 100))
def columns(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


@dataclass(frozen=True)
class Foreign:
    """Do nothing, from another package.

    y = x

    Needs:    nothing.
    Source:   none.
    """

    rank: str = option("auto", "a word where other methods have a number", choices=("auto", "manual"))
    strangeness: float = option(0.25, "an option that no other method has")

    def needs(self):
        return ()

    def plan(self, statistics, shape, amount):
        raise AssertionError("help and wrong usage do not plan")


@pytest.fixture
def foreign(monkeypatch):
    """A method that another package offers under the entry point."""

    class Point:
        def load(self):
            method("foreign", paper="none")(Foreign)

    monkeypatch.setattr(METHODS, "_items", dict(METHODS._items))
    monkeypatch.setattr(METHODS, "_offered", True)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Point()])


def helps():
    yield "--help"
    for name, item in cli.commands.items():
        yield f"{name} --help"
        for choice in item.choices:
            yield from (f"{name} --{choice.option} {thing} --help" for thing in choice.registry)


def words(text):
    return " ".join(text.split())


def flags(text):
    """The options that a help page has lines for."""
    return set(re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.MULTILINE))


# --- nothing is cut off ---------------------------------------------------------------------------------------------


def test_no_help_line_is_cut_off(columns):
    for line in helps():
        result = command(line)
        assert (result.exit_code, result.stderr) == (0, ""), line
        assert max(map(len, result.stdout.splitlines())) <= columns, line
        item = cli.commands.get(line.split()[0])
        if item is not None:
            assert words(item.help) in words(result.stdout), line
            own = [p.help if isinstance(p, click.Option) else p.about for p in item.params]
            assert all(words(text) in words(result.stdout) for text in own), line


def test_commands_stand_in_the_order_of_the_work_with_one_whole_line_each():
    said = command("--help").stdout
    assert re.findall(r"^(\w[\w ]*):$", said, re.MULTILINE) == [
        *("Options", "Look", "Decide", "Make", "Recover", "Judge", "Hand on")
    ]
    after = said[said.index("Look:") :]
    lines = dict(re.findall(r"^  (\w+) {2,}(\S.*)$", after, re.MULTILINE))
    assert list(lines) == ORDER.split() == list(cli.list_commands(None))
    assert set(lines) == set(cli.commands)
    assert lines == {name: item.short_help for name, item in cli.commands.items()}


# --- options of the method that was chosen, and no others -----------------------------------------------------------


@pytest.mark.parametrize("name", CHOOSING)
def test_general_help_has_the_commands_own_options_and_says_where_the_others_are(name):
    said = command(name, "--help").stdout
    own = {max(p.opts, key=len) for p in cli.commands[name].params if isinstance(p, click.Option)}
    assert flags(said) == own | {"--help"}
    assert f"locum {name} --method NAME --help" in words(said)
    named = words(said).partition("NAME is one of: ")[2].partition(".")[0].split(", ")
    assert named == [m for m in METHODS if name != "search" or isinstance(METHODS[m](), SearchingMethod)]


def check_method_help(name, chosen):
    said = command(name, "--method", chosen, "--help").stdout
    head, _, section = said.partition(f"\nOptions of {chosen}:\n")
    own = {p.name for p in cli.commands[name].params}
    fields = [field for field in option_fields(METHODS[chosen]) if field.name not in own]
    assert flags(head) == flags(command(name, "--help").stdout)
    assert flags(section) == {"--" + field.name.replace("_", "-") for field in fields}
    for field in fields:
        shown = field.default
        if isinstance(shown, bool):
            flag = field.name.replace("_", "-")
            shown = flag if shown else f"no-{flag}"
        told = "" if shown in (None, "") else f" [default: {shown}]"
        assert words(f"{field.metadata['help']}{told}") in words(section)
    return section


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("chosen", list(METHODS))
def test_help_of_a_method_has_its_options_and_no_others(name, chosen):
    check_method_help(name, chosen)


@pytest.mark.parametrize("name", CHOOSING)
def test_help_of_a_method_of_another_package(name, foreign):
    section = check_method_help(name, "foreign")
    assert "--rank [auto|manual]" in section
    assert "foreign" in command("plan", "--help").stdout


@pytest.mark.parametrize(
    "order",
    [
        "plan STATS --rank manual --method foreign",
        "plan --rank manual --method=foreign STATS",
        "plan --method foreign STATS --rank=manual",
        "plan --method lightmoe --rank manual STATS --method foreign",
    ],
)
def test_options_of_one_name_and_two_types_do_not_collide(order, foreign, monkeypatch):
    given = {}
    monkeypatch.setattr(cli.commands["plan"], "function", lambda **options: given.update(options) or [])
    result = command(order)
    assert result.exit_code == 0, result.stderr
    assert (given["method"], given["rank"]) == ("foreign", "manual")
    assert command("plan STATS --method lightmoe --rank 3").exit_code == 0
    assert given["rank"] == 3
    wrong = command("plan STATS --rank manual")  # the default method's
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1)
    assert "'manual' is not a valid integer" in wrong.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "plan STATS --method prune --strangeness 1",
            "method prune has no option '--strangeness'|allowed: --budget, --distinct, --floor, --lower-top-k, --multiple, --no-lower-top-k, --no-protect, --protect, --score; method foreign has it|"
            "see: locum plan --method prune --help",
        ),
        ("plan STATS --strangeness 1", "method lightmoe has no option '--strangeness'|method foreign has it"),
        ("plan STATS --method mone --no-shared", "method mone has no option '--no-shared'|method replace has it"),
        ("plan STATS --method compressed-experts --renormalize", "unknown option '--renormalize'|'--renormalise'"),
        ("plan STATS --remov 0.5", "unknown option '--remov'|did you mean '--remove'|see: locum plan --help"),
        ("plan STATS --method foreing --help", "unknown method 'foreing': did you mean 'foreign'?"),
        ("plan STATS --method", "Option '--method' requires an argument|locum plan --help"),
        ("recover DIR --step 3", "unknown option '--step'|did you mean '--steps'|see: locum recover --help"),
        ("inspect DIR --jason", "unknown option '--jason'|did you mean '--json'"),
    ],
)
def test_an_unknown_option_is_one_line_with_close_matches(line, said, foreign):
    result = command(line)
    assert (result.exit_code, result.stderr.count("\n"), result.stdout) == (2, 1, "")
    assert result.stderr.startswith(f"locum {line.split()[0]}: error: ")
    assert [part for part in said.split("|") if part not in result.stderr] == [], result.stderr


@dataclass(frozen=True)
class Shared:
    steps: int = option(5, "steps of every way")


@dataclass(frozen=True)
class Slow(Shared):
    patience: int = option(3, "of the slow way alone")


@dataclass(frozen=True)
class Quick(Shared):
    pass


WAYS: Registry = Registry("way")
WAYS.add("slow", Slow)
WAYS.add("quick", Quick)


@pytest.mark.parametrize("default", ["slow", None])
def test_any_command_may_choose_from_any_registry(default):
    """Options that every run has, a choice with or without a default, and choices with and without options."""
    given = {}

    def with_default(*, how: str = "slow", **options):
        """Go."""
        given.update(how=how, **options)

    def required(*, how: str, **options):
        """Go."""
        given.update(how=how, **options)

    function = with_default if default else required
    item = Command("go", function, lambda result, as_json: None, "go", options=Shared, choices=[Choice("how", WAYS)])

    def run(line):
        given.clear()
        result = CliRunner().invoke(item, line.split(), prog_name="locum go", catch_exceptions=False)
        return given if result.exit_code == 0 and "--help" not in line else result.output

    assert run("--how slow --patience 4 --steps 2") == {"how": "slow", "patience": 4, "steps": 2}
    assert run("--how quick") == {"how": "quick"}
    assert "way quick has no option '--patience': allowed: none; way slow has it" in run("--how quick --patience 4")
    assert "Options of quick:\n  none" in run("--how quick --help")
    assert flags(run("--how slow --help")) == {"--how", "--steps", "--patience", "--json", "--help"}
    assert flags(run("--help")) == {"--how", "--steps", "--json", "--help"}
    if default:
        assert run("--patience 4") == {"how": "slow", "patience": 4}
    else:
        assert "option '--patience' comes with --how slow" in run("--patience 4")
        assert "Missing option '--how'" in run("--steps 4")


def test_a_command_may_choose_twice():
    """As compress does: a thing of two registries may have options of one name, so one side's have a prefix."""
    given = {}

    def go(*, pace: str = "quick", train: str | None = None, **options):
        """Go."""
        given.update(pace=pace, train=train, **options)

    training = Choice("train", WAYS, shared=Shared, prefix="train_")
    item = Command("go", go, lambda result, as_json: None, "go", choices=[Choice("pace", WAYS), training])

    def run(line):
        given.clear()
        result = CliRunner().invoke(item, line.split(), prog_name="locum go", catch_exceptions=False)
        return given if result.exit_code == 0 and "--help" not in line else result.output

    assert run("--train slow --pace slow --patience 4 --train-patience 5 --train-steps 6") == {
        **{"pace": "slow", "train": "slow", "patience": 4, "train_patience": 5, "train_steps": 6}
    }
    assert run("--pace slow") == {"pace": "slow", "train": None}
    assert "option '--train-steps' comes with --train quick or slow; see" in run("--train-steps 3")
    assert "way quick has no option '--train-patience'" in run("--train quick --train-patience 3")
    assert "way quick has no option '--patience'" in run("--train slow --patience 3")
    help_ = run("--train slow --help")
    assert flags(help_) == {"--pace", "--train", "--json", "--help", "--train-steps", "--train-patience"}
    assert "--pace NAME --help. NAME is one of: quick, slow." in words(help_)
    assert "--train NAME --help" not in words(help_)


# --- list and show --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_list_of_a_kind_has_a_whole_line_of_each(kind, columns):
    result = command("list", kind)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= columns
    catalogue = json.loads(command("list", kind, "--json").stdout)
    assert list(catalogue) == [kind]
    assert list(catalogue[kind]) == list(KINDS[kind].registry)
    for name, about in catalogue[kind].items():
        assert about["summary"].endswith("."), name
        assert f"{name} {about['summary']}" in words(result.stdout)
    assert catalogue == json.loads(json.dumps(locum.catalogue(kind)))


def test_list_has_the_names_of_every_kind():
    said = words(command("list").stdout)
    for kind, item in KINDS.items():
        assert f"{kind} {', '.join(item.registry)}" in said


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, item in KINDS.items() for name in item.registry])
def test_show_says_all_that_is_known(kind, name, columns):
    shown = locum.show(name)
    about = next(one for one in shown if one["kind"] == KINDS[kind].registry.kind)
    assert about == locum.catalogue(kind)[kind][name]
    assert json.loads(command("show", name, "--json").stdout) == json.loads(json.dumps(shown))
    text = command("show", name).stdout
    assert max(map(len, text.splitlines())) <= columns
    for said in (f"{about['kind']} {name}: {about['summary']}", about["formula"], *about["notes"].values()):
        assert words(said) in words(text)
    for field, option_ in about["options"].items():
        assert words(f"--{field.replace('_', '-')} {option_['help']}") in words(text)
        assert f"[default: {option_['default']}]" in words(text)


def test_show_takes_it_from_the_docstring(foreign):
    (about,) = locum.show("foreign")
    assert (about["kind"], about["summary"], about["formula"]) == (
        "method",
        "Do nothing, from another package.",
        "y = x",
    )
    assert about["notes"] == {"needs": "nothing.", "source": "none."}
    assert about["options"]["strangeness"] == {"default": 0.25, "help": "an option that no other method has"}
    assert about["options"]["rank"]["choices"] == ["auto", "manual"]
    gate = next(one for one in locum.show("gate") if one["kind"] == "criterion")
    assert gate["formula"] == "S_e = G_e / sum_i G_i,  G_e = sum_{t in T_e} g_t,e"
    assert gate["paper"] == CRITERIA["gate"].paper
    assert gate["statistics"] == ["gate_sum"]
    assert gate["notes"]["units"]


def test_what_is_registered_is_documented():
    """Every criterion, method and statistic has a formula and a source, and none of its notes is taken for its formula."""
    for kind in ("methods", "criteria", "statistics"):
        for name, about in locum.catalogue(kind)[kind].items():
            assert about["formula"], name
            assert about["notes"], name
            assert about.get("paper") or about["notes"]["source"], name
            assert not re.search(r"^(Needs|Units|Edges|Cost|Source):", about["formula"], re.MULTILINE), name
    assert {f.name for f in dataclasses.fields(METHODS["prune"])} == set(locum.show("prune")[0]["options"])


def test_a_name_of_two_kinds_shows_both():
    assert [one["kind"] for one in locum.show("mone")] == ["method", "criterion"]
    said = command("show mone").stdout
    assert said.startswith("method mone: ")
    assert "\ncriterion mone: " in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("show lightmo", "unknown name 'lightmo': did you mean 'lightmoe'"),
        ("show annealt", "did you mean 'annealed'"),
        ("list method", "unknown kind 'method': did you mean 'methods'? allowed: budgets, criteria, "),
        ("lst", "unknown command 'lst': did you mean 'list'"),
    ],
)
def test_unknown_names_are_one_line_with_close_matches(line, said):
    result = command(line)
    assert (result.exit_code, result.stderr.count("\n"), result.stdout) == (2, 1, "")
    assert said in result.stderr
    with pytest.raises(OptionError):
        locum.show("nothing of this name")


def test_an_interrupt_says_what_help_says_of_going_on():
    """Every command whose help promises to go on says so when it is interrupted."""
    promised = {name for name, item in cli.commands.items() if re.search(r"nterrupted \w+ goes on", item.help or "")}
    assert len(promised) > 4 and promised <= set(RESUMABLE)
