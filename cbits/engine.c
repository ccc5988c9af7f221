/* SPDX-License-Identifier: MIT */
/*
 * The engine as its owner sees it: sources, tasks, threads, notices, totals. What happens per fault is in worker.c.
 *
 * Threads: everything here may be called from one controlling thread; the workers share with it only atomics, the
 * notices (one lock, never taken on the way of a page that is well) and the inbox of new tasks.
 */
#define _GNU_SOURCE 1
#include "worker.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define RESERVE_FDS 64U
#define ROOM_FDS 4096
#define RESERVE_SHARE 4U /* and of the limit no more than one in so many */

uint64_t lz_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
}

/* A fork's child costs a descriptor; the soft limit is 1,024 on most systems and may be raised to the hard one. */
static void raise_descriptor_limit(void)
{
	struct rlimit limit;

	if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur < limit.rlim_max) {
		limit.rlim_cur = limit.rlim_max;
		(void)setrlimit(RLIMIT_NOFILE, &limit); /* what we have is enough for most */
	}
}

/*
 * The kernel's table of descriptors grows in steps, and each step waits for a grace period of RCU, of up to tens of
 * milliseconds, once the table is shared (fs/file.c, expand_fdtable), as it is by threads and by those who keep us.
 * So it grows now, while nobody shares it.
 */
static void grow_descriptor_table(int any)
{
	struct rlimit limit;
	int last = ROOM_FDS - 1, fd;

	if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur <= (rlim_t)last)
		last = (int)limit.rlim_cur - 1;
	fd = fcntl(any, F_DUPFD_CLOEXEC, last);
	if (fd >= 0)
		close(fd);
}

struct lz_engine *lz_engine_new(const struct lz_config *config, int *error)
{
	struct lz_engine *engine;
	uint64_t shared;

	if (!config->workers || config->workers > LZ_MAX_WORKERS || config->fill > LZ_FILL_FULL) {
		*error = -EINVAL;
		return NULL;
	}
	engine = calloc(1, sizeof(*engine));
	if (!engine) {
		*error = -ENOMEM;
		return NULL;
	}
	engine->config = *config;
	engine->notify = -1;
	lz_io_init(&engine->io, engine);
	lz_remote_init(&engine->remote, engine);
	pthread_mutex_init(&engine->lock, NULL);
	pthread_mutex_init(&engine->notice_lock, NULL);
	for (uint32_t i = 0; i < LZ_MAX_WORKERS; i++)
		engine->worker[i].epoll = engine->worker[i].wake = -1;
	*error = -ENOMEM;
	engine->source = calloc(LZ_MAX_SOURCES, sizeof(*engine->source));
	engine->reserve_fd = calloc(RESERVE_FDS, sizeof(int));
	if (!engine->source || !engine->reserve_fd)
		goto fail;
	engine->arena = lz_arena_new(error);
	if (!engine->arena)
		goto fail;
	*error = -ENOMEM;
	shared = lz_arena_alloc(engine->arena, sizeof(struct lz_shared));
	if (!shared)
		goto fail;
	engine->shared = LZ_AT(engine->arena, struct lz_shared, shared);
	engine->shared->fill = config->fill;
	engine->shared->fill_rate = config->fill_rate;
	engine->notify = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (engine->notify < 0) {
		*error = -errno;
		goto fail;
	}
	raise_descriptor_limit();
	grow_descriptor_table(engine->notify);
	for (uint32_t i = 0; i < config->workers; i++) {
		struct lz_worker *worker = &engine->worker[i];
		uint64_t counters = lz_arena_alloc(engine->arena, sizeof(struct lz_counters));
		uint64_t flight = lz_arena_alloc(engine->arena, sizeof(struct lz_flight));
		struct epoll_event event = { .events = EPOLLIN };

		engine->workers = i + 1;
		worker->engine = engine;
		worker->number = i;
		pthread_mutex_init(&worker->inbox_lock, NULL);
		if (!counters || !flight)
			goto fail;
		worker->flight = LZ_AT(engine->arena, struct lz_flight, flight);
		worker->counters = LZ_AT(engine->arena, struct lz_counters, counters);
		worker->epoll = epoll_create1(EPOLL_CLOEXEC);
		worker->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		if (worker->epoll < 0 || worker->wake < 0 ||
		    epoll_ctl(worker->epoll, EPOLL_CTL_ADD, worker->wake, &event) < 0) {
			*error = -errno;
			goto fail;
		}
	}
	return engine;
fail:
	lz_engine_free(engine);
	return NULL;
}

