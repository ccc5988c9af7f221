/* SPDX-License-Identifier: MIT */
/*
 * A fill helper: a second thread that copies for a worker, with the processor time that nobody else wants.
 *
 * One thread copies 256 MiB out of the page cache in about 80 ms on the machine this was built on, two in 50 (the copy
 * itself is nearly all of it). So the worker hands part of the background fill to a helper under SCHED_IDLE, which a
 * task that wakes preempts at once.
 *
 * A task that faults leaves its processor idle until it is answered: that time is the helper's. But a helper that the
 * woken task preempts inside a copy would hold up the next fault (tried: p99 went from 140 to 600 µs). So it is held
 * from before a queue is read until the task has been woken, and then stands by: it spins, which may be preempted at
 * any time, until a gap in its own time shows that somebody ran in its place and has left again. A processor that
 * spins is also woken sooner than one that sleeps.
 *
 * Nothing may be copied on a decision that a layout event has outdated, and reading an event lets the task go on. So
 * the worker reads a task's queue only while no helper is inside a copy for it, and takes back what is not copied
 * before it applies an event: helper.busy and helper.wanted exclude each other (Dekker), a few pages at a time. A
 * helper that is preempted inside a copy all the same is made to run at once, and then left without work for a while.
 *
 * Pages handed to the helper are LZ_ASKED. A fault on one is answered by the worker at once; both copy the same bytes,
 * and the second is told -EEXIST.
 */
#ifndef LZ_HELPER_H
#define LZ_HELPER_H

#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>

struct lz_run;
struct lz_task;
struct lz_worker;

#define LZ_JOBS 16U
#define LZ_JOB_PAGES 64U

struct lz_job {
	struct lz_task *task; /* NULL: taken back */
	uint64_t start;       /* run address */
	uint64_t offset;      /* bytes into the source */
	uint32_t pages;
	uint32_t copy_pages; /* in one copy */
	uint32_t done_pages;
	int uffd;
	uint16_t source;
	bool failed;  /* not all of it could be copied: the worker finds out why */
	bool suspect; /* the source was cut while it was copied */
};

struct lz_helper {
	pthread_t thread;
	pid_t tid;
	cpu_set_t processors; /* it may run on */
	bool running;
	uint32_t stopping; /* atomic */
	uint32_t busy;     /* atomic, futex: inside a copy or about to be */
	uint32_t wanted;   /* atomic: the worker wants busy to be and stay 0 */
	uint32_t woken;    /* atomic: goes up when a task is about to be woken */
	uint32_t posted;   /* atomic, futex: goes up when there may be something to do */
	uint32_t sleeping; /* atomic */
	uint32_t depth;    /* of lz_helper_hold in the worker */
	uint64_t rest_length_ns;
	uint64_t rest_ns;   /* no jobs for it before then */
	uint32_t head;      /* atomic: first job that is not finished */
	uint32_t tail;      /* atomic: end of the jobs */
	uint32_t harvested; /* jobs before it have been accounted for */
	struct lz_job job[LZ_JOBS];
};

/* Start the helper of a worker; none where there is one processor. */
void lz_helper_start(struct lz_worker *worker);
void lz_helper_stop(struct lz_worker *worker);
/* Whether it would take a job now. */
bool lz_helper_has_room(struct lz_worker *worker, uint64_t now);
/* Hand over a run of missing dumped pages, at most LZ_JOB_PAGES; they are LZ_ASKED from then on. A fault may have
 * to wait for copy_pages of it. */
void lz_helper_give(struct lz_worker *worker, struct lz_task *task, const struct lz_run *run, uint32_t copy_pages);
/* Account for the jobs that are finished. */
void lz_helper_harvest(struct lz_worker *worker);
/* Whether it has been found without a processor of its own lately. */
bool lz_helper_rests(const struct lz_worker *worker, uint64_t now);
/* Keep the helper out of copies until lz_helper_release; they nest. */
void lz_helper_hold(struct lz_worker *worker);
/* Let it copy in the middle of a hold, for as long as no task is woken; returns what regain needs to know. */
uint32_t lz_helper_lend(struct lz_worker *worker);
void lz_helper_regain(struct lz_worker *worker, uint32_t depth);
/* A task is about to be woken, which may need the helper's processor; to be of use, while the helper is held. */
void lz_helper_stand_by(struct lz_worker *worker);
void lz_helper_release(struct lz_worker *worker);
/* Take back what a task has given and is not copied: those pages are missing again. */
void lz_helper_recall(struct lz_worker *worker, struct lz_task *task);

#endif
