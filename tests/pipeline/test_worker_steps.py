"""What a worker does with the steps that it is told of, in this process, with a stage that only adds."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from batchpipe.pipeline.channel import Payload, SharedMemoryChannel
from batchpipe.pipeline.messages import Closed, Computed, Sampled, Wire
from batchpipe.pipeline.worker import Inbox, LinkSpec, connect, run_step
from batchpipe.sample.sampler import SampledTokens
from batchpipe.types import Step

PAYLOAD = Payload(max_tokens=4, hidden_size=3, dtype=torch.float32)


class AddingStage:
    """The first stage makes hidden states of the token ids, every later one adds one."""

    link_use = None
    corrupt: dict[int, str] = {}
    spec = SimpleNamespace(device="cpu")

    def __init__(self) -> None:
        self.announced: list[int] = []

    def announce(self, step: Step) -> None:
        self.announced.append(step.step_id)

    def run(self, step: Step, hidden: Tensor | None) -> Tensor:
        if hidden is None:
            return torch.from_numpy(step.token_ids)[:, None].expand(-1, 3).float()
        return hidden + 1


class FirstNumbers:
    def sample_step(self, step: Step, logits: Tensor) -> SampledTokens:
        return SampledTokens(logits[:, 0].int().numpy(), {})


def step_of(step_id: int) -> Step:
    ids = np.arange(3, dtype=np.int32) + step_id
    ones = np.ones(3, np.int32)
    return Step(
        step_id=step_id, sequence_ids=(0, 1, 2), query_lengths=ones, context_lengths=0 * ones, token_ids=ids,
        block_tables=ids[:, None], samples=ones > 0, copied_blocks=np.zeros((0, 2), np.int32), transfers=None,
    )  # fmt: skip


def channels() -> tuple[Any, Any]:
    """As two workers of one machine connect."""
    memory_fd = SharedMemoryChannel.make_memory(PAYLOAD)
    bells = socket.socketpair()
    links = [LinkSpec(peer=1, memory_fd=memory_fd, bell_fd=bell.detach()) for bell in bells]
    stage = SimpleNamespace(max_step_tokens=4, hidden_size=3, device="cpu")

    def spec(incoming: LinkSpec | None, outgoing: LinkSpec | None) -> Any:
        return SimpleNamespace(stage=stage, transport="shared_memory", incoming=incoming, outgoing=outgoing)

    no_channel, outgoing = connect(spec(None, links[0]), torch.float32)
    incoming, none = connect(spec(links[1], None), torch.float32)
    os.close(memory_fd)
    assert no_channel is None and none is None
    return outgoing, incoming


def test_steps_pass_from_stage_to_stage_in_order_and_the_last_one_samples() -> None:
    outgoing, incoming = channels()
    ends = [socket.socketpair() for _ in range(2)]
    (told, heard), (answering, answers) = ([Wire(end) for end in pair] for pair in ends)
    first: Any = AddingStage()
    last: Any = AddingStage()
    inbox = Inbox(heard, first)
    for step_id in range(5):
        told.send(step_of(step_id))
    for step_id in range(5):
        step = inbox.next_step()
        assert step.step_id == step_id and step_id in first.announced
        run_step(step, answering, first, None, None, outgoing)
        computed = answers.receive_answer()
        assert isinstance(computed, Computed) and computed.step_id == step_id
        run_step(step, answering, last, FirstNumbers(), incoming, None)
        computed, sampled = answers.receive_answer(), answers.receive_answer()
        assert isinstance(computed, Computed) and isinstance(sampled, Sampled)
        assert sampled.token_ids.tolist() == [step_id + 1, step_id + 2, step_id + 3]
    told.close()
    with pytest.raises(Closed):
        inbox.next_step()
    for end in (heard, answering, answers):
        end.close()
    for channel in (outgoing, incoming):
        channel._bell.close()
