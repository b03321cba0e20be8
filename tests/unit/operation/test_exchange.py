"""Beats, alarms and endings go through the store at which the ranks have met."""

import time

import pytest
import torch
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore

from megatron_haplovl.operation.exchange import Exchange
from tests.unit.operation.beat import beat


@pytest.fixture
def store(monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


@pytest.fixture
def ranks(store):
    ranks = [Exchange(rank, 3, "0/abc", reads_all=rank != 1, beat=beat(rank)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    yield ranks
    for number, rank in enumerate(ranks):
        rank.stop(beat(number, left=True), 3.0)


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_beats_and_alarms(ranks):
    until(lambda: set(ranks[0].received.beats) == {0, 1, 2} and set(ranks[1].received.beats) == {0})
    ranks[2].beat = beat(2, number=7, phase="save")
    until(lambda: ranks[0].received.beats[2].phase == "save")
    ranks[1].raise_alarm("rank 1, beat 3")
    until(lambda: all(rank.received.alarm == "rank 1, beat 3" for rank in ranks))


def test_the_first_ending_holds(ranks):
    assert ranks[1].publish("one", lambda known: False, 10) == "one"
    assert ranks[2].publish("two", lambda known: False, 10) == "one"
    until(lambda: all(rank.received.ending == "one" for rank in ranks))
    assert ranks[2].publish("three", lambda known: known == "one", 10) == "three"
    until(lambda: ranks[0].seen_by == 2)


def test_a_store_that_is_gone_ends_nothing(store, monkeypatch):
    monkeypatch.setattr("megatron_haplovl.operation.exchange._SECONDS_TO_CONNECT", 1)
    rank = Exchange(0, 2, "0/abc", reads_all=False, beat=beat(0))
    rank.start()
    until(lambda: rank.received.number)
    monkeypatch.setattr(rank, "_store", PrefixStore("gone", HashStore()))
    monkeypatch.setenv("MASTER_PORT", "1")
    rank._store.set_timeout(torch.distributed.constants.default_pg_timeout / 1800)
    until(lambda: rank.trouble is not None)
    assert rank.publish("mine", lambda known: False, 0.5) == "mine"
    rank.stop(beat(0, left=True), 5.0)
