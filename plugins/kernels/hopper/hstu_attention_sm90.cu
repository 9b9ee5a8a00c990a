// HSTU attention on jagged data for compute capability 9.0, float16 and bfloat16.
//
// One persistent block an SM: one thread finds and describes tiles of query rows, one copies their queries, keys and
// values into shared memory with the tensor copy engine, and each of kWarpgroups warpgroups multiplies 64 query rows.
// Between the two products of a key tile lies SiLU, which needs no row maximum and no rescaling; so the scores of the next
// key tile are multiplied while the values of the last one are, and SiLU of the next runs beside the latter.
//
// Compiled once per set of the macros HSTU_TYPE, HSTU_DIM, HSTU_WARPGROUPS, HSTU_BLOCK_N, HSTU_STAGES, HSTU_PLAIN_CAUSAL,
// HSTU_TURNS, HSTU_HELD_STEPS, HSTU_SHARES, HSTU_POS_BIAS, HSTU_TIMESTAMP_BITS, HSTU_ACCURATE, HSTU_CACHE and
// HSTU_SHARED_BYTES;
// compile.py chooses them.
#include <cstdint>
#include <type_traits>

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "activation.cuh"
#include "bias.cuh"
#include "parameters.cuh"
#include "ptx.cuh"
#include "schedule.cuh"
#include "tile.cuh"
#include "wgmma.cuh"

namespace hstu
{
namespace
{

using Element = HSTU_TYPE;
constexpr int32_t kDim = HSTU_DIM; // of a head, padded to a multiple of 64: what lies beyond it is copied as zero
constexpr int32_t kWarpgroups = HSTU_WARPGROUPS;
constexpr int32_t kBlockM = 64 * kWarpgroups;
constexpr int32_t kBlockN = HSTU_BLOCK_N;
constexpr int32_t kStages = HSTU_STAGES;
constexpr bool kPosBias = HSTU_POS_BIAS != 0;
constexpr bool kTimeBias = HSTU_TIMESTAMP_BITS != 0;
constexpr bool kHasBias = kPosBias || kTimeBias;
using Timestamp = std::conditional_t<HSTU_TIMESTAMP_BITS == 32, int32_t, int64_t>;
constexpr bool kPlainCausal = HSTU_PLAIN_CAUSAL != 0;
constexpr bool kIsAccurate = HSTU_ACCURATE != 0;
constexpr bool kHasCache = HSTU_CACHE != 0; // the first keys of a sequence lie in other tensors than the rest
// The blocks of a cluster share a tile: of n, each takes every n-th key tile, and as there is no softmax their sums just
// add. For launches with fewer tiles than there are SMs, which say how many blocks a cluster has: 2, 4 or 8.
constexpr bool kShares = HSTU_SHARES != 0;

constexpr int32_t kSlab = 64; // columns of a 128-byte swizzled row
constexpr int32_t kSlabs = kDim / kSlab;
constexpr int32_t kRowBytes = kSlab * 2;
constexpr int32_t kDepth = 16; // of one product instruction
constexpr int32_t kTileSlots = 3; // one multiplied, one copied, one described
constexpr int32_t kManyTiles = 8; // a block
constexpr int32_t kAskAhead = kStages + 1; // key tiles of which the last ones hide the search for the next tile
constexpr int32_t kFirstGroupBarrier = 1; // named barriers; 0 is that of __syncthreads
constexpr int32_t kFirstTurnBarrier = 4;
constexpr int32_t kExchangeBarrier = 7;
constexpr int32_t kTimesBarrier = 8;
constexpr int32_t kThreads = 128 * (1 + kWarpgroups);
constexpr int32_t kConsumerWarps = 4 * kWarpgroups;
// Looking times up beside 128 columns of sums takes more registers; elsewhere the scheduler would have to spill.
constexpr bool kNeedsMost = kTimeBias && kDim == 128 && !kShares && !kHasCache;
constexpr int32_t kProducerRegisters = kWarpgroups != 2 ? 32 : kNeedsMost ? 24 : 40;
constexpr int32_t kConsumerRegisters = kWarpgroups != 2 ? 160 : kNeedsMost ? 240 : 232;
// A thread has as many at first as fit all threads, in steps of eight. Whoever asks for more than others give back waits
// forever.
constexpr int32_t kFirstRegisters = 65536 / kThreads / 8 * 8;
static_assert(kProducerRegisters + kWarpgroups * kConsumerRegisters <= kFirstRegisters * (1 + kWarpgroups),
    "there are not as many registers");
// Of the queries' columns, 16 a step, those that a warpgroup keeps in registers: their products then read keys alone from
// shared memory, whose bandwidth they else come close to.
constexpr int32_t kHeldSteps = HSTU_HELD_STEPS;
// Their buffer is free for the next tile's as soon as they have been taken.
constexpr bool kHoldsQueries = kHeldSteps * kDepth == kDim;
// Where in its buffer a thread finds them is the same for every tile. The one kernel below would keep these places over all
// products by spilling ten registers; it computes them anew for each tile, which takes four instructions and spills nothing.
constexpr bool kFindsQueriesAnew =
    kDim == 256 && !kPlainCausal && !kShares && !kPosBias && !kTimeBias && !kIsAccurate && !kHasCache;
// The next tile's queries are copied while this one is multiplied; with 256 columns there is no room for both.
constexpr int32_t kQueryBuffers = kDim <= 128 && !kShares && !kHoldsQueries ? 2 : 1;
// Warpgroups take turns, so that one multiplies while another computes SiLU: a turn ends when products have been issued, or
// only when scores are there. The latter keeps warpgroups apart where SiLU takes as long as the products.
constexpr bool kTurns = HSTU_TURNS != 0;
constexpr bool kTurnsLastForScores = HSTU_TURNS == 2;
// Masks are applied while values are multiplied, where the registers of the masks' bounds do not have to be spilled.
constexpr bool kHasRoomForBounds = !kTimeBias && !(kIsAccurate && kDim == 128);
constexpr bool kMasksBesideProducts = kDim <= 128 && kWarpgroups == 2 && !kShares && kHasRoomForBounds;

// The columns of a key tile in pieces. A warp leaves out those of which its rows see nothing, where biases make them dear and
// where there is a register to count them in.
constexpr bool kSkipsPieces = kHasBias && kDim == 64;
constexpr int32_t kPieceColumns = 32;
constexpr int32_t kColumnPieces = kBlockN / kPieceColumns;
constexpr int32_t kPieceScores = kPieceColumns / 2; // of a thread
constexpr int32_t kRowsOfWarp = 16;
// While operands are copied, the table of time biases is built and the first times are read; beside 128 columns of sums there
// are no registers for that.
constexpr bool kPreparesTimes = kTimeBias && kDim == 64;
// A table of as many distances has an entry for each column of a key tile at the diagonal that is looked up.
constexpr int32_t kLeastPosTable = kSkipsPieces ? kRowsOfWarp + kPieceColumns : kBlockM + kBlockN;
// A sequence's last tiles take its entries by column minus row alone too, but where that would spill two registers.
constexpr bool kHasRoomForLastTiles =
    !(kDim == 128 && kPlainCausal && kPosBias && !kTimeBias && !kShares && !kIsAccurate);

// A warpgroup leaves out key tiles of which its rows see nothing: where the others do not wait for its turn, and where the
// stage behind the one that is left out does not wait for an exchange.
constexpr bool kSkipsUnseen = kBlockN == 64 && !kTurns && !kShares;
static_assert(!kSkipsUnseen || kStages > 1, "the copies of a tile that one leaves out would wait for the other for ever");

struct alignas(1024) Buffers
{
    Element queries[kQueryBuffers][kSlabs][kBlockM][kSlab];
    Element keys[kStages][kSlabs][kBlockN][kSlab];
    Element values[kStages][kSlabs][kBlockN][kSlab];
};

// Where blocks share a tile, each adds up and stores an equal part of a warpgroup's rows, groups of eight. What others
// have summed for these rows they put into the stage behind the tile's last keys and values, which the producer keeps free
// of copies and offers to the cluster as soon as nobody reads there, so that sums find it waiting: the first warpgroup's
// go where keys would, the second's where values would. A stage of 64 keys takes half of the columns at a time.
constexpr int32_t kRowGroups = 8; // of a warpgroup; two a warp
constexpr int32_t kRowGroupsShift = 3;
constexpr int32_t kRounds = 128 / kBlockN;
constexpr int32_t kPieces = kDim / 16 / kRounds; // of 16 columns
// Added up at a time. Beside 256 columns of sums, or an accurate SiLU, there are no registers for the parts of several.
constexpr int32_t kPiecesAtOnce = kDim <= 128 && !kIsAccurate ? kPieces : 1;
using ExchangePiece = float4[32]; // of a row group: a lane has four sums of one row
static_assert(!kShares || (kWarpgroups == 2 && kStages > 1), "keys and values, and another stage for the next tile");
// Those of its rows that fall to a block, of all blocks: always as many as a block has.
constexpr int32_t kExchangedBytes = sizeof(ExchangePiece) * kRowGroups * kPieces;
static_assert(kExchangedBytes == sizeof(Buffers::keys[0]), "a warpgroup's sums fill a buffer");

struct Barriers
{
    uint64_t tileFull[kTileSlots];
    uint64_t tileEmpty[kTileSlots];
    uint64_t tileWanted;
    uint64_t queriesFull[kQueryBuffers];
    uint64_t queriesEmpty[kQueryBuffers];
    uint64_t keysFull[kStages];
    uint64_t keysEmpty[kStages];
    uint64_t valuesFull[kStages];
    uint64_t valuesEmpty[kStages];
    uint64_t exchangeReady;
    uint64_t exchangeFull[kWarpgroups];
    uint64_t exchangeDone;
};

// Everything that a block keeps in shared memory.
struct Shared
{
    Buffers buffers;
    Barriers barriers;
    Tile tiles[kTileSlots];
    Schedule schedule;
    int32_t exchangeStages[kMostBlocks]; //!< that each block of the cluster offers
    TimeTable<kTimeBias> times;
};

static_assert(sizeof(Shared) <= HSTU_SHARED_BYTES, "compile.py counts too little shared memory");

//! Position in a ring of buffers: which one, and the parity of its barriers' phase.
template <int32_t kSize>
struct Ring
{
    int32_t index{0};
    uint32_t phase{0};