int lz_engine_add_source(struct lz_engine *engine, int fd)
{
	struct lz_source source = { .fd = -1 };
	struct stat status;

	if (engine->sources == LZ_MAX_SOURCES)
		return -E2BIG;
	if (fstat(fd, &status) < 0)
		return -errno;
	source.size = (uint64_t)status.st_size;
	source.mtime_s = status.st_mtim.tv_sec;
	source.mtime_ns = status.st_mtim.tv_nsec;
	if (source.size) {
		void *map = mmap(NULL, source.size, PROT_READ, MAP_SHARED, fd, 0);

		if (map == MAP_FAILED)
			return -errno;
		source.map = map;
	}
	source.fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	if (source.fd < 0) {
		int error = -errno;

		if (source.map)
			munmap((void *)(uintptr_t)source.map, source.size);
		return error;
	}
	engine->source[engine->sources] = source;
	return (int)engine->sources++;
}

int lz_engine_add_task(struct lz_engine *engine, const struct lz_task *like, struct lz_task **task)
{
	uint64_t offset = lz_arena_alloc(engine->arena, sizeof(**task));
	int result = -ENOMEM;

	if (!offset)
		return -ENOMEM;
	pthread_mutex_lock(&engine->lock);
	if (engine->shared->tasks < LZ_MAX_TASKS) {
		*task = LZ_AT(engine->arena, struct lz_task, offset);
		**task = *like;
		(*task)->number = engine->shared->tasks;
		engine->shared->task_offset[engine->shared->tasks] = offset;
		__atomic_store_n(&engine->shared->tasks, engine->shared->tasks + 1, __ATOMIC_RELEASE);
		result = 0;
	}
	pthread_mutex_unlock(&engine->lock);
	if (result < 0)
		lz_arena_release(engine->arena, offset, sizeof(**task));
	return result;
}

static struct lz_task *nth_task(struct lz_engine *engine, uint32_t number)
{
	return LZ_AT(engine->arena, struct lz_task, engine->shared->task_offset[number]);
}

struct lz_task *lz_engine_task_at(struct lz_engine *engine, uint32_t number)
{
	if (number >= __atomic_load_n(&engine->shared->tasks, __ATOMIC_ACQUIRE))
		return NULL;
	return nth_task(engine, number);
}

int lz_engine_prepare(struct lz_engine *engine, int image_pid, const struct lz_extent *extents, uint64_t count,
		      const struct lz_vma *vmas, uint32_t vma_count)
{
	struct lz_task task = { .image_pid = image_pid, .parent = -1, .uffd = -1 };
	struct lz_task *added;
	int result;

	for (uint64_t i = 0; i < count; i++) {
		const struct lz_extent *row = &extents[i];

		if (row->kind != LZ_KIND_DUMPED)
			continue;
		if (row->source >= engine->sources ||
		    row->offset + ((uint64_t)row->pages << LZ_PAGE_SHIFT) > engine->source[row->source].size)
			return -ERANGE;
	}
	result = lz_space_init(engine->arena, &task.space, extents, count, vmas, vma_count);
	if (!result)
		result = lz_remote_place(&engine->remote, lz_space_rows(engine->arena, &task.space), count);
	if (result < 0) {
		lz_space_drop(engine->arena, &task.space);
		return result;
	}
	for (uint32_t i = 0; i < vma_count; i++)
		task.image_pages += lz_space_count_missing(engine->arena, &task.space, vmas[i].start, vmas[i].end);
	task.left_pages = task.image_pages;
	result = lz_engine_add_task(engine, &task, &added);
	if (result < 0) {
		lz_space_drop(engine->arena, &task.space);
		return result;
	}
	return (int)added->number;
}

static uint32_t reserve_size(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur / RESERVE_SHARE >= RESERVE_FDS)
		return RESERVE_FDS;
	return (uint32_t)(limit.rlim_cur / RESERVE_SHARE);
}

