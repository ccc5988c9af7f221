/* SPDX-License-Identifier: MIT */
#include "layout.h"

#include "abi.h"

#include <assert.h>
#include <string.h>

#define POINTS (2 * LZ_BATCH + LZ_BATCH * LZ_BATCH / 4) /* and where a move goes to what is unmapped */

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

/* What the first `count` events of an order leave of a point. */
static enum lz_truth predict(const struct lz_event *events, const uint8_t *order, uint32_t count, uint64_t address,
			     enum lz_truth before)
{
	for (uint32_t i = 0; i < count; i++) {
		enum lz_truth made = effect(&events[order[i]], address);

		if (made != LZ_UNKNOWN)
			before = made;
	}
	return before;
}

/* How many points the first `count` events of an order leave other than the truth says. */
static uint32_t contradictions(const struct puzzle *puzzle, const uint8_t *order, uint32_t count,
			       const enum lz_truth *truth)
{
	uint32_t score = 0;

	for (uint32_t p = 0; p < puzzle->points; p++) {
		enum lz_truth predicted = predict(puzzle->events, order, count, puzzle->point[p], puzzle->before[p]);

		score += predicted != LZ_UNKNOWN && truth[p] != LZ_UNKNOWN && predicted != truth[p];
	}
	return score;
}

/* How many points of the places that the moves of an order go to are not free then. */
static uint32_t collisions(const struct puzzle *puzzle, const uint8_t *order)
{
	uint32_t found = 0;

	for (uint32_t p = 0; p < puzzle->points; p++) {
		for (uint32_t i = 0; i < puzzle->moves; i++)
			found +=
				effect(&puzzle->events[order[i]], puzzle->point[p]) == LZ_REGISTERED &&
				predict(puzzle->events, order, i, puzzle->point[p], puzzle->before[p]) == LZ_REGISTERED;
	}
	return found;
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
		uint32_t score = contradictions(puzzle, order, placed, puzzle->now) + collisions(puzzle, order);

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

/* The first address that a move goes to and another event unmaps, in *address; false when there is none. */
static bool goes_where_unmapped(const struct lz_event *move, const struct lz_event *unmapping, uint64_t *address)
{
	*address = move->to > unmapping->start ? move->to : unmapping->start;
	return move->event == UFFD_EVENT_REMAP && effect(move, *address) == LZ_REGISTERED &&
	       effect(unmapping, *address) == LZ_NOT_REGISTERED;
}

static void add_point(struct puzzle *puzzle, uint64_t address)
{
	for (uint32_t p = 0; p < puzzle->points; p++)
		if (puzzle->point[p] == address)
			return;
	puzzle->point[puzzle->points++] = address;
}

/* What is known of a point before the batch. Where a move goes is free, unless the batch itself unmaps it first. */
static enum lz_truth before_batch(const struct puzzle *puzzle, uint32_t count, uint64_t address,
				  lz_truth_function *truth, void *context)
{
	enum lz_truth known = truth(context, LZ_BEFORE, address);
	bool is_free = false;

	for (uint32_t i = 0; i < count && known == LZ_UNKNOWN; i++) {
		if (effect(&puzzle->events[i], address) == LZ_NOT_REGISTERED)
			return LZ_UNKNOWN; /* it was registered, even if nobody told us */
		is_free |= puzzle->events[i].event == UFFD_EVENT_REMAP && puzzle->events[i].to == address;
	}
	return is_free ? LZ_NOT_REGISTERED : known;
}

/*
 * A batch of more events than whose orders can be tried: as they were read, but for an unmapping that must have made
 * room for a move read before it.
 */
static void order_many(const struct lz_event *events, uint32_t count, lz_truth_function *truth, void *context,
		       uint8_t *order)
{
	for (uint32_t i = 0; i < count; i++)
		order[i] = (uint8_t)i;
	for (uint32_t i = 0; i < count; i++) {
		const struct lz_event *move = &events[order[i]];

		for (uint32_t from = i + 1; from < count; from++) {
			uint8_t unmapping = order[from];
			uint64_t address;

			if (!goes_where_unmapped(move, &events[unmapping], &address) ||
			    predict(events, order, i, address, truth(context, LZ_BEFORE, address)) != LZ_REGISTERED)
				continue;
			memmove(&order[i + 1], &order[i], from - i);
			order[i++] = unmapping;
		}
	}
}

void lz_layout_order(const struct lz_event *events, uint32_t count, lz_truth_function *truth, void *context,
		     uint8_t *order)
{
	struct puzzle puzzle = { .events = events, .best_score = UINT32_MAX };
	uint8_t attempt[LZ_BATCH];
	uint32_t filled = 0;
	uint32_t place[LZ_BATCH];
	uint64_t address;

	if (count > LZ_BATCH) {
		order_many(events, count, truth, context, order);
		return;
	}
	for (uint32_t i = 0; i < count; i++) {
		if (events[i].event == UFFD_EVENT_FORK)
			continue;
		puzzle.move[puzzle.moves++] = (uint8_t)i;
		if (events[i].event == UFFD_EVENT_REMOVE)
			continue;
		add_point(&puzzle, events[i].start);
		if (events[i].event == UFFD_EVENT_REMAP)
			add_point(&puzzle, events[i].to);
		for (uint32_t k = 0; k < count; k++)
			if (goes_where_unmapped(&events[i], &events[k], &address))
				add_point(&puzzle, address);
	}
	for (uint32_t p = 0; p < puzzle.points && count > 1; p++) {
		puzzle.now[p] = truth(context, -1, puzzle.point[p]);
		puzzle.before[p] = before_batch(&puzzle, count, puzzle.point[p], truth, context);
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
