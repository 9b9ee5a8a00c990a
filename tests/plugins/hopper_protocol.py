"""Plays the barriers of the Hopper kernel on the CPU, its threads in random order: deadlocks and early reuse show.

One process stands for each role of a block (the scheduler's thread, the producer's thread, a warpgroup that multiplies)
and one for each tensor copy under way. A warpgroup arrives once where its four warps arrive in the kernel. Buffers hold
labels: a copy makes its buffer garbage when it is issued and gives it its label when it ends, and a warpgroup looks at
the label when a product begins and again when it has ended. Names are those of hstu_attention_sm90.cu.
"""

from __future__ import annotations

import enum
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hstu_compile.plugins.kernels.hopper import compile as hopper_compile
from hstu_compile.plugins.kernels.hopper.variants import HopperVariant, Turns, query_buffers, tile_of

SOURCE = Path(hopper_compile.__file__).with_name("hstu_attention_sm90.cu")


class Fault(enum.Enum):
    """A mistake in the protocol that the simulation must see."""

    #: A tile's slot is given back only when the next tile has begun, not before it is taken.
    SLOT_KEPT_INTO_NEXT_TILE = enum.auto()
    #: The first keys of a tile are copied only when the tile after it has been described.
    KEYS_WAIT_FOR_NEXT_TILE = enum.auto()
    #: A tile without keys does not ask for the next one.
    EMPTY_TILE_ASKS_FOR_NOTHING = enum.auto()
    #: No warpgroup has the first turn.
    NO_FIRST_TURN = enum.auto()
    #: Keys are given back when their product begins, not when it has ended.
    KEYS_RELEASED_EARLY = enum.auto()
    #: Queries that are kept in registers are given back before they have been read.
    QUERIES_RELEASED_UNREAD = enum.auto()
    #: Sums are sent before every block of the cluster has offered the stage that they overwrite.
    EXCHANGE_NOT_AWAITED = enum.auto()
    #: The producer offers a stage although a warpgroup may still read there.
    STAGE_OFFERED_EARLY = enum.auto()
    #: A warpgroup offers the stage for another round although the other may still read there.
    STAGE_OFFERED_AGAIN_EARLY = enum.auto()
    #: The producer offers a stage although a warpgroup may not have seen the offer for the tile before.
    OFFERED_BEFORE_LAST_EXCHANGE = enum.auto()
    #: The producer does not end the phases of the copies that it leaves out.
    PHASES_LEFT_OPEN = enum.auto()
    #: Who offers a stage does not arrive for the bytes of the sums that will be put there.
    SUMS_NOT_EXPECTED = enum.auto()
    #: A stage is given back for copies before the exchange in it.
    STAGE_RELEASED_BEFORE_EXCHANGE = enum.auto()
    #: Keys of which a warpgroup sees nothing are given back although their copy may not have begun.
    UNSEEN_KEYS_NOT_AWAITED = enum.auto()
    #: A key tile that is left out is not given back.
    UNSEEN_NOT_RELEASED = enum.auto()


@dataclass(frozen=True)
class Protocol:
    """What decides the order of things in one kernel.

    Attributes:
        stages: key and value tiles in shared memory; query_buffers the same for queries.
        warpgroups: that multiply.
        turns: of the warpgroups.
        holds_queries: they keep their rows of the queries in registers.
        split: blocks of a cluster that share a tile.
        rounds: of an exchange between them.
        slots: descriptions of tiles in shared memory.
        ask_ahead: how many key tiles before a tile's end the next tile is asked for.
        skips_unseen: a warpgroup leaves out a tile's first key tile where its rows see nothing of it.
    """

    stages: int
    query_buffers: int
    warpgroups: int
    turns: Turns
    holds_queries: bool
    split: int
    slots: int
    ask_ahead: int
    skips_unseen: bool = False
    rounds: int = 1