    __device__ __forceinline__ void advance()
    {
        if (++index == kSize)
        {
            index = 0;
            phase ^= 1;
        }
    }
};

__device__ __forceinline__ void initBarriers(Barriers& barriers)
{
    for (int32_t i = 0; i < kTileSlots; ++i)
    {
        barrierInit(&barriers.tileFull[i], 1);
        barrierInit(&barriers.tileEmpty[i], kConsumerWarps + 1); // and the producer
    }
    barrierInit(&barriers.tileWanted, 1);
    for (int32_t i = 0; i < kQueryBuffers; ++i)
    {
        barrierInit(&barriers.queriesFull[i], 1);
        barrierInit(&barriers.queriesEmpty[i], kConsumerWarps);
    }
    for (int32_t i = 0; i < kStages; ++i)
    {
        barrierInit(&barriers.keysFull[i], 1);
        barrierInit(&barriers.keysEmpty[i], kConsumerWarps);
        barrierInit(&barriers.valuesFull[i], 1);
        barrierInit(&barriers.valuesEmpty[i], kConsumerWarps);
    }
    if constexpr (kShares)
    {
        barrierInit(&barriers.exchangeReady, clusterBlocks());
        for (int32_t i = 0; i < kWarpgroups; ++i)
        {
            barrierInit(&barriers.exchangeFull[i], 1); // and the bytes of the sums
        }
        barrierInit(&barriers.exchangeDone, kConsumerWarps);
    }
    barrierInitFence();
}

//! First key of this block's key tile t. Blocks of a cluster deal the tiles out in turn.
__device__ __forceinline__ int32_t keyStart(Tile const& tile, int32_t t)
{
    if constexpr (!kShares)
    {
        return tile.keyStart(t, kBlockN);
    }
    return tile.keyStart(min(t * clusterBlocks() + clusterRank(), tile.tiles - 1), kBlockN);
}

//! Counts this block's share of the key tiles.
__device__ __forceinline__ void takeShare(Tile& tile)
{
    tile.share = tile.tiles;
    tile.maskedShare = tile.maskedTiles;
    if constexpr (kShares)
    {
        int32_t const others = clusterBlocks() - 1;
        tile.share = (tile.tiles - clusterRank() + others) >> clusterShift();
        tile.maskedShare = (tile.maskedTiles - clusterRank() + others) >> clusterShift();
        if (tile.share == 0 && tile.tiles > 0)
        {
            // Takes part with a key tile of which nothing counts, so that every block goes the same way.
            tile.share = 1;
            tile.maskedShare = 1;
            tile.mask = Mask::kNothing;
        }
    }
}

//! The thread that finds work and describes it. Of its own, because the answers of memory that it waits for would hold up
//! copies.
struct Scheduler
{
    AttentionParameters const& p;
    Shared& shared;

    //! Asks for the tile after those that blocks have been given.
    __device__ __forceinline__ int32_t claim() const
    {
        return gridDim.x + atomicAdd(&p.progress[0], 1);
    }

    //! The index of this block's tile of a round where the tiles are dealt out beforehand, since blocks of a cluster must
    //! agree: to and fro, as costs descend.
    __device__ __forceinline__ int32_t dealt(int32_t round) const
    {
        int32_t const clusters = gridDim.x >> clusterShift();
        int32_t const cluster = blockIdx.x >> clusterShift();
        return round * clusters + (round % 2 == 0 ? cluster : clusters - 1 - cluster);
    }

    __device__ __forceinline__ void run()
    {
        int32_t const numTiles = shared.schedule.numSlots * p.heads;
        // Where there are many tiles, one more in hand unbalances nothing, and its claim is answered in good time.
        bool const isEarly = !kShares && numTiles > kManyTiles * static_cast<int32_t>(gridDim.x);
        Ring<kTileSlots> slot;
        Ring<1> wanted;
        int32_t index = kShares ? dealt(0) : static_cast<int32_t>(blockIdx.x);
        for (int32_t round = 1;; ++round)
        {
            Tile& tile = shared.tiles[slot.index];
            // The first wait on an empty buffer is for the phase before the first: it returns at once.
            barrierWait(&shared.barriers.tileEmpty[slot.index], slot.phase ^ 1);
            tile.head = -1;
            if (index < numTiles)
            {
                describeTile<kPlainCausal, kHasCache>(p, shared.schedule, index, kBlockM, kBlockN, tile);
                takeShare(tile);
            }
            barrierArrive(&shared.barriers.tileFull[slot.index]);
            slot.advance();
            if (index >= numTiles)
            {
                break;
            }
            int32_t const early = isEarly ? claim() : 0;
            barrierWait(&shared.barriers.tileWanted, wanted.phase);
            wanted.advance();
            index = kShares ? dealt(round) : isEarly ? early : claim();
        }
        if constexpr (!kShares)
        {
            // The last block to come here has seen every other block's last question: both counters are as they were.
            if (atomicAdd(&p.progress[1], 1) == static_cast<int32_t>(gridDim.x) - 1)
            {
                p.progress[0] = 0;
                p.progress[1] = 0;
            }
        }
    }
};

//! The thread that copies every operand, as far ahead as there are buffers.
struct Producer
{
    CUtensorMap const& qMap;
    CUtensorMap const& kMap;
    CUtensorMap const& vMap;
    CUtensorMap const& kCachedMap; //!< kMap and vMap again where there is no cache
    CUtensorMap const& vCachedMap;
    Shared& shared;

