/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE 1
#include "worker.h"

#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SPIN_NS 40000U         /* the worker waits this long for a copy to end before it hurries the helper */
#define HELD_SPIN_NS 50000U    /* a helper that is held waits this long before it sleeps */
#define STAND_BY_NS 30000U     /* and this long for a task that was woken to take its processor */
#define GAP_NS 1000U           /* somebody ran here in between: two switches and a fault take longer */
#define FIRST_REST_NS 500000U  /* a helper that was preempted has no processor to itself: no jobs for a while, */
#define LAST_REST_NS 16000000U /* a longer one each time */

static void futex_wait(uint32_t *word, uint32_t value, uint64_t ns)
{
	struct timespec timeout = { .tv_sec = (time_t)(ns / 1000000000U), .tv_nsec = (long)(ns % 1000000000U) };

	(void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, &timeout, NULL, 0);
}

static void futex_wake(uint32_t *word)
{
	(void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* Let the helper look for work. */
static void post(struct lz_helper *helper)
{
	__atomic_add_fetch(&helper->posted, 1, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&helper->sleeping, __ATOMIC_SEQ_CST))
		futex_wake(&helper->posted);
}

/* Copy the next few pages of a job. The helper is busy, so the ring is its own. */
static void copy_some(struct lz_worker *worker, struct lz_job *job)
{
	const struct lz_source *source = &worker->engine->source[job->source];
	uint32_t pages = job->pages - job->done_pages;
	uint64_t start = job->start + BYTES(job->done_pages);
	uint64_t offset = job->offset + BYTES(job->done_pages), done;
	int result;

	if (pages > job->copy_pages)
		pages = job->copy_pages;
	if (!lz_source_held(worker, LZ_FOR_HELPER, LZ_BY_FILL, job->source, offset + BYTES(pages))) {
		job->failed = true;
		return;
	}
	LZ_POINT("helper-copy", start);
	result = lz_uffd_copy(job->uffd, start, source->map + offset, BYTES(pages), &done);
	if (done && !lz_source_holds(worker, LZ_FOR_HELPER, job->source, offset + done))
		job->suspect = true;
	job->done_pages += (uint32_t)PAGES(done);
	if (result == -EEXIST && !done)
		job->done_pages++; /* a fault was answered meanwhile, and its thread woken */
	else if (result < 0 && !done)
		job->failed = true;
}

/*
 * Wait until nobody holds the helper, and, where a task was woken meanwhile, until that has run on this processor and
 * left it, or seems to run on another one. False: it takes longer, sleep.
 */
static bool stand_by(const struct lz_helper *helper, uint32_t *woken)
{
	uint64_t begin = lz_now_ns(), now = begin, last = begin, woken_ns = begin;
	bool has_run = true;

	while (!__atomic_load_n(&helper->stopping, __ATOMIC_RELAXED)) {
		bool is_held = __atomic_load_n(&helper->wanted, __ATOMIC_SEQ_CST);
		uint32_t now_woken = __atomic_load_n(&helper->woken, __ATOMIC_ACQUIRE);

		last = now;
		now = lz_now_ns();
		if (now_woken != *woken) {
			*woken = now_woken;
			woken_ns = now;
			has_run = false;
		} else if (now - last >= GAP_NS) {
			has_run = true;
		}
		if (!is_held && (has_run || now - woken_ns >= STAND_BY_NS))
			return true;
		if (is_held && now - begin >= HELD_SPIN_NS)
			return false;
		__builtin_ia32_pause();
	}
	return false;
}

static void *helper_main(void *argument)
{
	struct lz_worker *worker = argument;
	struct lz_helper *helper = &worker->helper;
	const struct sched_param none = { 0 };
	uint32_t woken = 0;

	(void)sched_setscheduler(0, SCHED_IDLE, &none);
	__atomic_store_n(&helper->tid, (pid_t)syscall(SYS_gettid), __ATOMIC_RELEASE);
	while (!__atomic_load_n(&helper->stopping, __ATOMIC_SEQ_CST)) {
		uint32_t posted = __atomic_load_n(&helper->posted, __ATOMIC_SEQ_CST);
		uint32_t head = __atomic_load_n(&helper->head, __ATOMIC_RELAXED);

		if (head == __atomic_load_n(&helper->tail, __ATOMIC_ACQUIRE) || !stand_by(helper, &woken)) {
			__atomic_store_n(&helper->sleeping, 1, __ATOMIC_SEQ_CST);
			futex_wait(&helper->posted, posted, 100000000U);
			__atomic_store_n(&helper->sleeping, 0, __ATOMIC_SEQ_CST);
			continue;
		}
		__atomic_store_n(&helper->busy, 1, __ATOMIC_SEQ_CST);
		if (!__atomic_load_n(&helper->wanted, __ATOMIC_SEQ_CST)) {
			struct lz_job *job = &helper->job[head % LZ_JOBS];

			if (job->task && !job->failed && job->done_pages < job->pages)
				copy_some(worker, job);
			if (!job->task || job->failed || job->done_pages == job->pages)
				__atomic_store_n(&helper->head, head + 1, __ATOMIC_RELEASE);
		}
		__atomic_store_n(&helper->busy, 0, __ATOMIC_SEQ_CST);
		if (__atomic_load_n(&helper->wanted, __ATOMIC_SEQ_CST))
			futex_wake(&helper->busy);
	}
	return NULL;
}

void lz_helper_start(struct lz_worker *worker)
{
	struct lz_helper *helper = &worker->helper;

	if (sched_getaffinity(0, sizeof(helper->processors), &helper->processors) < 0 ||
	    CPU_COUNT(&helper->processors) < 2)
		return;
	helper->rest_length_ns = FIRST_REST_NS;
	helper->running = !pthread_create(&helper->thread, NULL, helper_main, worker);
}

void lz_helper_stop(struct lz_worker *worker)
{
	struct lz_helper *helper = &worker->helper;

	if (!helper->running)
		return;
	__atomic_store_n(&helper->stopping, 1, __ATOMIC_SEQ_CST);
	post(helper);
	pthread_join(helper->thread, NULL);
	helper->running = false;
}

bool lz_helper_rests(const struct lz_worker *worker, uint64_t now)
{
	return now < worker->helper.rest_ns;
}

bool lz_helper_has_room(struct lz_worker *worker, uint64_t now)
{
	const struct lz_helper *helper = &worker->helper;

	return helper->running && !lz_helper_rests(worker, now) && helper->tail - helper->harvested < LZ_JOBS;
}

void lz_helper_give(struct lz_worker *worker, struct lz_task *task, const struct lz_run *run, uint32_t copy_pages)
{
	struct lz_helper *helper = &worker->helper;

	helper->job[helper->tail % LZ_JOBS] = (struct lz_job){
		.task = task,
		.start = run->start,
		.offset = run->offset,
		.pages = (uint32_t)run->pages,
		.copy_pages = copy_pages,
		.uffd = task->uffd,
		.source = run->source,
	};
	lz_space_mark(worker->engine->arena, &task->space, run->start, run->pages, LZ_ASKED);
	task->jobs++;
	__atomic_store_n(&helper->tail, helper->tail + 1, __ATOMIC_RELEASE);
	post(helper);
}

/* Account for a job: what it has copied is present, what it has not is missing again. */
static void settle_job(struct lz_worker *worker, struct lz_job *job)
{
	struct lz_arena *arena = worker->engine->arena;
	struct lz_task *task = job->task;
	uint64_t copied = 0;

	if (!task)
		return;
	job->task = NULL;
	task->jobs--;
	for (uint32_t i = 0; i < job->pages; i++) {
		uint64_t address = job->start + BYTES(i);

		if (lz_space_state(arena, &task->space, address) != LZ_ASKED)
			continue; /* a fault brought it */
		lz_space_mark(arena, &task->space, address, 1, i < job->done_pages ? LZ_PRESENT : LZ_MISSING);
		copied += i < job->done_pages;
	}
	lz_forget_left(task, copied);
	lz_count(&worker->counters->fill_copied_pages, copied);
	if (job->done_pages < job->pages)
		lz_fill_again(worker, task, job->start + BYTES(job->done_pages));
	if (job->suspect)
		lz_notify(worker, (struct lz_notice){ .kind = LZ_NOTICE_SUSPECT,
						      .task = task->number,
						      .address = job->start,
						      .value = job->done_pages,
						      .source = job->source });
}

void lz_helper_harvest(struct lz_worker *worker)
{
	struct lz_helper *helper = &worker->helper;
	uint32_t head = __atomic_load_n(&helper->head, __ATOMIC_ACQUIRE);

	for (; helper->harvested != head; helper->harvested++)
		settle_job(worker, &helper->job[helper->harvested % LZ_JOBS]);
}

/*
 * Have a helper run that was preempted inside a copy, and so holds up every fault: at once where we may say so, else
 * on this processor, which we then leave to it.
 */
static bool hurry_helper(struct lz_helper *helper)
{
	const struct sched_param lowest = { .sched_priority = 1 };
	int processor = sched_getcpu();
	cpu_set_t here;

	if (!sched_setscheduler(helper->tid, SCHED_FIFO, &lowest))
		return true;
	CPU_ZERO(&here);
	if (processor >= 0)
		CPU_SET((size_t)processor, &here);
	(void)sched_setaffinity(helper->tid, sizeof(here), &here);
	return false;
}

/* Keep the helper out of copies; returns when it is in none. */
static void stop_copies(struct lz_helper *helper)
{
	const struct sched_param none = { 0 };
	bool is_hurried = false, runs = false;
	uint64_t since = 0;

	__atomic_store_n(&helper->wanted, 1, __ATOMIC_SEQ_CST);
	while (__atomic_load_n(&helper->busy, __ATOMIC_SEQ_CST)) {
		uint64_t now = lz_now_ns();

		if (!since)
			since = now;
		if (now - since >= SPIN_NS && !is_hurried) {
			is_hurried = true;
			runs = hurry_helper(helper);
		}
		if (is_hurried && !runs)
			futex_wait(&helper->busy, 1, 1000000U);
		else
			__builtin_ia32_pause();
	}
	if (!is_hurried)
		return;
	(void)sched_setscheduler(helper->tid, SCHED_IDLE, &none);
	if (!runs)
		(void)sched_setaffinity(helper->tid, sizeof(helper->processors), &helper->processors);
	since = lz_now_ns();
	if (since > helper->rest_ns + 4 * helper->rest_length_ns)
		helper->rest_length_ns = FIRST_REST_NS;
	else if (helper->rest_length_ns < LAST_REST_NS)
		helper->rest_length_ns *= 2;
	helper->rest_ns = since + helper->rest_length_ns;
}

static void allow_copies(struct lz_helper *helper)
{
	__atomic_store_n(&helper->wanted, 0, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&helper->head, __ATOMIC_RELAXED) != helper->tail)
		post(helper);
}

