/* CUDA's runtime. What is missing here answers 0 (build.py). */
#define _GNU_SOURCE
#include "card.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define RESULT_BYTES 8

/* --- devices -------------------------------------------------------------------------------- */

EXPORT cudaError_t cudaGetDeviceCount(int *count) {
    CALL();
    *count = card_device_count();
    return 0;
}

EXPORT cudaError_t cudaGetDevice(int *device) {
    *device = card_device;
    return 0;
}

EXPORT cudaError_t cudaSetDevice(int device) {
    CALL();
    if (device < 0 || device >= card_device_count()) return cudaErrorInvalidDevice;
    card_device = device;
    return 0;
}

EXPORT cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return 0;
}

EXPORT cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return 0;
}

EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    CALL();
    memset(properties, 0, sizeof *properties);
    strncpy(properties->name, card_name(), sizeof properties->name - 1);
    memset(properties->uuid.bytes, device + 1, sizeof properties->uuid.bytes);
    properties->totalGlobalMem = card_total_bytes();
    properties->major = card_capability(0);
    properties->minor = card_capability(1);
    properties->multiProcessorCount = card_attribute(cudaDevAttrMultiProcessorCount);
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor =
        card_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    properties->maxBlocksPerMultiProcessor = 24;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 2147483647;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 64 << 10;
    properties->totalConstMem = 64 << 10;
    properties->sharedMemPerBlock = card_attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    properties->sharedMemPerBlockOptin = card_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    properties->sharedMemPerMultiprocessor =
        card_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    properties->l2CacheSize = card_attribute(cudaDevAttrL2CacheSize);
    properties->memoryBusWidth = card_attribute(cudaDevAttrGlobalMemoryBusWidth);
    properties->textureAlignment = 512;
    properties->concurrentKernels = properties->unifiedAddressing = properties->managedMemory = 1;
    return 0;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = card_attribute(attribute);
    return 0;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char *id, int bytes, int device) {
    snprintf(id, bytes, "0000:%02x:00.0", device + 1);
    return 0;
}

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return 0;
}

EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return 0;
}

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function,
    unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
    *function = dlsym(RTLD_DEFAULT, symbol);
    if (result)
        *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return 0;
}

/* --- errors --------------------------------------------------------------------------------- */

EXPORT cudaError_t cudaGetLastError(void) {
    int error = card_last_error;
    card_last_error = 0;
    return error;
}

EXPORT cudaError_t cudaPeekAtLastError(void) { return card_last_error; }

EXPORT const char *cudaGetErrorString(cudaError_t error) {
    static __thread char text[32];
    if (error == cudaErrorMemoryAllocation) return "out of memory";
    snprintf(text, sizeof text, "error %d", error);
    return text;
}

EXPORT const char *cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}

/* --- memory --------------------------------------------------------------------------------- */

EXPORT cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    CALL();
    *free_bytes = card_free_bytes(card_device);
    *total = card_total_bytes();
    return 0;
}

EXPORT cudaError_t cudaMalloc(void **start, size_t bytes) {
    CALL();
    if (!card_take(bytes, card_device)) return card_last_error = cudaErrorMemoryAllocation;
    *start = card_map(bytes);
    card_remember(*start, bytes, DEVICE, card_device);
    return 0;
}

EXPORT cudaError_t cudaFree(void *start) {
    CALL();
    int device = 0;
    size_t bytes = start ? card_forget(start, &device) : 0;
    if (bytes) {
        munmap(start, bytes);
        card_give_back(bytes, device);
    }
    return 0;
}

EXPORT cudaError_t cudaHostAlloc(void **start, size_t bytes, unsigned flags) {
    CALL();
    *start = card_map(bytes);
    card_remember(*start, bytes, HOST, card_device);
    return 0;
}

EXPORT cudaError_t cudaFreeHost(void *start) {
    CALL();
    size_t bytes = card_forget(start, NULL);
    if (bytes) munmap(start, bytes);
    return 0;
}

EXPORT cudaError_t cudaHostRegister(void *start, size_t bytes, unsigned flags) {
    CALL();
    card_remember(start, bytes, HOST, card_device);
    return 0;
}

EXPORT cudaError_t cudaHostUnregister(void *start) {
    CALL();
    card_forget(start, NULL);
    return 0;
}

EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *answer, const void *p) {
    memset(answer, 0, sizeof *answer);
    enum memory_kind kind = card_kind_of(p, &answer->device);
    if (kind == UNKNOWN) return 0; /* cudaMemoryTypeUnregistered */
    answer->type = kind == DEVICE ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    answer->devicePointer = (void *)p;
    if (kind == HOST) answer->hostPointer = (void *)p;
    return 0;
}

static int has_only_finite_floats(const void *start, size_t bytes) {
    uint32_t words[RESULT_BYTES / 4] = {0};
    memcpy(words, start, bytes);
    for (int i = 0; i < RESULT_BYTES / 4; i++)
        if ((words[i] >> 23 & 0xff) == 0xff) return 0;
    return 1;
}

/* What the host reads in a few bytes is the result of a kernel, which computed nothing: numbers are
 * then 0, and a bool is true, e.g. of `isfinite`. The memory itself may hold anything. In a group it
 * may also hold what the others are asked for, e.g. whether they have as many parameters. */
static void copy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    if (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyHostToDevice)
        card_count_copy(kind == cudaMemcpyDeviceToHost);
    int is_result = kind == cudaMemcpyDeviceToHost && bytes <= RESULT_BYTES;
    if (is_result && !(card_in_group && bytes > 1 && has_only_finite_floats(from, bytes)))
        memset(to, bytes == 1, bytes);
    else
        card_copy(to, from, bytes);
}

EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    CALL();
    copy(to, from, bytes, kind);
    return 0;
}

EXPORT cudaError_t cudaMemcpyAsync(
    void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    CALL();
    copy(to, from, bytes, kind);
    return 0;
}

EXPORT cudaError_t cudaMemset(void *start, int value, size_t bytes) {
    CALL();
    if (bytes <= COPIED_BYTES) memset(start, value, bytes);
    return 0;
}

EXPORT cudaError_t cudaMemsetAsync(void *start, int value, size_t bytes, cudaStream_t stream) {
    CALL();
    if (bytes <= COPIED_BYTES) memset(start, value, bytes);
    return 0;
}

EXPORT cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static void *memory;
    if (!memory) memory = card_map(1 << 20);
    *address = memory;
    return 0;
}

/* --- streams and events: handles that nobody looks into --------------------------------------- */

static int new_handle(void *handle) {
    *(void **)handle = malloc(64);
    return 0;
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    CALL();
    return new_handle(stream);
}

EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    CALL();
    return new_handle(stream);
}

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    CALL();
    return new_handle(stream);
}

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return 0;
}

EXPORT cudaError_t cudaStreamIsCapturing(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return 0;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream,
    enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges, size_t *count) {
    *status = cudaStreamCaptureStatusNone;
    if (id) *id = 0;
    if (count) *count = 0;
    return 0;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) {
    CALL();
    return new_handle(event);
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    CALL();
    return new_handle(event);
}

EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    CALL();
    *milliseconds = 0.05f;
    return 0;
}

/* --- kernels -------------------------------------------------------------------------------- */

/* CUB chooses its tuning by the architecture that a kernel was compiled for, and accepts only those
 * that are in the library: of torch's, the newest that the card runs. */
static int compiled_architecture(void) {
    static const int compiled[] = {120, 100, 90, 86, 80, 75};
    int capability = 10 * card_capability(0) + card_capability(1), i = 0;
    while (i < 5 && compiled[i] > capability) i++;
    return compiled[i];
}

EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *f) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = compiled_architecture();
    attributes->maxDynamicSharedSizeBytes = 48 << 10;
    return 0;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *function, int threads, size_t shared_bytes, unsigned flags) {
    *blocks = 2;
    return 0;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int *blocks, const void *function, int threads, size_t shared_bytes) {
    *blocks = 2;
    return 0;
}

/* What the code behind `kernel<<<...>>>` calls. */

static __thread struct {
    dim3 grid, block;
    size_t shared_bytes;
    void *stream;
} configuration;

EXPORT unsigned __cudaPushCallConfiguration(
    dim3 grid, dim3 block, size_t shared_bytes, struct CUstream_st *stream) {
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared_bytes = shared_bytes;
    configuration.stream = stream;
    return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(
    dim3 *grid, dim3 *block, size_t *shared_bytes, void *stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared_bytes = configuration.shared_bytes;
    *(void **)stream = configuration.stream;
    return 0;
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return 0;
}

static void *modules[4];

EXPORT void **__cudaRegisterFatBinary(void *binary) { return modules; }

EXPORT char __cudaInitModule(void **module) { return 1; }