    Ring<kTileSlots> slot;
    Ring<kQueryBuffers> query;
    Ring<kStages> stage;
    Ring<1> exchange;

    __device__ __forceinline__ Producer(
        CUtensorMap const& queryMap, CUtensorMap const& keyMap, CUtensorMap const& valueMap,
        CUtensorMap const& cachedKeyMap, CUtensorMap const& cachedValueMap, Shared& memory)
        : qMap(queryMap)
        , kMap(keyMap)
        , vMap(valueMap)
        , kCachedMap(cachedKeyMap)
        , vCachedMap(cachedValueMap)
        , shared(memory)
    {
    }

    __device__ __forceinline__ void copyQueries(int32_t head, int32_t row)
    {
        uint64_t* const full = &shared.barriers.queriesFull[query.index];
        barrierWait(&shared.barriers.queriesEmpty[query.index], query.phase ^ 1);
        barrierArriveExpect(full, sizeof(shared.buffers.queries[0]));
#pragma unroll
        for (int32_t slab = 0; slab < kSlabs; ++slab)
        {
            copyBox(shared.buffers.queries[query.index][slab], &qMap, full, slab * kSlab, head, row);
        }
        query.advance();
    }

    //! The key tile at `start` of the tile's sequence, from the tensors that hold it.
    __device__ __forceinline__ void copyKeysAndValues(Tile const& tile, int32_t start)
    {
        bool const isCached = kHasCache && start < tile.numCached;
        CUtensorMap const* const keyMap = isCached ? &kCachedMap : &kMap;
        CUtensorMap const* const valueMap = isCached ? &vCachedMap : &vMap;
        int32_t const row = isCached ? tile.cachedRow + start : tile.keyRow + start - (kHasCache ? tile.numCached : 0);
        int32_t const head = tile.head;
        uint64_t* const keysFull = &shared.barriers.keysFull[stage.index];
        barrierWait(&shared.barriers.keysEmpty[stage.index], stage.phase ^ 1);
        barrierArriveExpect(keysFull, sizeof(shared.buffers.keys[0]));
#pragma unroll
        for (int32_t slab = 0; slab < kSlabs; ++slab)
        {
            copyBox(shared.buffers.keys[stage.index][slab], keyMap, keysFull, slab * kSlab, head, row);
        }
        uint64_t* const valuesFull = &shared.barriers.valuesFull[stage.index];
        barrierWait(&shared.barriers.valuesEmpty[stage.index], stage.phase ^ 1);
        barrierArriveExpect(valuesFull, sizeof(shared.buffers.values[0]));
#pragma unroll
        for (int32_t slab = 0; slab < kSlabs; ++slab)
        {
            copyBox(shared.buffers.values[stage.index][slab], valueMap, valuesFull, slab * kSlab, head, row);
        }
        stage.advance();
    }

    //! Tells the cluster that sums of this tile may be put into the next stage, once nobody reads there.
    __device__ __forceinline__ void offerStage()
    {
        barrierWait(&shared.barriers.keysEmpty[stage.index], stage.phase ^ 1);
        barrierWait(&shared.barriers.valuesEmpty[stage.index], stage.phase ^ 1);
        // Then every warpgroup of the cluster has seen the last offer.
        barrierWait(&shared.barriers.exchangeDone, exchange.phase ^ 1);
        // In place of the copies that would end these phases.
        barrierArrive(&shared.barriers.keysFull[stage.index]);
        barrierArrive(&shared.barriers.valuesFull[stage.index]);
        for (int32_t warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup)
        {
            barrierArriveExpect(&shared.barriers.exchangeFull[warpgroup], kExchangedBytes);
        }
        for (int32_t block = 0; block < clusterBlocks(); ++block)
        {
            remoteStore(remoteAddress(&shared.exchangeStages[clusterRank()], block), stage.index);
            remoteArrive(remoteAddress(&shared.barriers.exchangeReady, block));
        }
        stage.advance();
        exchange.advance();
    }

    __device__ __forceinline__ void run()
    {
        while (true)
        {
            barrierWait(&shared.barriers.tileFull[slot.index], slot.phase);
            Tile const& tile = shared.tiles[slot.index];
            if (tile.head < 0)
            {
                break;
            }
            int32_t const share = tile.share;
            // The next tile is asked for late, so that no block holds work that an idle one could begin; but early enough
            // to be described when its first operands can be copied.
            int32_t const asking = max(share - kAskAhead, 0);
            if (share > 0)
            {
                copyQueries(tile.head, tile.queryRow);
            }
            for (int32_t t = 0; t < max(share, 1); ++t)
            {
                if (t == asking)
                {
                    barrierArrive(&shared.barriers.tileWanted);
                }
                if (t < share)
                {
                    copyKeysAndValues(tile, keyStart(tile, t));
                }
            }
            barrierArrive(&shared.barriers.tileEmpty[slot.index]);
            slot.advance();
            if (kShares && share > 0)
            {
                offerStage();
            }
        }
    }
};

//! Rows of a stage that belong to the sequence, in one register: up to `end`, and with a cache from `begin` on.
struct ValidRows
{
    static constexpr int32_t kBits = 16;
    int32_t packed;

    static __device__ __forceinline__ ValidRows all()
    {
        return {kBlockN};
    }

    //! \param start of a key tile; negative where it begins in front of the sequence.
    static __device__ __forceinline__ ValidRows of(int32_t start, int32_t numKeys)
    {
        int32_t const end = numKeys - start;
        return {kHasCache ? max(-start, 0) << kBits | min(end, kBlockN) : end};
    }

    __device__ __forceinline__ int32_t begin() const
    {
        return kHasCache ? packed >> kBits : 0;
    }

    __device__ __forceinline__ int32_t end() const
    {
        return kHasCache ? packed & ((1 << kBits) - 1) : packed;
    }
};

//! What the end of a tile needs of it, after the tile's slot has been given back.
struct Ending
{
    int32_t head;
    int32_t queryRow;
    int32_t rows;
    ValidRows valid; //!< of the last key tile
    float scale;
    bool isSingle; //!< one key tile was multiplied
};

//! Times that the scores of a key tile are weighed by, from the sequence's first one on.
struct StepTimes
{
    int32_t rows[2];                //!< of this thread's two rows
    int32_t columns[kColumnPieces]; //!< of every 32nd column, from the lane's on
    bool isFar;                     //!< the table does not serve one of them
};

//! One of kWarpgroups that multiply: 64 rows of every tile.
struct Consumer
{
    AttentionParameters const& p;
    Shared& shared;
    int32_t const warpgroup; // 0 for the first that multiplies
    int32_t const thread;    // in the warpgroup
    int32_t lane; // never changes
    int32_t const rowInTile; // of this thread's first row; the other is 8 further
    float const halfAlpha;
    uint32_t const queriesUnit; // this warpgroup's rows
    uint32_t const keysUnit;
    uint32_t const valuesUnit;

    Ring<kTileSlots> slot;
    Ring<kQueryBuffers> query;
    Ring<kStages> keyStage;
    Ring<kStages> valueStage;
    Ring<1> exchange;

    uint32_t queries[kHeldSteps > 0 ? kHeldSteps : 1][4]; //!< the first kHeldSteps of this warpgroup's rows
    float scores[kBlockN / 2];
    uint32_t weights[kBlockN / kDepth][4];
    float sums[kDim / 2];
    StepTimes times; //!< of the next key tile, where they are read ahead

