"""Command lines as a user types them, without the seconds in which Python imports torch.

A run of the tests takes a moment; importing torch and Hydra for it takes seconds, several hundred
times. This file is therefore a program too. `CommandLine` starts it once; it imports everything and
then forks a process for each command line that it is asked for. Signals, exit codes, files and what
is printed are those of a real process. It differs from one that a user starts in this:

- `Hydra.get_mode` finds no mode, for which Hydra would compose every configuration twice:
  `hydra.mode=MULTIRUN` is not understood, `-m` is;
- each choice of options is composed once, see `composition.py`;
- it writes a page (`report.html`, seconds of figures) only if `report=html` is among its words;
- at its end it runs what was asked for by `atexit`, and then leaves by `os._exit`: to take down all
  that is imported costs Python more than most of these runs.

`tests/cli/test_real_processes.py` has each command once without any of that.
"""

import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

# Seconds after which a test gives up on a process. No test measures time: on a loaded machine a
# process may take twenty times as long as alone.
PATIENCE = 900


class Answer(NamedTuple):
    """What a command line came to that was given in the folder `cwd`."""

    code: int
    out: str
    err: str
    cwd: Path

    @property
    def said(self) -> str:
        return self.out + self.err

    @property
    def run_dir(self) -> Path:
        """The last line, as a script would take it."""
        return Path(self.out.splitlines()[-1])


@dataclass
class Running:
    """A command line that has been started; its exit code is negative where a signal ended it."""

    pid: int
    cwd: Path
    spoken: list[Path]
    poll: Callable[[], int | None]

    def until(self, *files: str) -> Self:
        """Wait for files below `cwd`, which it has to write before it ends."""
        while not all((self.cwd / file).exists() for file in files):
            assert self.poll() is None, self.said()
            time.sleep(0.001)
        return self

    def signal(self, *signums: int) -> Self:
        for signum in signums:
            os.kill(self.pid, signum)
        return self

    def end(self) -> Answer:
        """Wait for its end, which has to come within `PATIENCE`."""
        latest = time.monotonic() + PATIENCE
        while (code := self.poll()) is None:
            assert time.monotonic() < latest, self.said()
            time.sleep(0.005)
        out, err = self.said()
        return Answer(code, out, err, self.cwd)

    def said(self) -> list[str]:
        return [path.read_text() for path in self.spoken]


class CommandLine:
    """Starts command lines; what they say is kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # By process; none while it runs.
        self._codes: dict[int, int | None] = {}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *words: object, cwd: Path, first: str = "", **variables: str) -> Running:
        """Run `robusttrain words`, behind the Python code `first` in the same process.

        `variables` are added to the environment.
        """
        number = len(self._codes)
        spoken = [self.folder / f"{number}.{name}" for name in ("out", "err")]
        for path in spoken:
            path.touch()
        command = {
            "words": [str(word) for word in words], "cwd": str(cwd), "first": first,
            "environment": os.environ | variables, "spoken": [str(path) for path in spoken],
        }  # fmt: skip
        pid = self._ask(command)
        self._codes[pid] = None
        return Running(pid, cwd, spoken, lambda: self._poll(pid))

    def run(self, *words: object, cwd: Path, first: str = "", **variables: str) -> Answer:
        """`start`, and wait for the end."""
        return self.start(*words, cwd=cwd, first=first, **variables).end()

    def each(
        self, commands: Mapping[str, Sequence[object]], folder: Path, **more: str
    ) -> dict[str, Answer]:
        """`run` by name, each from an empty folder of its own that has its number in `folder`."""
        answers = {}
        for number, (name, words) in enumerate(commands.items()):
            (folder / str(number)).mkdir(parents=True)
            answers[name] = self.run(*words, cwd=folder / str(number), **more)
        return answers

    def close(self) -> None:
        """Kill what still runs."""
        for pid in self._codes:
            if self._poll(pid) is None:
                os.kill(pid, signal.SIGKILL)
        self._process.communicate(timeout=60)

    def _poll(self, pid: int) -> int | None:
        if self._codes[pid] is None:
            self._codes[pid] = self._ask(pid)
        return self._codes[pid]

    def _ask(self, question: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


# --- the program -----------------------------------------------------------------------------


# What a command line imports when it needs it.
LATER = (
    "robusttrain.cli.compare", "robusttrain.cli.report", "robusttrain.report.run.page",
    "robusttrain.api.task", "robusttrain.sweeps.callback", "robusttrain.runs.rerun",
    "torch._dynamo", "scipy.stats", "scipy.optimize",
)  # fmt: skip


def warm_up() -> None:
    """Do what every command line would do anew, and what its first time makes slow."""
    import composition
    import hydra
    from hydra._internal.hydra import Hydra
    from hydra.core.plugins import Plugins

    from robusttrain.config import schema
    from robusttrain.config.folders import CONF

    for module in LATER:
        importlib.import_module(module)
    schema.register()
    Plugins.instance()
    # For this Hydra composes every configuration once more, and finds none.
    Hydra.get_mode = lambda self, **names: None
    composition.remember()
    # The parser of command lines learns.
    words = ["evaluation=quick", "eps=8/255", "seed=1", "dataset.flip=true", "stages=[train]"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        hydra.compose("config", [*words, "~evaluation.attacks.fgsm"])
    # No search for garbage, of which each touches all memory, walks through what is there by now.
    gc.collect()
    gc.freeze()


def serve() -> dict[str, Any] | None:
    """Fork and wait as asked for; in a forked process, return the command that it is to run."""
    from composition import learn

    for line in sys.stdin:
        question = json.loads(line)
        if isinstance(question, int):
            ended, status = os.waitpid(question, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            learn(question["words"])
            gc.freeze()
            answer = os.fork()
            if answer == 0:
                return question
        print(json.dumps(answer), flush=True)
    return None


def become(command: dict[str, Any]) -> None:
    """Be the process of this command, from its first line to the end of what it has started."""
    from robusttrain.__main__ import main
    from robusttrain.api import task

    os.environ.clear()
    os.environ.update(command["environment"])
    os.chdir(command["cwd"])
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(command["spoken"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["robusttrain", *command["words"]]
    if "report=html" not in command["words"]:
        task.page_of = lambda run_dir: run_dir
    exec(command["first"], {"__name__": "first"})
    main()


def leaving(work: Callable[[], None]) -> int:
    """The exit code that Python would give `work`, after it has said what Python would say."""
    try:
        work()
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or 0
        print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    else:
        return 0
    return 1


if __name__ == "__main__":
    warm_up()
    command = serve()
    code = leaving(lambda: become(command)) if command else 0
    # What Python does at its end, but for taking down all that is imported, which would cost more
    # than most runs.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)