int lz_engine_start(struct lz_engine *engine)
{
	const uint32_t most = reserve_size();
	int result;

	for (; engine->reserve_fds < most; engine->reserve_fds++) {
		int fd = fcntl(engine->notify, F_DUPFD_CLOEXEC, 0);

		if (fd < 0)
			break;
		engine->reserve_fd[engine->reserve_fds] = fd;
	}
	engine->begun = 0;
	result = lz_io_start(&engine->io);
	if (!result)
		result = lz_remote_start(&engine->remote);
	for (uint32_t i = 0; i < engine->workers && !result; i++) {
		int error = pthread_create(&engine->worker[i].thread, NULL, lz_worker_main, &engine->worker[i]);

		engine->worker[i].running = !error;
		result = -error;
	}
	if (result < 0)
		lz_engine_stop(engine);
	return result;
}

int lz_engine_spend_reserve(struct lz_engine *engine)
{
	int spent = 0;

	pthread_mutex_lock(&engine->lock);
	if (engine->reserve_fds) {
		close(engine->reserve_fd[--engine->reserve_fds]);
		spent = 1;
	}
	pthread_mutex_unlock(&engine->lock);
	return spent;
}

void lz_engine_wake_worker(struct lz_worker *worker)
{
	uint64_t one = 1;
	ssize_t written = write(worker->wake, &one, sizeof(one));

	(void)written; /* full means it is being woken already */
}

static void wake_workers(struct lz_engine *engine)
{
	for (uint32_t i = 0; i < engine->workers; i++)
		lz_engine_wake_worker(&engine->worker[i]);
}

/* Put a task into its worker's inbox. */
static int hand_over(struct lz_engine *engine, struct lz_task *task)
{
	struct lz_worker *worker = &engine->worker[task->worker];
	int result = 0;

	pthread_mutex_lock(&worker->inbox_lock);
	if (worker->inbox_count == worker->inbox_capacity) {
		uint32_t capacity = worker->inbox_capacity ? 2 * worker->inbox_capacity : 64;
		struct lz_task **inbox = realloc(worker->inbox, capacity * sizeof(*inbox));

		if (inbox) {
			worker->inbox = inbox;
			worker->inbox_capacity = capacity;
		} else {
			result = -ENOMEM;
		}
	}
	if (!result) {
		__atomic_store_n(&task->status, LZ_TASK_SERVING, __ATOMIC_RELEASE);
		worker->inbox[worker->inbox_count] = task;
		__atomic_store_n(&worker->inbox_count, worker->inbox_count + 1, __ATOMIC_RELEASE);
	}
	pthread_mutex_unlock(&worker->inbox_lock);
	if (!result)
		lz_engine_wake_worker(worker);
	return result;
}

int lz_engine_attach(struct lz_engine *engine, uint32_t number, int uffd, int run_pid)
{
	struct lz_task *task = lz_engine_task_at(engine, number);
	int result;

	if (!task || task->status != LZ_TASK_PREPARED || task->uffd >= 0)
		return -EINVAL;
	task->uffd = uffd;
	task->run_pid = run_pid;
	task->worker = number % engine->workers;
	result = hand_over(engine, task);
	if (result < 0)
		task->uffd = -1;
	return result;
}

/* Have no thread of this process know of a task: what lz_engine_stop has left. */
static void forget_threads(struct lz_engine *engine)
{
	engine->stopping = 0;
	engine->abandoning = 0;
	lz_io_reset(&engine->io);
	lz_remote_resume(&engine->remote);
	for (uint32_t i = 0; i < engine->workers; i++) {
		struct lz_worker *worker = &engine->worker[i];

		worker->tasks = 0;
		worker->turn = 0;
		worker->pendings = 0;
		worker->outstanding = 0;
		worker->inbox_count = 0;
		memset(&worker->helper, 0, sizeof(worker->helper));
	}
}

void lz_engine_release_reserve(struct lz_engine *engine)
{
	while (lz_engine_spend_reserve(engine))
		;
}

