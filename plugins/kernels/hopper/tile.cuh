// Which keys a tile of query rows reads, and which of them its rows may attend to.
#ifndef HSTU_HOPPER_TILE_CUH
#define HSTU_HOPPER_TILE_CUH

#include <cstdint>

#include "parameters.cuh"

namespace hstu
{

constexpr int32_t kNoWindow = -(1 << 30); // below every position
constexpr int32_t kNoExemption = 1 << 30; // above every position

//! The cheapest test that decides a tile's masked keys.
enum class Mask : int32_t
{
    kDiagonal, //!< history rows without a window: the column is not behind the row
    kGroups,   //!< rows that see a part of the history and their own candidate group
    kWindow,   //!< everything
    kNothing,  //!< a block of a cluster that has no key tile of its own takes one and forbids all of it
};

//! One tile of query rows of one head, and its key tiles: masked ones first, then those that every row sees whole.
struct Tile
{
    int32_t head; //!< -1: there are no more tiles
    int32_t queryRow; //!< first row, in q and out
    int32_t rows;     //!< rows from there to the end of the sequence; more than a tile has in all but the last
    int32_t firstRow; //!< first row as a position among the keys; may be negative
    int32_t keyRow;   //!< first key of the sequence, in k and v
    int32_t cachedRow; //!< first key of the sequence, in the cached keys and values
    int32_t numCached; //!< keys in front of those of k and v
    int32_t numKeys;   //!< both
    int32_t history;
    int32_t context;
    float divisor;
    int32_t left;        //!< first key of the masked tiles at the window's edge
    int32_t leftTiles;   //!< how many of those
    int32_t right;       //!< first key of the masked tiles at the diagonal
    int32_t edgeTiles;   //!< both kinds
    int32_t ownLeft;     //!< first key of the tiles with the rows' own candidate groups
    int32_t maskedTiles; //!< all three kinds
    int32_t whole;       //!< first key of the tiles that every row sees whole
    int32_t tiles;       //!< all
    int32_t share;       //!< how many of them this block takes: all, unless it shares them with its cluster
    int32_t maskedShare; //!< how many of those are masked
    Mask mask;

