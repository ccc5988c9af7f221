/* SPDX-License-Identifier: MIT */
/*
 * The order of layout events against a model of the kernel: a few pages with contents that move about, changes made
 * one after the other, and events read in an order in which two neighbours have passed each other. VMAs may have
 * grown, before and in between, which no event tells. Applying the events in the order found must give the contents
 * that the changes gave, in the task and in every forked child. Then threads that have memory of their own and pass
 * each other as they like: what each of them knows has to be right without exception.
 */
#include "../../cbits/layout.h"

#include "../../cbits/abi.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGES 12U
#define MOST 24U /* pages of any world */
#define EVENTS 5U
#define PAGE 4096ULL
#define ZEROS 200
#define LEFT 1 /* in an event's uffd field, unused there: an mremap that leaves its old place mapped */

#define GROWN 201 /* as ZEROS, in memory that nobody has told us of */

struct world {
	uint8_t content[MOST]; /* 0: not registered; else whose page it is; ZEROS: dropped, or left by DONTUNMAP */
	bool joined[MOST + 1]; /* in one VMA with the page before */
};

struct kernel {
	struct world before, now, child[LZ_BATCH];
};

static void change(struct world *world, const struct lz_event *event)
{
	uint64_t first = event->start / PAGE, end = event->end / PAGE, to = event->to / PAGE;
	struct world old = *world;

	switch (event->event) {
	case UFFD_EVENT_REMAP:
		for (uint64_t p = first; p < end; p++)
			world->content[p] = event->uffd == LEFT ? ZEROS : 0;
		for (uint64_t p = first; p < end; p++) {
			world->content[to + p - first] = old.content[p];
			world->joined[to + p - first] = p > first && old.joined[p];
		}
		world->joined[to + end - first] = false;
		break;
	case UFFD_EVENT_UNMAP:
		for (uint64_t p = first; p < end; p++) {
			world->content[p] = 0;
			world->joined[p] = false;
		}
		world->joined[end] = false;
		break;
	case UFFD_EVENT_REMOVE:
		for (uint64_t p = first; p < end; p++)
			if (world->content[p])
				world->content[p] = ZEROS;
		break;
	default:
		break;
	}
}

static enum lz_truth truth(void *context, int child, uint64_t address)
{
	const struct kernel *kernel = context;
	const struct world *world = child == LZ_BEFORE ? &kernel->before :
				    child < 0          ? &kernel->now :
							 &kernel->child[child];

	if (child == LZ_BEFORE)
		return world->content[address / PAGE] % GROWN ? LZ_REGISTERED : LZ_UNKNOWN;
	if (!world->content[address / PAGE])
		return LZ_NOT_REGISTERED;
	return world->joined[address / PAGE] ? LZ_UNKNOWN : LZ_REGISTERED;
}

/* A VMA grows in place by a page, where there is room for it. */
static void grow(struct world *world, uint64_t page)
{
	if (world->content[page] && !world->content[page + 1]) {
		world->content[page + 1] = GROWN;
		world->joined[page + 1] = true;
	}
}

static uint32_t dice(uint32_t sides)
{
	return (uint32_t)rand() % sides;
}

/* A change that the kernel would make now; false when the draw is not possible. */
static bool draw(const struct world *world, uint32_t room, struct lz_event *event, bool may_drop)
{
	uint64_t pages = 1 + dice(2), first = dice(room - 1), to = dice(room - 1);

	*event = (struct lz_event){ .uffd = -1 };
	for (uint64_t p = first; p < first + pages; p++)
		if (p >= room || !world->content[p])
			return false;
	event->start = first * PAGE;
	event->end = (first + pages) * PAGE;
	switch (dice(may_drop ? 4 : 3)) {
	case 0:
		event->event = UFFD_EVENT_UNMAP;
		return true;
	case 1:
		event->event = UFFD_EVENT_REMAP;
		event->uffd = dice(3) ? -1 : LEFT;
		event->to = to * PAGE;
		for (uint64_t p = to; p < to + pages; p++) /* only to a free place: else an UNMAP comes with it */
			if (p >= room || world->content[p])
				return false;
		return true;
	case 2:
		event->event = UFFD_EVENT_FORK;
		event->start = event->end = 0;
		return true;
	default:
		event->event = UFFD_EVENT_REMOVE;
		return true;
	}
}

