"""Rounds of `compress`: a share of the experts goes, and what the others are worth is estimated anew on what is left.

    statistics of the model -> a plan -> the model without some [-> trained] -> statistics of that -> a plan -> ...

A round's plan counts the experts that the rounds before left. Joined to theirs (plans/following.py) it is a plan over the original,
so the last one says all of it, and without training it is all that remains of the rounds: it is applied to the original.
Training goes on from round to round: what it learnt stays.

Between rounds there is a folder beside the output, with the question that it answers and what the last rounds left, from which
an interrupted run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from .. import ranks
from ..budgets.target import Target
from ..checkpoints.skeleton import read_shape
from ..errors import PlanError
from ..files import clear, versions, write_text
from ..json_text import parse_json
from ..plans.following import following, only_drops
from ..plans.plan import Plan, keep_all
from ..plans.plan_file import load_plan
from ..runs import differences, set_aside
from ..shapes import ModelShape
from ..stats.sums import Statistics

QUESTION = "question.json"


class Made(NamedTuple):
    """What all rounds decided: the checkpoint that the last one planned for, its plan, and the same over the original."""

    subject: Path
    last: Plan
    whole: Plan


@dataclass(frozen=True)
class Rounds:
    """So many rounds to a target. `asked` is the question that what they leave in `folder` answers."""

    model: Path
    shape: ModelShape  # of the model
    target: Target
    count: int
    folder: Path
    asked: Mapping[str, Any]

    def run(
        self,
        observe: Callable[[Path, Path], Statistics],
        plan: Callable[[Statistics, Path, dict[str, Any]], Plan],
        make: Callable[[Path, Plan, Plan, Path], None],
    ) -> Made:
        """Go through them. `observe(model, file)` gives statistics and keeps them in the file, `plan(statistics, model, target)`
        plans, the target as options of `plan`; `make(model, plan, whole, out)` makes a checkpoint of a model by its plan, which is
        `whole` over the original. Raises PlanError for a method that does more than drop experts."""
        self._take_up()
        begun = self._begun()
        subject = self._place(begun) if begun else self.model
        whole = load_plan(subject / "plan.json") if begun else None
        last, seen = keep_all(left := read_shape(subject)), None
        for number in range(begun + 1, self.count + 1):
            last = keep_all(left)
            asked = self.target_of(number, left)
            if asked is None:
                continue
            seen = seen or observe(subject, self.folder / f"{number}.statistics")
            last = plan(seen, subject, asked)
            check_only_drops(self.count, last)
            whole = self._joined(whole, last)
            if number == self.count or all(layer.is_identity for layer in last.layers):
                continue
            make(subject, last, whole, self._place(number))
            if ranks.is_first() and subject != self.model:
                clear(subject)
            subject, left, seen = self._place(number), read_shape(self._place(number)), None
        return Made(subject, last, whole if whole is not None else keep_all(self.shape))

    def target_of(self, number: int, left: ModelShape) -> dict[str, Any] | None:
        """What a round asks of what is left, as options of `plan`: equal shares of the whole target, in bytes or parameters. None
        where the rounds before it did as much already."""
        share = number / self.count
        if self.target.fit is not None:
            return {"fit": str(self.shape.bytes - int((self.shape.bytes - self.target.fit) * share))}
        stay = (1 - self.target.remove * share) * self.shape.expert_parameters
        more = 1 - stay / left.expert_parameters
        return {"remove": more} if more > 1e-9 else None

    def _joined(self, before: Plan | None, last: Plan) -> Plan:
        """All rounds so far as one plan over the original. It reads no statistics, and those of a round are of what was left."""
        whole = last if before is None else following(before, last, self.shape)
        told = {key: value for key, value in whole.provenance.items() if key not in ("statistics", "statistics_file")}
        of_original = told if before is None else before.provenance
        told |= {key: of_original[key] for key in ("model_fingerprint", "super_experts") if key in of_original}
        told["target"] = {"remove": self.target.remove, "fit": self.target.fit}
        told["rounds"] = [*of_original.get("rounds", ()), round(whole.removed(self.shape), 6)]
        return replace(whole, provenance=told)

    # --- what an interrupted run left

    def _place(self, number: int) -> Path:
        return self.folder / f"{number}"

    def _begun(self) -> int:
        """The last round whose checkpoint is there."""
        numbers = range(1, self.count)
        return ranks.told(max((n for n in numbers if (self._place(n) / "plan.json").is_file()), default=0))

    def _take_up(self) -> None:
        """Go on with the folder where it answers the question; else it is set aside."""
        if ranks.is_first():
            asked = parse_json(json.dumps({**self.asked, "rounds": self.count, "versions": versions()}))
            if self.folder.is_dir() and (differ := self._differs(asked)):
                set_aside(self.folder, f"{self.folder} cannot be gone on from: {differ}")
            self.folder.mkdir(exist_ok=True)
            write_text(self.folder / QUESTION, json.dumps(asked))
        ranks.wait()

    def _differs(self, asked: Mapping[str, Any]) -> str:
        try:
            return differences(parse_json((self.folder / QUESTION).read_text(encoding="utf-8")), asked)
        except (OSError, ValueError, AttributeError) as error:
            return f"it is damaged ({error!r})"


def check_only_drops(rounds: int, plan: Plan) -> None:
    """Raise PlanError for a plan that no round can begin from."""
    if not only_drops(plan):
        raise PlanError(
            f"--rounds {rounds} estimates anew what experts are worth once others were dropped, and method {plan.method} does "
            f"something else with them; leave --rounds out, or take a method that drops experts, such as prune"
        )
