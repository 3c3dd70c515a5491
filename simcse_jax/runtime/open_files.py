"""The limit of the files that a process may have open."""

import contextlib

from simcse_jax.errors import InputError

LEAST = 64
"""Files that a command must be able to open: below some 50, libraries hang or end with tracebacks of their threads."""


def allow_open_files() -> int:
    """Raises the limit as far as the system lets this process: many begin with 1,024, macOS with 256.

    Returns:
      The limit. A connection is a file, too.

    Raises:
      InputError: it is below `LEAST`.
    """
    try:
        import resource
    except ImportError:  # not on Windows
        return 2**14
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 2**20
    if soft < LEAST:
        raise InputError(
            f"this process may have {soft} files open at a time, and a command needs {LEAST}: raise the limit "
            f"(ulimit -n {LEAST}), or ask whoever set it to"
        )
    return soft