void lz_engine_descriptors(struct lz_engine *engine, uint8_t *is, uint32_t count)
{
	uint32_t tasks = __atomic_load_n(&engine->shared->tasks, __ATOMIC_ACQUIRE);

	memset(is, LZ_DESCRIPTOR_UNKNOWN, count);
	for (uint32_t i = 0; i < tasks; i++) {
		const struct lz_task *task = nth_task(engine, i);

		if (task->closing > 0 && (uint32_t)task->closing <= count)
			is[task->closing - 1] = LZ_DESCRIPTOR_DONE;
		else if (task->status > LZ_TASK_SERVING && task->uffd >= 0 && (uint32_t)task->uffd < count)
			is[task->uffd] = LZ_DESCRIPTOR_DONE;
	}
	if (engine->remote.link && engine->remote.link->fd >= 0 && (uint32_t)engine->remote.link->fd < count)
		is[engine->remote.link->fd] = LZ_DESCRIPTOR_SERVED;
	/* Behind those, whose number another may have got meanwhile. */
	for (uint32_t i = 0; i < tasks; i++) {
		const struct lz_task *task = nth_task(engine, i);

		if (task->status == LZ_TASK_SERVING && task->uffd >= 0 && (uint32_t)task->uffd < count)
			is[task->uffd] = LZ_DESCRIPTOR_SERVED;
		for (uint32_t k = 0; k < task->batch.events && k < LZ_BATCH_ROOM; k++) {
			const struct lz_event *event = &task->event[task->batch.half][k];

			if (event->event == UFFD_EVENT_FORK && event->uffd >= 0 && (uint32_t)event->uffd < count)
				is[event->uffd] = LZ_DESCRIPTOR_SERVED;
		}
	}
	for (uint32_t i = 0; i < engine->workers; i++) {
		for (uint32_t k = 0; k < LZ_MESSAGES; k++) {
			const struct uffd_msg *message = &engine->worker[i].flight->message[k];

			if (message->event == UFFD_EVENT_FORK && message->arg.fork.ufd < count)
				is[message->arg.fork.ufd] = LZ_DESCRIPTOR_SERVED;
		}
	}
}

int lz_engine_resume(struct lz_engine *engine)
{
	uint32_t tasks = __atomic_load_n(&engine->shared->tasks, __ATOMIC_ACQUIRE);
	int served = 0;

	forget_threads(engine);
	for (uint32_t i = 0; i < tasks; i++) {
		struct lz_task *task = nth_task(engine, i);

		if (task->status == LZ_TASK_SERVING)
			lz_events_take_up(task);
		else
			task->uffd = -1; /* not handed over yet, or closed */
		task->closing = 0;
	}
	for (uint32_t i = 0; i < engine->workers; i++) {
		struct lz_flight *flight = engine->worker[i].flight;
		struct lz_task *task = lz_engine_task_at(engine, flight->task);

		for (uint32_t k = 0; k < LZ_MESSAGES; k++) {
			if (task && flight->message[k].event && task->status == LZ_TASK_SERVING)
				lz_events_recover(task, &flight->message[k]);
			flight->message[k].event = 0;
		}
		if (flight->handing_task) {
			/* Nobody knows whether something was moved there meanwhile. */
			task = lz_engine_task_at(engine, flight->handing_task - 1);
			if (task->status == LZ_TASK_SERVING)
				(void)lz_uffd_register(task->uffd, flight->handing_start,
						       flight->handing_end - flight->handing_start);
			flight->handing_task = 0;
		}
	}
	for (uint32_t i = 0; i < tasks; i++) {
		struct lz_task *task = nth_task(engine, i);
		int result;

		if (task->status != LZ_TASK_SERVING)
			continue;
		lz_space_forget_asked(engine->arena, &task->space);
		lz_fill_anew(task);
		task->held_pages = 0;
		task->near = 0;
		task->unsettled_ns = 0;
		task->left_pages = 0;
		for (uint32_t r = 0; r < task->space.regions; r++) {
			const struct lz_region *region = lz_space_region(engine->arena, &task->space, r);

			task->left_pages += lz_space_count_missing(engine->arena, &task->space, region->start,
								   region->start + (region->pages << LZ_PAGE_SHIFT));
		}
		result = hand_over(engine, task);
		if (result < 0)
			return result;
		/* Faults that were read and not answered are asked again. */
		for (uint64_t start = LZ_USER_START; start < LZ_USER_END;
		     start *= 2) { /* vm.mmap_min_addr may be higher */
			if (!lz_uffd_wake(task->uffd, start, LZ_USER_END - start))
				break;
		}
		served++;
	}
	return served;
}

