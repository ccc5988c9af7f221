/* SPDX-License-Identifier: MIT */
/*
 * In which order layout events took effect.
 *
 * The kernel raises mmap_changing and changes the layout under mmap_lock, lets go of the lock, and only then queues
 * the event. Two threads can pass each other in between, so events are read in another order than the one they took
 * effect in: thread 1 unmaps A, thread 2 moves B to where A was, and "B moved to A" is read before "A unmapped". Taken
 * at their word, the pages of B would be forgotten and read as zeros. A fork that passes an unmap would lack what its
 * child still has.
 *
 * What saves us: as long as one of the events is outstanding nothing can be installed, so applying them can wait
 * until all of them have been read and the layout is seen settled; and then the kernel itself says (lz_uffd_probe)
 * which of the addresses they name are registered now, in the task and in a forked child, which tells the order.
 * One event alone, the case of every program with one thread, needs no question.
 *
 * Not all that the kernel says proves something. A page is never unregistered without an event, so "not registered"
 * does; but a VMA that grows in place registers pages silently, so a page that is registered and continues the VMA
 * before it, or did until that went, may be new memory where other memory was unmapped. And an mremap goes to a free
 * place only: whatever was there was unmapped before, also when that is read later. What a program can rely on comes
 * out right by the order of reading alone: a thread that knows of another one's call, as a child knows of its
 * parent's, starts after that call has returned, so after its events were read. So that order is left only on proof,
 * and then for as few events as explain what the kernel says: each is a thread that stood still between its change and
 * its event. In particular a fork that a proof moves takes no call along that its own thread made after it.
 *
 * An mremap is one change that two events tell of: its move, and the UNMAP of the old place, between which others may
 * be read. So once the move has taken effect nothing is predicted of the old place.
 */
#ifndef LZ_LAYOUT_H
#define LZ_LAYOUT_H

#include <stdbool.h>
#include <stdint.h>

#define LZ_BATCH 6U        /* events in one batch whose order is asked for */
#define LZ_BATCH_ROOM 128U /* as many can be left by a process that died */

/* An event as it was read, not applied yet. */
struct lz_event {
	uint64_t start; /* run address of what is moved, unmapped or dropped */
	uint64_t end;
	uint64_t to;    /* UFFD_EVENT_REMAP: where to */
	uint32_t event; /* UFFD_EVENT_* */
	int32_t uffd;   /* UFFD_EVENT_FORK: the child's */
	uint64_t read_ns;
	/* UFFD_EVENT_FORK: the layout was watched without a break since the one event before and never seen settled,
	 * so the fork had happened before the thread that raised that event went on. */
	bool overlapped;
};

enum lz_truth {
	LZ_UNKNOWN = -1,
	LZ_NOT_REGISTERED = 0,
	LZ_REGISTERED = 1,
};

/*
 * Tell whether the page at a run address is registered: now in the task (child < 0), now in the child of the fork
 * with that number in the batch, or before the batch in the task (child LZ_BEFORE). Of a page that a VMA may have
 * grown to, being in one with the page before it, LZ_UNKNOWN.
 */
#define LZ_BEFORE (-2)
typedef enum lz_truth lz_truth_function(void *context, int child, uint64_t address);

/* Fill order[0..count) with the numbers of the events as they took effect. */
void lz_layout_order(const struct lz_event *events, uint32_t count, lz_truth_function *truth, void *context,
		     uint8_t *order);

#endif
