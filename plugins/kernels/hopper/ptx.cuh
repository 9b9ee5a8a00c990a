// The few PTX instructions of Hopper that CUDA C++ has no names for: barriers in shared memory, tensor copies, fences.
#ifndef HSTU_HOPPER_PTX_CUH
#define HSTU_HOPPER_PTX_CUH

#include <cstdint>

#include <cuda.h>

namespace hstu
{

__device__ __forceinline__ uint32_t sharedAddress(void const* pointer)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- mbarrier -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrierInit(uint64_t* barrier, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(sharedAddress(barrier)), "r"(arrivals));
}

//! Makes initialised barriers visible to the copy engine and to the other block of the cluster.
__device__ __forceinline__ void barrierInitFence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrierArrive(uint64_t* barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(sharedAddress(barrier)) : "memory");
}

//! Arrives, and lets the phase end only once this many bytes have been copied too.
__device__ __forceinline__ void barrierArriveExpect(uint64_t* barrier, uint32_t bytes)
{
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(sharedAddress(barrier)), "r"(bytes) : "memory");
}

//! Waits for the end of the phase of this parity.
__device__ __forceinline__ void barrierWait(uint64_t* barrier, uint32_t parity)
{
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}\n" ::"r"(sharedAddress(barrier)),
        "r"(parity)
        : "memory");
}

// --- clusters -----------------------------------------------------------------------------------------------------

//! The largest cluster that every GPU of compute capability 9.0 runs without being asked for more.
constexpr int32_t kMostBlocks = 8;

__device__ __forceinline__ int32_t clusterRank()
{
    int32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

//! Blocks of the cluster: a power of two.
__device__ __forceinline__ int32_t clusterBlocks()
{
    int32_t blocks;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return blocks;
}

//! Its logarithm.
__device__ __forceinline__ int32_t clusterShift()
{
    return 31 - __clz(clusterBlocks());
}

//! Every thread of every block arrives, and then waits for all the others; lanes of a warp may come one by one.
__device__ __forceinline__ void clusterArrive()
{
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ __forceinline__ void clusterWait()
{
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

//! The address in another block of the cluster of what lies at `pointer` in this one.
__device__ __forceinline__ uint32_t remoteAddress(void const* pointer, uint32_t rank)
{
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(sharedAddress(pointer)), "r"(rank));
    return address;
}

__device__ __forceinline__ void remoteStore(uint32_t address, int32_t value)
{
    asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

//! Stores 16 bytes, and tells a barrier of the same block when they are there, which counts them like a copy's. Who sends
//! does not wait for its stores to arrive, as it would have to before it arrives for them.
__device__ __forceinline__ void remoteStoreAsync(uint32_t address, uint32_t barrier, float a, float b, float c, float d)
{
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(address),
        "r"(barrier), "f"(a), "f"(b), "f"(c), "f"(d)
        : "memory");
}

//! Arrives at a barrier of a block of the cluster; what this thread has stored there is seen by who waits for it.
__device__ __forceinline__ void remoteArrive(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

//! barrierWait for arrivals from other blocks.
__device__ __forceinline__ void clusterBarrierWait(uint64_t* barrier, uint32_t parity)
{
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}\n" ::"r"(sharedAddress(barrier)),
        "r"(parity)
        : "memory");
}

//! Waits until this many threads have arrived at a named barrier. Barrier 0 belongs to __syncthreads.
__device__ __forceinline__ void namedBarrierSync(int32_t barrier, int32_t threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void namedBarrierArrive(int32_t barrier, int32_t threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// --- tensor copies ------------------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetchDescriptor(CUtensorMap const* map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

//! Copies the box at (column, head, row) of a [rows, heads, columns] tensor; what lies outside of it becomes zero.
__device__ __forceinline__ void copyBox(
    void* shared, CUtensorMap const* map, uint64_t* barrier, int32_t column, int32_t head, int32_t row)
{
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
            sharedAddress(shared)),
        "l"(map), "r"(sharedAddress(barrier)), "r"(column), "r"(head), "r"(row)
        : "memory");
}

//! Orders this thread's ordinary accesses to shared memory before later ones of the copy engine and the tensor cores.
__device__ __forceinline__ void sharedProxyFence()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

//! Loads four 8 x 8 matrices of half-precision numbers, the fragments of a 16 x 16 operand; lane l gives the address of row
//! l % 8 of matrix l / 8.
__device__ __forceinline__ void loadMatrices(uint32_t (&fragments)[4], void const* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(sharedAddress(row))
                 : "memory");
}

// --- warpgroup products -------------------------------------------------------------------------------------------

__device__ __forceinline__ void productFence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void productCommit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

//! Waits until at most this many committed groups of products are unfinished.
template <int kUnfinished>
__device__ __forceinline__ void productWait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kUnfinished) : "memory");
}

//! Keeps the compiler from moving accesses of accumulators across a wait that it does not understand.
template <int N>
__device__ __forceinline__ void pin(float (&registers)[N])
{
#pragma unroll
    for (int i = 0; i < N; ++i)
    {
        asm volatile("" : "+f"(registers[i])::"memory");
    }
}

template <int kRegisters>
__device__ __forceinline__ void takeRegisters()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void giveRegisters()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

//! A value that is the same in all lanes, from one of them: the compiler then knows it, and keeps it and all that follows
//! from it in uniform registers, where descriptors and barriers want their addresses.
__device__ __forceinline__ int32_t uniform(int32_t value)
{
    return __shfl_sync(0xFFFFFFFF, value, 0);
}

//! Descriptors count in units of 16 bytes.
constexpr uint32_t kDescriptorUnit = 16;

//! Where something lies in this block's shared memory. An address also says in which block of the cluster that is.
__device__ __forceinline__ uint32_t descriptorUnit(void const* pointer)
{
    return (sharedAddress(pointer) & 0x3FFFF) / kDescriptorUnit;
}

//! Descriptor of an operand in shared memory at an address in units, 128-byte swizzled: rows of 64 half-precision numbers,
//! eight rows an atom of 1024 bytes. `slabStride` is the distance of the next 64 columns, in bytes; it only counts where
//! columns are the contiguous, not summed dimension.
__device__ __forceinline__ uint64_t operandDescriptor(uint32_t unit, uint32_t slabStride)
{
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    constexpr uint64_t kAtomStride = uint64_t{1024 / kDescriptorUnit} << 32;
    // One addition in the low word: no address passes 14 bits of units.
    return kSwizzle128 | kAtomStride | ((slabStride / kDescriptorUnit << 16) + unit);
}

} // namespace hstu

#endif // HSTU_HOPPER_PTX_CUH