def protocol_of(variant: HopperVariant, split: int) -> Protocol:
    """Return the protocol of one kernel in clusters of so many blocks, from the tile table and the source."""
    source, tile = SOURCE.read_text(), tile_of(variant)

    def constant(pattern: str) -> int:
        found = re.search(pattern, source)
        assert found is not None, f"{SOURCE.name} has no {pattern}: follow what it has become"
        return int(found[1])

    skipping_block_n = constant(r"kSkipsUnseen = kBlockN == (\d+) && !kTurns && !kShares;")

    return Protocol(
        stages=tile.stages,
        query_buffers=query_buffers(variant),
        warpgroups=tile.warpgroups,
        turns=tile.turns,
        holds_queries=tile.held_steps * 16 == variant.block_dim,
        split=split,
        slots=constant(r"kTileSlots = (\d+);"),
        ask_ahead=tile.stages + constant(r"kAskAhead = kStages \+ (\d+);"),
        skips_unseen=tile.block_n == skipping_block_n and tile.turns is Turns.NONE and not variant.shares,
        rounds=constant(r"kRounds = (\d+) / kBlockN;") // tile.block_n,
    )


class DeadlockError(AssertionError):
    """No process can go on."""


class HazardError(AssertionError):
    """A buffer held something else than its reader needed."""


class Wait(NamedTuple):
    """What a process needs to go on."""

    is_over: Callable[[], bool]
    what: str


Process = Iterator[Wait]


class Barrier:
    """An mbarrier: a phase ends with its last arrival; waiting for a parity passes in the phase after it."""

    def __init__(self, what: str, arrivals: int) -> None:
        self._what, self._arrivals, self._pending, self._phase = what, arrivals, arrivals, 0

    def arrive(self) -> None:
        self._pending -= 1
        if self._pending == 0:
            self._pending, self._phase = self._arrivals, self._phase ^ 1

    def wait(self, parity: int) -> Wait:
        return Wait(lambda: self._phase != parity, f"{self._what}, parity {parity}")


class NamedBarrier:
    """A named barrier of some warpgroups, of which some may only arrive."""

    def __init__(self, what: str, warpgroups: int) -> None:
        self._what, self._warpgroups, self._arrived, self._generation = what, warpgroups, 0, 0

    def arrive(self) -> None:
        self._arrived += 1
        if self._arrived == self._warpgroups:
            self._arrived, self._generation = 0, self._generation + 1

    def sync(self) -> Wait:
        generation = self._generation
        self.arrive()
        return Wait(lambda: self._generation != generation, self._what)


class Ring:
    """Position in a ring of buffers and the parity of its barriers' phase."""

    def __init__(self, size: int) -> None:
        self._size, self.index, self.phase = size, 0, 0

    def advance(self) -> None:
        self.index += 1
        if self.index == self._size:
            self.index, self.phase = 0, self.phase ^ 1


@dataclass(frozen=True)
class Tile:
    """A description in a slot.

    Attributes:
        number: of the tile in its block.
        is_empty: its rows see no key.
        share: key tiles of this block.
        unseen: for each warpgroup, how many of the first key tiles its rows see nothing of.
    """

    number: int
    is_empty: bool
    share: int
    unseen: tuple[int, ...]


END = Tile(-1, True, 0, ())


class Buffer:
    """Shared memory that tensor copies fill, and other blocks with their sums, with the barriers of both directions."""

    def __init__(self, what: str, readers: int) -> None:
        self.full, self.empty = Barrier(f"{what} full", 1), Barrier(f"{what} empty", readers)
        self._what, self._label = what, ""
        self._sums: dict[int, str] = {}

    def copy(self, label: str) -> Process:
        """Begin to overwrite; the process ends the copy."""
        self._label = "garbage"
        self._sums.clear()

        def end() -> Process:
            yield Wait(lambda: True, "memory")
            if self._sums:
                raise HazardError(f"sums lie in {self._what} while {label!r} is copied there")
            self._label = label
            self.full.arrive()

        return end()

    def expect(self, label: str) -> None:
        if self._label != label:
            raise HazardError(f"{self._what} holds {self._label!r} where {label!r} is read")

    def put(self, rank: int, sums: str) -> None:
        """Store the sums of a block."""
        self._label = "sums"
        self._sums[rank] = sums

    def take(self, blocks: int, sums: str) -> None:
        """Read the sums of every block."""
        if self._label != "sums" or self._sums != dict.fromkeys(range(blocks), sums):
            raise HazardError(f"{self._what} holds {self._label!r} and {self._sums} where {sums!r} are added up")


