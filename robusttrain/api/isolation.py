"""What belongs to the caller's process and is left as it was; and what is printed there."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console

from robusttrain.report.terminal import Terminal
from robusttrain.report.verbosity import Verbosity


@contextmanager
def isolated() -> Iterator[None]:
    """Restore torch's global random streams, default format and current device after the block.

    Gradients are enabled within it, and the default format is that of the command line.
    """
    has_cuda = torch.cuda.is_available()
    devices = range(torch.cuda.device_count()) if has_cuda else ()
    before = torch.cuda.current_device() if has_cuda else None
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        if before is not None:
            torch.cuda.set_device(before)


def program_terminal(progress: bool) -> Terminal:
    """The terminal of a function that a program calls: the standard error.

    Without `progress` it prints warnings only.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    return Terminal(console, Verbosity.normal if progress else Verbosity.quiet)
