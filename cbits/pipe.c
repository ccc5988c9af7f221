/* SPDX-License-Identifier: MIT */
/*
 * Page pipes: runs collected in order of address, written as pagemap entries, and held against the parent's table.
 *
 * A hole carries its kind and merges only with its own, so that a zero hole beside a parent hole stays two entries.
 * What the entries look like is told at the head of pagemap.c.
 */
#define _GNU_SOURCE 1
#include "lz.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAGIC_COMMON 0x54564319U
#define MAGIC_PAGEMAP 0x56084025U
#define PE_PARENT 1U
#define PE_LAZY 2U
#define PE_PRESENT 4U

#define BUFFER_BYTES (256U << 10)
#define ENTRY_MAX 64U /* five fields of at most 11 bytes, and the length */

int lz_pipe_add(struct lz_page_pipe *pipe, uint64_t start, uint64_t pages, int kind, int lazy)
{
	struct lz_page_run *last = pipe->count ? &pipe->runs[pipe->count - 1] : NULL;
	uint64_t end = last ? last->start + (last->pages << LZ_PAGE_SHIFT) : 0;

	assert(pages && kind >= LZ_PAGE_ZERO && kind <= LZ_PAGE_DUMPED);
	if (start < end)
		return -EINVAL; /* not an assertion: the order is the kernel's word */
	lazy = lazy != 0;
	if (last && start == end && last->kind == kind && last->lazy == lazy) {
		last->pages += pages;
	} else {
		if (pipe->count == pipe->capacity) {
			uint64_t capacity = pipe->capacity ? pipe->capacity * 2 : 256;
			void *grown = realloc(pipe->runs, capacity * sizeof(*pipe->runs));
			if (!grown)
				return -ENOMEM;
			pipe->runs = grown;
			pipe->capacity = capacity;
		}
		pipe->runs[pipe->count++] = (struct lz_page_run){
			.start = start, .pages = pages, .kind = (uint8_t)kind, .lazy = (uint8_t)lazy
		};
	}
	pipe->pages[kind] += pages;
	if (kind == LZ_PAGE_DUMPED && lazy)
		pipe->lazy_pages += pages;
	return 0;
}

void lz_pipe_free(struct lz_page_pipe *pipe)
{
	free(pipe->runs);
	memset(pipe, 0, sizeof(*pipe));
}

struct writer {
	int fd;
	uint64_t offset;
	size_t filled;
	uint8_t *bytes;
};