/* What a task reads: memory that is not ours and zeros are the same to us. */
static bool same(const struct world *one, const struct world *other, uint32_t first, uint32_t end)
{
	for (uint32_t p = first; p < end; p++)
		if (one->content[p] % GROWN % ZEROS != other->content[p] % GROWN % ZEROS)
			return false;
	return true;
}

/* Order events as read and apply them to what there was before: what that leaves, and what each finds (found). */
static struct world apply_as_found(const struct lz_event *read, uint32_t count, struct kernel *kernel,
				   struct world *found)
{
	struct world applied = kernel->before;
	uint8_t order[LZ_BATCH];

	lz_layout_order(read, count, truth, kernel, order);
	for (uint32_t i = 0; i < count; i++) {
		found[order[i]] = applied;
		change(&applied, &read[order[i]]);
	}
	return applied;
}

static int one_case(void)
{
	struct lz_event made[LZ_BATCH + 1], read[LZ_BATCH];
	struct world child_of[LZ_BATCH], applied, found[LZ_BATCH];
	struct kernel kernel;
	uint32_t wanted = 2 + dice(EVENTS - 1), count = 0, passed;
	uint8_t at[LZ_BATCH];
	bool call[LZ_BATCH] = { false }; /* the second event of one system call */
	bool grew[LZ_BATCH] = { false }; /* before it */
	bool both, passes = dice(4);

	for (uint32_t p = 0; p < PAGES; p++) {
		kernel.before.content[p] = (uint8_t)(dice(3) ? p + 1 : 0);
		kernel.before.joined[p] = p && kernel.before.content[p] && kernel.before.content[p - 1] && dice(2);
	}
	kernel.before.joined[PAGES] = false;
	for (uint32_t n = dice(3); n-- > 0;)
		grow(&kernel.before, dice(PAGES - 1));
	kernel.now = kernel.before;
	while (count < wanted) {
		if (count + 2 > LZ_BATCH || !draw(&kernel.now, PAGES, &made[count], true))
			return 0;
		grew[count] = !dice(4);
		if (grew[count])
			grow(&kernel.now, dice(PAGES - 1));
		child_of[count] = kernel.now;
		change(&kernel.now, &made[count]);
		at[count] = (uint8_t)count;
		if (made[count].event == UFFD_EVENT_REMAP && made[count].uffd != LEFT) {
			made[count + 1] = made[count];
			made[count + 1].event = UFFD_EVENT_UNMAP;
			count++;
			at[count] = (uint8_t)count;
			call[count] = true;
			child_of[count] = kernel.now;
		}
		count++;
	}
	passed = dice(count);
	if (passed + 1 >= count || call[passed + 1])
		return 0;
	/* What passes must be of another thread, and a drop passes nothing but a fork: see layout.h. */
	both = made[passed].event != UFFD_EVENT_REMOVE && made[passed + 1].event != UFFD_EVENT_REMOVE;
	if (passes && !both && !(made[passed].event == UFFD_EVENT_FORK && made[passed + 1].event == UFFD_EVENT_REMOVE))
		return 0;
	if (passes) {
		at[passed] = (uint8_t)(passed + 1);
		at[passed + 1] = (uint8_t)passed;
	}
	for (uint32_t i = 0; i < count; i++) {
		read[i] = made[at[i]];
		kernel.child[i] = child_of[at[i]];
	}
	if (passes && !both)
		read[passed + 1].overlapped = true;
	applied = apply_as_found(read, count, &kernel, found);
	for (uint32_t i = 0; i < count; i++)
		if (read[i].event == UFFD_EVENT_FORK && !same(&found[i], &kernel.child[i], 0, PAGES))
			return passes ? -1 : -2;
	return same(&applied, &kernel.now, 0, PAGES) ? 1 : passes ? -1 : -2;
}

/*
 * Threads with memory of their own, none of which knows of the others, and no end to how they pass each other: an event
 * is read any time after its change, and a thread's next call comes after its last event was read. What a thread then
 * relies on has to be right always: all of what it has, and in a child that it forks, its own part.
 */
