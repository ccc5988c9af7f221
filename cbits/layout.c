/* SPDX-License-Identifier: MIT */
#include "layout.h"

#include "abi.h"
#include "lz.h"

#include <assert.h>
#include <string.h>

/* What speaks against an order; each weighs more than all that follow can. */
#define NEVER UINT32_MAX
#define CONTRADICTION (1U << 20)
#define LATE (1U << 10)
#define SAMPLES 8U
#define POINTS (2 * LZ_BATCH + LZ_BATCH * LZ_BATCH / 4) /* and where a move goes to what is unmapped */

struct puzzle {
	const struct lz_event *events;
	uint32_t count; /* of the batch */
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
	case UFFD_EVENT_REMAP: /* of the old place see predict() */
		return holds(event->to, event->to + (event->end - event->start), address) ? LZ_REGISTERED : LZ_UNKNOWN;
	case UFFD_EVENT_UNMAP:
		return holds(event->start, event->end, address) ? LZ_NOT_REGISTERED : LZ_UNKNOWN;
	default:
		return LZ_UNKNOWN;
	}
}

/* Whether an event, read behind another, is the UNMAP of the old place of that mremap: both tell of one moment. */
static bool is_second_half(const struct lz_event *unmap, const struct lz_event *move)
{
	return unmap->event == UFFD_EVENT_UNMAP && move->event == UFFD_EVENT_REMAP && unmap->start == move->start &&
	       unmap->end == move->end;
}

/* Whether both events of an mremap are in its batch. */
static bool is_whole(const struct lz_event *events, uint32_t all, uint32_t move)
{
	for (uint32_t i = move + 1; i < all; i++)
		if (is_second_half(&events[i], &events[move]))
			return true;
	return false;
}

/*
 * What the first `count` events of an order, of a batch of `all`, leave of a point. Of the old place of an mremap
 * without an UNMAP nothing is known after it: MREMAP_DONTUNMAP has left it, or the UNMAP is still to be read.
 */
static enum lz_truth predict(const struct lz_event *events, uint32_t all, const uint8_t *order, uint32_t count,
			     uint64_t address, enum lz_truth before)
{
	for (uint32_t i = 0; i < count; i++) {
		const struct lz_event *event = &events[order[i]];
		enum lz_truth made = effect(event, address);

		if (made != LZ_UNKNOWN)
			before = made;
		else if (event->event == UFFD_EVENT_REMAP && holds(event->start, event->end, address))
			before = is_whole(events, all, order[i]) ? LZ_NOT_REGISTERED : LZ_UNKNOWN;
	}
	return before;
}

/*
 * Whether a point that is not registered after the first `count` events of an order may be all the same: a VMA that
 * ended there has grown, which no event tells, and the page before it went later.
 */
static bool may_have_grown(const struct lz_event *events, const uint8_t *order, uint32_t count, uint64_t address)
{
	for (uint32_t i = count; i-- > 0;) {
		if (effect(&events[order[i]], address) != LZ_UNKNOWN)
			return false;
		if (effect(&events[order[i]], address - 1) == LZ_NOT_REGISTERED)
			return true;
	}
	return false;
}

/* How many points the first `count` events of an order leave other than the truth says. */
static uint32_t contradictions(const struct puzzle *puzzle, const uint8_t *order, uint32_t count,
			       const enum lz_truth *truth)
{
	uint32_t score = 0;

	for (uint32_t p = 0; p < puzzle->points; p++) {
		uint64_t address = puzzle->point[p];
		enum lz_truth predicted =
			predict(puzzle->events, puzzle->count, order, count, address, puzzle->before[p]);

		score += predicted != LZ_UNKNOWN && truth[p] != LZ_UNKNOWN && predicted != truth[p] &&
			 (predicted == LZ_REGISTERED || !may_have_grown(puzzle->events, order, count, address));
	}
	return score;
}

/* How many points of the places that the moves of an order go to are not free then. */
static uint32_t collisions(const struct puzzle *puzzle, const uint8_t *order)
{
	uint32_t found = 0;

	for (uint32_t p = 0; p < puzzle->points; p++) {
		for (uint32_t i = 0; i < puzzle->moves; i++)
			found += effect(&puzzle->events[order[i]], puzzle->point[p]) == LZ_REGISTERED &&
				 predict(puzzle->events, puzzle->count, order, i, puzzle->point[p],
					 puzzle->before[p]) == LZ_REGISTERED;
	}
	return found;
}

