from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from batchpipe.pipeline.channel import NUM_SLOTS, HostedChannel, Payload, SharedMemoryChannel
from batchpipe.pipeline.messages import Closed

PAYLOAD = Payload(max_tokens=6, hidden_size=4, dtype=torch.bfloat16)


@dataclass
class Ends:
    sender: SharedMemoryChannel
    receiver: SharedMemoryChannel
    sending_bell: socket.socket
    receiving_bell: socket.socket


@pytest.fixture
def ends() -> Iterator[Ends]:
    memory_fd = SharedMemoryChannel.make_memory(PAYLOAD)
    sending_bell, receiving_bell = socket.socketpair()
    with sending_bell, receiving_bell:
        yield Ends(
            SharedMemoryChannel(memory_fd, sending_bell, PAYLOAD),
            SharedMemoryChannel(memory_fd, receiving_bell, PAYLOAD),
            sending_bell,
            receiving_bell,
        )
    os.close(memory_fd)


def test_every_payload_arrives_in_order_and_none_is_overwritten_before_its_release(ends: Ends) -> None:
    sent = [torch.randn(1 + i % 6, 4, dtype=torch.bfloat16) for i in range(50)]

    def send_all() -> None:
        for hidden in sent:
            ends.sender.send(hidden)

    thread = threading.Thread(target=send_all)
    thread.start()
    for hidden in sent:
        arrived = ends.receiver.receive(len(hidden))
        assert torch.equal(arrived, hidden)
        ends.receiver.release()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_the_sender_waits_where_no_slot_is_free(ends: Ends) -> None:
    hidden = torch.ones(2, 4, dtype=torch.bfloat16)
    for _ in range(NUM_SLOTS):
        ends.sender.send(hidden)
    waiting = threading.Thread(target=lambda: ends.sender.send(hidden * 2))
    waiting.start()
    assert torch.equal(ends.receiver.receive(2), hidden)
    assert waiting.is_alive()
    ends.receiver.release()
    waiting.join(timeout=10)
    assert not waiting.is_alive()


def test_the_receiver_is_told_that_the_sender_is_gone(ends: Ends) -> None:
    ends.sending_bell.close()
    with pytest.raises(Closed):
        ends.receiver.receive(1)


def test_the_sender_is_told_that_the_receiver_is_gone(ends: Ends) -> None:
    ends.receiving_bell.close()
    with pytest.raises(Closed):
        ends.sender.send(torch.ones(1, 4, dtype=torch.bfloat16))


def test_between_gpus_a_payload_goes_by_way_of_pinned_memory_that_is_free_at_once(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = []

    class Runtime:
        def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:  # noqa: N802
            pinned.append(num_bytes)
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    sender, receiver = (HostedChannel(end, PAYLOAD, "cpu") for end in (ends.sender, ends.receiver))
    assert pinned == 2 * [NUM_SLOTS * PAYLOAD.nbytes]
    for i in range(3 * NUM_SLOTS):  # a receiver that held its slot would leave the sender none
        hidden = torch.full((1 + i % 6, 4), i, dtype=torch.bfloat16)
        sender.send(hidden)
        arrived = receiver.receive(len(hidden))
        receiver.release()
        assert torch.equal(arrived, hidden)
