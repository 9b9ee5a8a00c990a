"""The pools: one arena, no overlap, no growth; host and device alike."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_compile.errors import EngineError
from hstu_compile.runtime._cuda import CudaDriver
from hstu_compile.runtime._free_list import FreeList, aligned
from hstu_compile.runtime.resident import DevicePool, DeviceTensor, HostPool, HostTensor, MemoryPool
from tests.fake_cuda import FakeCuda

MakePool = Callable[[int], MemoryPool]


@pytest.fixture(params=["host", "device", pytest.param("gpu", marks=pytest.mark.gpu)])
def make_pool(request: pytest.FixtureRequest) -> MakePool:
    if request.param == "host":
        return HostPool
    if request.param == "device":
        return lambda capacity: DevicePool(capacity, CudaDriver(FakeCuda()))
    try:
        CudaDriver().close()
    except EngineError as error:
        pytest.skip(f"no GPU: {error.why}")
    return lambda capacity: DevicePool(capacity, CudaDriver())


def filled(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray[Any, Any]:
    stored = np.uint16 if dtype == "bfloat16" else np.dtype(dtype)
    return np.random.default_rng(seed).integers(1, 2**15, shape).astype(stored)


@given(st.integers(0, 24), st.lists(st.tuples(st.booleans(), st.integers(0, 23)), max_size=60))
def test_the_free_list_is_first_fit_and_merges_holes(units: int, steps: list[tuple[bool, int]]) -> None:
    free_list = FreeList(256 * units)
    owner: list[int | None] = [None] * units
    live: dict[int, int] = {}
    for is_take, number in steps:
        if is_take:
            size = number % 6 + 1
            fits = [at for at in range(units - size + 1) if owner[at : at + size] == [None] * size]
            offset = free_list.take(256 * size)
            assert offset == (256 * fits[0] if fits else None)
            if fits:
                owner[fits[0] : fits[0] + size] = [fits[0]] * size
                live[fits[0]] = size
        elif live:
            at = sorted(live)[number % len(live)]
            size = live.pop(at)
            free_list.give_back(256 * at, 256 * size)
            owner[at : at + size] = [None] * size
        assert free_list.used == 256 * sum(live.values())
        holes = free_list.holes()
        assert sum(size for _, size in holes) == free_list.capacity - free_list.used
        assert all(start + size < later for (start, size), (later, _) in itertools.pairwise(holes))
    for at, size in live.items():
        free_list.give_back(256 * at, 256 * size)
    assert free_list.holes() == ([(0, 256 * units)] if units else [])


def test_blocks_are_whole_multiples_of_256() -> None:
    assert [aligned(nbytes) for nbytes in (0, 1, 256, 257, 512)] == [256, 256, 256, 512, 512]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
@pytest.mark.parametrize("shape", [(3, 2, 5), (7,), (0, 4), ()])
def test_what_is_written_is_read_and_copied(make_pool: MakePool, dtype: str, shape: tuple[int, ...]) -> None:
    with make_pool(4096) as pool:
        values = filled(shape, dtype)
        regions = [pool.allocate(values.nbytes), pool.allocate(values.nbytes)]
        assert regions[0] is not None
        assert regions[1] is not None
        source, target = (pool.tensor(region, 0, shape, dtype) for region in regions if region)
        assert (source.shape, source.dtype, source.nbytes) == (shape, dtype, values.nbytes)
        if values.size:
            assert source.address % 256 == target.address % 256 == 0
            assert source.address != target.address
        pool.write(values, source)
        pool.write(np.zeros_like(values), target)
        pool.copy([(source, target)])
        np.testing.assert_array_equal(pool.read(target), values)
        assert pool.read(target).dtype == values.dtype


def test_rows_are_views(make_pool: MakePool) -> None:
    with make_pool(4096) as pool:
        region = pool.allocate(240)
        assert region is not None
        tensor = pool.tensor(region, 24, (9, 4), "bfloat16")
        values = filled((9, 4), "bfloat16")
        pool.write(values, tensor)
        part = tensor.rows(2, 5)
        assert (part.shape, part.address - tensor.address) == ((3, 4), 16)
        np.testing.assert_array_equal(pool.read(part), values[2:5])
        pool.copy([(tensor.rows(0, 2), tensor.rows(7, 9)), (tensor.rows(3, 3), tensor.rows(9, 9))])
        np.testing.assert_array_equal(pool.read(tensor), np.concatenate([values[:7], values[:2]]))
        for start, stop in ((-1, 2), (3, 2), (0, 10)):
            with pytest.raises(IndexError, match=rf"rows {start}:{stop} are not inside a tensor of shape \[9, 4\]"):
                tensor.rows(start, stop)
        with pytest.raises(IndexError, match=r"shape \[\]"):
            pool.tensor(region, 0, (), "float32").rows(0, 0)


def test_the_arena_neither_grows_nor_overlaps(make_pool: MakePool) -> None:
    with make_pool(1023) as pool:
        assert pool.capacity_bytes == 768
        regions = [pool.allocate(nbytes) for nbytes in (0, 256, 1)]
        assert [(r.offset, r.nbytes) for r in regions if r] == [(0, 256), (256, 256), (512, 256)]
        assert pool.used_bytes == 768
        assert pool.allocate(0) is None
        assert regions[0]
        assert regions[1]
        assert regions[2]
        pool.free(regions[0])
        pool.free(regions[2])
        assert pool.used_bytes == 256
        assert pool.allocate(512) is None, "512 free bytes in two holes are not a region"
        pool.free(regions[1])
        assert pool.allocate(768) is not None


def test_misuse_is_refused(make_pool: MakePool) -> None:
    pool = make_pool(1024)
    region = pool.allocate(300)
    assert region is not None
    for offset, shape, dtype in ((0, (129,), "float32"), (2, (1,), "float32"), (-4, (1,), "float32")):
        with pytest.raises(ValueError, match="does not lie inside a region of 512 bytes"):
            pool.tensor(region, offset, shape, dtype)
    with pytest.raises(ValueError, match="does not lie inside"):
        pool.tensor(region, 0, (-1, -2), "float32")
    tensor = pool.tensor(region, 0, (4,), "float32")
    with pytest.raises(ValueError, match=r"int32 \[4\] cannot fill float32 \[4\]"):
        pool.write(np.zeros(4, np.int32), tensor)
    with pytest.raises(ValueError, match=r"float32 \[4\] cannot be copied to float32 \[3\]"):
        pool.copy([(tensor, tensor.rows(0, 3))])
    foreign = DeviceTensor(256, (4,), "float32") if isinstance(pool, HostPool) else HostTensor(np.zeros(4, np.float32))
    for refused in (lambda: pool.read(foreign), lambda: pool.copy([(tensor, foreign)])):
        with pytest.raises(ValueError, match=f"a {type(foreign).__name__} is not in the memory of"):
            refused()
    pool.free(region)
    for refused in (lambda: pool.free(region), lambda: pool.tensor(region, 0, (1,), "float32")):
        with pytest.raises(ValueError, match="not a live region"):
            refused()
    # The same bytes, handed out again, are not the old region.
    again = pool.allocate(300)
    assert (again.offset, again.nbytes) == (region.offset, region.nbytes) if again else False
    with pytest.raises(ValueError, match="not a live region"):
        pool.free(region)
    pool.close()
    pool.close()
    for refused in (lambda: pool.allocate(1), lambda: pool.read(tensor), lambda: pool.copy([])):
        with pytest.raises(RuntimeError, match="closed"):
            refused()
    with pytest.raises(ValueError, match="-1 bytes"):
        make_pool(-1)


def test_a_host_tensor_is_contiguous_and_of_its_type() -> None:
    assert HostTensor(np.zeros((2, 3), np.uint16), "bfloat16").nbytes == 12
    with pytest.raises(ValueError, match="float32, not contiguous, cannot be a tensor of float32"):
        HostTensor(np.zeros((2, 3), np.float32).T)
    with pytest.raises(ValueError, match="float32, contiguous, cannot be a tensor of bfloat16"):
        HostTensor(np.zeros(2, np.float32), "bfloat16")


def test_a_device_pool_is_one_allocation_and_leaves_nothing() -> None:
    cuda = FakeCuda()
    with DevicePool(5000, CudaDriver(cuda)) as pool:
        assert [size for _, size in cuda.memory.values()] == [4864]
        for _ in range(3):
            regions = [pool.allocate(500) for _ in range(9)]
            assert all(regions)
            for region in regions:
                assert region
                pool.free(region)
        assert cuda.allocations == 1
    assert not cuda.memory
    assert not cuda.streams
    assert cuda.contexts == cuda.depth == 0


def test_a_budget_that_the_device_lacks_is_refused() -> None:
    cuda = FakeCuda(most_bytes=1000)
    with pytest.raises(EngineError, match=r"cuMemAlloc_v2 failed\n  Why: out of memory") as caught:
        DevicePool(2048, CudaDriver(cuda))
    assert caught.value.code == "HSTU-E404"
    assert not cuda.streams
    assert cuda.contexts == cuda.depth == 0


def test_a_budget_that_the_machine_lacks_is_refused() -> None:
    with pytest.raises(EngineError, match="the machine has no 1152921504606846976 bytes of memory") as caught:
        HostPool(2**60)
    assert caught.value.code == "HSTU-E404"


def test_an_empty_pool_holds_nothing(make_pool: MakePool) -> None:
    with make_pool(255) as pool:
        assert pool.capacity_bytes == 0
        assert pool.allocate(0) is None


def test_threads_share_a_pool(make_pool: MakePool) -> None:
    with make_pool(64 * 256) as pool:
        failures: list[str] = []

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for step in range(60):
                region = pool.allocate(int(rng.integers(0, 1500)))
                if region is None:
                    continue
                tensor = pool.tensor(region, 0, (region.nbytes // 4,), "int32")
                values = np.full(tensor.shape, seed * 1000 + step, np.int32)
                pool.write(values, tensor)
                if not np.array_equal(pool.read(tensor), values):
                    failures.append(f"thread {seed}, step {step}")
                pool.free(region)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert pool.used_bytes == 0
