"""Launchers and sweepers of Hydra other than its plain ones: their extras, and what they share."""

import os

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, open_dict, read_write

from robusttrain.errors import InputError

# The plain ones run one job after the other in this process, over a grid.
PLAIN = "basic"

# Libraries that compute in several threads look here. Torch goes by the second if there is one.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


# Nothing leaves the machine unless the user wants.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}

# What a search starts from: it goes by an accuracy, and a run that fails is no reason to end it.
SEARCH = {"direction": "maximize", "max_failure_rate": 1.0, "n_jobs": 1}


def register() -> None:
    """Give the sweepers that are installed defaults that suit what a run returns."""
    # The plugins would put their own in this place later.
    Plugins.instance()
    store = ConfigStore.instance()
    if "optuna.yaml" in store.list("hydra/sweeper"):
        found = store.load("hydra/sweeper/optuna.yaml")
        found.node.update(SEARCH)
        store.store(group="hydra/sweeper", name="optuna", node=found.node, provider=found.provider)


def launcher(config: DictConfig) -> str:
    """The option that runs the jobs."""
    return str(config.hydra.runtime.choices["hydra/launcher"])


def sweeper(config: DictConfig) -> str:
    """The option that says which jobs there are."""
    return str(config.hydra.runtime.choices["hydra/sweeper"])


def prepare_launcher(config: DictConfig, jobs: int) -> bool:
    """Give each of `jobs` jobs that run at once on this machine its share of the cores.

    Ray and Slurm count the cores of a job themselves. Returns whether jobs will run in other
    processes.

    Parameters
    ----------
    config
        A sweep, whose number of processes is set.
    jobs
        How many jobs there are to be run at once, or 0 where that is not known.

    Raises
    ------
    InputError
        If no process is asked for.
    """
    chosen = config.hydra.launcher
    if launcher(config) == "joblib":
        with read_write(chosen):
            chosen.n_jobs = processes(chosen.n_jobs, jobs)
        _limit_threads(share(chosen.n_jobs))
        # Joblib needs no other process for a single one.
        return bool(chosen.n_jobs > 1)
    if launcher(config) == "ray" and chosen.ray.init.get("address") is not None:
        # The launcher sets it to a size, which a cluster that is there already does not take.
        with read_write(chosen), open_dict(chosen):
            chosen.ray.init.setdefault("object_store_memory", None)
    if launcher(config) == "submitit_local":
        _limit_threads(share(max(1, jobs)))
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    return launcher(config) != PLAIN


def cores() -> int:
    """How many cores this process may use, whatever keeps it from the others."""
    # Takes long to import, and is only wanted here.
    from joblib import cpu_count

    return int(cpu_count())


def processes(asked: int, jobs: int) -> int:
    """How many processes: as many as `asked` for (-1 is one a core), but no more than `jobs`.

    Raises
    ------
    InputError
        If none are asked for.
    """
    if asked == 0:
        raise InputError("hydra.launcher.n_jobs", 0, "1 or more, or -1")
    # Joblib's count of what is negative.
    count = asked if asked > 0 else max(1, cores() + 1 + asked)
    return min(count, jobs) if jobs else count


def share(processes: int) -> int:
    """The cores for each of some processes, at least one."""
    return max(1, cores() // processes)


def check_search(config: DictConfig) -> None:
    """Refuse a search whose runs would measure nothing that it could go by.

    Raises
    ------
    InputError
        If they have no validation split, attack it with nothing, or do not train.
    """
    problem = "goes by the robust accuracy on the validation split"
    option = "hydra/sweeper", sweeper(config)
    if config.dataset.validation == 0:
        raise InputError(*option, "dataset.validation=0 is not allowed", problem)
    if config.training.validation_attack is None:
        raise InputError(*option, "training.validation_attack=null is not allowed", problem)
    if "train" not in [str(getattr(stage, "value", stage)) for stage in config.stages]:
        raise InputError(*option, "stages must contain train", problem)


def prepare_search(config: DictConfig) -> bool:
    """Have the sampler of a search draw from the seed of its runs, so that it can be repeated.

    Returns whether the search looks for the largest figure.
    """
    if sweeper(config) == "optuna":
        import optuna

        # It tells of studies and trials in lines of its own otherwise.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen = config.hydra.sweeper
    sampler = chosen.get("sampler", {})
    if "seed" in sampler and sampler.seed is None:
        with read_write(sampler):
            sampler.seed = config.seed
    return str(chosen.get("direction")) == "maximize"


def _limit_threads(count: int) -> None:
    """Let processes to come use `count` threads, or fewer where the user has said so."""
    for variable in THREADS:
        given = os.environ.get(variable, "")
        # What holds for OpenMP holds for MKL, which would take all that it is told for itself.
        count = min(count, int(given)) if given.isdigit() else count
        os.environ[variable] = str(count)
