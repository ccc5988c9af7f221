/* SPDX-License-Identifier: MIT */
/* Reading the queue of a task and applying layout events: what each does to what we know. Their order: layout.h. */
#define _GNU_SOURCE 1
#include "worker.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define MOST_READS 64U /* of a queue that does not get empty */
#define WATCH_NS 3000U /* less than a thread needs from the end of a madvise to the layout change of a fork */

/* The events of a task's batch. */
static struct lz_event *events_of(struct lz_task *task)
{
	return task->event[task->batch.half];
}

static void drop_range(struct lz_worker *worker, struct lz_task *task, uint64_t start, uint64_t end)
{
	uint64_t dropped = lz_space_count_missing(worker->engine->arena, &task->space, start, end);

	lz_count(&worker->counters->dropped_pages, dropped);
	lz_forget_left(task, dropped);
}

static void apply_fork(struct lz_worker *worker, struct lz_task *task, const struct lz_event *event)
{
	const int uffd = event->uffd;
	struct lz_engine *engine = worker->engine;
	struct lz_task like = {
		.image_pid = task->image_pid,
		.parent = (int32_t)task->number,
		.born_ns = event->read_ns,
		.uffd = uffd,
		.status = LZ_TASK_SERVING,
		.worker = worker->number,
		.handed_back = task->handed_back,
		.held_pages = task->held_pages, /* those that it has, too */
	};
	struct lz_task *child = NULL;
	int result;

	for (uint32_t i = task->number + 1; task->adopted_late; i++) {
		const struct lz_task *other = lz_engine_task_at(engine, i);

		if (!other)
			break;
		/* The process that died had come that far; and the child may have ended since. */
		if (other->parent == (int32_t)task->number && other->born_ns == event->read_ns)
			return;
	}
	lz_count(&worker->counters->forks, 1);
	result = lz_space_fork(engine->arena, &task->space, &like.space);
	if (!result) {
		like.left_pages = task->left_pages;
		for (uint32_t i = 0; i < task->space.regions; i++) {
			const struct lz_region *region = lz_space_region(engine->arena, &task->space, i);

			if (region->flags & LZ_REGION_WIPED_ON_FORK)
				like.left_pages -= lz_space_count_missing(engine->arena, &task->space, region->start,
									  region->start + BYTES(region->pages));
		}
		like.image_pages = like.left_pages;
		result = lz_engine_add_task(engine, &like, &child);
		if (result)
			lz_space_drop(engine->arena, &like.space);
	}
	if (!result)
		result = lz_task_adopt(worker, child);
	if (!result) {
		lz_notify(worker,
			  (struct lz_notice){ .kind = LZ_NOTICE_FORKED, .task = child->number, .value = task->number });
		return;
	}
	/* No room for it: it must not read zeros. */
	lz_task_poison(worker, task, uffd);
	close(uffd);
	if (child) {
		child->uffd = -1;
		__atomic_store_n(&child->status, LZ_TASK_FAILED, __ATOMIC_RELEASE);
	}
	lz_notify(worker, (struct lz_notice){ .kind = LZ_NOTICE_TASK_FAILED,
					      .task = child ? child->number : task->number,
					      .error = result });
}

int lz_events_begin_change(struct lz_worker *worker, struct lz_task *task)
{
	int result = lz_space_save(worker->engine->arena, &task->space, &task->saved);

	if (!result)
		__atomic_store_n(&task->batch.progress, task->batch.progress | 1, __ATOMIC_RELEASE);
	LZ_POINT("changing", 0);
	return result;
}

void lz_events_end_change(struct lz_task *task, uint32_t applied)
{
	LZ_POINT("changed", 0);
	__atomic_store_n(&task->batch.progress, (uint16_t)(2 * applied), __ATOMIC_RELEASE);
}

/* What an event does to what we know. A change of the regions is begun, and not ended, here. */
static int apply_event(struct lz_worker *worker, struct lz_task *task, const struct lz_event *event)
{
	struct lz_arena *arena = worker->engine->arena;
	int result;

	switch (event->event) {
	case UFFD_EVENT_FORK:
		apply_fork(worker, task, event);
		return 0;
	case UFFD_EVENT_REMOVE: /* twice is as good as once */
		drop_range(worker, task, event->start, event->end);
		lz_space_remove(arena, &task->space, event->start, event->end);
		return 0;
	case UFFD_EVENT_REMAP:
		drop_range(worker, task, event->to, event->to + (event->end - event->start));
		result = lz_events_begin_change(worker, task);
		if (!result)
			result =
				lz_space_remap(arena, &task->space, event->start, event->to, event->end - event->start);
		break;
	default: /* UFFD_EVENT_UNMAP */
		drop_range(worker, task, event->start, event->end);
		result = lz_events_begin_change(worker, task);
		if (!result)
			result = lz_space_unmap(arena, &task->space, event->start, event->end);
	}
	lz_uffd_wake(task->uffd, event->start, event->end - event->start);
	return result;
}