#define THREADS 3U
#define OWN 8U /* pages of a thread; the last one is never mapped */
#define ALL (THREADS * OWN)

struct thread {
	struct lz_event queued[2];
	uint32_t events;  /* queued and not read */
	bool is_dropping; /* its REMOVE was read, and the pages are still there */
	struct lz_event drop;
};

/* The thread that an event is of, by what it is about; a fork says it in its field `to`. */
static uint32_t thread_of(const struct lz_event *event)
{
	return (uint32_t)((event->event == UFFD_EVENT_FORK ? event->to : event->start / PAGE) / OWN);
}

enum step { NOTHING, DROPPED, READ_ONE };

/* Perhaps let a thread drop what it was to, or have its next event read. */
static enum step go_on(struct thread *thread, struct world *now, struct lz_event *read)
{
	if (thread->is_dropping && dice(2)) {
		change(now, &thread->drop);
		thread->is_dropping = false;
		return DROPPED;
	}
	if (!thread->events || !dice(2))
		return NOTHING;
	*read = thread->queued[0];
	thread->queued[0] = thread->queued[1];
	thread->events--;
	thread->is_dropping = read->event == UFFD_EVENT_REMOVE;
	thread->drop = *read;
	return READ_ONE;
}

static bool is_any_in_a_call(const struct thread *threads)
{
	for (uint32_t i = 0; i < THREADS; i++)
		if (threads[i].events || threads[i].is_dropping)
			return true;
	return false;
}

static void call(struct world *world, struct thread *thread, uint32_t number)
{
	struct lz_event event;
	struct world own = { .content = { 0 } };
	const uint64_t base = number * OWN * PAGE;

	memcpy(own.content, &world->content[number * OWN], OWN);
	if (!draw(&own, OWN, &event, true))
		return;
	event.start += base;
	event.end += base;
	event.to += base;
	if (event.event == UFFD_EVENT_FORK)
		event.to = number * OWN;
	thread->queued[thread->events++] = event;
	if (event.event != UFFD_EVENT_REMOVE)
		change(world, &event);
	if (event.event == UFFD_EVENT_REMAP && event.uffd != LEFT) {
		event.event = UFFD_EVENT_UNMAP;
		thread->queued[thread->events++] = event;
	}
}

static int one_case_of_threads(void)
{
	struct lz_event read[LZ_BATCH + 1];
	struct world child_of[THREADS], applied, found[LZ_BATCH];
	struct thread threads[THREADS] = { 0 };
	struct kernel kernel = { 0 };
	uint32_t count = 0, calls = 2 + dice(3);

	for (uint32_t p = 0; p < ALL; p++) {
		kernel.before.content[p] = (uint8_t)(p % OWN < OWN - 1 && dice(3) ? p + 1 : 0);
		kernel.before.joined[p] = p && kernel.before.content[p] && kernel.before.content[p - 1] && dice(2);
	}
	kernel.now = kernel.before;
	while (calls || is_any_in_a_call(threads)) {
		uint32_t number = dice(THREADS);
		struct thread *thread = &threads[number];
		enum step step = go_on(thread, &kernel.now, &read[count]);

		if (step == READ_ONE) {
			if (count == LZ_BATCH)
				return 0;
			kernel.child[count++] = child_of[number];
		} else if (step == NOTHING && !thread->events && !thread->is_dropping && calls) {
			if (!dice(4)) /* no event tells of it */
				grow(&kernel.now, number * OWN + dice(OWN - 2));
			child_of[number] = kernel.now;
			call(&kernel.now, thread, number);
			calls--;
		}
	}
	applied = apply_as_found(read, count, &kernel, found);
	if (!same(&applied, &kernel.now, 0, ALL))
		return -1;
	for (uint32_t i = 0; i < count; i++) {
		uint32_t own = thread_of(&read[i]) * OWN;

		if (read[i].event == UFFD_EVENT_FORK && !same(&found[i], &kernel.child[i], own, own + OWN))
			return -2;
	}
	return count > 0;
}

