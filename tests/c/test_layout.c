/* SPDX-License-Identifier: MIT */
/*
 * The order of layout events against a model of the kernel: a few pages with contents that move about, changes made
 * one after the other, and events read in an order in which two neighbours have passed each other. Applying the
 * events in the order found must give the contents that the changes gave, in the task and in every forked child.
 */
#include "../../cbits/layout.h"

#include "../../cbits/abi.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGES 12U
#define EVENTS 5U
#define PAGE 4096ULL

struct world {
	uint8_t content[PAGES]; /* 0: not registered; else whose page it is; 200: dropped */
};

struct kernel {
	struct world before, now, child[EVENTS];
};

static void change(struct world *world, const struct lz_event *event)
{
	uint64_t first = event->start / PAGE, end = event->end / PAGE, to = event->to / PAGE;
	struct world old = *world;

	switch (event->event) {
	case UFFD_EVENT_REMAP:
		for (uint64_t p = first; p < end; p++)
			world->content[p] = 0;
		for (uint64_t p = first; p < end; p++)
			world->content[to + p - first] = old.content[p];
		break;
	case UFFD_EVENT_UNMAP:
		for (uint64_t p = first; p < end; p++)
			world->content[p] = 0;
		break;
	case UFFD_EVENT_REMOVE:
		for (uint64_t p = first; p < end; p++)
			if (world->content[p])
				world->content[p] = 200;
		break;
	default:
		break;
	}
}

static enum lz_truth truth(void *context, int child, uint64_t address)
{
	const struct kernel *kernel = context;
	const struct world *world = child == LZ_BEFORE ? &kernel->before :
				    child < 0	       ? &kernel->now :
							 &kernel->child[child];

	if (child == LZ_BEFORE)
		return world->content[address / PAGE] ? LZ_REGISTERED : LZ_UNKNOWN;
	return world->content[address / PAGE] ? LZ_REGISTERED : LZ_NOT_REGISTERED;
}

static uint32_t dice(uint32_t sides)
{
	return (uint32_t)rand() % sides;
}

/* A change that the kernel would make now; false when the draw is not possible. */
static bool draw(const struct world *world, struct lz_event *event, bool may_drop)
{
	uint64_t pages = 1 + dice(2), first = dice(PAGES - 1), to = dice(PAGES - 1);

	*event = (struct lz_event){ .uffd = -1 };
	for (uint64_t p = first; p < first + pages; p++)
		if (p >= PAGES || !world->content[p])
			return false;
	event->start = first * PAGE;
	event->end = (first + pages) * PAGE;
	switch (dice(may_drop ? 4 : 3)) {
	case 0:
		event->event = UFFD_EVENT_UNMAP;
		return true;
	case 1:
		event->event = UFFD_EVENT_REMAP;
		event->to = to * PAGE;
		for (uint64_t p = to; p < to + pages; p++) /* only to a free place: else an UNMAP comes with it */
			if (p >= PAGES || world->content[p])
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

static int one_case(void)
{
	struct lz_event made[EVENTS], read[EVENTS];
	struct world child_of[EVENTS], applied, found[EVENTS];
	struct kernel kernel;
	uint32_t passed = dice(EVENTS - 1), count = 2 + dice(EVENTS - 1);
	uint8_t order[LZ_BATCH], at[EVENTS];
	bool both;

	for (uint32_t p = 0; p < PAGES; p++)
		kernel.before.content[p] = (uint8_t)(dice(3) ? p + 1 : 0);
	kernel.now = kernel.before;
	for (uint32_t i = 0; i < count; i++) {
		if (!draw(&kernel.now, &made[i], true))
			return 0;
		child_of[i] = kernel.now;
		change(&kernel.now, &made[i]);
		at[i] = (uint8_t)i;
	}
	if (passed + 1 >= count)
		return 0;
	/* What passes must be of another thread, and a drop passes nothing but a fork: see layout.h. */
	both = made[passed].event != UFFD_EVENT_REMOVE && made[passed + 1].event != UFFD_EVENT_REMOVE;
	if (!both && !(made[passed].event == UFFD_EVENT_FORK && made[passed + 1].event == UFFD_EVENT_REMOVE))
		return 0;
	at[passed] = (uint8_t)(passed + 1);
	at[passed + 1] = (uint8_t)passed;
	for (uint32_t i = 0; i < count; i++) {
		read[i] = made[at[i]];
		kernel.child[i] = child_of[at[i]];
	}
	if (!both)
		read[passed + 1].overlapped = true;
	lz_layout_order(read, count, truth, &kernel, order);
	applied = kernel.before;
	for (uint32_t i = 0; i < count; i++) {
		found[order[i]] = applied;
		change(&applied, &read[order[i]]);
	}
	if (memcmp(&applied, &kernel.now, sizeof(applied)))
		return -1;
	for (uint32_t i = 0; i < count; i++)
		if (read[i].event == UFFD_EVENT_FORK && memcmp(&found[i], &kernel.child[i], sizeof(applied)))
			return -1;
	return 1;
}

int main(void)
{
	uint32_t right = 0, wrong = 0;

	srand(1);
	for (uint32_t i = 0; i < 3000000; i++) {
		int result = one_case();

		right += result > 0;
		wrong += result < 0;
	}
	printf("layout: %u orders found, %u hidden\n", right, wrong);
	/* Taken as they were read, a third of these orders is wrong. */
	return wrong * 1000 > right; /* what is hidden is a page left and entered again in one batch */
}
