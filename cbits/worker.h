/* SPDX-License-Identifier: MIT */
/*
 * What the parts of a worker share. Every function here runs in the worker's own thread; `worker` and `task` are its
 * own. Results of attempts to install something: 0 done; -EAGAIN, -EBUSY or -ENOMEM to be tried again later;
 * -EINPROGRESS its bytes are being read from a disk; -ESRCH the memory is gone; anything else: the task cannot be
 * served. lz_task_outcome acts on them.
 */
#ifndef LZ_WORKER_H
#define LZ_WORKER_H

#include "engine.h"
#include "uffd.h"

#include <assert.h>

#define ACTIVE_CHUNK_PAGES 16U /* filled in one go while a task faults, and read in one go for a fault */
#define SCATTER_RANDOM 8U      /* from here on faults are random: what is around them is not what comes next */
#define SCATTER_MOST 16U
#define RESIDENT_PAGES 256U /* asked at once whether they are in memory */

#define PAGES(bytes) ((bytes) >> LZ_PAGE_SHIFT)
#define BYTES(pages) ((uint64_t)(pages) << LZ_PAGE_SHIFT)

enum lz_cause { LZ_BY_FAULT, LZ_BY_FILL };

/* Who asks for bytes of a source, each somewhere else in it. */
enum lz_for { LZ_FOR_WORKER, LZ_FOR_HELPER };

static inline void lz_count(uint64_t *counter, uint64_t n)
{
	__atomic_store_n(counter, *counter + n, __ATOMIC_RELAXED);
}

static inline void lz_notify(struct lz_worker *worker, struct lz_notice notice)
{
	lz_engine_notify(worker->engine, &notice);
}

static inline bool lz_is_serving(const struct lz_task *task)
{
	return task->status == LZ_TASK_SERVING;
}

/* Image pages that are not missing any more. */
static inline void lz_forget_left(struct lz_task *task, uint64_t pages)
{
	assert(pages <= task->left_pages);
	__atomic_store_n(&task->left_pages, task->left_pages - pages, __ATOMIC_RELAXED);
}

/* task.c */
int lz_task_adopt(struct lz_worker *worker, struct lz_task *task);
/* Close the uffd: only when no image page is missing or poisoned, or the memory is gone. The space is dropped. */
void lz_task_end(struct lz_worker *worker, struct lz_task *task, enum lz_task_status status, struct lz_notice notice);
void lz_task_gone(struct lz_worker *worker, struct lz_task *task);
/* Poison what is missing and end the task. */
void lz_task_fail(struct lz_worker *worker, struct lz_task *task, int error);
/* Poison every missing image page of a task's space through a uffd. Returns how many could not be. */
int64_t lz_task_poison(struct lz_worker *worker, struct lz_task *task, int uffd);
/* Leave a task alone for a while whose layout is changing; longer each time until lz_task_settle. */
void lz_task_unsettle(struct lz_worker *worker, struct lz_task *task, uint64_t now);
void lz_task_settle(struct lz_task *task);
/* Act on the result of an attempt. True when it is not to be tried again; the task may have ended. */
bool lz_task_outcome(struct lz_worker *worker, struct lz_task *task, int result);

/* install.c */
int lz_install_run(struct lz_worker *worker, struct lz_task *task, const struct lz_run *run, enum lz_cause cause);
/*
 * Zeros: the first page surely, the others as far as they go. To be written: as pages of the task's own, at most
 * LZ_FRESH_PAGES of them; the zero page would be exchanged for one at the write, by a fault for each.
 */
int lz_install_zeros(struct lz_worker *worker, struct lz_task *task, uint64_t start, uint64_t pages, bool to_write);
/*
 * Ask whether a pages image still holds its bytes up to `end`. A page of a mapping that lies beyond the end of its
 * file raises -EFAULT in COPY; but the rest of the last page of a file that was cut inside a page reads as zeros.
 */
bool lz_source_holds(struct lz_worker *worker, enum lz_for who, uint16_t source, uint64_t end);
/* The same where the answer may be a little old: the look after one copy is the look before the next. */
bool lz_source_held(struct lz_worker *worker, enum lz_for who, enum lz_cause cause, uint16_t source, uint64_t end);
/* How much of a range of a source, from its start, is in memory; 0 when its first page is not. */
uint64_t lz_resident_bytes(struct lz_worker *worker, enum lz_for who, uint16_t source, uint64_t start, uint64_t end);

/* fault.c */
/* Answer a fault, or keep it for later. `since` is when it may have happened, `read` what was read for it, if any. */
void lz_fault_answer(struct lz_worker *worker, struct lz_task *task, struct lz_fault fault, uint64_t since,
		     uint32_t read);
void lz_fault_retry(struct lz_worker *worker, uint64_t now);

/* events.c */
/* Drain a task's queue: its layout events are kept, its faults returned; what finds no room is woken. */
uint32_t lz_events_read(struct lz_worker *worker, struct lz_task *task, struct lz_fault *faults, uint32_t room);
/* Apply the events that are kept, if the layout has settled. True when none is outstanding. */
bool lz_events_settle(struct lz_worker *worker, struct lz_task *task);
/* Apply them now. */
void lz_events_apply(struct lz_worker *worker, struct lz_task *task);

/* Around a change of a task's regions: if this process dies in between, the next one finds them as they were. */
int lz_events_begin_change(struct lz_worker *worker, struct lz_task *task);
void lz_events_end_change(struct lz_task *task, uint32_t applied);
/* Make a task that a dead process served fit to be served; before any worker runs. */
void lz_events_take_up(struct lz_task *task);
/* Keep an event that was read by a process that is dead; before any worker runs. */
void lz_events_recover(struct lz_task *task, const struct uffd_msg *message);

/* fill.c */
/* One round of background work. True when something was done and the next round may do more. */
bool lz_fill(struct lz_worker *worker, uint64_t now);
/* The next missing run of a task in order; false when no image page of it is missing. */
bool lz_fill_next(struct lz_worker *worker, struct lz_task *task, uint64_t most, struct lz_run *run, uint32_t *region);
/* Begin with the first region again: their numbers have changed, or pages of them are missing again. */
void lz_fill_anew(struct lz_task *task);
/* A page at a run address is missing again: the fill has to come back to it. */
void lz_fill_again(struct lz_worker *worker, struct lz_task *task, uint64_t address);
/* End a task of which nothing is missing; false when something is, or is held back and its faults must stay blocked. */
bool lz_fill_done(struct lz_worker *worker, struct lz_task *task);

#endif