void lz_helper_hold(struct lz_worker *worker)
{
	if (!worker->helper.depth++ && worker->helper.running)
		stop_copies(&worker->helper);
}

void lz_helper_stand_by(struct lz_worker *worker)
{
	struct lz_helper *helper = &worker->helper;

	__atomic_store_n(&helper->woken, helper->woken + 1, __ATOMIC_RELEASE);
}

void lz_helper_release(struct lz_worker *worker)
{
	assert(worker->helper.depth);
	if (!--worker->helper.depth && worker->helper.running)
		allow_copies(&worker->helper);
}

uint32_t lz_helper_lend(struct lz_worker *worker)
{
	const uint32_t depth = worker->helper.depth;

	worker->helper.depth = 0;
	if (depth && worker->helper.running)
		allow_copies(&worker->helper);
	return depth;
}

void lz_helper_regain(struct lz_worker *worker, uint32_t depth)
{
	assert(!worker->helper.depth);
	if (depth && worker->helper.running)
		stop_copies(&worker->helper);
	worker->helper.depth = depth;
}

void lz_helper_recall(struct lz_worker *worker, struct lz_task *task)
{
	struct lz_helper *helper = &worker->helper;

	if (!task->jobs)
		return;
	lz_helper_hold(worker);
	for (uint32_t i = helper->harvested; i != helper->tail; i++) {
		struct lz_job *job = &helper->job[i % LZ_JOBS];

		if (job->task == task)
			settle_job(worker, job);
	}
	lz_helper_release(worker);
}
