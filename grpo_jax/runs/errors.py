"""Why a run stops early; every message says what to do."""


class RunError(RuntimeError):
    """A run cannot start or go on."""


class RunDirectoryError(RunError):
    """The run directory cannot be used; nothing in it has been changed."""


class DirectoryInUse(RunDirectoryError):
    """Another process works in the run directory."""


class DirectoryUnreachable(RunDirectoryError):
    """The system does not let it be read or written; another time it may."""


class CheckpointError(RunError):
    """No checkpoint of the run can be trusted, or one could not be written."""


class VerifierFailed(RunError):
    """The verifier judged nothing: every completion crashed it, or ran into its deadline."""


class NothingToLearn(RunError):
    """No completion of the reference succeeded, and groups of equal rewards teach nothing."""


class WarmStartFailed(RunError):
    """The supervised warm start did not reach its target."""


class Diverged(RunError):
    """Too many updates in a row had a non-finite loss or gradient; the checkpoints are from before."""


class StartedInVain(RunError):
    """Start after start ended before anything new was saved; another will not help."""


class Preempted(RuntimeError):
    """SIGTERM or SIGHUP arrived; what was done is saved, and the same command resumes it."""


class Interrupted(Preempted):
    """The same of SIGINT: somebody wants it to stop, and not to be started again."""
