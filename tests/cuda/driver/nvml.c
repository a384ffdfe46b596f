/* NVML, as torch and nvidia-ml-py use it. The wheels have no header of it; handles are ordinals. */
#include "card.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NOT_FOUND 6
#define NOT_SUPPORTED 3

EXPORT int nvmlInit_v2(void) { CALL(); return 0; }
EXPORT int nvmlInitWithFlags(unsigned flags) { CALL(); return 0; }
EXPORT int nvmlShutdown(void) { return 0; }
EXPORT const char *nvmlErrorString(int error) { return "an error of NVML"; }

EXPORT int nvmlDeviceGetCount_v2(unsigned *count) {
    CALL();
    *count = card_device_count();
    return 0;
}

EXPORT int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    CALL();
    *device = (void *)(size_t)(index + 1);
    return 0;
}

EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) {
    CALL();
    *device = (void *)strtoul(id + strlen("0000:"), NULL, 16);
    return 0;
}

EXPORT int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    CALL();
    char expected[48];
    for (int ordinal = 1; ordinal <= card_device_count(); ordinal++) {
        int b = ordinal; /* each byte of the UUID, as in cudaGetDeviceProperties */
        snprintf(expected, sizeof expected,
            "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", b, b, b, b,
            b, b, b, b, b, b, b, b, b, b, b, b);
        if (!strcmp(uuid, expected)) {
            *device = (void *)(size_t)ordinal;
            return 0;
        }
    }
    return NOT_FOUND;
}

EXPORT int nvmlDeviceGetUUID(void *device, char *uuid, unsigned bytes) {
    CALL();
    int b = (int)(size_t)device;
    snprintf(uuid, bytes, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x",
        b, b, b, b, b, b, b, b, b, b, b, b, b, b, b, b);
    return 0;
}

EXPORT int nvmlDeviceGetName(void *device, char *name, unsigned bytes) {
    CALL();
    snprintf(name, bytes, "%s", card_name());
    return 0;
}

EXPORT int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *total_free_used) {
    CALL();
    total_free_used[0] = card_total_bytes();
    total_free_used[1] = card_free_bytes((int)(size_t)device - 1);
    total_free_used[2] = total_free_used[0] - total_free_used[1];
    return 0;
}

EXPORT int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    CALL();
    static unsigned long long energy;
    *millijoules = energy += 1000;
    return 0;
}

EXPORT int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *milliwatts) {
    CALL();
    *milliwatts = 200000;
    return 0;
}

EXPORT int nvmlSystemGetDriverVersion(char *version, unsigned bytes) {
    CALL();
    snprintf(version, bytes, "580.00");
    return 0;
}

EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    CALL();
    *version = 13000;
    return 0;
}

/* What torch asks when it is out of memory, and before it exports memory to other processes. */

EXPORT int nvmlDeviceGetComputeRunningProcesses(void *device, unsigned *count, void *processes) {
    CALL();
    *count = 0;
    return 0;
}

EXPORT int nvmlDeviceGetGpuFabricInfoV(void *device, void *info) { CALL(); return 0; }

EXPORT int nvmlDeviceGetNvLinkRemoteDeviceType(void *device, unsigned link, void *type) {
    return NOT_SUPPORTED;
}

EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2(void *device, unsigned link, void *info) {
    return NOT_SUPPORTED;
}
