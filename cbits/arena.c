/* SPDX-License-Identifier: MIT */
/*
 * The arena: a memfd that is far larger than it will ever be full, mapped once. shmem allocates a page when it is
 * first written, so the size costs nothing; everything in it refers by offset, so another process that maps the same
 * memfd anywhere reads the same state.
 *
 * Blocks are handed out by a bump pointer and, once released, punched out of the file (the memory goes back to the
 * system, and the next user finds zeros) and kept for a request of the same size: what comes and goes here are the
 * tables of forks, whose sizes repeat. Not on the fault path; one lock guards it.
 */
#define _GNU_SOURCE 1
#include "arena.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define LZ_ARENA_BYTES (1ULL << 38)
#define LZ_ARENA_FREE_BLOCKS 4096

struct lz_block {
	uint64_t offset;
	uint64_t bytes;
};

/* What the next process that maps the arena must know; at its start. */
struct lz_arena_head {
	uint64_t used;
	uint32_t free_blocks;
	struct lz_block free_block[LZ_ARENA_FREE_BLOCKS];
};

struct lz_arena {
	uint8_t *base;
	struct lz_arena_head *head;
	int fd;
	pthread_mutex_t lock;
};

/* Whole pages for anything that is worth punching out again, cache lines for the rest. */
static uint64_t block_bytes(uint64_t bytes)
{
	uint64_t unit = bytes >= LZ_PAGE_SIZE ? LZ_PAGE_SIZE : 64;

	return (bytes + unit - 1) & ~(unit - 1);
}

struct lz_arena *lz_arena_new(int *error)
{
	struct lz_arena *arena = calloc(1, sizeof(*arena));

	if (!arena) {
		*error = -ENOMEM;
		return NULL;
	}
	pthread_mutex_init(&arena->lock, NULL);
	arena->fd = memfd_create("lazyd-arena", MFD_CLOEXEC);
	if (arena->fd < 0) {
		*error = -errno;
		free(arena);
		return NULL;
	}
	if (ftruncate(arena->fd, (off_t)LZ_ARENA_BYTES) < 0) {
		*error = -errno;
		goto fail;
	}
	arena->base = mmap(NULL, LZ_ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, arena->fd, 0);
	if (arena->base == MAP_FAILED) {
		*error = -errno;
		goto fail;
	}
	arena->head = (struct lz_arena_head *)(void *)arena->base;
	arena->head->used = sizeof(*arena->head); /* so offset 0 means none */
	return arena;
fail:
	close(arena->fd);
	free(arena);
	return NULL;
}

void lz_arena_free(struct lz_arena *arena)
{
	if (!arena)
		return;
	munmap(arena->base, LZ_ARENA_BYTES);
	close(arena->fd);
	pthread_mutex_destroy(&arena->lock);
	free(arena);
}

uint8_t *lz_arena_base(const struct lz_arena *arena)
{
	return arena->base;
}

uint64_t lz_arena_alloc(struct lz_arena *arena, uint64_t bytes)
{
	uint64_t offset = 0;

	assert(bytes > 0);
	if (bytes > LZ_ARENA_BYTES)
		return 0;
	bytes = block_bytes(bytes);
	pthread_mutex_lock(&arena->lock);
	for (uint32_t i = 0; i < arena->head->free_blocks; i++) {
		if (arena->head->free_block[i].bytes == bytes) {
			offset = arena->head->free_block[i].offset;
			/* In this order: a process that dies in between loses a block, and hands none out twice. */
			__atomic_store_n(&arena->head->free_blocks, arena->head->free_blocks - 1, __ATOMIC_SEQ_CST);
			arena->head->free_block[i] = arena->head->free_block[arena->head->free_blocks];
			break;
		}
	}
	if (!offset) {
		uint64_t unit = bytes >= LZ_PAGE_SIZE ? LZ_PAGE_SIZE : 64;
		uint64_t start = (arena->head->used + unit - 1) & ~(unit - 1);

		if (start + bytes <= LZ_ARENA_BYTES) {
			offset = start;
			arena->head->used = start + bytes;
		}
	}
	pthread_mutex_unlock(&arena->lock);
	return offset;
}

void lz_arena_release(struct lz_arena *arena, uint64_t offset, uint64_t bytes)
{
	if (!offset)
		return;
	bytes = block_bytes(bytes);
	if (bytes >= LZ_PAGE_SIZE) {
		if (fallocate(arena->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes) < 0)
			__builtin_memset(arena->base + offset, 0, bytes);
	} else {
		__builtin_memset(arena->base + offset, 0, bytes);
	}
	pthread_mutex_lock(&arena->lock);
	if (arena->head->free_blocks < LZ_ARENA_FREE_BLOCKS) {
		arena->head->free_block[arena->head->free_blocks] = (struct lz_block){ offset, bytes };
		__atomic_store_n(&arena->head->free_blocks, arena->head->free_blocks + 1, __ATOMIC_SEQ_CST);
	}
	pthread_mutex_unlock(&arena->lock);
}
