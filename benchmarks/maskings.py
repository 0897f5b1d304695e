"""Measure whether the audit catches models that hide their weakness, and passes honest models.

    python benchmarks/maskings.py --out docs/maskings.md --csv maskings.csv
    python benchmarks/maskings.py --group planted --only moat --evaluation standard

Small networks on the digits of scikit-learn are trained in seconds, and kept in `--cache`. Planted
models hide a network that is not robust. Honest models are trained with each defense, too briefly,
or in plain torch. For each model, the table has the truth, which an attack that knows the model
finds (masking/adaptive.py), the worst case that the evaluation reports, and the verdict of its
audit. It takes about an hour on two cores.
"""

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from masking.adaptive import Budget, Mean, Subject, truth
from masking.honest import EPS, HONEST
from masking.planted import PLANTED
from masking.table import markdown, progress, replaced, summary
from masking.verdict import Judged, composed, judged
from masking.workshop import Workshop
from torch import nn

from robusttrain.data import as_input
from robusttrain.noise.layer import predicts_randomly
from robusttrain.threat import Norm, Threat

GROUPS = ("planted", "honest")
# A random model needs several passes for each prediction.
PLANTED_BUDGET, RANDOM_BUDGET = Budget(), Budget(searches=12, steps=50, jitters=10)
HONEST_BUDGET = Budget(steps=100)


Row = dict[Any, object]


class Case(NamedTuple):
    """A row of the table: a model in a norm."""

    group: str
    name: str
    norm: Norm

    @property
    def threat(self) -> Threat:
        """Its threat model."""
        own = HONEST[self.name].eps if self.group == "honest" else None
        return Threat(self.norm, own or EPS[self.norm])


class Settings(NamedTuple):
    """Settings of all rows."""

    cache: Path
    evaluation: str
    samples: int


def cases(groups: list[str], names: list[str], norms: list[str]) -> Iterator[Case]:
    """The requested rows."""
    for group in groups:
        for name, entry in (PLANTED if group == "planted" else HONEST).items():
            if not names or name in names:
                yield from (Case(group, name, norm) for norm in entry.norms if norm in norms)


def measured(case: Case, settings: Settings) -> Row:
    """The row of a case."""
    torch.set_num_threads(1)
    model, subject, suite = _built(case, Workshop(settings.cache))
    config = composed(suite or settings.evaluation, case.threat, settings.samples)
    _, test = config.dataset.load()
    images, y = test.take(config.evaluation.choose(test.size)).loaded()
    own_budget = PLANTED_BUDGET if case.group == "planted" else HONEST_BUDGET
    budget = RANDOM_BUDGET if subject.random else own_budget
    started = time.process_time()
    true = truth(subject, as_input(images), y, case.threat, budget)
    between = time.process_time()
    try:
        found = judged(model, config, case.name, foreign=suite is None)
    except Exception as error:  # a model that breaks the evaluation still has a row
        found = Judged(float("nan"), "error", (repr(error),))
    return {
        "model": case.name, "kind": case.group, "norm": str(case.norm), "eps": case.threat.eps,
        "suite": suite or settings.evaluation, "n": len(y), "clean": true.clean,
        "truth": true.robust, "worst_case": found.worst_case, "audit": found.verdict,
        "checks": "; ".join(found.checks), "warnings": "; ".join(found.warnings),
        "seconds_truth": round(between - started, 1),
        "seconds_evaluation": round(time.process_time() - between, 1),
    }  # fmt: skip


def _built(case: Case, shop: Workshop) -> tuple[nn.Module, Subject, str | None]:
    """The model, the subject of the attack that finds its truth, and a suite of its own, if any.

    The two models are different objects, since some remember their queries.
    """
    if case.group == "planted":
        build = PLANTED[case.name].build
        model, known = (build(shop, case.threat).eval() for _ in range(2))
        return model, Subject(known, known.views(), known.random), known.suite
    entry = HONEST[case.name]
    own, copied = (entry.build(shop, case.threat).eval() for _ in range(2))
    random = predicts_randomly(own)
    return own, Subject(copied, [Mean(copied) if random else copied], random), entry.suite


def rows(wanted: list[Case], settings: Settings, processes: int) -> Iterator[Row]:
    """The rows of the cases, in the order in which they finish."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for done in as_completed(pool.submit(measured, case, settings) for case in wanted):
            yield done.result()


def main() -> None:
    """Parse the command line, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--group", choices=GROUPS, help="planted or honest; both by default")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="models")
    parser.add_argument("--norm", nargs="+", default=list(Norm), choices=list(Norm))
    parser.add_argument("--evaluation", default="fast", help="the suite; random models: eot")
    parser.add_argument("--samples", type=int, default=100, help="test images")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path("outputs/maskings"))
    parser.add_argument("--out", type=Path, help="a Markdown file with the two marks of the table")
    parser.add_argument("--csv", type=Path, help="written after every row")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --csv has")
    arguments = parser.parse_args()
    groups = [arguments.group] if arguments.group else list(GROUPS)
    wanted = list(cases(groups, arguments.only, arguments.norm))
    settings = Settings(arguments.cache.resolve(), arguments.evaluation, arguments.samples)
    resumed = arguments.resume and arguments.csv is not None and arguments.csv.is_file()
    found = kept(arguments.csv, wanted) if resumed else []
    done = {_case(row) for row in found}
    left = [case for case in wanted if case not in done]
    for row in rows(left, settings, arguments.processes):
        found.append(row)
        print(f"{len(found)}/{len(wanted)}", progress(row), flush=True)
        if arguments.csv:
            in_order(found, wanted).to_csv(arguments.csv, index=False)
    table = in_order(found, wanted)
    if arguments.out:
        arguments.out.write_text(replaced(arguments.out.read_text(), markdown(table)))
    print(summary(table))


def kept(csv: Path, wanted: list[Case]) -> list[Row]:
    """Those of the rows in a file that are wanted."""
    found = pd.read_csv(csv, keep_default_na=False, na_values={"worst_case": ""})
    return [row for row in found.to_dict("records") if _case(row) in wanted]


def in_order(found: list[Row], wanted: list[Case]) -> pd.DataFrame:
    """The rows that are done, in the order of the cases."""
    return pd.DataFrame(sorted(found, key=lambda row: wanted.index(_case(row))))


def _case(row: Row) -> Case:
    return Case(str(row["kind"]), str(row["model"]), Norm(str(row["norm"])))


if __name__ == "__main__":
    main()
