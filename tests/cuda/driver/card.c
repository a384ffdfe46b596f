/* The books of a card that is not there: its memory, the calls of each function, errors on demand.
 *
 * The library stands in for CUDA's driver and runtime, cuBLAS, NCCL and NVML. Kernels compute
 * nothing: memory keeps what was copied into it, zeros at first. The environment chooses the card
 * (cards.py); the exported card_* functions at the end are for tests (conftest.py).
 */
#define _GNU_SOURCE
#include "card.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MAX_DEVICES 8
#define MAX_FUNCTIONS 1024

int card_in_group = 0;
__thread int card_device = 0;
__thread int card_last_error = 0;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* --- the card ------------------------------------------------------------------------------- */

long card_setting(const char *name, long otherwise) {
    const char *value = getenv(name);
    return value ? atol(value) : otherwise;
}

const char *card_name(void) {
    const char *name = getenv("CARD_NAME");
    return name ? name : "NVIDIA GeForce RTX 4070";
}

int card_capability(int minor) {
    const char *capability = getenv("CARD_CAPABILITY");
    if (!capability) capability = "8.9";
    return atoi(minor ? strchr(capability, '.') + 1 : capability);
}

int card_device_count(void) { return (int)card_setting("CARD_DEVICES", 1); }

size_t card_total_bytes(void) { return (size_t)card_setting("CARD_MEMORY_BYTES", 12282L << 20); }

int card_attribute(int attribute) {
    switch (attribute) { /* the driver's numbers are the runtime's */
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        return (int)card_setting("CARD_SHARED_BYTES_PER_BLOCK", 99 << 10);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        return (int)card_setting("CARD_SHARED_BYTES_PER_BLOCK", 99 << 10) + 1024;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrTotalConstantMemory:
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 64 << 10;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrClockRate: return 2475000;
    case cudaDevAttrMemoryClockRate: return 10501000;
    case cudaDevAttrGlobalMemoryBusWidth: return 192;
    case cudaDevAttrL2CacheSize: return 36 << 20;
    case cudaDevAttrMultiProcessorCount: return (int)card_setting("CARD_MULTIPROCESSORS", 46);
    case cudaDevAttrMaxThreadsPerMultiProcessor:
        return (int)card_setting("CARD_THREADS_PER_MULTIPROCESSOR", 1536);
    case cudaDevAttrComputeCapabilityMajor: return card_capability(0);
    case cudaDevAttrComputeCapabilityMinor: return card_capability(1);
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrConcurrentManagedAccess:
    case 102: /* CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, for expandable segments */
    case cudaDevAttrMemoryPoolsSupported: return 1;
    default: return 0;
    }
}

/* --- calls and errors on demand ------------------------------------------------------------- */

struct call {
    const char *name;
    atomic_long count;
    atomic_long calls_to_failure; /* 0: none is due */
    int error;
};

static struct call calls[MAX_FUNCTIONS];
static int functions = 0;

static struct call *find_call(const char *name) {
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < functions && strcmp(calls[i].name, name)) i++;
    if (i == functions) {
        if (functions == MAX_FUNCTIONS) abort();
        calls[functions++].name = strdup(name);
    }
    pthread_mutex_unlock(&lock);
    return &calls[i];
}

int card_called(struct call **site, const char *name) {
    if (!*site) *site = find_call(name);
    struct call *call = *site;
    atomic_fetch_add(&call->count, 1);
    if (atomic_load(&call->calls_to_failure) == 0) return 0;
    if (atomic_fetch_sub(&call->calls_to_failure, 1) > 1) return 0;
    if (!strncmp(name + strspn(name, "_"), "cuda", strlen("cuda"))) card_last_error = call->error;
    return call->error;
}

/* --- memory --------------------------------------------------------------------------------- */

struct allocation {
    char *start;
    size_t bytes;
    enum memory_kind kind;
    int device;
};