    __device__ __forceinline__ Consumer(AttentionParameters const& parameters, Shared& memory)
        : p(parameters)
        , shared(memory)
        , warpgroup(uniform(threadIdx.x / 128) - 1)
        , thread(threadIdx.x % 128)
        , lane(threadIdx.x % 32)
        , rowInTile(warpgroup * 64 + thread / 32 * 16 + lane / 4)
        , halfAlpha(0.5F * parameters.alpha)
        , queriesUnit(descriptorUnit(memory.buffers.queries) + warpgroup * 64 * kRowBytes / kDescriptorUnit)
        , keysUnit(descriptorUnit(memory.buffers.keys))
        , valuesUnit(descriptorUnit(memory.buffers.values))
    {
    }

    //! One arrival of this warp.
    __device__ __forceinline__ void release(uint64_t* barrier) const
    {
        if (lane == 0)
        {
            barrierArrive(barrier);
        }
    }

    __device__ __forceinline__ void awaitTurn() const
    {
        if constexpr (kTurns)
        {
            namedBarrierSync(kFirstTurnBarrier + warpgroup, 256);
        }
    }

    __device__ __forceinline__ void passTurn() const
    {
        if constexpr (kTurns)
        {
            namedBarrierArrive(kFirstTurnBarrier + (warpgroup + 1) % kWarpgroups, 256);
        }
    }

    //! How many of the tile's first key tiles this warpgroup's rows see nothing of. Those are not multiplied.
    __device__ __forceinline__ int32_t unseenTiles(Tile const& tile) const
    {
        if constexpr (!kSkipsUnseen)
        {
            return 0;
        }
        bool const isUnseen = tile.mask == Mask::kDiagonal && tile.maskedShare > 1
                              && keyStart(tile, 0) >= tile.firstRow + 64 * (warpgroup + 1);
        return uniform(isUnseen ? 1 : 0);
    }

    __device__ __forceinline__ void skipKeys(int32_t tiles)
    {
        if (kSkipsUnseen && tiles > 0)
        {
            awaitKeys();
            releaseKeys();
        }
    }

    __device__ __forceinline__ void skipValues(int32_t tiles)
    {
        if (kSkipsUnseen && tiles > 0)
        {
            barrierWait(&shared.barriers.valuesFull[valueStage.index], valueStage.phase);
            releaseValues();
        }
    }

    //! scores = queries x keys of the stage at keyStage.
    __device__ __forceinline__ void multiplyKeys()
    {
        constexpr uint32_t kBuffer = sizeof(shared.buffers.queries[0]) / kDescriptorUnit;
        constexpr uint32_t kStage = sizeof(shared.buffers.keys[0]) / kDescriptorUnit;
        uint32_t const rows = queriesUnit + query.index * kBuffer;
        uint32_t const keys = keysUnit + keyStage.index * kStage;
#pragma unroll
        for (int32_t step = 0; step < kDim / kDepth; ++step)
        {
            uint32_t const slab = step * kDepth / kSlab * kRowBytes / kDescriptorUnit;
            uint32_t const column = step * kDepth % kSlab * 2 / kDescriptorUnit;
            uint64_t const descriptor = operandDescriptor(keys + slab * kBlockN + column, 0);
            if (step < kHeldSteps)
            {
                Wgmma<Element, kBlockN>::registerShared(scores, queries[step], descriptor, step > 0);
            }
            else
            {
                Wgmma<Element, kBlockN>::sharedShared(
                    scores, operandDescriptor(rows + slab * kBlockM + column, 0), descriptor, step > 0);
            }
        }
        productCommit();
    }

    //! sums (+)= weights x values of the stage at valueStage.
    __device__ __forceinline__ void multiplyValues(bool isFirst)
    {
        constexpr uint32_t kStage = sizeof(shared.buffers.values[0]) / kDescriptorUnit;
        uint32_t const values = valuesUnit + valueStage.index * kStage;
#pragma unroll
        for (int32_t step = 0; step < kBlockN / kDepth; ++step)
        {
            uint32_t const row = step * kDepth * kRowBytes / kDescriptorUnit;
            Wgmma<Element, kDim>::registerSharedT(
                sums, weights[step], operandDescriptor(values + row, kBlockN * kRowBytes), step > 0 || !isFirst);
        }
        productCommit();
    }

    __device__ __forceinline__ void awaitQueries()
    {
        barrierWait(&shared.barriers.queriesFull[query.index], query.phase);
        if constexpr (kFindsQueriesAnew)
        {
            // For all the compiler knows, another value than for the tile before.
            asm volatile("" : "+r"(lane));
        }
#pragma unroll
        for (int32_t step = 0; step < kHeldSteps; ++step)
        {
            // Four 8 x 8 matrices: rows 0-7 and 8-15 of the first eight columns, then of the second. The copy engine has
            // swapped the 16-byte pieces of a row by its number.
            int32_t const row = warpgroup * 64 + thread / 32 * 16 + lane % 16;
            int32_t const piece = step * kDepth % kSlab / 8 + lane / 16;
            loadMatrices(queries[step],
                &shared.buffers.queries[query.index][step * kDepth / kSlab][row][(piece ^ row % 8) * 8]);
        }
        if constexpr (kHoldsQueries)
        {
            releaseQueries();
        }
    }

    __device__ __forceinline__ void releaseQueries()
    {
        __syncwarp();
        release(&shared.barriers.queriesEmpty[query.index]);
        query.advance();
    }

    __device__ __forceinline__ void awaitKeys() const
    {
        barrierWait(&shared.barriers.keysFull[keyStage.index], keyStage.phase);
    }

    //! Which of the values of key tile t belong to the sequence.
    __device__ __forceinline__ ValidRows validRows(Tile const& tile, int32_t t) const
    {
        return {uniform(ValidRows::of(keyStart(tile, t), tile.numKeys).packed)};
    }

    //! Clears what does not belong to the sequence: it may be anything, and 0 * NaN is NaN.
    __device__ __forceinline__ void awaitValues(ValidRows valid) const
    {
        barrierWait(&shared.barriers.valuesFull[valueStage.index], valueStage.phase);
        if (kHasCache ? valid.packed == kBlockN : valid.end() >= kBlockN)
        {
            return;
        }
        for (int32_t row = (kHasCache ? 0 : valid.end()) + thread / 8; row < kBlockN; row += 16)
        {
            if (kHasCache && row >= valid.begin() && row < valid.end())
            {
                continue;
            }
#pragma unroll
            for (int32_t slab = 0; slab < kSlabs; ++slab)
            {
                auto* const line = reinterpret_cast<uint4*>(shared.buffers.values[valueStage.index][slab][row]);
                line[thread % 8] = make_uint4(0, 0, 0, 0);
            }
        }
        sharedProxyFence();
        namedBarrierSync(kFirstGroupBarrier + warpgroup, 128);
    }

    __device__ __forceinline__ void releaseKeys()
    {
        release(&shared.barriers.keysEmpty[keyStage.index]);
        keyStage.advance();
    }

    __device__ __forceinline__ void releaseValues()
    {
        release(&shared.barriers.valuesEmpty[valueStage.index]);
        valueStage.advance();
    }

    //! Gives the stage back in which sums have been exchanged.
    __device__ __forceinline__ void releaseStage()
    {
        sharedProxyFence();
        __syncwarp();
        release(&shared.barriers.exchangeDone);
        release(&shared.barriers.keysEmpty[valueStage.index]);
        releaseValues();
    }