/*
 * Threads that have blocks of their own and move them to wherever there is room, as mremap does by itself: to where
 * another one's has just been, too. Where two UNMAPs of one place are in a batch nobody can tell which was which.
 */
#define BLOCKS 8U
#define BLOCK 2U  /* pages */
#define STRIDE 3U /* pages from block to block: no VMA touches another */
#define NOBODY 255

static struct lz_event draw_block(const struct world *world, uint8_t *owner, uint8_t number)
{
	const uint64_t from = dice(BLOCKS), to = dice(BLOCKS);
	struct lz_event event = { .uffd = -1, .start = from * STRIDE * PAGE };

	event.end = event.start + BLOCK * PAGE;
	switch (owner[from] == number ? dice(4) : 3) {
	case 0:
		event.event = UFFD_EVENT_UNMAP;
		owner[from] = NOBODY;
		return event;
	case 1:
		event.event = UFFD_EVENT_REMOVE;
		return event;
	case 2:
		if (world->content[to * STRIDE])
			break;
		event.event = UFFD_EVENT_REMAP;
		event.to = to * STRIDE * PAGE;
		owner[from] = NOBODY;
		owner[to] = number;
		return event;
	default:
		break;
	}
	return (struct lz_event){ .event = UFFD_EVENT_FORK, .uffd = -1 };
}

static int one_case_of_movers(void)
{
	struct lz_event read[LZ_BATCH + 1];
	uint8_t owner[BLOCKS], owner_then[THREADS][BLOCKS], owned[LZ_BATCH][BLOCKS], by[LZ_BATCH];
	struct world child_of[THREADS], applied, found[LZ_BATCH];
	struct thread threads[THREADS] = { 0 };
	struct kernel kernel = { 0 };
	uint32_t count = 0, calls = 2 + dice(3);

	for (uint32_t b = 0; b < BLOCKS; b++) {
		owner[b] = (uint8_t)(dice(4) ? b % THREADS : NOBODY);
		for (uint32_t p = b * STRIDE; p < b * STRIDE + BLOCK; p++)
			kernel.before.content[p] = (uint8_t)(owner[b] == NOBODY ? 0 : p + 1);
	}
	kernel.now = kernel.before;
	while (calls || is_any_in_a_call(threads)) {
		uint8_t number = (uint8_t)dice(THREADS);
		struct thread *thread = &threads[number];
		enum step step = go_on(thread, &kernel.now, &read[count]);

		if (step == READ_ONE) {
			if (count == LZ_BATCH)
				return 0;
			by[count] = number;
			kernel.child[count] = child_of[number];
			memcpy(owned[count++], owner_then[number], BLOCKS);
		} else if (step == NOTHING && !thread->events && !thread->is_dropping && calls) {
			child_of[number] = kernel.now;
			memcpy(owner_then[number], owner, BLOCKS);
			thread->queued[0] = draw_block(&kernel.now, owner, number);
			thread->queued[1] = thread->queued[0];
			thread->queued[1].event = UFFD_EVENT_UNMAP;
			thread->events = thread->queued[0].event == UFFD_EVENT_REMAP ? 2 : 1;
			if (thread->queued[0].event != UFFD_EVENT_REMOVE)
				change(&kernel.now, &thread->queued[0]);
			calls--;
		}
	}
	applied = apply_as_found(read, count, &kernel, found);
	if (!same(&applied, &kernel.now, 0, MOST))
		return -1;
	for (uint32_t i = 0; i < count; i++)
		for (uint32_t b = 0; read[i].event == UFFD_EVENT_FORK && b < BLOCKS; b++)
			if (owned[i][b] == by[i] && !same(&found[i], &kernel.child[i], b * STRIDE, b * STRIDE + BLOCK))
				return -1;
	return count > 0;
}

