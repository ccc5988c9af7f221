/* SPDX-License-Identifier: MIT */
/*
 * The dumping core under the sanitizers: pipes against an array of pages, written and read back; pages of our own
 * copied by several threads, by every way; streams taken apart; our own page tables read in both ways.
 */
#undef NDEBUG
#define _GNU_SOURCE 1
#include "lz.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define BASE 0x7f0000000000ULL
#define MODEL_PAGES 200
#define PAGES 3000

static uint64_t random_state = 0x9e3779b97f4a7c15ULL;

static uint32_t any(uint32_t below)
{
	random_state = random_state * 6364136223846793005ULL + 1442695040888963407ULL;
	return (uint32_t)(random_state >> 33) % below;
}

/* 0: nothing; else a kind, plus 4 if lazy. */
static void fill_model(uint8_t *model)
{
	for (uint32_t page = 0; page < MODEL_PAGES;) {
		uint8_t what = (uint8_t)any(4);
		if (what)
			what = (uint8_t)(what + 4 * any(2));
		for (uint32_t length = 1 + any(6); length && page < MODEL_PAGES; length--)
			model[page++] = what;
	}
}

static void pipe_from_model(const uint8_t *model, struct lz_page_pipe *pipe)
{
	memset(pipe, 0, sizeof(*pipe));
	for (uint64_t page = 0; page < MODEL_PAGES; page++)
		if (model[page])
			assert(lz_pipe_add(pipe, BASE + (page << LZ_PAGE_SHIFT), 1, model[page] & 3, model[page] & 4) ==
			       0);
}

static void check_pipe(const uint8_t *model, const struct lz_page_pipe *pipe)
{
	uint8_t found[MODEL_PAGES] = { 0 };

	for (uint64_t i = 0; i < pipe->count; i++) {
		const struct lz_page_run *run = &pipe->runs[i];
		for (uint64_t page = 0; page < run->pages; page++)
			found[((run->start - BASE) >> LZ_PAGE_SHIFT) + page] =
				(uint8_t)(run->kind + (run->lazy ? 4 : 0));
		if (i)
			assert(run[-1].start + (run[-1].pages << LZ_PAGE_SHIFT) < run->start ||
			       run[-1].kind != run->kind || run[-1].lazy != run->lazy);
	}
	assert(memcmp(found, model, sizeof(found)) == 0);
}

/* What is written is decoded to the same, zero holes aside where the dialect has none. */
static void check_written(const uint8_t *model, const struct lz_page_pipe *pipe)
{
	for (uint32_t way = 0; way < 3; way++) {
		struct lz_entry_format format = { .dialect = way ? LZ_DIALECT_FLAGS : LZ_DIALECT_BOOLEANS,
						  .wide = way == 2,
						  .lazy_holes = 1 };
		int fd = memfd_create("pagemap", 0);
		struct lz_pagemap pagemap;
		struct lz_pagemap_error error;
		struct lz_table table = { 0 };
		uint64_t covered = 0;
		assert(lz_pagemap_write(fd, 3, pipe, &format) > 0);
		assert(lz_pagemap_read(fd, &pagemap, &error) == 0);
		assert(pagemap.pages_id == 3);
		assert(lz_table_push(&table, &pagemap, 0, (int)format.dialect, 1 << 30, &error) == 0);
		for (uint64_t i = 0; i < table.count; i++) {
			const struct lz_extent *row = &table.rows[i];
			uint64_t first = (row->start - BASE) >> LZ_PAGE_SHIFT;
			for (uint32_t page = 0; page < row->pages; page++) {
				uint8_t what = model[first + page];
				int kind = what & 3;
				assert(row->kind == (kind == LZ_PAGE_ZERO   ? LZ_KIND_ZERO :
						     kind == LZ_PAGE_PARENT ? LZ_KIND_BROKEN :
									      LZ_KIND_DUMPED));
				assert(!way || row->lazy == (what >> 2));
			}
			covered += row->pages;
		}
		assert(covered == pipe->pages[LZ_PAGE_DUMPED] + pipe->pages[LZ_PAGE_PARENT] +
					  (way ? 0 : pipe->pages[LZ_PAGE_ZERO]));
		assert(table.image_bytes == pipe->pages[LZ_PAGE_DUMPED] << LZ_PAGE_SHIFT);
		lz_table_free(&table);
		lz_pagemap_free(&pagemap);
		close(fd);
	}
}