    //! First key of key tile t.
    __device__ __forceinline__ int32_t keyStart(int32_t t, int32_t blockN) const
    {
        if (t >= maskedTiles)
        {
            return whole + (t - maskedTiles) * blockN;
        }
        if (t >= edgeTiles)
        {
            return ownLeft + (t - edgeTiles) * blockN;
        }
        // From the diagonal's last to its first: of the last, a tile's first rows see nothing.
        return t >= leftTiles ? right + (edgeTiles - 1 - t) * blockN : left + t * blockN;
    }
};

//! What one query row may attend to: columns below historyEnd, and its own group from ownBegin up to itself.
struct RowBounds
{
    int32_t row;
    int32_t historyEnd;
    int32_t ownBegin;
    int32_t windowBegin; //!< smallest position
};

__device__ __forceinline__ int32_t contextRank(int32_t context)
{
    return max(context - 1, 0);
}

//! First member of the candidate group that a row at or behind `history` belongs to.
__device__ __forceinline__ int32_t groupBegin(AttentionParameters const& p, int32_t row, int32_t history)
{
    return history + (row - history) / p.targetGroupSize * p.targetGroupSize;
}

//! Below it, a row's window applies; at and above it, rows see the whole history.
__device__ __forceinline__ int32_t firstExempt(AttentionParameters const& p, int32_t history, int32_t context)
{
    return p.minFullAttnSeqLen > 0 ? history - contextRank(context) - p.minFullAttnSeqLen : kNoExemption;
}

__device__ __forceinline__ RowBounds rowBounds(AttentionParameters const& p, Tile const& tile, int32_t row)
{
    RowBounds bounds;
    bool const isContext = row < tile.context;
    bounds.row = row;
    bounds.historyEnd = row < 0 ? 0 : isContext ? tile.history : min(row + 1, tile.history);
    bounds.ownBegin = max(isContext || row < tile.history ? row : groupBegin(p, row, tile.history), 0);
    int32_t const position = min(row, tile.history) - contextRank(tile.context);
    bool const isWindowed = p.maxAttnLen > 0 && !isContext && position < firstExempt(p, tile.history, tile.context);
    bounds.windowBegin = isWindowed ? position - p.maxAttnLen : kNoWindow;
    return bounds;
}

//! Start of the key tile that holds a column, where one tile begins at `origin`, which is less than a tile, and others every
//! blockN columns in front of it and behind. Without a cache the origin is 0.
template <bool kHasCache>
__device__ __forceinline__ int32_t tileFloor(int32_t column, int32_t origin, int32_t blockN)
{
    return kHasCache ? (column - origin + blockN) / blockN * blockN - blockN + origin : column / blockN * blockN;
}

//! Start of the first key tile that does not begin in front of a column.
template <bool kHasCache>
__device__ __forceinline__ int32_t tileCeil(int32_t column, int32_t origin, int32_t blockN)
{
    return tileFloor<kHasCache>(column + blockN - 1, origin, blockN);
}

//! Whether column `first + offset` is not in front of the sequence. Masks alone do not ask.
__device__ __forceinline__ bool isInSequence(int32_t first, int32_t offset)
{
    return offset >= -first;
}

//! Whether a row may attend to column `first + offset` of the sequence; with a constant offset, a few comparisons with constants.
template <Mask kMask>
__device__ __forceinline__ bool isAllowed(Tile const& tile, RowBounds const& bounds, int32_t first, int32_t offset)
{
    if constexpr (kMask == Mask::kNothing)
    {
        return false;
    }
    bool const isNotBehind = offset <= bounds.row - first;
    if constexpr (kMask == Mask::kDiagonal)
    {
        return isNotBehind;
    }
    bool const isSeen = offset < bounds.historyEnd - first || (offset >= bounds.ownBegin - first && isNotBehind);
    if constexpr (kMask == Mask::kGroups)
    {
        return isSeen;
    }
    int32_t const column = first + offset;
    int32_t const position = column < tile.context ? 0 : min(column, tile.history) - contextRank(tile.context);
    return isSeen && position >= bounds.windowBegin;
}

//! Fills in the ranges of key tiles. firstRow, rows, numCached, numKeys, history and context are given.
//!
//! With a cache, a tile's keys come from one of two tensors. No tile lies in both, because one begins where the cache ends;
//! the first then begins in front of the sequence, and is masked.
template <bool kPlainCausal, bool kHasCache>
__device__ __forceinline__ void findKeyTiles(AttentionParameters const& p, Tile& tile, int32_t blockM, int32_t blockN)
{
    int32_t const first = max(tile.firstRow, 0);
    int32_t const last = min(tile.firstRow + blockM, tile.numKeys) - 1;
    // Every row sees [fullBegin, fullEnd). No row sees a history column outside [leftBegin, maskedEnd) or a candidate
    // outside [ownFirst, ownEnd).
    int32_t fullBegin = 0;
    int32_t fullEnd = max(tile.firstRow + 1, 0);
    int32_t leftBegin = 0;
    int32_t maskedEnd = max(last + 1, 0);
    int32_t ownFirst = maskedEnd;
    int32_t ownEnd = 0;
    tile.mask = Mask::kDiagonal;
    if constexpr (!kPlainCausal)
    {
        bool const isHistory = first >= tile.context && last < tile.history;
        tile.mask = p.maxAttnLen > 0 ? Mask::kWindow : isHistory ? Mask::kDiagonal : Mask::kGroups;
        int32_t const rank = contextRank(tile.context);
        fullEnd = tile.firstRow < 0
                      ? 0
                      : min(max(tile.firstRow, last < tile.context ? tile.numKeys : tile.context) + 1, tile.history);
        maskedEnd = max(first < tile.context ? tile.history : min(last + 1, tile.history), 0);
        if (p.maxAttnLen > 0)
        {
            int32_t const lastBegin = min(last, tile.history) - rank - p.maxAttnLen;
            fullBegin = lastBegin > 0 ? lastBegin + rank : 0;
            int32_t const firstBegin = min(first, tile.history) - rank - p.maxAttnLen;
            bool const isCut = first >= tile.context && firstBegin > 0
                               && min(last, tile.history) - rank < firstExempt(p, tile.history, tile.context);
            leftBegin = isCut ? firstBegin + rank : 0;
        }
        ownFirst = groupBegin(p, max(first, tile.history), tile.history);
        ownEnd = last >= tile.history ? last + 1 : 0;
    }
    int32_t const origin = kHasCache ? tile.numCached % blockN : 0;
    tile.left = tileFloor<kHasCache>(leftBegin, origin, blockN);
    tile.whole = tileCeil<kHasCache>(fullBegin, origin, blockN);
    tile.right = max(tileFloor<kHasCache>(fullEnd, origin, blockN), tile.whole);
    int32_t const rightEnd = max(tileCeil<kHasCache>(maskedEnd, origin, blockN), tile.right);
    tile.leftTiles = (tile.whole - tile.left) / blockN;
    tile.edgeTiles = tile.leftTiles + (rightEnd - tile.right) / blockN;
    // Key tiles may begin anywhere, so a tile's groups lie in as few as there can be. Not so in the cache, whose end a tile
    // must not pass.
    tile.ownLeft = max(kHasCache && ownFirst < tile.numCached ? tileFloor<kHasCache>(ownFirst, origin, blockN) : ownFirst, rightEnd);
    tile.maskedTiles = tile.edgeTiles + max(ownEnd - tile.ownLeft + blockN - 1, 0) / blockN;
    tile.tiles = tile.maskedTiles + (tile.right - tile.whole) / blockN;
}

} // namespace hstu

#endif // HSTU_HOPPER_TILE_CUH
