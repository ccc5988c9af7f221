/* SPDX-License-Identifier: MIT */
/*
 * lz.h: the one public header of lazyd's C core.
 *
 * The regions between `cffi:` marks are also what the Python side sees: scripts/build_backend.py feeds them to cffi
 * (common goes to both compiled modules, the others to the module they name), so that no struct or constant is typed
 * twice. Inside them only what cffi's parser understands: no #if, no static inline.
 *
 * Functions return >= 0 or -errno; errno is read in the one place that makes the system call; out-parameters come
 * last. Lengths are bytes unless the name ends in _pages. Ranges are half-open.
 */
#ifndef LZ_H
#define LZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* What depends on the architecture. x86-64: 4 KiB pages, user space ends one guard page below 2^47. */
#if defined(__x86_64__)
#define LZ_PAGE_SHIFT 12
#define LZ_USER_END 0x7ffffffff000ULL
#else
#error "lazyd: name this architecture's page size and end of user space here"
#endif
#define LZ_PAGE_SIZE (1ULL << LZ_PAGE_SHIFT)

/* cffi: common */
/* What the bytes of an extent are. */
enum lz_kind {
	LZ_KIND_DUMPED = 1, /* in a local pages image, at offset */
	LZ_KIND_ZERO = 2,   /* zeros, said so by an entry */
	LZ_KIND_REMOTE = 3, /* only a page server has them */
	LZ_KIND_BROKEN = 4, /* a parent hole that no ancestor covers: never served, only reported */
};

/*
 * A run of pages with one source: one row of a task's flat table of extents. Rows are sorted by start and disjoint.
 * 24 bytes, so that a million of them are 24 MB.
 */
struct lz_extent {
	uint64_t start;    /* image address, page-aligned */
	uint64_t offset;   /* bytes into the source's pages image; 0 unless LZ_KIND_DUMPED */
	uint32_t pages;    /* > 0 */
	uint16_t source;   /* index into the list of pages images; 0 unless LZ_KIND_DUMPED */
	uint8_t kind;      /* enum lz_kind */
	uint8_t lazy;      /* 1: may be restored lazily; 0: the restorer fills it before the task runs */
};
/* cffi: end */

/* cffi: pagemap */
/* cffi: end */

/* cffi: engine */
/* cffi: end */

#endif
