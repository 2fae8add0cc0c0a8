"""The errors a user meets; the CLI maps them to exit codes."""


class UsageError(Exception):
    """The user's input is wrong (recipe, option, file): one sentence naming the place and the fix; exit code 2."""


class RunError(Exception):
    """The run failed while running: one sentence; exit code 1."""


class ProcessLost(RunError):
    """A process that holds training state died: the run can go on from its newest checkpoint."""
