/* SPDX-License-Identifier: MIT */
#ifndef LZ_ARENA_H
#define LZ_ARENA_H

#include "lz.h"

/* Allocate zeroed bytes, 64-byte aligned: their offset from the arena's base, or 0 (no memory). */
uint64_t lz_arena_alloc(struct lz_arena *arena, uint64_t bytes);
/* Give memory back; offset and bytes as they were allocated. Offset 0 is ignored. */
void lz_arena_release(struct lz_arena *arena, uint64_t offset, uint64_t bytes);
/* The arena's first byte in this process; constant for its life. */
uint8_t *lz_arena_base(const struct lz_arena *arena);

#define LZ_AT(arena, type, offset) ((type *)(void *)(lz_arena_base(arena) + (offset)))

/* The flat table of a checkpointed task, shared by the forks of the restored one. */
struct lz_flat_table {
	uint64_t references;
	uint64_t count;
	struct lz_extent extents[];
};

#endif
