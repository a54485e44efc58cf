"""The training loop of one replica: what every rank does, from the first update to the last.

The one idea: one loop for every phase. What a batch is (text, or samples of the model's own) is the
phase's affair; every rank is told the same plan.
"""

from __future__ import annotations

from gossamer.trainer.session import Session


def train(session: Session) -> None:
    """Runs the phases from wherever the session stands to their end.

    A collective call: every rank of the replica runs it with a session of its own.
    """
    session.start()
    while (phase := session.phase()) is not None:
        if session.progress.phase_step == 0:
            session.begin_phase(phase)
        result = session.update(phase)
        session.sync_replicas(phase)
        session.publish(phase)
        session.record(phase, result)
        session.evaluate(phase)
        if session.is_phase_done(phase):
            session.end_phase(phase)
        elif session.is_checkpoint_due():
            session.checkpoint()
    session.finish()