    template <Mask kMask>
    __device__ __forceinline__ void applyMask(Tile const& tile, int32_t keyStart)
    {
        RowBounds const upper = rowBounds(p, tile, tile.firstRow + rowInTile);
        RowBounds const lower = rowBounds(p, tile, tile.firstRow + rowInTile + 8);
        int32_t const first = keyStart + 2 * (lane % 4);
#pragma unroll
        for (int32_t i = 0; i < kBlockN / 2; ++i)
        {
            bool const isUpper = i % 4 < 2;
            scores[i] = isAllowed<kMask>(tile, isUpper ? upper : lower, first, i / 4 * 8 + i % 2) ? scores[i] : 0.0F;
        }
    }

    //! Columns in front of the sequence, which begins inside the key tile.
    __device__ __forceinline__ void clearFront(int32_t keyStart)
    {
        int32_t const first = keyStart + 2 * (lane % 4);
#pragma unroll
        for (int32_t i = 0; i < kBlockN / 2; ++i)
        {
            scores[i] = isInSequence(first, columnOffset(i)) ? scores[i] : 0.0F;
        }
    }

    //! What the mask forbids becomes zero, and SiLU of that is zero.
    __device__ __forceinline__ void mask(Tile const& tile, int32_t t)
    {
        int32_t const start = keyStart(tile, t);
        if (kHasCache && start < 0)
        {
            clearFront(start);
        }
        Mask const kind = tile.mask;
        if (kShares && kind == Mask::kNothing)
        {
            applyMask<Mask::kNothing>(tile, start);
        }
        else if (kPlainCausal || kind == Mask::kDiagonal)
        {
            applyMask<Mask::kDiagonal>(tile, start);
        }
        else if (kind == Mask::kGroups)
        {
            applyMask<Mask::kGroups>(tile, start);
        }
        else
        {
            applyMask<Mask::kWindow>(tile, start);
        }
    }

    //! scores, until now products, become half of what SiLU is taken of. For a key tile's first pieces.
    __device__ __forceinline__ void scale(Tile const& tile, int32_t keyStart, int32_t seen)
    {
        if constexpr (kTimeBias)
        {
            scaleWithTimeBias(tile, keyStart, seen);
        }
        else
        {
#pragma unroll
            for (int32_t i = 0; i < kBlockN / 2; ++i)
            {
                scores[i] *= halfAlpha;
            }
        }
        if constexpr (kPosBias)
        {
            addPositionBias(tile, keyStart, seen);
        }
    }

    //! How many of a key tile's first pieces a row of this warp may see something of. What lies behind them stays as it is:
    //! masked, or in rows that nobody stores.
    __device__ __forceinline__ int32_t seenPieces(Tile const& tile, int32_t keyStart, bool isMasked) const
    {
        if constexpr (!kSkipsPieces)
        {
            return kColumnPieces;
        }
        int32_t const firstRow = warpgroup * 64 + thread / 32 * kRowsOfWarp;
        int32_t last = kBlockN - 1;
        if (isMasked)
        {
            bool const isDiagonal = kPlainCausal || tile.mask == Mask::kDiagonal;
            last = min(tile.numKeys - 1, isDiagonal ? tile.firstRow + firstRow + kRowsOfWarp - 1 : kBlockN + keyStart) - keyStart;
        }
        // Rounded towards zero: what is negative is none.
        int32_t const pieces = firstRow < tile.rows ? (last + kPieceColumns) / kPieceColumns : 0;
        return uniform(min(max(pieces, 0), kColumnPieces));
    }

    //! The column of scores[i], from the thread's first on.
    static __device__ __forceinline__ constexpr int32_t columnOffset(int32_t i)
    {
        return i / 4 * 8 + i % 2;
    }

    __device__ __forceinline__ void addPositionBias(Tile const& tile, int32_t keyStart, int32_t seen)
    {
        float const* const table =
            p.posTable + int64_t{p.posHeads > 1 ? tile.head : 0} * (2 * p.posTableLen - 1) + p.posTableLen - 1;
        int32_t const last = p.posTableLen - 1;
        int32_t const row = tile.firstRow + rowInTile;
        int32_t const column = keyStart + 2 * (lane % 4);
        // Where neither rows nor columns are candidates, entries depend on column - row alone. Rows behind the sequence, of
        // which nothing is stored, may take any entry; columns behind it are masked, but need one.
        int32_t const lastRow = min(tile.firstRow + kBlockM, tile.numKeys) - 1;
        bool const isDiagonal = kHasRoomForLastTiles && (kPlainCausal || tile.mask == Mask::kDiagonal)
                                && p.posTableLen >= kLeastPosTable;
        bool const isInside = isDiagonal || (keyStart + kBlockN <= tile.history && tile.firstRow + kBlockM <= tile.history);
        bool const isHistory =
            isInside && lastRow < tile.history && tile.firstRow >= 0 && (!kHasCache || keyStart >= 0);
        if (uniform(isHistory && tile.numKeys <= p.posTableLen ? 1 : 0) != 0)
        {
            // Eight columns on, the lower row meets the entries of the upper one.
            int32_t const distance = column - min(row, tile.numKeys - 1);
            float const* const entries = table + distance;
            int32_t const lowest = max(distance - 8, -last);
            float lower[2] = {table[lowest], table[max(lowest, distance - 7)]};
#pragma unroll
            for (int32_t piece = 0; piece < kColumnPieces; ++piece)
            {
                if (piece >= seen)
                {
                    break;
                }
#pragma unroll
                for (int32_t i = kPieceScores * piece; i < kPieceScores * (piece + 1); i += 4)
                {
                    float const upper[2] = {entries[columnOffset(i)], entries[columnOffset(i + 1)]};
                    scores[i] = fmaf(0.5F, upper[0], scores[i]);
                    scores[i + 1] = fmaf(0.5F, upper[1], scores[i + 1]);
                    scores[i + 2] = fmaf(0.5F, lower[0], scores[i + 2]);
                    scores[i + 3] = fmaf(0.5F, lower[1], scores[i + 3]);
                    lower[0] = upper[0];
                    lower[1] = upper[1];
                }
            }
        }
        else
        {
#pragma unroll
            for (int32_t piece = 0; piece < kColumnPieces; ++piece)
            {
                if (piece >= seen)
                {
                    break;
                }
#pragma unroll
                for (int32_t i = kPieceScores * piece; i < kPieceScores * (piece + 1); ++i)
                {
                    int32_t const distance =
                        min(column + columnOffset(i), tile.history) - min(row + i % 4 / 2 * 8, tile.history);
                    // Sequences longer than the table share its outermost entries.
                    scores[i] = fmaf(0.5F, table[min(max(distance, -last), last)], scores[i]);
                }
            }
        }
    }

    //! Where the sequence's times begin among those of all keys, cached ones included.
    static __device__ __forceinline__ int32_t firstTime(Tile const& tile)
    {
        return kHasCache ? tile.keyRow + tile.cachedRow : tile.keyRow;
    }

    //! A column whose time is there, for one that may lie outside the sequence.
    static __device__ __forceinline__ int32_t timeColumn(Tile const& tile, int32_t column)
    {
        return min(kHasCache ? max(column, 0) : column, tile.numKeys - 1);
    }

    //! Of the columns' times, lane l reads every 32nd from l on. Rows and columns behind the sequence repeat the last one: what
    //! becomes of them is neither stored nor seen.
    __device__ __forceinline__ StepTimes readTimes(Tile const& tile, int32_t keyStart) const
    {
        auto const* const columns = static_cast<Timestamp const*>(p.colTimestamps) + firstTime(tile);
        auto const* const rows = static_cast<Timestamp const*>(p.rowTimestamps) + tile.queryRow;
        int64_t const base = columns[0];
        StepTimes read;
        read.isFar = shared.times.isCrowded != 0;
        auto fromBase = [&](int64_t time) {
            read.isFar |= abs(time - base) >= kFarthest;
            return static_cast<int32_t>(time - base);
        };
        read.rows[0] = fromBase(rows[min(rowInTile, tile.rows - 1)]);
        read.rows[1] = fromBase(rows[min(rowInTile + 8, tile.rows - 1)]);
#pragma unroll
        for (int32_t i = 0; i < kColumnPieces; ++i)
        {
            read.columns[i] = fromBase(columns[timeColumn(tile, keyStart + kPieceColumns * i + lane)]);
        }
        return read;
    }

