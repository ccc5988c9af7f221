/* SPDX-License-Identifier: MIT */
/*
 * A worker: the only reader of the uffds of its tasks, and the only one who installs pages in them.
 *
 * Order of work: every pending message is read; layout events are applied, once the layout has settled and in the
 * order they took effect (layout.h), before any fault is answered; then the faults, each with its own page first; then
 * one bounded chunk of background fill near the last fault; then the queue is looked at again. While there is fill to
 * do a worker does not sleep.
 *
 * What the kernel guarantees, and what follows (fs/userfaultfd.c; seen on 6.18, tests in tests/c and tests/kernel):
 *
 * - A layout change raises mmap_changing under mmap_lock before it happens, queues its event, and lowers it only
 *   when the thread has run again after the event was read. Every COPY and ZEROPAGE in between fails with -EAGAIN.
 *   So with one thread a task nothing can be installed by an outdated layout: what we know when a COPY succeeds is
 *   what was true. A fault whose address we misplace because its event is not queued yet fails the same way, is kept,
 *   and is looked up anew after the event.
 * - read() hands out faults before events, whatever their age. So the queue is drained before a fault is answered.
 * - A woken thread faults again if its page is not there and queues a new message. So UFFDIO_WAKE is always a safe
 *   answer: it is what -EEXIST, -ENOENT and a full list of pending faults get, and what frees the threads that wait
 *   on a range that was moved or unmapped.
 * - UNREGISTER and REGISTER do not look at mmap_changing. A range is handed back only between two moments that the
 *   layout was seen settled with nothing read in between; if a change slipped in, the range is registered again
 *   before its event is read, while the thread that made the change still waits (fill.c, hand_back).
 * - UNREGISTER of part of a VMA splits it, and an mremap or mprotect-sensitive program sees that: mremap over the cut
 *   fails with EFAULT before Linux 6.17. So, other than the first sketch of the design, a VMA is handed back whole or
 *   not at all; long runs without image bytes inside a VMA that has some are served by ZEROPAGE windows that grow
 *   to 2 MiB, which costs one fault in 512 and no split.
 * - Closing a uffd lets every waiting thread and every later fault read zeros. So it is closed only when no image
 *   page is missing, when the memory is gone, or after every missing page was poisoned.
 */
#define _GNU_SOURCE 1
#include "worker.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define FAULTS 1024U

#define SPIN_NS 50000U     /* looks for the next fault this long before it blocks */
#define SETTLE_NS 30000U   /* waits this long in place for a layout to settle */
#define PROBE_NS 50000000U /* how often an idle task is asked whether it still exists */

/* Whether a task's queue has something to read; a queue that says so may be read. */
static bool has_messages(struct lz_task *task)
{
	struct pollfd queue = { .fd = task->uffd, .events = POLLIN };
	uint64_t before = lz_now_ns();

	if (poll(&queue, 1, 0))
		return true;
	task->empty_ns = before;
	return false;
}

static void serve(struct lz_worker *worker, struct lz_task *task)
{
	struct lz_fault faults[FAULTS];
	uint64_t since = task->empty_ns;
	uint32_t found;

	lz_helper_hold(worker); /* from what is read to what is answered */
	found = lz_events_read(worker, task, faults, FAULTS);
	if (lz_is_serving(task) && task->batch.events) {
		/* The thread that waits for us needs a few µs to go on. */
		uint64_t until = lz_now_ns() + SETTLE_NS;

		while (lz_is_serving(task) && !lz_events_settle(worker, task)) {
			found += lz_events_read(worker, task, &faults[found], FAULTS - found);
			if (lz_now_ns() < until)
				continue;
			lz_task_unsettle(worker, task, lz_now_ns());
			break;
		}
	}
	for (uint32_t i = 0; i < found; i++)
		lz_fault_answer(worker, task, faults[i], since, LZ_NO_READ);
	lz_helper_release(worker);
}

/* Look again at the layouts that had not settled. */
static void serve_outstanding(struct lz_worker *worker, uint64_t now)
{
	for (uint32_t i = worker->tasks; i-- > 0;) {
		struct lz_task *task = worker->task[i];

		if (task->batch.events && now >= task->unsettled_ns)
			serve(worker, task);
	}
}
/* Ask the idle tasks whether they still exist; with fill off also whether they have all they need. */
static void probe_tasks(struct lz_worker *worker, uint64_t now)
{
	uint64_t interval = PROBE_NS * (1 + worker->tasks / 64);
	bool finished = __atomic_load_n(&worker->engine->shared->finished, __ATOMIC_ACQUIRE);

	for (uint32_t i = worker->tasks; i-- > 0;) {
		struct lz_task *task = worker->task[i];
		struct lz_run run;
		uint32_t number;

		if (now < task->probe_ns)
			continue;
		task->probe_ns = now + interval;
		if (task->batch.events)
			continue;
		if (lz_uffd_settled(task->uffd) == -ESRCH)
			lz_task_gone(worker, task);
		else if (finished && !lz_fill_next(worker, task, 1, &run, &number))
			lz_fill_done(worker, task);
	}
}