static struct allocation *allocations;
static int allocation_count = 0, allocation_capacity = 0;
static size_t used[MAX_DEVICES], peak[MAX_DEVICES], limit_bytes = 0;
static atomic_long copies_to_host, copies_to_device;

static size_t usable_bytes(void) {
    size_t total = card_total_bytes() - (size_t)card_setting("CARD_CONTEXT_BYTES", 0);
    return limit_bytes && limit_bytes < total ? limit_bytes : total;
}

size_t card_free_bytes(int device) {
    size_t usable = usable_bytes();
    return used[device] < usable ? usable - used[device] : 0;
}

int card_take(size_t bytes, int device) {
    pthread_mutex_lock(&lock);
    int fits = used[device] + bytes <= usable_bytes();
    if (fits) used[device] += bytes;
    if (used[device] > peak[device]) peak[device] = used[device];
    pthread_mutex_unlock(&lock);
    return fits;
}

void card_give_back(size_t bytes, int device) {
    pthread_mutex_lock(&lock);
    used[device] -= bytes;
    pthread_mutex_unlock(&lock);
}

void *card_map(size_t bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    return start == MAP_FAILED ? NULL : start;
}

void card_remember(void *start, size_t bytes, enum memory_kind kind, int device) {
    pthread_mutex_lock(&lock);
    if (allocation_count == allocation_capacity) {
        allocation_capacity = allocation_capacity ? 2 * allocation_capacity : 256;
        allocations = realloc(allocations, allocation_capacity * sizeof *allocations);
    }
    allocations[allocation_count++] = (struct allocation){start, bytes, kind, device};
    pthread_mutex_unlock(&lock);
}

/* Call it with the lock held. Returns NULL for memory that no one allocated here. */
static struct allocation *find_allocation(const char *address) {
    for (int i = allocation_count - 1; i >= 0; i--) {
        struct allocation *found = &allocations[i];
        if (address >= found->start && address < found->start + found->bytes) return found;
    }
    return NULL;
}

size_t card_forget(void *start, int *device) {
    size_t bytes = 0;
    pthread_mutex_lock(&lock);
    struct allocation *found = find_allocation(start);
    if (found) {
        bytes = found->bytes;
        if (device) *device = found->device;
        *found = allocations[--allocation_count];
    }
    pthread_mutex_unlock(&lock);
    return bytes;
}

enum memory_kind card_kind_of(const void *address, int *device) {
    pthread_mutex_lock(&lock);
    struct allocation *found = find_allocation(address);
    enum memory_kind kind = found ? found->kind : UNKNOWN;
    if (found && device) *device = found->device;
    pthread_mutex_unlock(&lock);
    return kind;
}

void card_count_copy(int to_host) {
    atomic_fetch_add(to_host ? &copies_to_host : &copies_to_device, 1);
}

void card_copy(void *to, const void *from, size_t bytes) {
    if (to != from && bytes <= COPIED_BYTES) memmove(to, from, bytes);
}

/* --- for tests ------------------------------------------------------------------------------ */

EXPORT long card_calls(const char *name) { return find_call(name)->count; }

EXPORT long card_copies_to_host(void) { return copies_to_host; }

EXPORT long card_copies_to_device(void) { return copies_to_device; }

EXPORT size_t card_used_bytes(int device) { return used[device]; }

EXPORT size_t card_peak_bytes(int device) { return peak[device]; }

/* Refuse memory beyond `bytes` in use on each device; 0: all of the card's. */
EXPORT void card_limit_memory(size_t bytes) { limit_bytes = bytes; }

/* Let the function `name` return `error` once, after that many successful calls. */
EXPORT void card_fail_once(const char *name, int error, long successful_calls) {
    struct call *call = find_call(name);
    call->error = error;
    call->calls_to_failure = successful_calls + 1;
}

/* Take back every failure that is still due; returns how many there were. */
EXPORT int card_clear_failures(void) {
    int due = 0;
    for (int i = 0; i < functions; i++)
        if (atomic_exchange(&calls[i].calls_to_failure, 0) > 0) due++;
    card_last_error = 0;
    return due;
}
