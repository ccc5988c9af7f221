/* SPDX-License-Identifier: MIT */
#include "layout.h"

#include "abi.h"

#include <assert.h>
#include <string.h>

#define POINTS (2 * LZ_BATCH)

struct puzzle {
	const struct lz_event *events;
	uint32_t moves; /* events other than forks, as read */
	uint8_t move[LZ_BATCH];
	uint32_t points;
	uint64_t point[POINTS];
	enum lz_truth now[POINTS];
	enum lz_truth before[POINTS];
	uint32_t best_score;
	uint8_t best[LZ_BATCH];
};

static bool holds(uint64_t start, uint64_t end, uint64_t address)
{
	return start <= address && address < end;
}

/* What an event makes of a point: registered, not registered, or nothing (LZ_UNKNOWN). */
static enum lz_truth effect(const struct lz_event *event, uint64_t address)
{
	switch (event->event) {
	case UFFD_EVENT_REMAP:
		/* Of the old place it says nothing: MREMAP_DONTUNMAP leaves it, any other has an UNMAP of its own. */
		return holds(event->to, event->to + (event->end - event->start), address) ? LZ_REGISTERED : LZ_UNKNOWN;
	case UFFD_EVENT_UNMAP:
		return holds(event->start, event->end, address) ? LZ_NOT_REGISTERED : LZ_UNKNOWN;
	default:
		return LZ_UNKNOWN;
	}
}

/* How many points the first `count` events of an order leave other than the truth says. */
static uint32_t contradictions(const struct puzzle *puzzle, const uint8_t *order, uint32_t count,
			       const enum lz_truth *truth)
{
	uint32_t score = 0;

	for (uint32_t p = 0; p < puzzle->points; p++) {
		enum lz_truth predicted = puzzle->before[p];

		for (uint32_t i = 0; i < count; i++) {
			enum lz_truth made = effect(&puzzle->events[order[i]], puzzle->point[p]);

			if (made != LZ_UNKNOWN)
				predicted = made;
		}
		score += predicted != LZ_UNKNOWN && truth[p] != LZ_UNKNOWN && predicted != truth[p];
	}
	return score;
}

/* Whether an order puts the unmapping of the old place of an mremap before its move: both are one call. */
static bool splits_a_move(const struct puzzle *puzzle, const uint8_t *order)
{
	for (uint32_t i = 0; i < puzzle->moves; i++) {
		const struct lz_event *unmap = &puzzle->events[order[i]];

		for (uint32_t k = i + 1; k < puzzle->moves && unmap->event == UFFD_EVENT_UNMAP; k++) {
			const struct lz_event *move = &puzzle->events[order[k]];

			if (move->event == UFFD_EVENT_REMAP && move->start == unmap->start && move->end == unmap->end &&
			    order[k] < order[i])
				return true;
		}
	}
	return false;
}

/* Try every order of the moves, the one they were read in first; keep the first that contradicts least. */
static void try_orders(struct puzzle *puzzle, uint8_t *order, uint32_t placed, uint32_t used)
{
	if (!puzzle->best_score)
		return;
	if (placed == puzzle->moves) {
		uint32_t score = contradictions(puzzle, order, placed, puzzle->now);

		if (splits_a_move(puzzle, order))
			return;
		if (score < puzzle->best_score) {
			puzzle->best_score = score;
			memcpy(puzzle->best, order, placed);
		}
		return;
	}
	for (uint32_t i = 0; i < puzzle->moves; i++) {
		if (used & 1U << i)
			continue;
		order[placed] = puzzle->move[i];
		try_orders(puzzle, order, placed + 1, used | 1U << i);
	}
}

/* How many of the moves, in the order found, took effect before a fork. */
static uint32_t place_of_fork(const struct puzzle *puzzle, uint8_t fork, lz_truth_function *truth, void *context)
{
	enum lz_truth in_child[POINTS];
	uint32_t as_read = 0, best = 0, best_score = UINT32_MAX;

	for (uint32_t p = 0; p < puzzle->points; p++)
		in_child[p] = truth(context, fork, puzzle->point[p]);
	for (uint32_t i = 0; i < puzzle->moves; i++)
		as_read += puzzle->best[i] < fork;
	if (puzzle->events[fork].overlapped) {
		/* The child has what the madvise, not yet gone on, was to drop. With several, the last: it is rare
		 * enough that one thread passes another, and a fork is the slowest to be passed. */
		for (uint32_t i = as_read; i-- > 0;) {
			if (puzzle->events[puzzle->best[i]].event == UFFD_EVENT_REMOVE) {
				as_read = i;
				break;
			}
		}
	}
	for (uint32_t m = 0; m <= puzzle->moves; m++) {
		uint32_t distance = m < as_read ? as_read - m : m - as_read;
		/* a contradiction weighs more than any distance */
		uint32_t score = contradictions(puzzle, puzzle->best, m, in_child) * (LZ_BATCH + 1) + distance;

		if (score < best_score) {
			best_score = score;
			best = m;
		}
	}
	return best;
}

void lz_layout_order(const struct lz_event *events, uint32_t count, lz_truth_function *truth, void *context,
		     uint8_t *order)
{
	struct puzzle puzzle = { .events = events, .best_score = UINT32_MAX };
	uint8_t attempt[LZ_BATCH];
	uint32_t filled = 0, is_free = 0;
	uint32_t place[LZ_BATCH];

	assert(count <= LZ_BATCH);
	for (uint32_t i = 0; i < count; i++) {
		if (events[i].event == UFFD_EVENT_FORK)
			continue;
		puzzle.move[puzzle.moves++] = (uint8_t)i;
		if (events[i].event == UFFD_EVENT_REMOVE)
			continue;
		puzzle.point[puzzle.points++] = events[i].start;
		if (events[i].event == UFFD_EVENT_REMAP) {
			is_free |= 1U << puzzle.points; /* unless we know better */
			puzzle.point[puzzle.points++] = events[i].to;
		}
	}
	for (uint32_t p = 0; p < puzzle.points && count > 1; p++) {
		puzzle.now[p] = truth(context, -1, puzzle.point[p]);
		puzzle.before[p] = truth(context, LZ_BEFORE, puzzle.point[p]);
		if (puzzle.before[p] == LZ_UNKNOWN && is_free & 1U << p)
			puzzle.before[p] = LZ_NOT_REGISTERED;
	}
	if (puzzle.moves < 2)
		memcpy(puzzle.best, puzzle.move, puzzle.moves);
	else
		try_orders(&puzzle, attempt, 0, 0);
	for (uint32_t i = 0; i < count; i++) {
		if (events[i].event == UFFD_EVENT_FORK)
			place[i] = puzzle.moves ? place_of_fork(&puzzle, (uint8_t)i, truth, context) : 0;
	}
	for (uint32_t m = 0; m <= puzzle.moves; m++) {
		for (uint32_t i = 0; i < count; i++) {
			if (events[i].event == UFFD_EVENT_FORK && place[i] == m)
				order[filled++] = (uint8_t)i;
		}
		if (m < puzzle.moves)
			order[filled++] = puzzle.best[m];
	}
	assert(filled == count);
}