    //! For the key tile that is multiplied next.
    __device__ __forceinline__ void readTimesAhead(Tile const& tile, int32_t t)
    {
        if constexpr (kPreparesTimes)
        {
            times = readTimes(tile, keyStart(tile, t));
        }
    }

    __device__ __forceinline__ void scaleWithTimeBias(Tile const& tile, int32_t keyStart, int32_t seen)
    {
        StepTimes const now = kPreparesTimes ? times : readTimes(tile, keyStart);
        int32_t const(&rowTimes)[2] = now.rows;
        int32_t const(&columnTimes)[kColumnPieces] = now.columns;
        constexpr int32_t kMany = 2;
        if (__any_sync(0xFFFFFFFF, now.isFar) != 0)
        {
            scaleWithSearchedTimeBias(tile, keyStart);
            return;
        }
        auto const& values = shared.times.values[p.tsHeads > 1 ? tile.head : 0];
        int32_t const firstRow = __reduce_min_sync(0xFFFFFFFF, min(rowTimes[0], rowTimes[1]));
        int32_t const lastRow = __reduce_max_sync(0xFFFFFFFF, max(rowTimes[0], rowTimes[1]));
        // Lane l looks up what piece l, of 32 columns, adds.
        int32_t first = columnTimes[0];
        int32_t last = columnTimes[0];
#pragma unroll
        for (int32_t piece = 0; piece < kColumnPieces; ++piece)
        {
            int32_t const earliest = __reduce_min_sync(0xFFFFFFFF, columnTimes[piece]);
            int32_t const latest = __reduce_max_sync(0xFFFFFFFF, columnTimes[piece]);
            first = lane == piece ? earliest : first;
            last = lane == piece ? latest : last;
        }
        int32_t const least = max(max(firstRow - last, first - lastRow), 0);
        int32_t const most = max(lastRow - first, last - firstRow);
        TimeBiasRange range = timeBiasRange(shared.times, values, least + 1, most + 1);
        // Where a column comes after a row, one comparison does not tell how far apart they are.
        bool const isOrdered = last <= firstRow;
        range.crossed = range.crossed == 0 || (range.crossed == 1 && isOrdered) ? range.crossed : kMany;
#pragma unroll
        for (int32_t piece = 0; piece < kColumnPieces; ++piece)
        {
            if (piece >= seen)
            {
                break;
            }
            float(&part)[kPieceScores] = *reinterpret_cast<float(*)[kPieceScores]>(scores + kPieceScores * piece);
            int32_t const crossed = __shfl_sync(0xFFFFFFFF, range.crossed, piece);
            float const below = __shfl_sync(0xFFFFFFFF, range.below, piece);
            if (crossed == 0)
            {
#pragma unroll
                for (int32_t i = 0; i < kPieceScores; ++i)
                {
                    part[i] = fmaf(halfAlpha, part[i], below);
                }
            }
            else if (crossed == 1)
            {
                float const above = __shfl_sync(0xFFFFFFFF, range.above, piece);
                int64_t const threshold = __shfl_sync(0xFFFFFFFF, range.threshold, piece);
                // Columns until then have reached the threshold, which is a distance.
                constexpr int64_t kBeforeAll = INT32_MIN;
                int32_t const until[2] = {static_cast<int32_t>(max(rowTimes[0] + 1 - threshold, kBeforeAll)),
                    static_cast<int32_t>(max(rowTimes[1] + 1 - threshold, kBeforeAll))};
                scalePiece(part, columnTimes[piece],
                    [&](int32_t row, int32_t time) { return time <= until[row] ? above : below; });
            }
            else
            {
                scalePiece(part, columnTimes[piece], [&](int32_t row, int32_t time) {
                    return timeBias(shared.times.thresholds, values, abs(rowTimes[row] - time) + 1);
                });
            }
        }
    }

    //! Scales the scores of 32 columns and adds what `bias` gives for each of this thread's rows, 0 or 1, and each column's
    //! time. `times` is that of column l in lane l.
    template <typename Bias>
    __device__ __forceinline__ void scalePiece(float (&part)[kPieceScores], int32_t times, Bias bias) const
    {
#pragma unroll
        for (int32_t i = 0; i < kPieceScores; i += i % 4 == 1 ? 3 : 1)
        {
            int32_t const time = __shfl_sync(0xFFFFFFFF, times, columnOffset(i) + 2 * (lane % 4));
            part[i] = fmaf(halfAlpha, part[i], bias(0, time));
            part[i + 2] = fmaf(halfAlpha, part[i + 2], bias(1, time));
        }
    }

    //! For times that the table does not serve.
    __device__ __forceinline__ void scaleWithSearchedTimeBias(Tile const& tile, int32_t keyStart)
    {
        auto const* const columns = static_cast<Timestamp const*>(p.colTimestamps) + firstTime(tile);
        auto const* const rows = static_cast<Timestamp const*>(p.rowTimestamps) + tile.queryRow;
        int64_t const times[2] = {rows[min(rowInTile, tile.rows - 1)], rows[min(rowInTile + 8, tile.rows - 1)]};
        int32_t const column = keyStart + 2 * (lane % 4);
#pragma unroll
        for (int32_t i = 0; i < kBlockN / 2; ++i)
        {
            asm volatile("" ::: "memory"); // one after the other: times loaded ahead would take the registers of others
            int64_t const time = columns[timeColumn(tile, column + columnOffset(i))];
            float const bias = searchedTimeBias<Timestamp>(p, tile.head, times[i % 4 / 2], time);
            scores[i] = fmaf(halfAlpha, scores[i], bias);
        }
    }

    //! scores, until now products, become SiLU weights.
    __device__ __forceinline__ void weigh(Tile const& tile, int32_t t, bool isMasked)
    {
        int32_t const start = keyStart(tile, t);
        int32_t const seen = seenPieces(tile, start, isMasked);
        scale(tile, start, seen);
        if (isMasked)
        {
            mask(tile, t);
        }
#pragma unroll
        for (int32_t piece = 0; piece < kColumnPieces; ++piece)
        {
            if (piece >= seen)
            {
                break;
            }
#pragma unroll
            for (int32_t i = kPieceScores * piece; i < kPieceScores * (piece + 1); ++i)
            {
                activate<kIsAccurate>(scores[i]);
            }
        }
    }

    __device__ __forceinline__ void packWeights()
    {
#pragma unroll
        for (int32_t i = 0; i < kBlockN / 4; ++i)
        {
            weights[i / 4][i % 4] = packPair<Element>(scores[2 * i], scores[2 * i + 1]);
        }
    }

    //! The next tile that has keys, or null. Tiles without are cleared on the way.
    __device__ __forceinline__ Tile const* takeTile()
    {
        while (true)
        {
            barrierWait(&shared.barriers.tileFull[slot.index], slot.phase);
            // Read where it lies: held in registers it would cost the products theirs.
            Tile const& tile = shared.tiles[slot.index];
            if (uniform(tile.head) < 0)
            {
                return nullptr;
            }
            if (uniform(tile.tiles) > 0)
            {
                return &tile;
            }
            clear(tile);
            releaseTile(tile);
            slot.advance();
        }
    }

    __device__ __forceinline__ void releaseTile(Tile const& tile) const
    {
        __syncwarp();
        release(&shared.barriers.tileEmpty[&tile - shared.tiles]);
    }

