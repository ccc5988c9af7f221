/* SPDX-License-Identifier: MIT */
/*
 * Pages that were copied while the task still ran, and what becomes of them once it is stopped.
 *
 * To copy memory takes far longer than to look at it. So writes are tracked (track.c), all pages are copied while the
 * task runs, and then it is stopped and looked at: what was not written since the tracking began is what was copied.
 * Only the rest is copied while it is stopped, into a file of its own. In the pages image the bytes have to be in the
 * order of addresses: they are brought into it when the task runs again.
 *
 * A page keeps its place if no page before it has come or gone. If not, the copied runs are moved inside the image,
 * without room for a second copy. Neither addresses nor places ever change their order, so a run that moves up never
 * comes to lie where one that moves down still is, nor the other way: all that move up are moved from the last to the
 * first, then all that move down from the first to the last.
 */
#define _GNU_SOURCE 1
#include "lz.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define BUFFER_BYTES (1U << 20)

static uint64_t run_end(const struct lz_page_run *run)
{
	return run->start + (run->pages << LZ_PAGE_SHIFT);
}

/* Where in the pages image the dumped runs of a pipe are, for addresses that only go up. */
struct places {
	const struct lz_page_pipe *pipe;
	uint64_t run;
	uint64_t offset; /* of that run */
};

/* Say whether an address is in a dumped run and at which offset, and where from there on that ends or begins. */
static bool find_place(struct places *places, uint64_t at, uint64_t *offset, uint64_t *until)
{
	const struct lz_page_pipe *pipe = places->pipe;

	for (; places->run < pipe->count; places->run++) {
		const struct lz_page_run *run = &pipe->runs[places->run];
		if (run->kind != LZ_PAGE_DUMPED)
			continue;
		if (run_end(run) > at) {
			*until = run->start > at ? run->start : run_end(run);
			*offset = places->offset + (at - run->start);
			return run->start <= at;
		}
		places->offset += run->pages << LZ_PAGE_SHIFT;
	}
	*until = UINT64_MAX;
	return false;
}