/* Holes against a parent that has some of the pages, in rows of random lengths. */
static void check_parent(uint8_t *model, struct lz_page_pipe *pipe)
{
	struct lz_extent rows[MODEL_PAGES];
	uint8_t has[MODEL_PAGES] = { 0 };
	uint64_t count = 0, address, missing = UINT64_MAX;

	for (uint32_t page = 0; page < MODEL_PAGES;) {
		uint32_t length = 1 + any(7);
		if (length > MODEL_PAGES - page)
			length = MODEL_PAGES - page;
		if (any(4)) {
			rows[count] = (struct lz_extent){ .start = BASE + ((uint64_t)page << LZ_PAGE_SHIFT),
							  .pages = length,
							  .kind = (uint8_t)(1 + any(3)) };
			memset(has + page, rows[count++].kind != LZ_KIND_REMOTE, length);
		}
		page += length;
	}
	for (uint32_t page = 0; page < MODEL_PAGES; page++)
		if ((model[page] & 3) == LZ_PAGE_PARENT && !has[page]) {
			if (missing == UINT64_MAX)
				missing = BASE + ((uint64_t)page << LZ_PAGE_SHIFT);
			model[page] = (uint8_t)(LZ_PAGE_DUMPED + (model[page] & 4));
		}
	int result = lz_pipe_check_parent(pipe, rows, count, &address);
	assert(result == (missing == UINT64_MAX ? 0 : -ENOENT) && (!result || address == missing));
	assert(lz_pipe_require_parent(pipe, rows, count) == 0);
	check_pipe(model, pipe);
	assert(lz_pipe_check_parent(pipe, rows, count, &address) == 0);
}

static void test_pipes(void)
{
	for (int round = 0; round < 300; round++) {
		uint8_t model[MODEL_PAGES];
		struct lz_page_pipe pipe;
		fill_model(model);
		pipe_from_model(model, &pipe);
		check_pipe(model, &pipe);
		check_written(model, &pipe);
		check_parent(model, &pipe);
		if (pipe.count)
			assert(lz_pipe_add(&pipe, BASE, 1, LZ_PAGE_ZERO, 0) == -EINVAL);
		lz_pipe_free(&pipe);
	}
}