    //! Issues the products of a key tile's scores, and of the key tile before it, of whose values the `valid` rows count.
    __device__ __forceinline__ void multiplyBoth(ValidRows valid, bool isFirst)
    {
        awaitKeys();
        // Before the turn: a wait between the two products would leave the tensor cores idle.
        awaitValues(valid);
        awaitTurn();
        productFence();
        multiplyKeys();
        if constexpr (kTurnsLastForScores)
        {
            productWait<0>();
            pin(scores);
            passTurn();
            productFence();
        }
        multiplyValues(isFirst);
        if constexpr (!kTurnsLastForScores)
        {
            passTurn();
        }
    }

    //! A key tile that every row sees whole: SiLU runs while the values are multiplied.
    __device__ __forceinline__ void step(Tile const& tile, int32_t t, ValidRows valid, bool isFirst)
    {
        readTimesAhead(tile, t);
        multiplyBoth(valid, isFirst);
        // Looking times up takes registers, and branches where the compiler does not see that all lanes branch alike.
        productWait<kTimeBias ? 0 : 1>();
        pin(scores);
        releaseKeys();
        weigh(tile, t, false);
        productWait<0>();
        pin(sums);
        releaseValues();
        packWeights();
    }

    //! A key tile that the mask cuts.
    __device__ __forceinline__ void maskedStep(Tile const& tile, int32_t t, bool isFirst)
    {
        readTimesAhead(tile, t);
        multiplyBoth(validRows(tile, t - 1), isFirst);
        productWait<kMasksBesideProducts ? 1 : 0>();
        pin(scores);
        releaseKeys();
        weigh(tile, t, true);
        productWait<0>();
        pin(sums);
        releaseValues();
        packWeights();
    }

    //! The first key tile that is multiplied; its scores are there.
    __device__ __forceinline__ void weighFirst(Tile const& tile, int32_t t)
    {
        weigh(tile, t, tile.maskedShare > 0);
        packWeights();
    }

    //! Tells the cluster that the next round's sums may be put into the stage, once no warpgroup reads there.
    __device__ __forceinline__ void offerStageAgain() const
    {
        namedBarrierSync(kExchangeBarrier, 128 * kWarpgroups);
        if (thread == 0)
        {
            barrierArriveExpect(&shared.barriers.exchangeFull[warpgroup], kExchangedBytes);
        }
        if (warpgroup == 0 && thread < clusterBlocks())
        {
            remoteArrive(remoteAddress(&shared.barriers.exchangeReady, thread));
        }
    }

    //! Where in a block this warpgroup's sums are exchanged.
    __device__ __forceinline__ ExchangePiece* exchanged(int32_t stage) const
    {
        void* const buffer = warpgroup == 0 ? static_cast<void*>(shared.buffers.keys[stage]) : shared.buffers.values[stage];
        return static_cast<ExchangePiece*>(buffer);
    }

    //! Stores the tile's rows. Where blocks share the tile: what the cluster has summed of the rows that fall to this one.
    __device__ __forceinline__ void finish(Ending const& ending)
    {
        if constexpr (!kShares)
        {
            store(ending);
        }
        else
        {
#pragma unroll
            for (int32_t round = 0; round < kRounds; ++round)
            {
                if (round > 0)
                {
                    offerStageAgain();
                }
                clusterBarrierWait(&shared.barriers.exchangeReady, exchange.phase);
                sendSums(round);
                clusterBarrierWait(&shared.barriers.exchangeFull[warpgroup], exchange.phase);
                addAndStore(ending, round);
                exchange.advance();
            }
        }
    }

    //! Gives every block of the cluster this thread's sums of its rows.
    __device__ __forceinline__ void sendSums(int32_t round) const
    {
        int32_t const shift = clusterShift();
        int32_t const groups = kRowGroups >> shift;
#pragma unroll
        for (int32_t half = 0; half < 2; ++half)
        {
            int32_t const group = thread / 32 * 2 + half;
            int32_t const block = group << shift >> kRowGroupsShift;
            int32_t const slot = clusterRank() * groups + (group & (groups - 1));
            int32_t const stage = shared.exchangeStages[block];
            uint32_t const target = remoteAddress(&exchanged(stage)[slot * kPieces][lane], block);
            uint32_t const full = remoteAddress(&shared.barriers.exchangeFull[warpgroup], block);
#pragma unroll
            for (int32_t piece = 0; piece < kPieces; ++piece)
            {
                float const* const pair = sums + 8 * (round * kPieces + piece) + 2 * half;
                remoteStoreAsync(target + piece * sizeof(ExchangePiece), full, pair[0], pair[1], pair[4], pair[5]);
            }
        }
    }

    //! Adds up what the blocks have sent, always in their order, and stores it. A warp takes neighbouring pieces of a group.
    template <int32_t kBlocks>
    __device__ __forceinline__ void addAndStore(Ending const& ending, int32_t round) const
    {
        constexpr int32_t kGroups = kRowGroups / kBlocks;
        constexpr int32_t kOfWarp = kGroups * kPieces / 4;
        static_assert(kPieces % kOfWarp == 0, "all of one group");
        int32_t const first = thread / 32 * kOfWarp;
        ExchangePiece const* const pieces = exchanged(valueStage.index) + first;
        int32_t const row = warpgroup * 64 + (clusterRank() * kGroups + first / kPieces) * 8 + lane / 4;
        int32_t const firstColumn = 16 * (round * kPieces + first % kPieces);
        Element* const out = rowOfOut(ending, row) + firstColumn;
        int32_t const columns = row < ending.rows ? p.dv - firstColumn - pieceColumn() : 0;
#pragma unroll (kPiecesAtOnce)
        for (int32_t i = 0; i < kOfWarp; ++i)
        {
            float4 total = pieces[i][lane];
#pragma unroll
            for (int32_t block = 1; block < kBlocks; ++block)
            {
                float4 const part = pieces[block * kGroups * kPieces + i][lane];
                total = make_float4(total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w);
            }
            storePiece(out + 16 * i, 16 * i < columns, ending.scale, total);
        }
    }

    //! One form for each size of a cluster: with the number of blocks in a variable, the parts of two took as many
    //! instructions as those of eight, one piece after the other.
    __device__ __forceinline__ void addAndStore(Ending const& ending, int32_t round) const
    {
        // Read anew: kept from the start it would be a register too many for the accurate SiLU.
        int32_t const blocks = uniform(clusterBlocks());
        if (blocks == 2)
        {
            addAndStore<2>(ending, round);
        }
        else if (blocks == 4)
        {
            addAndStore<4>(ending, round);
        }
        else
        {
            addAndStore<kMostBlocks>(ending, round);
        }
    }

    //! Divides, rounds and writes this thread's part of two rows.
    __device__ __forceinline__ void store(Ending const& ending) const
    {
        // One address and one test of the row for all its columns: made anew for each, with a branch around each store, they
        // were 240 more instructions a tile at 128 columns and 500 at 256.
        Element* const out = rowOfOut(ending, rowInTile);
        int64_t const pitch = int64_t{p.heads} * p.dv;
#pragma unroll
        for (int32_t half = 0; half < 2; ++half)
        {
            bool const isRow = rowInTile + 8 * half < ending.rows;
#pragma unroll
            for (int32_t i = 0; i < kDim / 2; i += 8)
            {
                float const* const pair = sums + i + 2 * half;
                bool const isStored = isRow && 2 * i + pieceColumn() < p.dv;
                storePiece(out + 8 * half * pitch + 2 * i, isStored, ending.scale,
                    make_float4(pair[0], pair[1], pair[4], pair[5]));
            }
        }
    }