/* Whether an order puts the unmapping of the old place of an mremap before its move: both are one call. */
static bool splits_a_move(const struct puzzle *puzzle, const uint8_t *order)
{
	for (uint32_t i = 0; i < puzzle->moves; i++)
		for (uint32_t k = i + 1; k < puzzle->moves; k++)
			if (order[k] < order[i] && is_second_half(&puzzle->events[order[i]], &puzzle->events[order[k]]))
				return true;
	return false;
}

/*
 * Try every order of the moves, the one they were read in first. The one that contradicts least; then, in which the
 * fewest have passed each other.
 */
static void try_orders(struct puzzle *puzzle, uint8_t *order, uint32_t placed, uint32_t used)
{
	bool is_late = false; /* one that was read before is not placed yet */

	if (!puzzle->best_score)
		return;
	if (placed == puzzle->moves) {
		uint32_t score = contradictions(puzzle, order, placed, puzzle->now) + collisions(puzzle, order);

		if (splits_a_move(puzzle, order))
			return;
		score *= LZ_BATCH * LZ_BATCH;
		for (uint32_t i = 0; i < placed; i++)
			for (uint32_t k = i + 1; k < placed; k++)
				score += order[k] < order[i];
		if (score < puzzle->best_score) {
			puzzle->best_score = score;
			memcpy(puzzle->best, order, placed);
		}
		return;
	}
	for (uint32_t i = 0; i < puzzle->moves; i++) {
		if (used & 1U << i)
			continue;
		/* Who drops goes on only when the event was read: what was read before had happened. */
		if (!is_late || puzzle->events[puzzle->move[i]].event != UFFD_EVENT_REMOVE) {
			order[placed] = puzzle->move[i];
			try_orders(puzzle, order, placed + 1, used | 1U << i);
		}
		is_late = true;
	}
}

/* Whether two events are about a common address: then their order matters. */
static bool touch(const struct lz_event *one, const struct lz_event *other)
{
	const uint64_t length = one->end - one->start, other_length = other->end - other->start;

	for (int of_one = 0; of_one < (one->event == UFFD_EVENT_REMAP ? 2 : 1); of_one++) {
		for (int of_other = 0; of_other < (other->event == UFFD_EVENT_REMAP ? 2 : 1); of_other++) {
			uint64_t start = of_one ? one->to : one->start;
			uint64_t other_start = of_other ? other->to : other->start;

			if (start < other_start + other_length && other_start < start + length)
				return true;
		}
	}
	return false;
}

/* Where the forks of a batch go among its moves; sets of moves are bits by their place in puzzle->best. */
struct plan {
	const struct puzzle *puzzle;
	uint32_t wrong[LZ_BATCH][1U << LZ_BATCH]; /* see wrong_for_fork(), plus 1; 0: not asked */
	enum lz_truth in_child[LZ_BATCH][POINTS];
	uint32_t best_cost;
	uint8_t best[LZ_BATCH];
};

/* How much the child of a fork, by event, has other than if just these moves had taken effect before. */
static uint32_t wrong_for_fork(struct plan *plan, uint8_t fork, uint32_t set)
{
	const struct puzzle *puzzle = plan->puzzle;
	uint8_t order[LZ_BATCH];
	uint32_t count = 0;

	if (!plan->wrong[fork][set]) {
		for (uint32_t i = 0; i < puzzle->moves; i++)
			if (set >> i & 1)
				order[count++] = puzzle->best[i];
		plan->wrong[fork][set] = contradictions(puzzle, order, count, plan->in_child[fork]) * CONTRADICTION + 1;
	}
	return plan->wrong[fork][set] - 1;
}

/* Whether two events were read in this order; an overlapped fork as if before the drop. */
static bool was_before(const struct puzzle *puzzle, uint32_t one, uint32_t other)
{
	const struct lz_event *events = puzzle->events;
	uint32_t drop = one, fork = other;

	if (one > other) {
		drop = other;
		fork = one;
	}
	if (!events[fork].overlapped || events[drop].event != UFFD_EVENT_REMOVE)
		return one < other;
	/* The child has what the madvise, not yet gone on, was to drop. With several, the last: it is rare enough
	 * that one thread passes another, and a fork is the slowest to be passed. */
	for (uint32_t i = drop + 1; i < fork; i++)
		if (events[i].event == UFFD_EVENT_REMOVE)
			return one < other;
	return one == fork;
}