void lz_engine_finish_restore(struct lz_engine *engine)
{
	engine->shared->fill_start_ns = lz_now_ns();
	__atomic_store_n(&engine->shared->finished, 1, __ATOMIC_RELEASE);
	wake_workers(engine);
}

int lz_engine_is_finished(struct lz_engine *engine)
{
	return (int)__atomic_load_n(&engine->shared->finished, __ATOMIC_ACQUIRE);
}

int lz_fork_keeping_fds(void)
{
	long child = syscall(SYS_clone, CLONE_FILES | SIGCHLD, NULL, NULL, NULL, NULL);

	return child < 0 ? -errno : (int)child;
}

int lz_swap(uint64_t *word, uint64_t old, uint64_t changed)
{
	return __atomic_compare_exchange_n(word, &old, changed, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

int lz_signals_open(const int *numbers, uint32_t count)
{
	sigset_t set;
	int fd;

	sigemptyset(&set);
	for (uint32_t i = 0; i < count; i++)
		sigaddset(&set, numbers[i]);
	fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	return fd < 0 ? -errno : fd;
}

void lz_engine_hurry(struct lz_engine *engine)
{
	__atomic_store_n(&engine->shared->fill_rate, 0, __ATOMIC_RELEASE);
	__atomic_store_n(&engine->shared->fill, LZ_FILL_FULL, __ATOMIC_RELEASE);
	wake_workers(engine);
}

void lz_engine_stop(struct lz_engine *engine)
{
	__atomic_store_n(&engine->stopping, 1, __ATOMIC_RELEASE);
	wake_workers(engine);
	for (uint32_t i = 0; i < engine->workers; i++) {
		struct lz_worker *worker = &engine->worker[i];

		if (worker->running)
			pthread_join(worker->thread, NULL);
		worker->running = false;
	}
	lz_remote_stop(&engine->remote);
	lz_io_stop(&engine->io);
}

void lz_engine_abandon(struct lz_engine *engine)
{
	__atomic_store_n(&engine->abandoning, 1, __ATOMIC_RELEASE);
	lz_engine_stop(engine);
}

void lz_engine_free(struct lz_engine *engine)
{
	if (!engine)
		return;
	lz_engine_stop(engine);
	for (uint32_t i = 0; i < engine->workers; i++) {
		struct lz_worker *worker = &engine->worker[i];

		if (worker->epoll >= 0)
			close(worker->epoll);
		if (worker->wake >= 0)
			close(worker->wake);
		free(worker->task);
		free(worker->inbox);
		pthread_mutex_destroy(&worker->inbox_lock);
	}
	for (uint32_t i = 0; engine->shared && i < engine->shared->tasks; i++) {
		struct lz_task *task = nth_task(engine, i);

		if (task->uffd >= 0)
			close(task->uffd);
	}
	for (uint32_t i = 0; i < engine->sources; i++) {
		if (engine->source[i].is_landing)
			continue;
		if (engine->source[i].map)
			munmap((void *)(uintptr_t)engine->source[i].map, engine->source[i].size);
		close(engine->source[i].fd);
	}
	lz_remote_free(&engine->remote);
	lz_engine_release_reserve(engine);
	if (engine->notify >= 0)
		close(engine->notify);
	lz_arena_free(engine->arena);
	free(engine->source);
	free(engine->reserve_fd);
	pthread_mutex_destroy(&engine->lock);
	pthread_mutex_destroy(&engine->notice_lock);
	free(engine);
}

int lz_engine_notify_fd(struct lz_engine *engine)
{
	return engine->notify;
}

void lz_engine_notify(struct lz_engine *engine, const struct lz_notice *notice)
{
	uint64_t one = 1;
	ssize_t written;

	pthread_mutex_lock(&engine->notice_lock);
	if (engine->notices < LZ_NOTICES)
		engine->notice[(engine->notice_first + engine->notices++) % LZ_NOTICES] = *notice;
	else
		engine->notices_lost++;
	pthread_mutex_unlock(&engine->notice_lock);
	written = write(engine->notify, &one, sizeof(one));
	(void)written;
}

int lz_engine_next_notice(struct lz_engine *engine, struct lz_notice *notice)
{
	int found = 0;
	uint64_t count;
	ssize_t got;

	pthread_mutex_lock(&engine->notice_lock);
	if (engine->notices) {
		*notice = engine->notice[engine->notice_first];
		engine->notice_first = (engine->notice_first + 1) % LZ_NOTICES;
		engine->notices--;
		found = 1;
	} else if (engine->notices_lost) {
		*notice = (struct lz_notice){ .kind = LZ_NOTICE_LOST, .value = engine->notices_lost };
		engine->notices_lost = 0;
		found = 1;
	} else {
		got = read(engine->notify, &count, sizeof(count));
		(void)got;
	}
	pthread_mutex_unlock(&engine->notice_lock);
	return found;
}

void lz_engine_totals(struct lz_engine *engine, struct lz_totals *totals)
{
	uint32_t tasks = __atomic_load_n(&engine->shared->tasks, __ATOMIC_ACQUIRE);

	memset(totals, 0, sizeof(*totals));
	for (uint32_t i = 0; i < engine->workers; i++) {
		const struct lz_counters *from = engine->worker[i].counters;

#define ADD(name) totals->name += __atomic_load_n(&from->name, __ATOMIC_RELAXED)
		ADD(faults);
		ADD(fault_copied_pages);
		ADD(fill_copied_pages);
		ADD(zero_pages);
		ADD(present_pages);
		ADD(poisoned_pages);
		ADD(dropped_pages);
		ADD(forks);
		ADD(remaps);
		ADD(removes);
		ADD(unmaps);
		ADD(again);
		ADD(unregistered_pages);
		ADD(fault_ns_sum);
		ADD(fill_ns);
		for (uint32_t k = 0; k < LZ_LATENCY_BUCKETS; k++)
			ADD(fault_ns[k]);
#undef ADD
		if (__atomic_load_n(&from->fault_ns_max, __ATOMIC_RELAXED) > totals->fault_ns_max)
			totals->fault_ns_max = __atomic_load_n(&from->fault_ns_max, __ATOMIC_RELAXED);
	}
	for (uint32_t i = 0; i < tasks; i++) {
		const struct lz_task *task = nth_task(engine, i);
		uint32_t status = __atomic_load_n(&task->status, __ATOMIC_ACQUIRE);

		totals->image_pages += task->image_pages;
		if (status == LZ_TASK_PREPARED || status == LZ_TASK_SERVING)
			totals->left_pages += __atomic_load_n(&task->left_pages, __ATOMIC_RELAXED);
		totals->serving += status == LZ_TASK_SERVING;
		totals->tasks += status != LZ_TASK_PREPARED;
	}
}

int lz_engine_task(struct lz_engine *engine, uint32_t number, struct lz_task_info *info)
{
	const struct lz_task *task = lz_engine_task_at(engine, number);

	if (!task)
		return -ESRCH;
	*info = (struct lz_task_info){
		.image_pid = task->image_pid,
		.run_pid = task->run_pid,
		.status = __atomic_load_n(&task->status, __ATOMIC_ACQUIRE),
		.parent = task->parent,
		.image_pages = task->image_pages,
		.left_pages = __atomic_load_n(&task->left_pages, __ATOMIC_RELAXED),
	};
	return 0;
}

/* Largest number of ns that falls into a latency bucket. */
static uint64_t bucket_top(uint32_t bucket)
{
	uint32_t exponent = bucket / 16 + 3;

	if (bucket < 16)
		return bucket;
	return (((16ULL + bucket % 16) + 1) << (exponent - 4)) - 1;
}

uint64_t lz_latency_quantile(const struct lz_totals *totals, double share)
{
	uint64_t total = 0, seen = 0;

	for (uint32_t i = 0; i < LZ_LATENCY_BUCKETS; i++)
		total += totals->fault_ns[i];
	for (uint32_t i = 0; total && i < LZ_LATENCY_BUCKETS; i++) {
		seen += totals->fault_ns[i];
		if ((double)seen >= share * (double)total) {
			uint64_t top = bucket_top(i);

			return top < totals->fault_ns_max ? top : totals->fault_ns_max;
		}
	}
	return 0;
}