    //! Of 16 columns, the first of the four that this thread writes.
    __device__ __forceinline__ int32_t pieceColumn() const
    {
        return lane % 2 != 0 ? 8 + 2 * (lane % 4 - 1) : 2 * (lane % 4);
    }

    //! Where this thread's columns of a row begin in out.
    __device__ __forceinline__ Element* rowOfOut(Ending const& ending, int32_t row) const
    {
        return static_cast<Element*>(p.out) + ((ending.queryRow + row) * int64_t{p.heads} + ending.head) * p.dv
               + pieceColumn();
    }

    //! Divides, rounds and writes two pairs of a row's sums, eight columns apart, of 16 columns of which each of four lanes
    //! has its own. Neighbouring lanes exchange pairs, so that the four write 32 bytes in a row.
    __device__ __forceinline__ void storePiece(Element* out, bool isStored, float scale, float4 pairs) const
    {
        bool const isOdd = lane % 2 != 0;
        uint32_t const left = packPair<Element>(pairs.x * scale, pairs.y * scale);
        uint32_t const right = packPair<Element>(pairs.z * scale, pairs.w * scale);
        uint32_t const received = __shfl_xor_sync(0xFFFFFFFF, isOdd ? left : right, 1);
        if (isStored)
        {
            *reinterpret_cast<uint2*>(out) = isOdd ? make_uint2(received, right) : make_uint2(left, received);
        }
    }

    //! Rows that see no key.
    __device__ __forceinline__ void clear(Tile const& tile) const
    {
        if (kShares && clusterRank() != 0)
        {
            return;
        }
        int32_t const pieces = p.dv / 8;
        for (int32_t i = thread; i < 64 * pieces; i += 128)
        {
            int32_t const row = warpgroup * 64 + i / pieces;
            if (row < tile.rows)
            {
                int64_t const target = (int64_t{tile.queryRow + row} * p.heads + tile.head) * p.dv + i % pieces * 8;
                *reinterpret_cast<uint4*>(static_cast<Element*>(p.out) + target) = make_uint4(0, 0, 0, 0);
            }
        }
    }

    __device__ __forceinline__ void run()
    {
        if (warpgroup == kWarpgroups - 1)
        {
            passTurn();
        }
        Tile const* tile = takeTile();
        if (tile == nullptr)
        {
            return;
        }
        slot.advance();
        int32_t first = unseenTiles(*tile);
        readTimesAhead(*tile, first);
        skipKeys(first);
        skipValues(first);
        awaitQueries();
        awaitKeys();
        awaitTurn();
        productFence();
        multiplyKeys();
        passTurn();
        productWait<0>();
        pin(scores);
        releaseKeys();
        weighFirst(*tile, first);
        while (true)
        {
            int32_t const masked = uniform(tile->maskedShare);
            int32_t const share = uniform(tile->share);
            int32_t t = first + 1;
            for (; t < masked; ++t)
            {
                maskedStep(*tile, t, t == first + 1);
            }
            // Of the key tiles, only a masked one can reach out of the sequence.
            ValidRows valid = validRows(*tile, t - 1);
            for (; t < share; ++t)
            {
                step(*tile, t, valid, t == first + 1);
                valid = ValidRows::all();
            }
            if constexpr (!kHoldsQueries)
            {
                releaseQueries();
            }
            if constexpr (kShares)
            {
                keyStage.advance(); // past the stage of the exchange
            }
            // Given back first: the next tile may need the slot to be described in.
            Ending const ending{tile->head, tile->queryRow, tile->rows,
                validRows(*tile, tile->share - 1), 1.0F / tile->divisor, tile->share == first + 1};
            releaseTile(*tile);
            tile = takeTile();
            awaitValues(ending.valid);
            if (tile == nullptr)
            {
                awaitTurn();
                productFence();
                multiplyValues(ending.isSingle);
                passTurn();
                productWait<0>();
                pin(sums);
                releaseValues();
                finish(ending);
                return;
            }
            // The last values of this tile and the first scores of the next in one go.
            slot.advance();
            first = unseenTiles(*tile);
            readTimesAhead(*tile, first);
            if constexpr (kQueryBuffers > 1 || kHoldsQueries)
            {
                skipKeys(first);
                awaitQueries();
                awaitKeys();
            }
            awaitTurn();
            productFence();
            multiplyValues(ending.isSingle);
            if constexpr (kQueryBuffers == 1 && !kHoldsQueries)
            {
                skipKeys(first);
                awaitQueries();
                awaitKeys();
            }
            productFence();
            multiplyKeys();
            passTurn();
            productWait<1>();
            pin(sums);
            releaseValues();
            skipValues(first);
            finish(ending);
            if constexpr (kShares)
            {
                releaseStage();
            }
            productWait<0>();
            pin(scores);
            releaseKeys();
            weighFirst(*tile, first);
        }
    }
};

} // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1) hstu_attention_sm90(
    __grid_constant__ CUtensorMap const qMap, __grid_constant__ CUtensorMap const kMap,
    __grid_constant__ CUtensorMap const vMap, __grid_constant__ AttentionParameters const p
#if HSTU_CACHE
    ,
    __grid_constant__ CUtensorMap const kCachedMap, __grid_constant__ CUtensorMap const vCachedMap
#endif
)
{
#if !HSTU_CACHE
    CUtensorMap const& kCachedMap = kMap;
    CUtensorMap const& vCachedMap = vMap;
#endif
    // Declared so, and not computed: the compiler has to see that these are addresses of shared memory.
    extern __shared__ __align__(1024) uint8_t memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (sharedAddress(memory) % 1024 != 0)
    {
        __trap(); // swizzled operands would be read from wrong places
    }

    FirstReads const reads = readFirst<kHasCache>(p);
    if constexpr (kTimeBias)
    {
        readThresholds<Timestamp>(p, shared.times);
    }
    // By a warp that has nothing to wait for where sequences are few.
    if (threadIdx.x == kThreads - 32)
    {
        prefetchDescriptor(&qMap);
        prefetchDescriptor(&kMap);
        prefetchDescriptor(&vMap);
        if constexpr (kHasCache)
        {
            prefetchDescriptor(&kCachedMap);
            prefetchDescriptor(&vCachedMap);
        }
        initBarriers(shared.barriers);
    }
    bool const isValid = orderSequences(p, reads, shared.schedule, kBlockM);
    clearRows(p, isValid ? reads.queryEnd : 0);
    if (!isValid || p.batch == 0)
    {
        return;
    }
    if constexpr (kShares)
    {
        clusterArrive(); // this block's barriers are ready
    }
    if constexpr (kTimeBias && !kPreparesTimes)
    {
        buildTimeTable(p, shared.times, threadIdx.x, blockDim.x);
        __syncthreads();
    }
    if constexpr (kShares)
    {
        clusterWait(); // and so are the others'
    }

    if (threadIdx.x < 128)
    {
        giveRegisters<kProducerRegisters>();
        if (threadIdx.x == 0)
        {
            Producer(qMap, kMap, vMap, kCachedMap, vCachedMap, shared).run();
        }
        else if (threadIdx.x == 32)
        {
            Scheduler{p, shared}.run();
        }
    }
    else
    {
        takeRegisters<kConsumerRegisters>();
        if constexpr (kPreparesTimes)
        {
            // Meanwhile the others find the first tile and copy its operands.
            buildTimeTable(p, shared.times, threadIdx.x - 128, 128 * kWarpgroups);
            namedBarrierSync(kTimesBarrier, 128 * kWarpgroups);
        }
        Consumer(p, shared).run();
    }
    if constexpr (kShares)
    {
        // The others may still be writing here. Lanes of a warp may come one by one.
        clusterArrive();
        clusterWait();
    }
}

} // namespace hstu
