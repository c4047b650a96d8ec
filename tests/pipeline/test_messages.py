from __future__ import annotations

import socket

import numpy as np
import pytest

from batchpipe.errors import MemoryLimitError, WorkerError
from batchpipe.pipeline.messages import Closed, Computed, Failed, Sampled, Wire, decode, encode, merge_corrupt
from batchpipe.types import LinkUse, SequenceStart, Step, TokenLogprobs, Transfers
from tests.scheduler.scheduler_cases import request, sampling


def a_step() -> Step:
    start = SequenceStart(7, 99, sampling(logit_bias={3: -1.5}, stop=("end",)), request(0, 4).prompt_token_ids, (1, 2))
    return Step(
        step_id=3,
        sequence_ids=(7, 8),
        query_lengths=np.array([4, 1], dtype=np.int32),
        context_lengths=np.array([0, 9], dtype=np.int32),
        token_ids=np.arange(5, dtype=np.int32),
        block_tables=np.array([[0, 1], [2, 3]], dtype=np.int32),
        samples=np.array([False, True]),
        copied_blocks=np.array([[4, 0]], dtype=np.int32),
        started=(start,),
        released=(4,),
        transfers=Transfers(
            host_tables=np.array([[5, 6], [7, 8]], dtype=np.int32),
            loads=np.array([[7, 2]], dtype=np.int32),
            staging_tables=np.array([[-1, -1], [-1, 0]], dtype=np.int32),
            staged_blocks=np.array([8], dtype=np.int32),
            staging_blocks=np.array([3], dtype=np.int32),
            host_copies=np.zeros((0, 2), dtype=np.int32),
        ),
    )


def test_a_step_survives_the_way() -> None:
    step = a_step()
    copy = decode(encode(step), Step)
    for name in ("query_lengths", "context_lengths", "token_ids", "block_tables", "samples", "copied_blocks"):
        assert getattr(copy, name).dtype == getattr(step, name).dtype
        np.testing.assert_array_equal(getattr(copy, name), getattr(step, name))
    assert copy.transfers is not None and step.transfers is not None
    for name in ("host_tables", "staging_tables", "loads", "staged_blocks", "staging_blocks", "host_copies"):
        np.testing.assert_array_equal(getattr(copy.transfers, name), getattr(step.transfers, name))
        assert getattr(copy.transfers, name).dtype == np.int32
    assert copy.started[0].sampling == step.started[0].sampling
    assert (copy.step_id, copy.sequence_ids, copy.released) == (3, (7, 8), (4,))
    copy.token_ids[0] = 5  # what arrives is the receiver's own


def test_both_events_of_a_step_survive_the_way() -> None:
    logprobs = {7: TokenLogprobs(4, -0.5, (4, 2), (-0.5, -1.0))}
    sampled = decode(encode(Sampled(1, 0.5, np.array([4, -1], dtype=np.int32), logprobs)), Sampled)
    assert (sampled.step_id, sampled.seconds, sampled.logprobs) == (1, 0.5, logprobs)
    assert sampled.token_ids.dtype == np.int32 and sampled.token_ids.tolist() == [4, -1]
    computed = Computed(1, 0.25, LinkUse(0.25, 1 << 40, 3, 1.5, 2.5), {7: "stage 0: wrong"})
    assert decode(encode(computed), Computed) == computed


def test_messages_of_any_size_arrive_whole_and_a_closed_end_is_told() -> None:
    ends = socket.socketpair()
    sender, receiver = Wire(ends[0]), Wire(ends[1])
    for size in (0, 1, 70_000):
        sender.send(Computed(size, 0.0), Sampled(size, 0.0, np.arange(size % 5000, dtype=np.int32), {}))
        computed, sampled = receiver.receive_answer(), receiver.receive_answer()
        assert computed == Computed(size, 0.0)
        assert isinstance(sampled, Sampled) and len(sampled.token_ids) == size % 5000
    sender.close()
    with pytest.raises(Closed):
        receiver.receive_answer()
    with pytest.raises(Closed):
        receiver.send(Computed(0, 0.0))
    receiver.close()


def test_an_error_keeps_its_type_on_the_way_if_it_is_the_users() -> None:
    error = decode(encode(Failed.of(MemoryLimitError("too much"))), Failed).as_error("stage 3")
    assert type(error) is MemoryLimitError and str(error) == "too much"
    try:
        raise ValueError("a bug")
    except ValueError as bug:
        error = Failed.of(bug).as_error("stage 3")
    assert type(error) is WorkerError
    assert str(error).startswith("stage 3 failed") and str(error).endswith("ValueError: a bug")
    with pytest.raises(AssertionError, match="unknown kind Exception"):
        Failed("Exception", "").as_error("stage 3")


def test_of_a_sequence_that_several_stages_found_wrong_the_first_is_heard() -> None:
    assert merge_corrupt([{}, {1: "one", 2: "one"}, {2: "two", 3: "two"}]) == {1: "one", 2: "one", 3: "two"}
