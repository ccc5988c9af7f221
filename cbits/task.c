/* SPDX-License-Identifier: MIT */
/* The life of a task in its worker: from its uffd to one of its ends. */
#define _GNU_SOURCE 1
#include "worker.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#define FIRST_BACKOFF_NS 2000U /* after an EAGAIN: doubles up to the last */
#define LAST_BACKOFF_NS 1000000U
#define POISON_TRIES 2000U /* times 1 ms */

int lz_task_adopt(struct lz_worker *worker, struct lz_task *task)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = task };

	if (worker->tasks == worker->task_capacity) {
		uint32_t capacity = worker->task_capacity ? 2 * worker->task_capacity : 64;
		struct lz_task **list = realloc(worker->task, capacity * sizeof(struct lz_task *));

		if (!list)
			return -ENOMEM;
		worker->task = list;
		worker->task_capacity = capacity;
	}
	if (fcntl(task->uffd, F_SETFL, O_NONBLOCK) < 0) /* or a read of it would stop every task */
		return -errno;
	/* A process that is dead may have added it: the epoll instance is one of the descriptors we share. */
	if (epoll_ctl(worker->epoll, EPOLL_CTL_ADD, task->uffd, &event) < 0 &&
	    (errno != EEXIST || epoll_ctl(worker->epoll, EPOLL_CTL_MOD, task->uffd, &event) < 0))
		return -errno;
	task->backoff_ns = FIRST_BACKOFF_NS;
	task->empty_ns = lz_now_ns();
	task->event_ns = task->empty_ns;
	worker->outstanding += task->batch.events > 0; /* kept by a process that is dead */
	worker->task[worker->tasks++] = task;
	return 0;
}

void lz_task_end(struct lz_worker *worker, struct lz_task *task, enum lz_task_status status, struct lz_notice notice)
{
	struct lz_arena *arena = worker->engine->arena;
	const int uffd = task->uffd;
	uint32_t kept = 0;

	lz_helper_recall(worker, task);
	for (uint32_t i = 0; i < worker->tasks; i++) {
		if (worker->task[i] == task) {
			worker->task[i] = worker->task[--worker->tasks];
			break;
		}
	}
	for (uint32_t i = 0; i < worker->pendings; i++) {
		if (worker->pending[i].task != task || worker->pending[i].read < LZ_READS)
			worker->pending[kept++] = worker->pending[i];
	}
	worker->pendings = kept;
	/* In this order: a process that dies here must neither leave a number that another descriptor gets, nor a
	 * descriptor that nobody knows of (lz_engine_descriptors). */
	__atomic_store_n(&task->closing, uffd + 1, __ATOMIC_RELEASE);
	__atomic_store_n(&task->status, status, __ATOMIC_RELEASE);
	__atomic_store_n(&task->uffd, -1, __ATOMIC_RELEASE);
	(void)epoll_ctl(worker->epoll, EPOLL_CTL_DEL, uffd, NULL); /* a restorer may have kept a copy open */
	LZ_POINT("uffd-closing", 0);
	close(uffd);
	__atomic_store_n(&task->closing, 0, __ATOMIC_RELEASE);
	lz_space_drop_saved(arena, &task->space, &task->saved);
	lz_space_drop(arena, &task->space);
	notice.task = task->number;
	lz_notify(worker, notice);
}

void lz_task_gone(struct lz_worker *worker, struct lz_task *task)
{
	if (task->batch.events && !task->applying)
		lz_events_apply(worker, task); /* a child that it forked lives on */
	if (!lz_is_serving(task))
		return;
	lz_helper_recall(worker, task);
	lz_count(&worker->counters->dropped_pages, task->left_pages);
	lz_forget_left(task, task->left_pages);
	lz_task_end(worker, task, LZ_TASK_GONE, (struct lz_notice){ .kind = LZ_NOTICE_TASK_GONE });
}

void lz_task_unsettle(struct lz_worker *worker, struct lz_task *task, uint64_t now)
{
	lz_count(&worker->counters->again, 1);
	task->unsettled_ns = now + task->backoff_ns;
	if (task->backoff_ns < LAST_BACKOFF_NS)
		task->backoff_ns *= 2;
}

void lz_task_settle(struct lz_task *task)
{
	task->backoff_ns = FIRST_BACKOFF_NS;
	task->unsettled_ns = 0;
}

/* Poison every missing image page of a task's space through a uffd. Returns how many could not be. */
int64_t lz_task_poison(struct lz_worker *worker, struct lz_task *task, int uffd)
{
	struct lz_arena *arena = worker->engine->arena;
	uint32_t tries = POISON_TRIES;
	int64_t missed = 0;

	lz_helper_recall(worker, task);
	for (uint32_t i = 0; i < task->space.regions; i++) {
		const struct lz_region *region = lz_space_region(arena, &task->space, i);
		uint64_t page = 0, most = UINT64_MAX;
		struct lz_run run;

		while (lz_space_next_missing(arena, &task->space, i, page, region->pages, most, &run)) {
			uint64_t done;
			int result = lz_uffd_poison(uffd, run.start, BYTES(run.pages), &done);

			if (done) {
				lz_count(&worker->counters->poisoned_pages, PAGES(done));
				if (uffd == task->uffd) {
					lz_space_mark(arena, &task->space, run.start, PAGES(done), LZ_PRESENT);
					lz_forget_left(task, PAGES(done));
				}
				page = run.page + PAGES(done);
				continue;
			}
			if (result == -ESRCH)
				return 0;
			if ((result == -EAGAIN || result == -ENOMEM) && tries) {
				struct timespec pause = { .tv_nsec = 1000000 };

				tries--;
				if (uffd == task->uffd) {
					lz_events_read(worker, task, NULL, 0);
					if (lz_is_serving(task))
						lz_events_settle(worker, task);
					i = 0; /* the layout may have changed */
					page = 0;
					region = lz_space_region(arena, &task->space, i);
					if (!lz_is_serving(task) || !region)
						return missed;
				}
				nanosleep(&pause, NULL);
				continue;
			}
			if (result == -ENOENT && run.pages > 1) {
				most = run.pages / 2;
				continue;
			}
			if (result != -EEXIST && result != -ENOENT)
				missed += (int64_t)run.pages;
			page = run.page + (result == -EEXIST || result == -ENOENT ? 1 : run.pages);
		}
	}
	return missed;
}

void lz_task_fail(struct lz_worker *worker, struct lz_task *task, int error)
{
	int64_t missed;

	if (task->batch.events && !task->applying)
		lz_events_apply(worker, task);
	if (!lz_is_serving(task))
		return;
	missed = lz_task_poison(worker, task, task->uffd);

	if (lz_is_serving(task))
		lz_task_end(
			worker, task, LZ_TASK_FAILED,
			(struct lz_notice){ .kind = LZ_NOTICE_TASK_FAILED, .error = error, .value = (uint64_t)missed });
}

/* Deal with what an attempt to install something said. True when it is not to be tried again. */
bool lz_task_outcome(struct lz_worker *worker, struct lz_task *task, int result)
{
	switch (result) {
	case 0:
		return true;
	case -EINPROGRESS:
		return false;
	case -EAGAIN:
	case -ENOMEM: /* the task is at the limit of its control group: it may free some, or be killed */
	case -EBUSY:
		lz_task_unsettle(worker, task, lz_now_ns());
		return false;
	case -ESRCH:
		lz_task_gone(worker, task);
		return true;
	default:
		lz_task_fail(worker, task, result);
		return true;
	}
}
