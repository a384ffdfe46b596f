/* A CUDA driver without a card: what its parts share. See card.c. */
#pragma once
#include <stddef.h>

#define EXPORT __attribute__((visibility("default")))

/* Copies and fills up to this size are real; larger ones would take the host's memory. */
#define COPIED_BYTES (16u << 20)

enum memory_kind { UNKNOWN, DEVICE, HOST };

struct call;

/* Count a call. Returns the error that a test has asked for, mostly 0. */
int card_called(struct call **site, const char *name);

/* The first line of a function whose callers want to know about errors. */
#define CALL()                                             \
    do {                                                   \
        static struct call *site;                          \
        int error = card_called(&site, __func__);          \
        if (error) return error;                           \
    } while (0)

long card_setting(const char *name, long otherwise);
const char *card_name(void);
int card_capability(int minor);
int card_attribute(int attribute);
size_t card_total_bytes(void);
size_t card_free_bytes(int device);
int card_device_count(void);

extern __thread int card_device;     /* the current one of this thread */
extern int card_in_group;            /* has joined other processes over NCCL */
extern __thread int card_last_error; /* of the runtime, until someone asks */

/* Charge memory to a device; 0 if it does not fit. */
int card_take(size_t bytes, int device);
void card_give_back(size_t bytes, int device);

/* Map memory that takes none of the host's until it is written to. */
void *card_map(size_t bytes);
void card_remember(void *start, size_t bytes, enum memory_kind kind, int device);
/* Forget a remembered start; returns its bytes, and its device if `device` is given. */
size_t card_forget(void *start, int *device);
enum memory_kind card_kind_of(const void *address, int *device);
void card_count_copy(int to_host);
void card_copy(void *to, const void *from, size_t bytes);
