"""Prepare Hydra's launchers and sweepers, other than its basic ones."""

import os

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, open_dict, read_write

from robusttrain.errors import InputError

# The basic launcher runs job after job in this process; the basic sweeper runs a grid.
PLAIN = "basic"

# Variables that limit the threads of numerical libraries. Torch obeys the second if it is set.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


# No usage statistics are sent unless the user enables them.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}

# Defaults of a search: it maximises an accuracy, and a failed run does not end it.
SEARCH = {"direction": "maximize", "max_failure_rate": 1.0, "n_jobs": 1}


def register() -> None:
    """Set defaults of the installed sweepers that suit the figure that a run returns."""
    # Loaded first, since the plugins would overwrite these defaults.
    Plugins.instance()
    store = ConfigStore.instance()
    if "optuna.yaml" in store.list("hydra/sweeper"):
        found = store.load("hydra/sweeper/optuna.yaml")
        found.node.update(SEARCH)
        store.store(group="hydra/sweeper", name="optuna", node=found.node, provider=found.provider)


def launcher(config: DictConfig) -> str:
    """The chosen option of `hydra/launcher`, which runs the jobs."""
    return str(config.hydra.runtime.choices["hydra/launcher"])


def sweeper(config: DictConfig) -> str:
    """The chosen option of `hydra/sweeper`, which chooses the jobs."""
    return str(config.hydra.runtime.choices["hydra/sweeper"])


def prepare_launcher(config: DictConfig, jobs: int) -> bool:
    """Divide the cores of this machine among the jobs that run at once.

    Ray and Slurm assign cores to jobs themselves. Returns whether jobs will run in other processes.

    Parameters
    ----------
    config
        The configuration of a sweep, in which the number of processes is set.
    jobs
        How many jobs the launcher gets at once, or 0 if that is unknown.

    Raises
    ------
    InputError
        If `hydra.launcher.n_jobs` is 0.
    """
    chosen = config.hydra.launcher
    if launcher(config) == "joblib":
        with read_write(chosen):
            chosen.n_jobs = processes(chosen.n_jobs, jobs)
        _limit_threads(share(chosen.n_jobs))
        # With one process, joblib runs the jobs in this one.
        return bool(chosen.n_jobs > 1)
    if launcher(config) == "ray" and chosen.ray.init.get("address") is not None:
        # The launcher would set a size, which Ray rejects for an existing cluster.
        with read_write(chosen), open_dict(chosen):
            chosen.ray.init.setdefault("object_store_memory", None)
    if launcher(config) == "submitit_local":
        _limit_threads(share(max(1, jobs)))
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    return launcher(config) != PLAIN


def cores() -> int:
    """How many cores this process may use, within every limit on it."""
    # Imported here, since it takes long and few sweeps need it.
    from joblib import cpu_count

    return int(cpu_count())


def processes(asked: int, jobs: int) -> int:
    """The number of processes: as many as `asked` for (-1: one per core), at most `jobs`.

    Raises
    ------
    InputError
        If `asked` is 0.
    """
    if asked == 0:
        raise InputError("hydra.launcher.n_jobs", 0, "1 or more, or -1")
    # Negative numbers mean the same as in joblib.
    count = asked if asked > 0 else max(1, cores() + 1 + asked)
    return min(count, jobs) if jobs else count


def share(processes: int) -> int:
    """The number of cores for each of `processes` processes, at least one."""
    return max(1, cores() // processes)


def check_search(config: DictConfig) -> None:
    """Refuse a search whose runs would return no figure.

    Raises
    ------
    InputError
        If the runs have no validation split, do not attack it, or do not train.
    """
    problem = "needs the robust accuracy on the validation split"
    option = "hydra/sweeper", sweeper(config)
    if config.dataset.validation == 0:
        raise InputError(*option, "dataset.validation=0 is not allowed", problem)
    if config.training.validation_attack is None:
        raise InputError(*option, "training.validation_attack=null is not allowed", problem)
    if "train" not in [str(getattr(stage, "value", stage)) for stage in config.stages]:
        raise InputError(*option, "stages must contain train", problem)


def prepare_search(config: DictConfig) -> bool:
    """Seed the sampler of a search with the seed of its runs, so that it can be repeated.

    Returns whether the search maximises its figure.
    """
    if sweeper(config) == "optuna":
        import optuna

        # By default it prints lines of its own for studies and trials.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
    chosen = config.hydra.sweeper
    sampler = chosen.get("sampler", {})
    if "seed" in sampler and sampler.seed is None:
        with read_write(sampler):
            # Samplers take no larger seeds.
            sampler.seed = int(config.seed) % 2**32
    return str(chosen.get("direction")) == "maximize"


def _limit_threads(count: int) -> None:
    """Limit new processes to `count` threads, or to fewer if the user has set fewer."""
    for variable in THREADS:
        given = os.environ.get(variable, "")
        # The limit of OpenMP holds for MKL, too, which would otherwise follow its own alone.
        count = min(count, int(given)) if given.isdigit() else count
        os.environ[variable] = str(count)