static int flush(struct writer *w)
{
	size_t at = 0;

	while (at < w->filled) {
		ssize_t wrote = pwrite(w->fd, w->bytes + at, w->filled - at, (off_t)w->offset);
		if (wrote < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		at += (size_t)wrote;
		w->offset += (uint64_t)wrote;
	}
	w->filled = 0;
	return 0;
}

static void put32(uint8_t *at, uint32_t value)
{
	for (unsigned int i = 0; i < 4; i++)
		at[i] = (uint8_t)(value >> (8 * i));
}

static size_t put_field(uint8_t *at, unsigned int number, uint64_t value)
{
	size_t length = 0;

	at[length++] = (uint8_t)(number << 3);
	for (; value > 0x7f; value >>= 7)
		at[length++] = (uint8_t)(value | 0x80);
	at[length++] = (uint8_t)value;
	return length;
}

/* Encode one entry behind its length; return how many bytes it takes. */
static size_t put_entry(uint8_t *at, const struct lz_page_run *run, uint64_t start, uint32_t pages,
			const struct lz_entry_format *format)
{
	uint8_t *body = at + 4;
	bool wide = format->dialect == LZ_DIALECT_FLAGS && format->wide;
	size_t length = put_field(body, 1, start);

	length += put_field(body + length, 2, wide ? 0 : pages);
	if (format->dialect == LZ_DIALECT_BOOLEANS) {
		if (run->kind == LZ_PAGE_PARENT)
			length += put_field(body + length, 3, 1);
		else if (run->kind == LZ_PAGE_ZERO)
			length += put_field(body + length, 4, 1);
	} else {
		bool holds = run->kind == LZ_PAGE_DUMPED;
		uint32_t flags = holds ? PE_PRESENT : PE_PARENT;
		if (run->lazy && (holds || format->lazy_holes))
			flags |= PE_LAZY;
		length += put_field(body + length, 4, flags);
	}
	if (wide)
		length += put_field(body + length, 5, pages);
	put32(at, (uint32_t)length);
	return 4 + length;
}

static int write_entries(struct writer *w, const struct lz_page_pipe *pipe, const struct lz_entry_format *format)
{
	for (uint64_t i = 0; i < pipe->count; i++) {
		const struct lz_page_run *run = &pipe->runs[i];
		uint64_t start = run->start, left = run->pages;
		if (run->kind == LZ_PAGE_ZERO && format->dialect == LZ_DIALECT_FLAGS)
			continue;
		while (left) {
			uint32_t pages = left > UINT32_MAX ? UINT32_MAX : (uint32_t)left;
			if (BUFFER_BYTES - w->filled < ENTRY_MAX) {
				int result = flush(w);
				if (result < 0)
					return result;
			}
			w->filled += put_entry(w->bytes + w->filled, run, start, pages, format);
			start += (uint64_t)pages << LZ_PAGE_SHIFT;
			left -= pages;
		}
	}
	return flush(w);
}

int64_t lz_pagemap_write(int out, uint32_t pages_id, const struct lz_page_pipe *pipe,
			 const struct lz_entry_format *format)
{
	struct writer w = { .fd = out, .bytes = malloc(BUFFER_BYTES) };
	size_t length;
	int result;

	assert(format->dialect == LZ_DIALECT_BOOLEANS || format->dialect == LZ_DIALECT_FLAGS);
	if (!w.bytes)
		return -ENOMEM;
	put32(w.bytes, MAGIC_COMMON);
	put32(w.bytes + 4, MAGIC_PAGEMAP);
	length = put_field(w.bytes + 12, 1, pages_id);
	put32(w.bytes + 8, (uint32_t)length);
	w.filled = 12 + length;
	result = write_entries(&w, pipe, format);
	free(w.bytes);
	return result < 0 ? result : (int64_t)w.offset;
}

static uint64_t run_end(const struct lz_page_run *run)
{
	return run->start + (run->pages << LZ_PAGE_SHIFT);
}

static uint64_t row_end(const struct lz_extent *row)
{
	return row->start + ((uint64_t)row->pages << LZ_PAGE_SHIFT);
}

/* Say whether a row has bytes, and where from `at` on that ends or begins. */
static bool row_has(const struct lz_extent *rows, uint64_t count, uint64_t *row, uint64_t at, uint64_t *until)
{
	while (*row < count && row_end(&rows[*row]) <= at)
		(*row)++;
	if (*row == count) {
		*until = UINT64_MAX;
		return false;
	}
	if (rows[*row].start > at) {
		*until = rows[*row].start;
		return false;
	}
	*until = row_end(&rows[*row]);
	return rows[*row].kind == LZ_KIND_DUMPED || rows[*row].kind == LZ_KIND_ZERO;
}

int lz_pipe_check_parent(const struct lz_page_pipe *pipe, const struct lz_extent *rows, uint64_t count,
			 uint64_t *address)
{
	uint64_t row = 0;

	for (uint64_t i = 0; i < pipe->count; i++) {
		const struct lz_page_run *run = &pipe->runs[i];
		uint64_t at = run->start;
		if (run->kind != LZ_PAGE_PARENT)
			continue;
		while (at < run_end(run)) {
			uint64_t until;
			if (!row_has(rows, count, &row, at, &until)) {
				*address = at;
				return -ENOENT;
			}
			at = until;
		}
	}
	return 0;
}

int lz_pipe_require_parent(struct lz_page_pipe *pipe, const struct lz_extent *rows, uint64_t count)
{
	struct lz_page_pipe out = { .scanned_pages = pipe->scanned_pages };
	uint64_t row = 0;

	for (uint64_t i = 0; i < pipe->count; i++) {
		const struct lz_page_run *run = &pipe->runs[i];
		uint64_t at = run->start;
		while (at < run_end(run)) {
			uint64_t until = run_end(run);
			int kind = run->kind;
			if (kind == LZ_PAGE_PARENT && !row_has(rows, count, &row, at, &until))
				kind = LZ_PAGE_DUMPED;
			if (until > run_end(run))
				until = run_end(run);
			int result = lz_pipe_add(&out, at, (until - at) >> LZ_PAGE_SHIFT, kind, run->lazy);
			if (result < 0) {
				lz_pipe_free(&out);
				return result;
			}
			at = until;
		}
	}
	lz_pipe_free(pipe);
	*pipe = out;
	return 0;
}

int64_t lz_pipe_punch_parent(const struct lz_page_pipe *pipe, const struct lz_extent *rows, uint64_t count,
			     const int *fds)
{
	uint64_t row = 0;
	int64_t punched = 0;

	for (uint64_t i = 0; i < pipe->count; i++) {
		const struct lz_page_run *run = &pipe->runs[i];
		if (run->kind == LZ_PAGE_PARENT)
			continue;
		while (row < count && row_end(&rows[row]) <= run->start)
			row++;
		for (uint64_t r = row; r < count && rows[r].start < run_end(run); r++) {
			const struct lz_extent *old = &rows[r];
			uint64_t start = old->start > run->start ? old->start : run->start;
			uint64_t end = row_end(old) < run_end(run) ? row_end(old) : run_end(run);
			if (old->kind != LZ_KIND_DUMPED)
				continue;
			while (fallocate(fds[old->source], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
					 (off_t)(old->offset + (start - old->start)), (off_t)(end - start)) < 0)
				if (errno != EINTR)
					return -errno;
			punched += (int64_t)(end - start);
		}
	}
	return punched;
}
