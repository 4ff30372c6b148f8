"""How a run can end: exceptions, each with the exit code of the process. Imports nothing, for the launcher's start."""


class UsageError(ValueError):
    """Report input that cannot work: what was wrong, what was expected, what to do."""

    exit_code = 64  # EX_USAGE of sysexits.h


class NotFiniteError(ArithmeticError):
    """Report that a run has ended because a metric or a variable is no longer finite. The same command would again."""

    exit_code = 65


class PreflightError(RuntimeError):
    """Report that the machines cannot train together: a worker does not answer, or sums come out wrong."""

    exit_code = 69  # EX_UNAVAILABLE


class PortTakenError(PreflightError):
    """Report that another process has the port of this worker."""


class PeerLostError(RuntimeError):
    """Report that this worker ended because another one did, which has the true error."""

    exit_code = 138


class Stopped(Exception):
    """Report that all workers have stopped after the same step, as asked, with a checkpoint to go on from."""

    exit_code = 143  # as a shell says of SIGTERM


class StorageError(OSError):
    """Report that the metrics or the last checkpoint of a run could not be written."""

    exit_code = 1


def check_address(address: str, name: str) -> None:
    """Raise UsageError unless `address` (called `name` in the message) is host:port."""
    host, _, port = address.rpartition(":")
    is_host = host and "/" not in host and (":" not in host or (host[0] == "[" and host[-1] == "]"))
    if not (is_host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UsageError(f"{name} is {address!r}; expected host:port, such as localhost:5050 or [::1]:5050.")
