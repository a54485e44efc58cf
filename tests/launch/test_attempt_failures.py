"""What an attempt died of, as Ray Train tells it, and whether another would mend it."""

import pytest
from gossamer.comm.log import StaleWriterError
from gossamer.launch.replica import failure_of
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

LOST_PEER = UserExceptionWithTraceback(
    RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), "a traceback"
)
KILLED = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())


def raised(error: Exception) -> UserExceptionWithTraceback:
    return UserExceptionWithTraceback(error, "Traceback ...")


@pytest.mark.parametrize(
    ("by_rank", "reason", "is_final"),
    [
        ({0: LOST_PEER, 1: KILLED}, "the process of trainer rank 1 was killed or crashed", False),
        ({0: LOST_PEER, 1: raised(ValueError("field x"))}, "rank 1: field x", True),
        ({0: KILLED, 1: raised(FloatingPointError("not finite"))}, "rank 1: not finite", True),
        ({0: raised(StaleWriterError("a later writer"))}, "rank 0: a later writer", True),
        ({0: LOST_PEER, 3: raised(OSError(28, "No space left"))}, "rank 3: [Errno 28] No", False),
        ({0: LOST_PEER}, "rank 0: [gloo/transport/tcp/pair.cc] Connection closed", False),
        ({0: raised(TimeoutError())}, "rank 0: TimeoutError", False),
    ],
)
def test_the_rank_that_made_the_others_fail_is_named(by_rank, reason, is_final):
    failure = failure_of(WorkerGroupError("told at length", by_rank))
    assert failure.reason.startswith(reason)
    assert failure.is_final is is_final


def test_ranks_that_could_not_be_started():
    failure = failure_of(ControllerError(RuntimeError("no nodes\nThe group did not start.")))
    assert (failure.reason, failure.is_final) == ("The group did not start.", False)
