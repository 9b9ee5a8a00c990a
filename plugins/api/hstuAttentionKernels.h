#ifndef HSTU_ATTENTION_KERNELS_H
#define HSTU_ATTENTION_KERNELS_H

//! The kernels of attentions and norms without TensorRT, for a host that runs them between engines of its own. Plain C: a
//! host loads the library with dlopen and needs no C++ runtime of the same make.
//!
//! Tensors and attributes are named as in HstuAttention_PluginConfig.yaml and HstuNorm_PluginConfig.yaml and come in any
//! order; nothing is known by its position, so a contract that grows an optional input leaves this interface as it is. A
//! call is thread-safe unless two use the same HstuAttention or HstuNorm. The caller's CUDA context is current in every
//! call but the first two.
//!
//! A function that returns int32_t returns 0, or another number and a message of at most errorCapacity bytes, NUL
//! included, that says what failed, the values seen and those allowed. No exception leaves the library.

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

//! Version of this interface. A host refuses a library of another version.
#define HSTU_ATTENTION_KERNELS_API_VERSION 2

//! Most axes of a tensor.
#define HSTU_MAX_RANK 8

//! Element types; the values of hstu::ElementType.
enum HstuElementType
{
    kHSTU_FLOAT32 = 0,
    kHSTU_FLOAT16 = 1,
    kHSTU_BFLOAT16 = 2,
    kHSTU_INT32 = 3,
    kHSTU_INT64 = 4
};

//! One attribute of the contract. Integers and floats alike are given as a double, which holds every legal integer.
typedef struct HstuAttribute
{
    char const* name;
    double value;
} HstuAttribute;

//! One input, or the output, whose name is "out". Row-major and contiguous, but for the rows of an attention's q,
//! k and v and of a norm's x and gate.
typedef struct HstuTensor
{
    char const* name;
    int32_t type; //!< an HstuElementType
    int32_t rank;
    int64_t dims[HSTU_MAX_RANK]; //!< in hstuAttentionCreate -1 where the extent may vary
    //! Device address. Not read by hstuAttentionCreate, hstuAttentionWorkspace and hstuNormCreate; may be null where the
    //! tensor is empty. What an input's address points to is not written.
    void* data;
    //! Elements from a row, [H, D], of q, k or v, or [D] of x or gate, to the next where they are columns of a wider
    //! tensor; 0: contiguous, as everything else is. May differ from launch to launch. Kernels are fastest where every row
    //! is 16-byte aligned.
    int64_t rowStride;
} HstuTensor;

//! One attention: attributes, element types, and loaded kernels.
typedef struct HstuAttention HstuAttention;

//! \return HSTU_ATTENTION_KERNELS_API_VERSION of the library. Needs no GPU.
int32_t hstuAttentionKernelsApiVersion(void);

//! \return identifier of the kernels in the library: changes whenever any of their bytes does. Owned by the library.
//! Needs no GPU.
char const* hstuAttentionKernelsBuildId(void);

//! Makes an attention and loads its kernels into the current CUDA context, so that a later enqueue loads nothing.
//!
//! \param nodeName name of the node, for messages.
//! \param attributes every attribute of the contract that has no default.
//! \param inputs the inputs that the attributes make present.
//! \param output the output.
//! \param attention receives the attention, which hstuAttentionDestroy frees; null after an error.
int32_t hstuAttentionCreate(char const* nodeName, HstuAttribute const* attributes, int32_t nbAttributes,
    HstuTensor const* inputs, int32_t nbInputs, HstuTensor const* output, HstuAttention** attention, char* error,
    size_t errorCapacity);

//! Device memory that an enqueue of these shapes needs beside its tensors.
//!
//! \param inputs every extent known.
//! \param bytes receives the number, which may be 0.
int32_t hstuAttentionWorkspace(HstuAttention const* attention, HstuTensor const* inputs, int32_t nbInputs,
    size_t* bytes, char* error, size_t errorCapacity);

//! Queues the kernels on a stream and does nothing else: no allocation, no loading, no synchronisation, no work on another
//! stream. So it may be recorded into a CUDA graph, and what it queues depends on the extents and addresses alone.
//!
//! Launches of one attention must not overlap on the device, those that graphs replay included: they share the counters by
//! which their blocks take work. One stream sees to that; a host that wants two at once makes two attentions.
//!
//! \param inputs every extent known, every address set; 256-byte aligned, as those of an engine are, but that columns of a
//!     wider tensor begin where they lie in it.
//! \param output likewise. It overlaps no input and no workspace.
//! \param workspace of at least the bytes that hstuAttentionWorkspace names, 256-byte aligned; may be null if that is 0.
//! \param stream a CUstream.
int32_t hstuAttentionEnqueue(HstuAttention* attention, HstuTensor const* inputs, int32_t nbInputs,
    HstuTensor const* output, void* workspace, size_t workspaceBytes, void* stream, char* error, size_t errorCapacity);

//! Frees an attention; null does nothing. Nothing of it is running.
void hstuAttentionDestroy(HstuAttention* attention);

//! One norm: attributes, element types, and loaded kernels. It needs no workspace, and its launches may overlap.
typedef struct HstuNorm HstuNorm;

//! Makes a norm and loads its kernels; see hstuAttentionCreate.
//!
//! \param norm receives the norm, which hstuNormDestroy frees; null after an error.
int32_t hstuNormCreate(char const* nodeName, HstuAttribute const* attributes, int32_t nbAttributes,
    HstuTensor const* inputs, int32_t nbInputs, HstuTensor const* output, HstuNorm** norm, char* error,
    size_t errorCapacity);

//! Queues the kernel on a stream and does nothing else, as hstuAttentionEnqueue; the same holds of inputs and output.
int32_t hstuNormEnqueue(HstuNorm* norm, HstuTensor const* inputs, int32_t nbInputs, HstuTensor const* output,
    void* stream, char* error, size_t errorCapacity);

//! Frees a norm; null does nothing. Nothing of it is running.
void hstuNormDestroy(HstuNorm* norm);

#ifdef __cplusplus
}
#endif

#endif // HSTU_ATTENTION_KERNELS_H