/* Changes in their true order, and as they were read: what is found must leave what they left. */
static bool is_found(const struct lz_event *made, uint32_t count, const uint8_t *as_read, uint64_t mapped)
{
	struct lz_event read[LZ_BATCH] = { 0 };
	struct world applied, child_of[LZ_BATCH], found[LZ_BATCH];
	struct kernel kernel = { 0 };

	for (uint32_t p = 0; p < MOST; p++)
		kernel.before.content[p] = (uint8_t)(mapped >> p & 1 ? p + 1 : 0);
	kernel.now = kernel.before;
	for (uint32_t i = 0; i < count; i++) {
		child_of[i] = kernel.now;
		change(&kernel.now, &made[i]);
	}
	for (uint32_t i = 0; i < count; i++) {
		read[i] = made[as_read[i]];
		kernel.child[i] = child_of[as_read[i]];
	}
	applied = apply_as_found(read, count, &kernel, found);
	for (uint32_t i = 0; i < count; i++)
		if (read[i].event == UFFD_EVENT_FORK && !same(&found[i], &kernel.child[i], 0, MOST))
			return false;
	return same(&applied, &kernel.now, 0, MOST);
}

#define EVENT(what, from, length, ...)                                                                                 \
	{ .event = UFFD_EVENT_##what,                                                                                  \
	  .start = (from) * PAGE,                                                                                      \
	  .end = ((from) + (length)) * PAGE,                                                                           \
	  .uffd = -1,                                                                                                  \
	  __VA_ARGS__ }

static bool named_cases(void)
{
	/* One thread moves 2 to 10 and its second event is late; another one moves 6 to where that was, and drops it.
	 */
	const struct lz_event drop[] = { EVENT(REMAP, 2, 2, .to = 10 * PAGE), EVENT(UNMAP, 2, 2),
					 EVENT(REMAP, 6, 2, .to = 2 * PAGE), EVENT(UNMAP, 6, 2), EVENT(REMOVE, 2, 2) };
	/* A fork that an unmapping was read before, and a move of the thread that has forked. */
	const struct lz_event fork[] = { EVENT(FORK, 0, 0), EVENT(UNMAP, 10, 2), EVENT(REMAP, 2, 2, .to = 10 * PAGE),
					 EVENT(UNMAP, 2, 2) };
	/* Two threads: a move, a fork, and an unmapping after it, that is read before the move's second event. */
	const struct lz_event between[] = { EVENT(REMAP, 2, 2, .to = 10 * PAGE), EVENT(UNMAP, 2, 2), EVENT(FORK, 0, 0),
					    EVENT(UNMAP, 6, 2) };

	return is_found(drop, 5, (const uint8_t[]){ 0, 2, 3, 4, 1 }, 0x0cc) &&
	       is_found(fork, 4, (const uint8_t[]){ 1, 0, 2, 3 }, 0xc0c) &&
	       is_found(between, 4, (const uint8_t[]){ 0, 2, 3, 1 }, 0x0cc);
}

int main(void)
{
	uint32_t right = 0, hidden = 0, disturbed = 0, well = 0, wrong = 0, wrong_child = 0;

	srand(1);
	for (uint32_t i = 0; i < 6000000; i++) {
		int result = one_case();

		right += result > 0;
		hidden += result == -1;
		disturbed += result == -2;
	}
	printf("layout: %u orders found, %u hidden, %u disturbed\n", right, hidden, disturbed);
	for (uint32_t i = 0; i < 3000000; i++) {
		int result = one_case_of_threads();

		well += result > 0;
		wrong += result == -1;
		wrong_child += result == -2;
	}
	printf("layout: %u batches of threads well, %u wrong, %u wrong in a child\n", well, wrong, wrong_child);
	/* What was read in order stays in order, but where a VMA shrinks, grows again and loses what was before, all in
	 * one batch. Of what was not, most is found; hidden is a page that was left and entered again within one batch,
	 * and the end of a VMA that is unmapped while a thread forks, which cannot know of it. */
	if (wrong || wrong_child || well < 10000)
		return 1;
	well = wrong = 0;
	for (uint32_t i = 0; i < 1000000; i++) {
		int result = one_case_of_movers();

		well += result > 0;
		wrong += result < 0;
	}
	printf("layout: %u batches of movers well, %u wrong\n", well, wrong);
	if (wrong * 20000ULL > well || !named_cases())
		return 1;
	return disturbed * 100000ULL > right || right < 10000 || hidden * 20ULL > right;
}