struct question {
	struct lz_worker *worker;
	struct lz_task *task;
};

static enum lz_truth registered(void *context, int child, uint64_t address)
{
	const struct question *question = context;
	struct lz_task *task = question->task;
	enum lz_truth answer = LZ_UNKNOWN;
	int uffd, result;

	if (child == LZ_BEFORE)
		return lz_space_find(question->worker->engine->arena, &task->space, address) < 0 ? LZ_UNKNOWN :
												   LZ_REGISTERED;
	uffd = child < 0 ? task->uffd : events_of(task)[child].uffd;
	result = lz_uffd_probe(uffd, address, LZ_PAGE_SIZE);
	if (result == -EFAULT && lz_uffd_probe(uffd, address - LZ_PAGE_SIZE, 2 * LZ_PAGE_SIZE) == -ENOENT)
		answer = LZ_REGISTERED; /* and not with the page before it in one VMA */
	else if (result == -ENOENT)
		answer = LZ_NOT_REGISTERED;
	/* A child runs, and its events are not read before it is adopted: what it has changed itself says nothing. */
	return child >= 0 && lz_uffd_settled(uffd) ? LZ_UNKNOWN : answer;
}

/* Apply what is ordered, from where that has come to. */
static void apply_ordered(struct lz_worker *worker, struct lz_task *task)
{
	const uint16_t ordered = task->batch.ordered;
	struct lz_batch left = { .half = !task->batch.half };

	task->applying = 1;
	lz_fill_anew(task);
	task->near = 0;
	lz_task_settle(task);
	for (uint32_t i = task->batch.progress / 2; i < ordered; i++) {
		const struct lz_event *event = &events_of(task)[task->order[i]];
		int result = 0;

		if (lz_is_serving(task))
			result = apply_event(worker, task, event);
		else if (event->event == UFFD_EVENT_FORK) /* no longer known what it has: it waits for ever */
			lz_notify(worker, (struct lz_notice){ .kind = LZ_NOTICE_HELD, .task = task->number });
		lz_events_end_change(task, i + 1);
		if (result < 0)
			lz_task_fail(worker, task, result);
	}
	/* More may have come: while a task that fails was read out, or by a process that died. */
	left.events = (uint16_t)(task->batch.events - ordered);
	memcpy(task->event[left.half], &events_of(task)[ordered], left.events * sizeof(struct lz_event));
	__atomic_store(&task->batch, &left, __ATOMIC_RELEASE);
	task->adopted_late = 0;
	task->applying = 0;
	worker->outstanding -= !task->batch.events;
}

static void find_order(struct lz_worker *worker, struct lz_task *task)
{
	struct question question = { worker, task };

	lz_layout_order(events_of(task), task->batch.events, registered, &question, task->order);
}

void lz_events_apply(struct lz_worker *worker, struct lz_task *task)
{
	if (!task->batch.ordered) {
		find_order(worker, task);
		__atomic_store_n(&task->batch.ordered, task->batch.events, __ATOMIC_RELEASE);
	}
	apply_ordered(worker, task);
}

void lz_events_take_up(struct lz_task *task)
{
	if (task->batch.progress & 1)
		task->space = task->saved; /* what the array was that is replaced is not known for sure: it is left */
	__atomic_store_n(&task->batch.progress, task->batch.progress & ~1, __ATOMIC_RELEASE);
	task->jobs = 0;
	task->adopted_late = 1;
	task->applying = 0;
}

/* What a message says, as an event; false for one that is not a layout event. */
static bool event_of(const struct uffd_msg *message, struct lz_event *event)
{
	*event = (struct lz_event){ .event = message->event, .uffd = -1, .read_ns = lz_now_ns() };
	switch (message->event) {
	case UFFD_EVENT_FORK:
		event->uffd = (int)message->arg.fork.ufd;
		return true;
	case UFFD_EVENT_REMAP:
		event->start = message->arg.remap.from;
		event->end = event->start + message->arg.remap.len;
		event->to = message->arg.remap.to;
		return true;
	case UFFD_EVENT_REMOVE:
	case UFFD_EVENT_UNMAP:
		event->start = message->arg.remove.start;
		event->end = message->arg.remove.end;
		return true;
	default:
		return false;
	}
}

void lz_events_recover(struct lz_task *task, const struct uffd_msg *message)
{
	const struct lz_event *last = task->batch.events ? &events_of(task)[task->batch.events - 1] : NULL;
	struct lz_event event;

	if (!event_of(message, &event))
		return; /* a fault asks again */
	if (last && last->event == event.event && last->start == event.start && last->end == event.end &&
	    last->to == event.to && last->uffd == event.uffd)
		return;                          /* kept already, and its message not cleared yet */
	if (task->batch.events == LZ_BATCH_ROOM) /* only of a task that was failing: it has nothing to lose */
		return;
	events_of(task)[task->batch.events] = event;
	__atomic_store_n(&task->batch.events, task->batch.events + 1, __ATOMIC_RELEASE);
}