int lz_early_match(struct lz_page_pipe *pipe, const struct lz_page_pipe *early, const uint8_t *done)
{
	struct lz_page_pipe out = { .scanned_pages = pipe->scanned_pages };
	struct places places = { .pipe = early };

	for (uint64_t i = 0; i < pipe->count; i++) {
		const struct lz_page_run *run = &pipe->runs[i];
		uint64_t at = run->start, end = run_end(run);
		while (at < end) {
			uint64_t until = end, offset;
			int kind = run->kind;
			if (kind == LZ_PAGE_PARENT && !find_place(&places, at, &offset, &until)) {
				kind = LZ_PAGE_DUMPED;
			} else if (kind == LZ_PAGE_PARENT) {
				uint64_t batch = offset / LZ_EARLY_BATCH_BYTES;
				uint64_t left = (batch + 1) * LZ_EARLY_BATCH_BYTES - offset;
				if (until - at > left)
					until = at + left;
				if (!done[batch])
					kind = LZ_PAGE_DUMPED;
			}
			if (until > end)
				until = end;
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

int lz_early_settle(const struct lz_page_pipe *pipe, struct lz_page_pipe *settled)
{
	settled->scanned_pages = pipe->scanned_pages;
	for (uint64_t i = 0; i < pipe->count; i++) {
		const struct lz_page_run *run = &pipe->runs[i];
		int kind = run->kind == LZ_PAGE_PARENT ? LZ_PAGE_DUMPED : run->kind;
		int result = lz_pipe_add(settled, run->start, run->pages, kind, run->lazy);
		if (result < 0)
			return result;
	}
	return 0;
}

/* Bytes to be brought from one place to another. */
struct move {
	uint64_t from;
	uint64_t to;
	uint64_t bytes;
};

struct moves {
	struct move *list;
	uint64_t count;
	uint64_t capacity;
};

static int add_move(struct moves *moves, uint64_t from, uint64_t to, uint64_t bytes)
{
	struct move *last = moves->count ? &moves->list[moves->count - 1] : NULL;

	if (last && last->from + last->bytes == from && last->to + last->bytes == to) {
		last->bytes += bytes;
		return 0;
	}
	if (moves->count == moves->capacity) {
		uint64_t capacity = moves->capacity ? moves->capacity * 2 : 256;
		void *grown = realloc(moves->list, capacity * sizeof(*moves->list));
		if (!grown)
			return -ENOMEM;
		moves->list = grown;
		moves->capacity = capacity;
	}
	moves->list[moves->count++] = (struct move){ .from = from, .to = to, .bytes = bytes };
	return 0;
}

/* Lay out the pages image: what of it is in place or elsewhere in the image, and what in the other file. */
static int plan(const struct lz_page_pipe *pipe, const struct lz_page_pipe *early, struct moves *inside,
		struct moves *late)
{
	struct places places = { .pipe = early };
	uint64_t to = 0, from_late = 0;
	int result = 0;

	for (uint64_t i = 0; i < pipe->count && result == 0; i++) {
		const struct lz_page_run *run = &pipe->runs[i];
		uint64_t at = run->start, end = run_end(run);
		if (run->kind == LZ_PAGE_DUMPED) {
			result = add_move(late, from_late, to, end - at);
			from_late += end - at;
			to += end - at;
		}
		while (run->kind == LZ_PAGE_PARENT && at < end && result == 0) {
			uint64_t from, until;
			if (!find_place(&places, at, &from, &until))
				return -EINVAL; /* lz_early_match() leaves none of these */
			if (until > end)
				until = end;
			result = add_move(inside, from, to, until - at);
			to += until - at;
			at = until;
		}
	}
	return result;
}

static int transfer(int in, uint64_t from, int out, uint64_t to, uint64_t bytes, uint8_t *buffer)
{
	uint64_t there = 0;

	while (there < bytes) {
		ssize_t got = pread(in, buffer + there, bytes - there, (off_t)(from + there));
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return got < 0 ? -errno : -EIO;
		there += (uint64_t)got;
	}
	for (uint64_t done = 0; done < bytes;) {
		ssize_t wrote = pwrite(out, buffer + done, bytes - done, (off_t)(to + done));
		if (wrote < 0 && errno == EINTR)
			continue;
		if (wrote <= 0)
			return wrote < 0 ? -errno : -ENOSPC;
		done += (uint64_t)wrote;
	}
	return 0;
}

/* Move bytes in pieces, from the end that the new place does not lie over. */
static int do_move(int in, int out, const struct move *move, uint8_t *buffer)
{
	bool is_up = move->to > move->from;
	int result = 0;

	for (uint64_t done = 0, take; done < move->bytes && result == 0; done += take) {
		take = move->bytes - done < BUFFER_BYTES ? move->bytes - done : BUFFER_BYTES;
		uint64_t at = is_up ? move->bytes - done - take : done;
		result = transfer(in, move->from + at, out, move->to + at, take, buffer);
	}
	return result;
}

static int do_moves(int image, int late_file, const struct moves *inside, const struct moves *late, uint8_t *buffer)
{
	int result = 0;

	for (uint64_t i = inside->count; i-- && result == 0;)
		if (inside->list[i].to > inside->list[i].from)
			result = do_move(image, image, &inside->list[i], buffer);
	for (uint64_t i = 0; i < inside->count && result == 0; i++)
		if (inside->list[i].to < inside->list[i].from)
			result = do_move(image, image, &inside->list[i], buffer);
	for (uint64_t i = 0; i < late->count && result == 0; i++)
		result = do_move(late_file, image, &late->list[i], buffer);
	return result;
}

int lz_early_merge(const struct lz_page_pipe *pipe, const struct lz_page_pipe *early, int image, int late_file)
{
	struct moves inside = { 0 }, late = { 0 };
	uint8_t *buffer = malloc(BUFFER_BYTES);
	int result = buffer ? plan(pipe, early, &inside, &late) : -ENOMEM;

	if (result == 0)
		result = do_moves(image, late_file, &inside, &late, buffer);
	free(inside.list);
	free(late.list);
	free(buffer);
	return result;
}
