"""An evaluation as a whole: the attacks, certificates, and a closer look at what was found."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from robusttrain import ranges
from robusttrain.attacks import Attack, ProbeAttack
from robusttrain.data import Samples
from robusttrain.evaluation import radii
from robusttrain.evaluation.attack_suite import PassingOver, attack_all, open_session, rounded
from robusttrain.evaluation.audit import audit, pieces_of
from robusttrain.evaluation.cache import NO_CACHE, Cache, FolderCache, description
from robusttrain.evaluation.certification import GROUPS, Certificates, certify
from robusttrain.evaluation.curves import Probe
from robusttrain.evaluation.findings import NO_AUDIT, Audit
from robusttrain.evaluation.radii import ImageRadii
from robusttrain.evaluation.session import EvaluationSession
from robusttrain.evaluation.settings import Evaluation
from robusttrain.evaluation.verification import verify
from robusttrain.models.modes import modes_restored
from robusttrain.noise.control import smoothed
from robusttrain.report.ledger import PROBE, Ledger, Row, joined
from robusttrain.report.run import examples
from robusttrain.report.terminal import Terminal
from robusttrain.runtime import distributed
from robusttrain.threat import Norm, Threat, named


class Plan(NamedTuple):
    """How a model is evaluated: the settings, the threat model, and the seed of all draws.

    `threats` are all threat models, if there are several; `threat` is one of them.
    """

    settings: Evaluation
    threat: Threat
    seed: int
    threats: tuple[Threat, ...] = ()

    @property
    def all_threats(self) -> tuple[Threat, ...]:
        """All threat models, also if there is one."""
        return self.threats or (self.threat,)

    @property
    def probes(self) -> list[ProbeAttack]:
        """The probe of the audit, once for each threat model."""
        return self.settings.probes(self.threat, self.all_threats)

    @property
    def verified(self) -> Threat:
        """The threat model that proofs are for: of several that in linf, or else the first."""
        every = self.all_threats
        return next((each for each in every if each.norm is Norm.linf), every[0])


class EvaluationCache(NamedTuple):
    """Where an evaluation keeps its finished pieces, so that a killed one can be resumed.

    Parameters
    ----------
    folder
        Of several processes each needs one of its own.
    origin
        What else the model is, which its weights do not show: pieces of another `repr` of it are
        not used.
    """

    folder: Path
    origin: object


class EvaluationResult(NamedTuple):
    """What an evaluation found; `rows` are those of `report.csv` beside its attacks.

    `threats` are its threat models, if there are several. `radii` are those of the images in each
    norm, if they were searched.
    """

    ledger: Ledger
    audit: Audit
    certificates: Certificates | None
    rows: list[Row]
    threats: tuple[Threat, ...] = ()
    radii: Sequence[ImageRadii] = ()


class FinishedEvaluation(NamedTuple):
    """An evaluation that is done: what it found, which of several processes the first one knows.

    `pieces` holds the finished work until the report is written.
    """

    found: EvaluationResult | None
    pieces: Cache


def run_evaluation(
    model: nn.Module,
    samples: Samples,
    plan: Plan,
    workplace: EvaluationCache | None,
    terminal: Terminal,
) -> FinishedEvaluation:
    """Attack `model` on the chosen images, certify them if asked, and audit the figures.

    A killed evaluation is resumed from its finished pieces when it is started again on the same
    images, weights, plan and origin, unless there is no `workplace` for pieces. Several processes
    divide attacks and certificates by images.
    """
    settings = plan.settings
    with modes_restored(model), _predicting(model, settings):
        model.eval()
        index, subject = open_session(model, samples, settings, plan.seed)
        subject.saved = pieces = _pieces(model, subject, plan, workplace)
        suite = settings.suite(subject.num_classes, subject.random)
        ranges.require(
            bool(suite) or not settings.attacks, "evaluation.attacks", list(settings.attacks),
            "one attack or more that does not walk along the boundary of a model that draws noise",
        )  # fmt: skip
        ledger = _attacked(subject, index, suite, plan, terminal)
        certificates = _certified(subject, index, settings, terminal)
        if ledger is None:
            return FinishedEvaluation(None, pieces)
        closer, probes = _audited(subject, plan, suite, ledger, terminal)
        brackets = _radii(subject, plan, suite, ledger, probes, terminal)
        for each in brackets:
            closer = closer.joined(each.audit)
        closer = closer.joined(_verified(subject, plan, ledger, terminal))
        if certificates:
            closer = closer.joined(certificates.audit)
        kept = rounded(subject, ledger) if settings.save_adversarial else []
    rows = [*closer.controls, *kept]
    found = EvaluationResult(ledger, closer, certificates, rows, plan.threats, brackets)
    return FinishedEvaluation(found, pieces)


def _pieces(
    model: nn.Module, subject: EvaluationSession, plan: Plan, workplace: EvaluationCache | None
) -> Cache:
    if workplace is None:
        return NO_CACHE
    # How the images are cut into batches, and by what they are computed, shows in rounding.
    how = workplace.origin, *plan, subject.batch_size, subject.x.device
    processes = distributed.rank(), distributed.size()
    work = description(model, subject.x, subject.y, (*how, *processes, torch.__version__))
    return FolderCache(workplace.folder, work)


def _predicting(model: nn.Module, settings: Evaluation) -> AbstractContextManager[None]:
    return smoothed(model) if settings.certification else nullcontext()


def _attacked(
    subject: EvaluationSession,
    index: NDArray[np.int64],
    suite: Mapping[str, Attack],
    plan: Plan,
    terminal: Terminal,
) -> Ledger | None:
    """What the attacks did to all images, of which each process has a share."""
    mine, part = index[distributed.share(len(index))], subject
    if len(mine) < len(index):
        rows = torch.arange(len(index))[distributed.share(len(index))]
        part = subject.take(rows)
        part.seed = distributed.own_seed(subject.seed)
    ledger = None
    with terminal.progress("evaluation", len(mine) * len(suite)) as bar:
        if len(mine):
            ledger = attack_all(
                part, mine, suite, PassingOver.of(plan.settings), threat=plan.threat, progress=bar
            )
            ledger.examples = examples.kept(ledger, part.x, plan.threat)
            if not plan.settings.save_adversarial:
                ledger.adversarial = None
    ledgers = distributed.gather(ledger)
    if ledgers is None:
        return None
    return joined([each for each in ledgers if each is not None])


def _certified(
    subject: EvaluationSession, index: NDArray[np.int64], settings: Evaluation, terminal: Terminal
) -> Certificates | None:
    if settings.certification is None:
        return None
    with terminal.progress("certification", len(index) + GROUPS) as bar:
        return certify(subject, index, settings.certification, bar.advance)


def _verified(subject: EvaluationSession, plan: Plan, ledger: Ledger, terminal: Terminal) -> Audit:
    """Rows and checks of proofs, if they are asked for; the ledger gets the proofs."""
    settings = plan.settings.proofs
    if settings is None:
        return NO_AUDIT
    with terminal.progress("verification", len(ledger.index)) as bar:
        return verify(subject, ledger, settings, plan.verified, bar.advance)


def _audited(
    subject: EvaluationSession,
    plan: Plan,
    suite: Mapping[str, Attack],
    ledger: Ledger,
    terminal: Terminal,
) -> tuple[Audit, list[Probe]]:
    """What the audit found in each threat model, and its probes."""
    for name, outcome in ledger.outcomes.items():
        tried = len(ledger.index) if outcome.attacked is None else int(outcome.attacked.sum())
        broke = int(outcome.broke.sum())
        terminal.detail(f"{name}: {broke} of {tried} images broken in {outcome.seconds:.1f} s")
    rows = plan.settings.probed(len(ledger.index))
    found, attacks, probes = NO_AUDIT, plan.probes, []
    with terminal.progress("audit", len(attacks) * pieces_of(subject)) as bar:
        for attack in attacks:
            work = named("audit", attack.threat, len(attacks))
            probe = Probe(subject.take(rows), attack, rows.numpy(), work)
            found = found.joined(audit(probe, suite, ledger, bar.advance))
            name = named(PROBE, attack.threat, len(attacks))
            probe.searches.enter(ledger, name, attack.threat, rows.numpy())
            probes.append(probe)
    return found, probes


def _radii(
    subject: EvaluationSession,
    plan: Plan,
    suite: Mapping[str, Attack],
    ledger: Ledger,
    probes: Sequence[Probe],
    terminal: Terminal,
) -> list[ImageRadii]:
    settings, threats = plan.settings.radii, plan.all_threats
    if settings is None:
        return []
    with terminal.progress("radii", radii.pieces_of(settings, threats)) as bar:
        return radii.search(subject, threats, suite, settings, ledger, probes, bar.advance)
