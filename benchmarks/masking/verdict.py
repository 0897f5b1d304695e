"""The worst case and the verdict that robusttrain reports for a model.

The benchmark uses nothing else of the evaluation.
"""

import io
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from hydra import compose, initialize_config_dir
from rich.console import Console
from torch import nn

from robusttrain.config import build as configs
from robusttrain.config import schema
from robusttrain.config.folders import CONF
from robusttrain.config.run_config import Config
from robusttrain.errors import InputError
from robusttrain.evaluation import model_checks
from robusttrain.evaluation.pipeline import EvaluationCache, Plan, run_evaluation
from robusttrain.report.terminal import Terminal
from robusttrain.runs.preflight import inspect_model
from robusttrain.threat import Threat

ORDER = ("pass", "warn", "fail")
REFUSED = "refused"


class Judged(NamedTuple):
    """The result of an evaluation.

    Parameters
    ----------
    worst_case
        The accuracy of that row, from 0 to 1; NaN where the model was refused.
    verdict
        The worst verdict of all checks, or `refused`.
    checks
        The checks that did not pass, each with its verdict.
    warnings
        Warnings printed before the evaluation.
    """

    worst_case: float
    verdict: str
    checks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def composed(suite: str, threat: Threat, samples: int) -> Config:
    """The settings of an evaluation on the digits."""
    schema.register()
    words = [f"norm={threat.norm}", f"eps={threat.eps}", f"evaluation.samples={samples}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"evaluation={suite}", *words])
    return configs.build(configs.with_numbers(config))


def judged(model: nn.Module, config: Config, name: str, *, foreign: bool) -> Judged:
    """Evaluate a model as a run does; `foreign` models were not trained by robusttrain."""
    _, test = config.dataset.load()
    spoken = io.StringIO()
    terminal = Terminal(Console(file=spoken, width=1000, soft_wrap=True))
    batch = model_checks.sample(test, config.evaluation.choose(test.size))
    try:
        model_checks.refuse_without_gradient(model.eval(), batch[0], name)
        inspect_model(model, batch, foreign, terminal)
    except InputError as error:
        return Judged(float("nan"), REFUSED, warnings=(str(error),))
    warnings = tuple(line for line in spoken.getvalue().splitlines() if "warning: " in line)
    with TemporaryDirectory() as folder:
        plan = Plan(config.evaluation, config.threat, config.seed)
        cache = EvaluationCache(Path(folder), name)
        found = run_evaluation(model, test, plan, cache, terminal).found
    assert found is not None
    report = found.ledger.report(config.threat, found.rows)
    row = report[(report.attack == "worst_case") & (report.eps == config.threat.eps)].iloc[0]
    checks = [check for check in found.audit.checks if check.verdict != ORDER[0]]
    verdict = max((str(check.verdict) for check in checks), key=ORDER.index, default=ORDER[0])
    said = tuple(f"{check.verdict}: {check.check} ({check.figure:.4g})" for check in checks)
    return Judged(float(row.accuracy), verdict, said, warnings)