static void keep_event(struct lz_worker *worker, struct lz_task *task, const struct uffd_msg *message, uint64_t now)
{
	struct lz_event event;

	LZ_POINT("event-read", message->event);
	if (!event_of(message, &event)) {
		lz_task_fail(worker, task, -EPROTO);
		return;
	}
	if (event.event == UFFD_EVENT_FORK)
		event.overlapped = task->batch.events == 1 && now - task->watched_ns < WATCH_NS;
	else if (event.event == UFFD_EVENT_REMAP)
		lz_count(&worker->counters->remaps, 1);
	else
		lz_count(event.event == UFFD_EVENT_REMOVE ? &worker->counters->removes : &worker->counters->unmaps, 1);
	if (task->batch.events >= LZ_BATCH_ROOM - LZ_MESSAGES && !task->applying)
		lz_events_apply(worker, task);
	if (!lz_is_serving(task) || task->batch.events == LZ_BATCH_ROOM)
		return;
	if (!task->batch.events)
		worker->outstanding++;
	if (!task->batch.events || now - task->watched_ns < WATCH_NS)
		task->watched_ns = now;
	task->event_ns = now;
	events_of(task)[task->batch.events] = event;
	__atomic_store_n(&task->batch.events, task->batch.events + 1, __ATOMIC_RELEASE);
	LZ_POINT("event-kept", message->event);
}

/*
 * Drain a task's queue: layout events are kept in its batch, faults returned. What finds no room is
 * woken to ask again.
 */
uint32_t lz_events_read(struct lz_worker *worker, struct lz_task *task, struct lz_fault *faults, uint32_t room)
{
	struct uffd_msg aside[LZ_MESSAGES]; /* called while messages are being looked at: the task is ending */
	struct uffd_msg *message = faults ? worker->flight->message : aside;
	uint32_t found = 0;

	if (faults)
		worker->flight->task = task->number;
	/* What is read lets the task go on: no copy may be on its way that was decided before. */
	lz_helper_hold(worker);

	/* Bounded: what is left in the queue makes every copy fail that it matters to. */
	for (uint32_t reads = 0; lz_is_serving(task) && reads < MOST_READS && (!room || found < room); reads++) {
		uint64_t before = lz_now_ns();
		ssize_t got = read(task->uffd, message, sizeof(aside));

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0 && (errno == EMFILE || errno == ENFILE)) {
			/* A fork waits for a descriptor. */
			if (lz_engine_spend_reserve(worker->engine))
				continue;
			lz_task_unsettle(worker, task, before);
			break;
		}
		if (got <= 0) {
			task->empty_ns = before;
			break;
		}
		for (uint32_t i = 0; i < (size_t)got / sizeof(message[0]) && lz_is_serving(task); i++) {
			const struct lz_fault fault = {
				.address = message[i].arg.pagefault.address & ~(LZ_PAGE_SIZE - 1),
				.to_write = message[i].arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE,
			};
			bool is_fault = message[i].event == UFFD_EVENT_PAGEFAULT;

			if (!is_fault) {
				lz_helper_recall(worker, task);
				keep_event(worker, task, &message[i], lz_now_ns());
			}
			__atomic_store_n(&message[i].event, 0, __ATOMIC_RELEASE);
			if (!is_fault)
				continue;
			lz_count(&worker->counters->faults, 1);
			if (found < room)
				faults[found++] = fault;
			else
				lz_uffd_wake(task->uffd, fault.address, LZ_PAGE_SIZE);
		}
	}
	if (!lz_is_serving(task)) /* it ended in the middle: what is left is nobody's */
		for (uint32_t i = 0; i < LZ_MESSAGES; i++)
			message[i].event = 0;
	lz_helper_release(worker);
	return found;
}

/*
 * Look whether the layout has settled, and apply the batch when it has. True when no event is outstanding.
 */
bool lz_events_settle(struct lz_worker *worker, struct lz_task *task)
{
	uint64_t now;

	if (!task->batch.events)
		return true;
	now = lz_now_ns();
	if (lz_uffd_settled(task->uffd) == -EAGAIN) {
		/* A look that came late may have missed that it was settled in between. */
		if (now - task->watched_ns < WATCH_NS)
			task->watched_ns = now;
		return false;
	}
	/* Settled, or the memory is gone: a child that it forked is not. */
	if (!task->batch.ordered) {
		find_order(worker, task);
		if (task->batch.events > 1 && lz_uffd_settled(task->uffd) == -EAGAIN)
			return false; /* another change has begun, and the answers may be about it */
		__atomic_store_n(&task->batch.ordered, task->batch.events, __ATOMIC_RELEASE);
	}
	apply_ordered(worker, task);
	return true;
}
