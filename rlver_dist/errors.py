"""One error family, the helper that names where an outside call failed, and what a command tells of either.

Vocabulary: an error that the user can mend (`UserError` and its kinds) is one line that names the file, field
and value and the way out, and entry points print it without a traceback. Everything else is a defect or a
failed machine and keeps its traceback. A failed dialogue is data, not an error: see
`dialogue.EndReason.INFRASTRUCTURE`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_FAILED = 1
EXIT_REFUSED = 2
"""Exit code of a run that the user has to mend something for."""
EXIT_INTERRUPTED = 130
"""Exit code after SIGINT or SIGTERM, as shells have it."""


class RlverError(Exception):
    """Base of every error that this package raises on purpose."""


class UserError(RlverError):
    """The user can mend it: the message is one line that names what is wrong and the way out."""


class ConfigError(UserError):
    """A configuration value is refused; the message names the key, the value and the way out."""


class DataError(UserError):
    """A data file is refused; the message names the file, the line and the field."""


class ResourceError(UserError):
    """The machine or cluster lacks what the run needs; the message says what is needed and what is there."""


class BudgetError(UserError):
    """Tokens, money or quota of an endpoint are used up; the run stops with a checkpoint and can be
    resumed."""


class BoundaryError(RlverError):
    """A call that left this package failed (an engine, an endpoint, a file system); chained to its cause."""


class GoneError(BoundaryError):
    """What was called is there but will never answer again, such as an engine whose process died; another one
    may."""


class WeightSyncError(RlverError):
    """Weights did not arrive at an engine; the learner's own are whole."""


class WeightMismatchError(WeightSyncError):
    """After a weight sync an engine does not compute what the learner computes; training on would be wrong,
    and so may the learner's weights be."""


@contextmanager
def boundary(what: str) -> Iterator[None]:
    """Attribute any foreign exception inside the block to `what`.

    Errors of this package pass through unchanged; others are re-raised as `BoundaryError` with the original
    chained.
    """
    try:
        yield
    except RlverError:
        raise
    except Exception as error:
        raise BoundaryError(f"{what}: {type(error).__name__}: {error}") from error


def exit_code(command: Callable[[], int], *, kept: str = "") -> int:
    """Run a command, and tell on standard error, in one line, what ended it early.

    Args:
        command: returns its own exit code.
        kept: what a failed or interrupted command has kept, and how it goes on; empty where `command` says so
            itself.

    Returns:
        The command's code; `EXIT_REFUSED` for what the user can mend, `EXIT_FAILED` for another error of this
            package, `EXIT_INTERRUPTED` after an interrupt. Any other exception is a defect and passes.
    """
    ending = f"; {kept}" if kept else ""
    try:
        return command()
    except UserError as error:
        # Its message holds the way out already.
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except RlverError as error:
        print(f"failed: {error}{ending}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        if kept:
            print(f"interrupted{ending}", file=sys.stderr)
        return EXIT_INTERRUPTED