/* Waiting */

static void take_inbox(struct lz_worker *worker)
{
	pthread_mutex_lock(&worker->inbox_lock);
	for (uint32_t i = 0; i < worker->inbox_count; i++) {
		struct lz_task *task = worker->inbox[i];
		int result = lz_task_adopt(worker, task);

		if (result < 0)
			lz_task_fail(worker, task, result);
		else
			serve(worker, task);
	}
	__atomic_store_n(&worker->inbox_count, 0, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&worker->inbox_lock);
}

/* How long nothing can be due. */
static uint64_t idle_ns(struct lz_worker *worker, uint64_t now)
{
	uint64_t rate = __atomic_load_n(&worker->engine->shared->fill_rate, __ATOMIC_RELAXED);
	uint64_t until = now + 1000000000ULL;

	for (uint32_t i = 0; i < worker->tasks; i++) {
		const struct lz_task *task = worker->task[i];
		uint64_t due = task->unsettled_ns > now ? task->unsettled_ns : task->probe_ns;

		if (due < until)
			until = due;
	}
	if (rate && worker->tasks && until > now + 1000000)
		until = now + 1000000;
	return until > now ? until - now : 0;
}

static void wait_for_work(struct lz_worker *worker, uint64_t ns)
{
	struct epoll_event event[64];
	struct timespec timeout = { .tv_sec = (time_t)(ns / 1000000000ULL), .tv_nsec = (long)(ns % 1000000000ULL) };
	int ready;

	if (!ns && worker->tasks == 1) {                                     /* saves the fault a system call */
		if (!worker->task[0]->jobs || has_messages(worker->task[0])) /* the helper is not held for nothing */
			serve(worker, worker->task[0]);
		return;
	}
	ready = epoll_pwait2(worker->epoll, event, 64, &timeout, NULL);
	for (int i = 0; i < ready; i++) {
		struct lz_task *task = event[i].data.ptr;
		uint64_t token;

		if (!task) {
			ssize_t got = read(worker->wake, &token, sizeof(token));

			(void)got;
		} else if (lz_is_serving(task)) {
			if (ns)
				task->empty_ns = lz_now_ns();
			serve(worker, task);
		}
	}
}

void *lz_worker_main(void *argument)
{
	struct lz_worker *worker = argument;
	struct lz_engine *engine = worker->engine;
	uint64_t busy_ns = 0;
	bool worked = false;

	for (int i = 0; i < 2; i++) {
		worker->view[i] = calloc(engine->sources + 1, sizeof(*worker->view[i]));
		if (!worker->view[i])
			abort(); /* before any task: the keeper reports it */
	}
	worker->zeros = mmap(NULL, BYTES(LZ_FRESH_PAGES), PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (worker->zeros == MAP_FAILED)
		worker->zeros = NULL; /* the zero page will do */
	lz_helper_start(worker);
	if (__atomic_add_fetch(&engine->begun, 1, __ATOMIC_ACQ_REL) == engine->workers)
		lz_io_map(&engine->io);
	while (!__atomic_load_n(&engine->stopping, __ATOMIC_ACQUIRE)) {
		uint64_t now, faults = worker->counters->faults;

		if (__atomic_load_n(&worker->inbox_count, __ATOMIC_ACQUIRE))
			take_inbox(worker);
		now = lz_now_ns();
		wait_for_work(worker, worked || now - busy_ns < SPIN_NS ? 0 : idle_ns(worker, now));
		now = lz_now_ns();
		if (worker->outstanding)
			serve_outstanding(worker, now);
		if (worker->pendings)
			lz_fault_retry(worker, now);
		worked = lz_fill(worker, now);
		if (worker->counters->faults != faults)
			busy_ns = now;
		if (!worked)
			probe_tasks(worker, now);
	}
	if (__atomic_load_n(&engine->abandoning, __ATOMIC_ACQUIRE)) {
		take_inbox(worker);
		while (worker->tasks) {
			struct lz_task *task = worker->task[0];

			if (lz_uffd_settled(task->uffd) == -ESRCH)
				lz_task_gone(worker, task);
			else
				lz_task_fail(worker, task, -ECANCELED);
		}
	}
	for (uint32_t i = 0; i < worker->tasks; i++)
		lz_helper_recall(worker, worker->task[i]);
	lz_helper_stop(worker);
	if (worker->zeros)
		munmap((void *)(uintptr_t)worker->zeros, BYTES(LZ_FRESH_PAGES));
	for (int i = 0; i < 2; i++)
		free(worker->view[i]);
	return NULL;
}