class Block:
    """One block of a cluster."""

    def __init__(self, protocol: Protocol, faults: frozenset[Fault], rank: int, keys_of_tiles: Sequence[int]) -> None:
        p = self.protocol = protocol
        self.faults, self.rank = faults, rank
        self.cluster: Sequence[Block] = [self]
        self.tiles = [self._describe(number, keys) for number, keys in enumerate(keys_of_tiles)]
        self.copies: list[Process] = []
        self.finished: list[int] = []
        self.slots = [END] * p.slots
        self.tile_full = [Barrier(f"tileFull[{i}]", 1) for i in range(p.slots)]
        self.tile_empty = [Barrier(f"tileEmpty[{i}]", p.warpgroups + 1) for i in range(p.slots)]
        self.tile_wanted = Barrier("tileWanted", 1)
        self.queries = [Buffer(f"queries[{i}]", p.warpgroups) for i in range(p.query_buffers)]
        self.keys = [Buffer(f"keys[{i}]", p.warpgroups) for i in range(p.stages)]
        self.values = [Buffer(f"values[{i}]", p.warpgroups) for i in range(p.stages)]
        self.turns = [NamedBarrier(f"turn of {i}", 2) for i in range(p.warpgroups)]
        self.exchange_barrier = NamedBarrier("exchange", p.warpgroups)
        self.exchange_ready = Barrier("exchangeReady", p.split)
        self.exchange_done = Barrier("exchangeDone", p.warpgroups)
        # In the kernel one arrival and the bytes of the sums, here those of each block as an arrival.
        self.exchange_full = [Barrier(f"exchangeFull[{i}]", 1 + p.split) for i in range(p.warpgroups)]
        self.exchange_stages = [-1] * p.split

    def _describe(self, number: int, keys: int) -> Tile:
        share = (keys - self.rank + self.protocol.split - 1) // self.protocol.split
        # The last warpgroup's rows see something of every key tile; others may leave out the first of several.
        unseen = [
            int(self.protocol.skips_unseen and share > 1 and (number + self.rank + w) % 3 != 0)
            for w in range(self.protocol.warpgroups - 1)
        ]
        # A block without a key tile of its own takes part with one of which nothing counts.
        return Tile(number, keys == 0, max(share, 1) if keys else 0, (*unseen, 0))

    def processes(self) -> dict[str, Process]:
        consumers = {f"warpgroup {w}": self.consumer(w) for w in range(self.protocol.warpgroups)}
        roles = {"scheduler": self.scheduler(), "producer": self.producer(), **consumers}
        return {f"block {self.rank} {role}": process for role, process in roles.items()}

    def scheduler(self) -> Process:
        slot, wanted = Ring(self.protocol.slots), Ring(1)
        for tile in [*self.tiles, END]:
            if tile is not (*self.tiles, END)[0]:
                yield self.tile_wanted.wait(wanted.phase)
                wanted.advance()
            yield self.tile_empty[slot.index].wait(slot.phase ^ 1)
            self.slots[slot.index] = tile
            self.tile_full[slot.index].arrive()
            slot.advance()

    def producer(self) -> Process:
        slot, query, stage = Ring(self.protocol.slots), Ring(self.protocol.query_buffers), Ring(self.protocol.stages)
        exchange = Ring(1)

        def offer_stage() -> Process:
            """Tell the cluster that sums may be put into the next stage, once nobody reads there."""
            if Fault.STAGE_OFFERED_EARLY not in self.faults:
                for buffers in (self.keys, self.values):
                    yield buffers[stage.index].empty.wait(stage.phase ^ 1)
            if Fault.OFFERED_BEFORE_LAST_EXCHANGE not in self.faults:
                yield self.exchange_done.wait(exchange.phase ^ 1)
            if Fault.PHASES_LEFT_OPEN not in self.faults:
                self.keys[stage.index].full.arrive()
                self.values[stage.index].full.arrive()
            if Fault.SUMS_NOT_EXPECTED not in self.faults:
                for barrier in self.exchange_full:
                    yield PREEMPTED
                    barrier.arrive()
            for block in self.cluster:
                yield PREEMPTED
                block.exchange_stages[self.rank] = stage.index
                block.exchange_ready.arrive()
            stage.advance()
            exchange.advance()

        while True:
            yield self.tile_full[slot.index].wait(slot.phase)
            here = slot.index
            tile = self.slots[here]
            if tile is END:
                return
            asking = max(tile.share - self.protocol.ask_ahead, 0)
            least = 0 if Fault.EMPTY_TILE_ASKS_FOR_NOTHING in self.faults else 1
            slot.advance()
            if tile.share > 0:
                yield self.queries[query.index].empty.wait(query.phase ^ 1)
                self.copies.append(self.queries[query.index].copy(f"tile {tile.number}"))
                query.advance()
            if Fault.KEYS_WAIT_FOR_NEXT_TILE in self.faults:
                self.tile_wanted.arrive()
                asking = -1
                yield self.tile_full[slot.index].wait(slot.phase)
            for t in range(max(tile.share, least)):
                if t == asking:
                    self.tile_wanted.arrive()
                if self.slots[here] is not tile:
                    raise HazardError(f"slot {here} was described anew while tile {tile.number} was copied")
                if t < tile.share:
                    for buffers in (self.keys, self.values):
                        yield buffers[stage.index].empty.wait(stage.phase ^ 1)
                        self.copies.append(buffers[stage.index].copy(f"tile {tile.number} keys {t}"))
                    stage.advance()
            self.tile_empty[here].arrive()
            if self.protocol.split > 1 and tile.share > 0:
                yield from offer_stage()

    def consumer(self, warpgroup: int) -> Process:
        p = self.protocol
        slot, query, key, value = Ring(p.slots), Ring(p.query_buffers), Ring(p.stages), Ring(p.stages)
        exchange = Ring(1)
        taken = END
        holding = 0

        def take() -> Process:
            nonlocal taken, holding
            while True:
                yield self.tile_full[slot.index].wait(slot.phase)
                taken, holding = self.slots[slot.index], slot.index
                if taken is END or not taken.is_empty:
                    return
                self.finished.append(taken.number)
                self.tile_empty[slot.index].arrive()
                slot.advance()

        def await_turn() -> Process:
            if p.turns is not Turns.NONE:
                yield self.turns[warpgroup].sync()

        def pass_turn() -> None:
            if p.turns is not Turns.NONE:
                self.turns[(warpgroup + 1) % p.warpgroups].arrive()

        def await_queries_and_keys() -> Process:
            yield self.queries[query.index].full.wait(query.phase)
            if p.holds_queries:
                buffer = self.queries[query.index]
                is_early = Fault.QUERIES_RELEASED_UNREAD in self.faults
                if is_early:
                    release_queries()
                yield PREEMPTED
                buffer.expect(f"tile {taken.number}")
                if not is_early:
                    release_queries()
            yield self.keys[key.index].full.wait(key.phase)

        def release_queries() -> None:
            self.queries[query.index].empty.arrive()
            query.advance()

        def product_of_keys(label: str) -> Callable[[], None]:
            """Begin the product; the result ends it and gives the keys back."""
            buffer, queries, tile = self.keys[key.index], self.queries[query.index], label.split(" keys")[0]
            key.advance()
            buffer.expect(label)
            if not p.holds_queries:
                queries.expect(tile)
            is_early = Fault.KEYS_RELEASED_EARLY in self.faults
            if is_early:
                buffer.empty.arrive()

            def end() -> None:
                buffer.expect(label)
                if not p.holds_queries:
                    queries.expect(tile)
                if not is_early:
                    buffer.empty.arrive()

            return end

        def product_of_values(label: str) -> Callable[[], None]:
            buffer = self.values[value.index]
            buffer.expect(label)
            value.advance()

            def end() -> None:
                buffer.expect(label)
                buffer.empty.arrive()

            return end

        def offer_stage_again() -> Process:
            """Tell the cluster that the next round's sums may be put into the stage, once no warpgroup reads there."""
            if Fault.STAGE_OFFERED_AGAIN_EARLY not in self.faults:
                yield self.exchange_barrier.sync()
            yield PREEMPTED
            self.exchange_full[warpgroup].arrive()
            if warpgroup == 0:
                for block in self.cluster:
                    yield PREEMPTED
                    block.exchange_ready.arrive()

        def skip(buffers: list[Buffer], ring: Ring, is_awaited: bool) -> Process:
            """Give back the first key tile's keys or values, if this warpgroup's rows see nothing of it."""
            if taken.unseen[warpgroup] == 0:
                return
            if is_awaited:
                yield buffers[ring.index].full.wait(ring.phase)
            if Fault.UNSEEN_NOT_RELEASED not in self.faults:
                buffers[ring.index].empty.arrive()
            ring.advance()

        def skip_keys() -> Process:
            return skip(self.keys, key, Fault.UNSEEN_KEYS_NOT_AWAITED not in self.faults)

        def skip_values() -> Process:
            return skip(self.values, value, True)

        def exchanged(block: Block, stage: int) -> Buffer:
            return (block.keys, block.values)[warpgroup][stage]

        def finish(number: int) -> Process:
            self.finished.append(number)
            if p.split == 1:
                return
            for turn in range(p.rounds):
                sums = f"tile {number} round {turn}"
                if turn > 0:
                    yield from offer_stage_again()
                if Fault.EXCHANGE_NOT_AWAITED not in self.faults:
                    yield self.exchange_ready.wait(exchange.phase)
                for rank, block in enumerate(self.cluster):
                    exchanged(block, self.exchange_stages[rank]).put(self.rank, sums)
                    yield PREEMPTED
                    block.exchange_full[warpgroup].arrive()
                yield self.exchange_full[warpgroup].wait(exchange.phase)
                yield PREEMPTED
                exchanged(self, value.index).take(p.split, sums)
                exchange.advance()

        def release_stage() -> None:
            """Give the stage back in which sums are exchanged."""
            if p.split > 1:
                self.keys[value.index].empty.arrive()
                self.values[value.index].empty.arrive()

        def exchange_sums(number: int) -> Process:
            is_early = Fault.STAGE_RELEASED_BEFORE_EXCHANGE in self.faults
            if is_early:
                release_stage()
            yield from finish(number)
            if p.split > 1:
                self.exchange_done.arrive()
            if not is_early:
                release_stage()
            if p.split > 1:
                value.advance()

        if warpgroup == p.warpgroups - 1 and Fault.NO_FIRST_TURN not in self.faults:
            pass_turn()
        yield from take()
        if taken is END:
            return
        slot.advance()
        yield from skip_keys()
        yield from skip_values()
        yield from await_queries_and_keys()
        yield from await_turn()
        end_keys = product_of_keys(f"tile {taken.number} keys {taken.unseen[warpgroup]}")
        pass_turn()
        yield PREEMPTED
        end_keys()
        while True:
            tile, held = taken, holding
            for t in range(tile.unseen[warpgroup] + 1, tile.share):
                yield self.keys[key.index].full.wait(key.phase)
                yield self.values[value.index].full.wait(value.phase)
                yield from await_turn()
                end_keys = product_of_keys(f"tile {tile.number} keys {t}")
                if p.turns is Turns.SCORES:
                    yield PREEMPTED
                    pass_turn()
                end_values = product_of_values(f"tile {tile.number} keys {t - 1}")
                if p.turns is not Turns.SCORES:
                    pass_turn()
                yield PREEMPTED
                end_keys()
                yield PREEMPTED
                end_values()
            last = f"tile {tile.number} keys {tile.share - 1}"
            if not p.holds_queries:
                release_queries()
            if p.split > 1:
                key.advance()  # past the stage of the exchange
            keeps_slot = Fault.SLOT_KEPT_INTO_NEXT_TILE in self.faults
            if not keeps_slot:
                self.tile_empty[held].arrive()
            yield from take()
            yield self.values[value.index].full.wait(value.phase)
            if taken is END:
                yield from await_turn()
                end_values = product_of_values(last)
                pass_turn()
                yield PREEMPTED
                end_values()
                yield from exchange_sums(tile.number)
                return
            slot.advance()
            if p.query_buffers > 1 or p.holds_queries:
                yield from skip_keys()
                yield from await_queries_and_keys()
            yield from await_turn()
            end_values = product_of_values(last)
            if p.query_buffers == 1 and not p.holds_queries:
                yield from skip_keys()
                yield from await_queries_and_keys()
            end_keys = product_of_keys(f"tile {taken.number} keys {taken.unseen[warpgroup]}")
            pass_turn()
            if keeps_slot:
                self.tile_empty[held].arrive()
            yield PREEMPTED
            end_values()
            yield from skip_values()
            yield from exchange_sums(tile.number)
            yield PREEMPTED
            end_keys()