/* Memory of our own: some pages written, some only read, some that may not be read, some not there. */
static uint8_t *make_memory(void)
{
	uint8_t *memory = mmap(NULL, PAGES * LZ_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	assert(memory != MAP_FAILED);
	for (uint64_t page = 0; page < PAGES; page++) {
		uint8_t *at = memory + page * LZ_PAGE_SIZE;
		if (page % 7 == 3)
			(void)*(volatile uint8_t *)at;
		else if (page % 7 != 5)
			for (uint64_t i = 0; i < LZ_PAGE_SIZE; i += 8)
				memcpy(at + i, &page, 8);
	}
	return memory;
}

static void check_image(int fd, uint64_t pages_wanted)
{
	uint64_t at = 0;

	for (uint64_t page = 0; page < PAGES; page++) {
		uint64_t words[LZ_PAGE_SIZE / 8];
		if (page % 7 == 3 || page % 7 == 5)
			continue;
		assert(pread(fd, words, sizeof(words), (off_t)(at++ * LZ_PAGE_SIZE)) == sizeof(words));
		for (size_t i = 0; i < LZ_PAGE_SIZE / 8; i++)
			assert(words[i] == page);
	}
	assert(at == pages_wanted);
}

static void copy_and_check(const struct lz_page_pipe *pipe, uint64_t room_pages, uint32_t threads)
{
	int fd = memfd_create("pages", 0);
	struct lz_room room = { 0 };
	struct lz_copy_state state = { 0 };

	assert(fd >= 0);
	if (room_pages)
		assert(lz_room_make(fd, room_pages * LZ_PAGE_SIZE, room_pages * LZ_PAGE_SIZE, &room) == 0);
	assert(lz_copy_pages(getpid(), pipe, fd, &room, threads, &state) == 0);
	assert(state.copied_bytes == pipe->pages[LZ_PAGE_DUMPED] << LZ_PAGE_SHIFT);
	lz_room_free(&room);
	check_image(fd, pipe->pages[LZ_PAGE_DUMPED]);
	close(fd);
}

struct reader {
	int fd;
	uint8_t *bytes;
	size_t filled;
};

static void *read_all(void *argument)
{
	struct reader *reader = argument;
	ssize_t got;

	while ((got = read(reader->fd, reader->bytes + reader->filled, 1 << 16)) > 0)
		reader->filled += (size_t)got;
	return NULL;
}

/* The headers and pages of a stream are the runs of the pipe. */
static void stream_and_check(const struct lz_page_pipe *pipe, uint32_t header_bytes)
{
	struct lz_stream_format format = { .dst_id = 0x4201, .header_bytes = header_bytes, .zero_holes = 1 };
	struct lz_copy_state state = { 0 };
	struct reader reader = { .bytes = malloc((PAGES + 1) * (LZ_PAGE_SIZE + 32) + (1 << 16)) };
	pthread_t thread;
	int pair[2];
	size_t at = 0;

	assert(reader.bytes && socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	reader.fd = pair[0];
	assert(pthread_create(&thread, NULL, read_all, &reader) == 0);
	assert(lz_stream_pages(getpid(), -1, pipe, pair[1], &format, &state) == 0);
	close(pair[1]);
	pthread_join(thread, NULL);
	for (uint64_t i = 0; i < pipe->count; i++) {
		const struct lz_page_run *run = &pipe->runs[i];
		const uint8_t *header = reader.bytes + at;
		uint64_t pages = 0, address;
		uint32_t command;
		memcpy(&command, header, 4);
		if (header_bytes == 24)
			memcpy(&pages, header + 4, 4);
		else
			memcpy(&pages, header + 8, 8);
		memcpy(&address, header + header_bytes - 16, 8);
		assert(command == (6U | (run->kind == LZ_PAGE_DUMPED ? 4U << 16 : 0U)));
		assert(pages == run->pages && address == run->start);
		at += header_bytes;
		if (run->kind != LZ_PAGE_DUMPED)
			continue;
		assert(memcmp(reader.bytes + at, (void *)(uintptr_t)run->start, run->pages << LZ_PAGE_SHIFT) == 0);
		at += run->pages << LZ_PAGE_SHIFT;
	}
	assert(at == reader.filled);
	free(reader.bytes);
	close(pair[0]);
}

static int test_memory(void)
{
	uint8_t *memory = make_memory();
	struct lz_area area = { .start = (uint64_t)(uintptr_t)memory,
				.end = (uint64_t)(uintptr_t)memory + PAGES * LZ_PAGE_SIZE,
				.kind = LZ_AREA_ANON };
	struct lz_page_pipe pipe = { 0 };
	int error;

	for (int method = LZ_SCAN_PAGEMAP; method >= LZ_SCAN_AUTO; method -= LZ_SCAN_PAGEMAP) {
		struct lz_scanner *scanner = lz_scanner_open(getpid(), method, &error);
		assert(scanner);
		lz_pipe_free(&pipe);
		assert(lz_scan(scanner, LZ_TRACK_NONE, &area, 1, &pipe) == 0);
		lz_scanner_close(scanner);
		if (!pipe.pages[LZ_PAGE_ZERO])
			return 77;
		assert(pipe.pages[LZ_PAGE_PARENT] == 0);
		assert(pipe.pages[LZ_PAGE_ZERO] == (PAGES + 3) / 7);
		assert(pipe.pages[LZ_PAGE_DUMPED] == PAGES - (PAGES + 3) / 7 - (PAGES + 1) / 7);
	}
	stream_and_check(&pipe, 24);
	stream_and_check(&pipe, 32);
	assert(mprotect(memory + 100 * LZ_PAGE_SIZE, 50 * LZ_PAGE_SIZE, PROT_NONE) == 0);
	for (uint32_t threads = 1; threads < 5; threads++)
		for (uint64_t room = 0; room < PAGES; room += PAGES / 3)
			copy_and_check(&pipe, room, threads);
	lz_pipe_free(&pipe);
	munmap(memory, PAGES * LZ_PAGE_SIZE);
	return 0;
}

static void test_unreadable(void)
{
	struct lz_page_pipe pipe = { 0 };
	struct lz_copy_state state = { 0 };
	int fd = memfd_create("pages", 0);

	assert(lz_pipe_add(&pipe, LZ_USER_START, 1, LZ_PAGE_DUMPED, 0) == 0);
	assert(lz_copy_pages(getpid(), &pipe, fd, NULL, 1, &state) < 0);
	assert(state.code && !state.writing && state.address == LZ_USER_START);
	lz_pipe_free(&pipe);
	close(fd);
}

int main(void)
{
	int result;

	test_pipes();
	test_unreadable();
	result = test_memory();
	if (result == 77)
		puts("no zero page to be seen: reading frame numbers needs root");
	return result;
}
