/* CUDA's driver, as torch's expandable segments and Triton's kernels use it. */
#include "card.h"

#include <cuda.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static char context; /* its address is the handle */

EXPORT CUresult cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION;
    return 0;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return 0;
}

EXPORT CUresult cuDeviceGetCount(int *count) {
    *count = card_device_count();
    return 0;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = card_attribute(attribute);
    return 0;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *current) {
    *current = (CUcontext)&context;
    return 0;
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    *device = card_device;
    return 0;
}

EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 0;
    return 0;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) {
    *retained = (CUcontext)&context;
    return 0;
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return 0;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "an error that the test asked for";
    return 0;
}

EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr p) {
    *(CUdeviceptr *)value = p;
    return card_kind_of((void *)p, NULL) == UNKNOWN ? CUDA_ERROR_INVALID_VALUE : 0;
}

/* --- kernels -------------------------------------------------------------------------------- */

EXPORT CUresult cuModuleLoad(CUmodule *module, const char *path) {
    CALL();
    *module = malloc(64);
    return 0;
}

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    CALL();
    *module = malloc(64);
    return 0;
}

EXPORT CUresult cuModuleLoadDataEx(
    CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values) {
    CALL();
    *module = malloc(64);
    return 0;
}

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    CALL();
    *function = (CUfunction)strdup(name);
    return 0;
}

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
    *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS                ? 32
             : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                                    : 0;
    return 0;
}

EXPORT CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction f, const CUlaunchConfig *c) {
    *clusters = 8;
    return 0;
}

/* --- memory that is reserved and mapped in two steps ------------------------------------------ */

struct physical {
    size_t bytes;
    int device;
};

EXPORT CUresult cuMemAddressReserve(CUdeviceptr *start, size_t bytes, size_t alignment,
    CUdeviceptr wanted, unsigned long long flags) {
    CALL();
    void *reserved = card_map(bytes);
    if (!reserved) return CUDA_ERROR_OUT_OF_MEMORY;
    *start = (CUdeviceptr)reserved;
    card_remember(reserved, bytes, DEVICE, card_device);
    return 0;
}

EXPORT CUresult cuMemAddressFree(CUdeviceptr start, size_t bytes) {
    CALL();
    card_forget((void *)start, NULL);
    munmap((void *)start, bytes);
    return 0;
}

EXPORT CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t bytes,
    const CUmemAllocationProp *properties, unsigned long long flags) {
    CALL();
    int device = properties->location.id;
    if (!card_take(bytes, device)) return CUDA_ERROR_OUT_OF_MEMORY;
    struct physical *memory = malloc(sizeof *memory);
    *memory = (struct physical){bytes, device};
    *handle = (CUmemGenericAllocationHandle)memory;
    return 0;
}

EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    CALL();
    struct physical *memory = (struct physical *)handle;
    card_give_back(memory->bytes, memory->device);
    free(memory);
    return 0;
}

EXPORT CUresult cuMemUnmap(CUdeviceptr start, size_t bytes) {
    CALL();
    madvise((void *)start, bytes, MADV_DONTNEED);
    return 0;
}

EXPORT CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *properties,
    CUmemAllocationGranularity_flags option) {
    *bytes = 2 << 20;
    return 0;
}