PREEMPTED = Wait(lambda: True, "nothing")


def play(protocol: Protocol, keys_of_tiles: Sequence[int], seed: int, faults: frozenset[Fault] = frozenset()) -> None:
    """Run one cluster over its tiles to the end.

    Args:
        protocol: of the kernel.
        keys_of_tiles: how many key tiles each tile has, in the order in which they are given out.
        seed: of the order in which processes go on.
        faults: mistakes to make.

    Raises:
        DeadlockError: no process can go on; says what each waits for.
        HazardError: a buffer was overwritten too early, or read too early.
    """
    order = random.Random(seed)
    blocks = [Block(protocol, faults, rank, keys_of_tiles) for rank in range(protocol.split)]
    begun: list[Process] = []
    for block in blocks:
        block.cluster, block.copies = blocks, begun
    running = {name: process for block in blocks for name, process in block.processes().items()}
    waits = dict.fromkeys(running, PREEMPTED)
    names = list(running)
    num_copies = 0
    while names:
        # Any that can go on, each as likely: draw until one can, and look at no other.
        for drawn in range(len(names)):
            other = drawn + int(order.random() * (len(names) - drawn))
            names[drawn], names[other] = names[other], names[drawn]
            if waits[names[drawn]].is_over():
                break
        else:
            raise DeadlockError("; ".join(f"{name} waits for {waits[name].what}" for name in running))
        name = names[drawn]
        try:
            waits[name] = next(running[name])
        except StopIteration:
            del running[name]
            names[drawn] = names[-1]
            names.pop()
        for copy in begun:
            num_copies += 1
            running[f"copy {num_copies}"] = copy
            waits[f"copy {num_copies}"] = PREEMPTED
            names.append(f"copy {num_copies}")
        begun.clear()
    for block in blocks:
        # Every warpgroup ends every tile, in order.
        expected = sorted(list(range(len(keys_of_tiles))) * protocol.warpgroups)
        if sorted(block.finished) != expected:
            raise HazardError(f"tiles ended: {sorted(block.finished)}, expected {expected}")


def random_tiles(seed: int) -> list[int]:
    """Return key tiles of 0 to 12 tiles: mostly few, now and then none."""
    chosen = random.Random(seed)
    return [chosen.choice([0, 1, 1, 1, 2, 3, 5, 9]) for _ in range(chosen.randint(0, 12))]
