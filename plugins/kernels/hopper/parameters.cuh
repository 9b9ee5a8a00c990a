// What one launch is given beside its tensor maps. The host side (launch.py, the plugin) fills the same struct.
#ifndef HSTU_HOPPER_PARAMETERS_CUH
#define HSTU_HOPPER_PARAMETERS_CUH

#include <cstdint>

namespace hstu
{

//! Operator semantics and names: HstuAttention_PluginConfig.yaml. Pointers are null where the contract has no tensor.
struct AttentionParameters
{
    void* out;                        //!< [Lq, H, Dv], 16-byte aligned, Dv a multiple of 8
    int32_t const* qOffsets;          //!< [B + 1]
    int32_t const* kOffsets;          //!< [B + 1]
    int32_t const* numTargets;        //!< [B] or null
    int32_t const* contextualSeqLens; //!< [B] or null: the attribute
    float const* scalingSeqLens;      //!< [B] or null: the attribute
    int32_t* progress; //!< two counters, zero before a launch and zero again after it; no two launches at once
    float alpha;
    float scalingSeqLen;
    int32_t lq;
    int32_t lk;
    int32_t batch;
    int32_t heads;
    int32_t dv;
    int32_t targetGroupSize;
    int32_t contextualSeqLen;
    int32_t maxAttnLen;
    int32_t minFullAttnSeqLen;
    // With bias tables; kernels without them do not look.
    void const* rowTimestamps; //!< [Lq] int64 or int32
    void const* colTimestamps; //!< [Lc + Lk] the same
    void const* tsThresholds;  //!< [numBuckets] the same, ascending
    float const* tsTable;      //!< [tsHeads, numBuckets + 1]
    float const* posTable;     //!< [posHeads, 2 * posTableLen - 1]
    int32_t numBuckets;
    int32_t tsHeads; //!< 1: shared by all heads
    int32_t posTableLen;
    int32_t posHeads; //!< 1: shared by all heads
    // With keys in a cache; kernels without do not look.
    int32_t const* cacheOffsets; //!< [B + 1]
    int32_t lc;
};

} // namespace hstu

#endif // HSTU_HOPPER_PARAMETERS_CUH
