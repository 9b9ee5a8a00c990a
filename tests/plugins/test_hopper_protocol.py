"""The barriers of the Hopper kernel: no order of its threads deadlocks or reads what is not there."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from hstu_compile.plugins.kernels.hopper.variants import BLOCK_DIMS, SILU_FORMS, SPLITS, Turns, hopper_variants_for
from tests.plugins.hopper_protocol import DeadlockError, Fault, HazardError, Protocol, play, protocol_of, random_tiles

SEEDS = range(300)
PROTOCOLS = {
    f"dim{dim}-split{split}-{silu}": protocol_of(variant, split)
    for dim in BLOCK_DIMS
    for silu in SILU_FORMS
    for variant in hopper_variants_for("float16", dim, dim, silu=silu)
    for split in SPLITS
    if (split > 1) == variant.shares
}
#: Two warpgroups in turns with two of everything, as small as a kernel gets.
SMALL = Protocol(
    stages=2, query_buffers=2, warpgroups=2, turns=Turns.PRODUCTS, holds_queries=False, split=1, slots=3, ask_ahead=3
)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_kernel_ends_every_tile(name: str) -> None:
    protocol = PROTOCOLS[name]
    # Larger clusters have as many more orders a run, and take as much longer.
    for seed in SEEDS[:: protocol.split]:
        play(protocol, random_tiles(seed), seed)


def test_no_tile_and_tiles_without_keys_end_at_once() -> None:
    for protocol in PROTOCOLS.values():
        for tiles in ([], [0], [0] * 7, [0, 0, 1, 0, 0]):
            play(protocol, tiles, seed=1)


@functools.cache
def failures(protocol: Protocol, *faults: Fault, with_empty: bool = True) -> frozenset[type[AssertionError]]:
    """Return how the protocol with these mistakes fails over many tile lists and orders."""
    found: set[type[AssertionError]] = set()
    for seed in SEEDS:
        tiles = [keys for keys in random_tiles(seed) if keys > 0 or with_empty]
        try:
            play(protocol, tiles, seed, frozenset(faults))
        except (DeadlockError, HazardError) as failure:
            found.add(type(failure))
    return frozenset(found)


def test_the_deadlock_of_an_earlier_version_is_found() -> None:
    earlier = replace(SMALL, slots=2)
    faults = (Fault.SLOT_KEPT_INTO_NEXT_TILE, Fault.KEYS_WAIT_FOR_NEXT_TILE)
    assert failures(earlier, *faults) == {DeadlockError}
    assert failures(earlier, *faults, with_empty=False) == {DeadlockError}
    for fault in faults:
        assert failures(earlier, fault, with_empty=False) == set(), "it takes both, where every tile has keys"
    # A third slot hides neither: tiles without keys fill it.
    assert failures(SMALL, Fault.SLOT_KEPT_INTO_NEXT_TILE) == {DeadlockError}


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        (Fault.EMPTY_TILE_ASKS_FOR_NOTHING, DeadlockError),
        (Fault.NO_FIRST_TURN, DeadlockError),
        (Fault.KEYS_RELEASED_EARLY, HazardError),
    ],
)
def test_other_mistakes_are_found(fault: Fault, failure: type[AssertionError]) -> None:
    assert failure in failures(SMALL, fault)


def test_queries_that_are_given_back_unread_are_found() -> None:
    holding = replace(SMALL, query_buffers=1, holds_queries=True)
    assert failures(holding) == set()
    assert HazardError in failures(holding, Fault.QUERIES_RELEASED_UNREAD)


# Two rounds have what one has.
@pytest.mark.parametrize("rounds", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        (Fault.EXCHANGE_NOT_AWAITED, HazardError),
        (Fault.STAGE_OFFERED_EARLY, HazardError),
        (Fault.STAGE_RELEASED_BEFORE_EXCHANGE, HazardError),
        (Fault.PHASES_LEFT_OPEN, HazardError),
        (Fault.SUMS_NOT_EXPECTED, DeadlockError),
    ],
)
def test_an_exchange_over_what_is_still_read_is_found(fault: Fault, failure: type[AssertionError], rounds: int) -> None:
    sharing = replace(SMALL, split=2, query_buffers=1, rounds=rounds)
    assert failures(sharing) == set()
    assert failure in failures(sharing, fault)


def test_a_second_round_over_what_is_still_read_is_found() -> None:
    sharing = replace(SMALL, split=2, query_buffers=1, rounds=2)
    assert HazardError in failures(sharing, Fault.STAGE_OFFERED_AGAIN_EARLY)


def test_an_offer_before_the_last_one_was_seen_is_found() -> None:
    """It takes three stages: with two, the stage to offer is the one of the last exchange."""
    assert failures(replace(SMALL, split=2, query_buffers=1), Fault.OFFERED_BEFORE_LAST_EXCHANGE) == set()
    sharing = replace(SMALL, split=2, query_buffers=1, stages=3)
    assert failures(sharing) == set()
    assert failures(sharing, Fault.OFFERED_BEFORE_LAST_EXCHANGE)


#: As the kernel of 256 columns: no turns, one buffer of queries, two stages.
SKIPPING = replace(SMALL, query_buffers=1, turns=Turns.NONE, skips_unseen=True)


def test_a_kernel_leaves_out_what_a_warpgroup_sees_nothing_of() -> None:
    assert {name.split("-")[0] for name, protocol in PROTOCOLS.items() if protocol.skips_unseen} == {"dim256"}


@pytest.mark.parametrize("warpgroups", [2, 3])
@pytest.mark.parametrize("query_buffers", [1, 2])
def test_a_warpgroup_leaves_out_key_tiles_that_another_multiplies(warpgroups: int, query_buffers: int) -> None:
    protocol = replace(SKIPPING, warpgroups=warpgroups, query_buffers=query_buffers)
    assert failures(protocol) == set()


def test_leaving_key_tiles_out_would_stop_an_exchange() -> None:
    """The stage behind the one that is left out is given back after the exchange, which waits for the next keys."""
    assert DeadlockError in failures(replace(SKIPPING, split=2))


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        (Fault.UNSEEN_KEYS_NOT_AWAITED, HazardError),
        (Fault.UNSEEN_NOT_RELEASED, DeadlockError),
    ],
)
def test_mistakes_with_key_tiles_that_are_left_out_are_found(fault: Fault, failure: type[AssertionError]) -> None:
    assert failure in failures(SKIPPING, fault)
    assert failures(replace(SKIPPING, skips_unseen=False), fault) == set(), "the mistake shows where tiles are left out"


def test_leaving_key_tiles_out_takes_two_stages() -> None:
    """With one, the keys to multiply wait for values that wait for the last tile's, which wait for those keys."""
    assert failures(replace(SKIPPING, stages=1)) == {DeadlockError}
    assert failures(replace(SKIPPING, stages=1, skips_unseen=False)) == set()
