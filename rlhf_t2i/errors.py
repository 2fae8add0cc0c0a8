"""The errors a user meets; the CLI maps them to exit codes. And other libraries' errors in one line."""


class UsageError(Exception):
    """The user's input is wrong (recipe, option, file): one sentence naming the place and the fix; exit code 2."""


class RunError(Exception):
    """The run failed while running: one sentence; exit code 1."""


class ProcessLost(RunError):
    """A process that holds training state died: the run can go on from its newest checkpoint."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error that says something, else its kind: one sentence for the user."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