/* What speaks against an event being the next: events that were read before it and are not placed yet. */
static uint32_t lateness(const struct plan *plan, uint32_t next, uint32_t used)
{
	const struct lz_event *events = plan->puzzle->events;
	bool is_late = false;
	uint32_t distance = 0;

	for (uint32_t i = 0; i < plan->puzzle->count; i++) {
		if (i == next || used >> i & 1 || !was_before(plan->puzzle, i, next))
			continue;
		is_late = true;
		/* It goes on, and drops, only when its event was read. */
		if (events[next].event == UFFD_EVENT_REMOVE && events[i].event == UFFD_EVENT_FORK)
			return NEVER;
		if ((events[i].event == UFFD_EVENT_FORK) != (events[next].event == UFFD_EVENT_FORK))
			distance += i < next ? next - i : i - next;
	}
	return is_late ? LATE + distance : 0;
}

/*
 * Try every order that keeps the moves that touch each other in the order found, as they were read first. The one that
 * contradicts least; then, in which the fewest events were read late: each is a thread that stood still in between.
 */
static void place_rest(struct plan *plan, uint8_t *order, uint32_t placed, uint32_t used, uint32_t set, uint32_t cost)
{
	const struct puzzle *puzzle = plan->puzzle;

	if (cost >= plan->best_cost)
		return;
	if (placed == plan->puzzle->count) {
		plan->best_cost = cost;
		memcpy(plan->best, order, placed);
		return;
	}
	for (uint32_t next = 0; next < plan->puzzle->count; next++) {
		bool is_fork = puzzle->events[next].event == UFFD_EVENT_FORK, is_free = true;
		uint32_t at = 0, late;

		if (used >> next & 1)
			continue;
		for (; !is_fork && puzzle->best[at] != next; at++)
			is_free &= set >> at & 1 || !touch(&puzzle->events[puzzle->best[at]], &puzzle->events[next]);
		late = is_free ? lateness(plan, next, used) : NEVER;
		if (late == NEVER)
			continue;
		order[placed] = (uint8_t)next;
		place_rest(plan, order, placed + 1, used | 1U << next, is_fork ? set : set | 1U << at,
			   cost + late + (is_fork ? wrong_for_fork(plan, (uint8_t)next, set) : 0));
	}
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
			    predict(events, count, order, i, address, truth(context, LZ_BEFORE, address)) !=
				    LZ_REGISTERED)
				continue;
			memmove(&order[i + 1], &order[i], from - i);
			order[i++] = unmapping;
		}
	}
}

/*
 * What is known of a point in the child of a fork. That it is not registered there proves something only if nothing
 * else is either of what an event names with it: MADV_DONTFORK may have kept a part from the child.
 */
static enum lz_truth truth_in_child(const struct puzzle *puzzle, uint32_t fork, uint64_t address,
				    lz_truth_function *truth, void *context)
{
	enum lz_truth known = truth(context, (int)fork, address);

	for (uint32_t i = 0; i < puzzle->count && known == LZ_NOT_REGISTERED; i++) {
		const struct lz_event *event = &puzzle->events[i];
		const uint64_t pages = (event->end - event->start) >> LZ_PAGE_SHIFT;

		if (effect(event, address) == LZ_UNKNOWN || (event->start != address && event->to != address))
			continue;
		for (uint64_t k = 1; k <= SAMPLES; k++) {
			uint64_t page = k == SAMPLES ? pages - 1 : pages * k / SAMPLES;

			if (page && truth(context, (int)fork, address + (page << LZ_PAGE_SHIFT)) != LZ_NOT_REGISTERED)
				return LZ_UNKNOWN;
		}
	}
	return known;
}

void lz_layout_order(const struct lz_event *events, uint32_t count, lz_truth_function *truth, void *context,
		     uint8_t *order)
{
	struct puzzle puzzle = { .events = events, .count = count, .best_score = UINT32_MAX };
	uint8_t attempt[LZ_BATCH];
	struct plan plan = { .puzzle = &puzzle, .best_cost = UINT32_MAX };
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
	if (puzzle.moves == count) {
		memcpy(order, puzzle.best, count);
		return;
	}
	for (uint32_t i = 0; i < count; i++)
		for (uint32_t p = 0; p < puzzle.points && events[i].event == UFFD_EVENT_FORK; p++)
			plan.in_child[i][p] = truth_in_child(&puzzle, i, puzzle.point[p], truth, context);
	place_rest(&plan, attempt, 0, 0, 0, 0);
	memcpy(order, plan.best, count);
}
