/* cuBLAS: handles, and one algorithm for every product. The products themselves answer 0.
 *
 * Its headers want more than the wheels have, so that the types are declared here.
 */
#include "card.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define VERSION 130100

/* cublasLtMatmulHeuristicResult_t */
struct heuristic {
    uint64_t algorithm[8];
    size_t workspace_bytes;
    int status;
    float waves;
    int reserved[4];
};

static int new_handle(void **handle) {
    *handle = calloc(1, 1024);
    return 0;
}

EXPORT int cublasCreate_v2(void **handle) {
    CALL();
    return new_handle(handle);
}

EXPORT int cublasDestroy_v2(void *handle) {
    CALL();
    free(handle);
    return 0;
}

EXPORT int cublasGetMathMode(void *handle, int *mode) {
    *mode = 0; /* CUBLAS_DEFAULT_MATH */
    return 0;
}

EXPORT int cublasGetPointerMode_v2(void *handle, int *mode) {
    *mode = 0; /* CUBLAS_POINTER_MODE_HOST */
    return 0;
}

EXPORT int cublasLtMatmulDescCreate(void **descriptor, int compute_type, int scale_type) {
    return new_handle(descriptor);
}

EXPORT int cublasLtMatmulDescDestroy(void *descriptor) {
    free(descriptor);
    return 0;
}

EXPORT int cublasLtMatmulPreferenceCreate(void **preference) { return new_handle(preference); }

EXPORT int cublasLtMatmulPreferenceDestroy(void *preference) {
    free(preference);
    return 0;
}

EXPORT int cublasLtMatrixLayoutCreate(
    void **layout, int type, uint64_t rows, uint64_t columns, int64_t leading_dimension) {
    return new_handle(layout);
}

EXPORT int cublasLtMatrixLayoutDestroy(void *layout) {
    free(layout);
    return 0;
}

EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, void *descriptor, void *a, void *b, void *c,
    void *d, void *preference, int requested, struct heuristic *results, int *found) {
    CALL();
    memset(results, 0, sizeof *results);
    *found = 1;
    return 0;
}

EXPORT size_t cublasLtGetVersion(void) { return VERSION; }
