/* SPDX-License-Identifier: MIT */
/*
 * Pages that only a page server has: what is asked of it, and where the answers land.
 *
 * Remote pages are numbered through all tables, as if they were one pages image: rows name them by source and offset as
 * those of dumped pages. A page that is asked for gets a place in the landing, a memfd that is mapped; a receiver
 * thread reads the socket straight into it, and what has arrived is then served as what is in memory of a local image
 * is: by the worker, near faults first, to every task that wants it. So a page crosses the network once, whatever is
 * forked, moved or dropped meanwhile. The place of a page that is installed and wanted by nobody else is used again:
 * the landing stays small, and warm in the caches.
 *
 * Requests go out in the order they are made and answers come in that order (FACTS of the protocol: lazyd/wire.py).
 * Bulk is asked only as long as what is on its way fits a window: what the link holds (its rate times its round trip,
 * both measured) and a little, so that the server always has something to send and a fault never has much before it.
 *
 * The bytes wait in memory of ours between the socket and UFFDIO_COPY, so that no task's changing layout ever holds up
 * the link, and a process that dies loses nothing that has arrived: all of the state is in the arena, and what the dead
 * process has taken from the socket without writing it down is found out from TCP's own counters (tcp(7), TCP_INFO;
 * SIOCINQ, SIOCOUTQ).
 */
#ifndef LZ_REMOTE_H
#define LZ_REMOTE_H

#include "lz.h"

#include <pthread.h>

struct lz_engine;
struct lz_worker;

#define LZ_REQUESTS 1024U
#define LZ_REMOTE_READ 0x80000000U /* plus the number of a remote page: a fault waits for its arrival */

/* A GET, and what is known of its answer. */
struct lz_request {
	uint64_t address;      /* image address */
	uint64_t offset;       /* of its first page among all remote ones, in bytes */
	uint64_t answer_start; /* where its answer begins: bytes received on this connection before it */
	uint64_t asked_ns;
	uint32_t pages;
	uint32_t answer_pages; /* 0: its header has not been read yet */
	uint32_t answer_bytes; /* of pages, behind the header */
	int32_t pid;
	uint32_t worker;
	uint32_t place; /* of its first page in the landing, in pages; the others are behind it */
};

/*
 * The link, in the arena. Where it stands is one counter each way (received_bytes, sent_bytes) and one in the ring
 * (answered); everything else follows from these and is written before them.
 */
struct lz_link {
	uint64_t first;    /* requests ever made before this connection */
	uint64_t asked;    /* ever made */
	uint64_t answered; /* ever answered; the next one's answer is coming in */
	uint64_t sent_bytes, received_bytes;
	uint64_t sent_base, received_base;            /* what TCP had counted when this connection began */
	uint64_t total_bytes;                         /* of pages, over all connections; atomic */
	uint64_t remote_bytes;                        /* of pages, over all tables */
	uint64_t asked_bits, arrived_bits, lost_bits; /* a bit a remote page */
	uint64_t places;                              /* uint32_t a remote page that is asked for: its place */
	uint64_t used_bits;                           /* a bit a place */
	uint64_t used_end;                            /* no place is in use from here on */
	uint64_t in_flight;                           /* bytes of pages that are asked and have not come; atomic */
	int32_t fd;
	int32_t error;     /* atomic; -errno: the link is of no use any more, and reason and detail say why */
	uint32_t breaking; /* atomic; somebody is about to say so */
	uint32_t reason;   /* enum lz_link_reason */
	uint64_t detail[2];
	uint32_t header_bytes;
	uint32_t speaks_lazyd; /* atomic; the other side has said so */
	uint32_t any_lost;
	uint32_t sending, receiving; /* atomic; in the middle of a system call and what is written down after it */
	uint32_t generation;         /* atomic; goes up when something that was asked is not asked any more */
	uint64_t round_trip_ns;      /* the shortest that was seen */
	uint64_t rate;               /* bytes a second */
	uint8_t header[32];
	struct lz_request request[LZ_REQUESTS];
};

struct lz_remote {
	struct lz_engine *engine;
	struct lz_link *link; /* NULL: there is no page server */
	uint8_t *landing;
	int landing_fd;
	uint32_t source; /* its number */
	int wake;
	bool running;
	uint32_t stopping; /* atomic */
	pthread_t receiver;
	pthread_mutex_t lock; /* requests */
	/* What is received is noted on the connection that it is of; taken before the other. */
	pthread_mutex_t receive_lock;
	uint64_t measured_ns;    /* when the rate was measured last; 0: nothing has been on its way since */
	uint64_t measured_bytes; /* and what total_bytes was then */
};

void lz_remote_init(struct lz_remote *remote, struct lz_engine *engine);
int lz_remote_start(struct lz_remote *remote);
void lz_remote_stop(struct lz_remote *remote);
/* Go on where a process that died has left the link; while no thread runs. */
void lz_remote_resume(struct lz_remote *remote);
void lz_remote_free(struct lz_remote *remote);
/* Give the remote rows of a table their places. -ENOSPC when there are more than the landing holds. */
int lz_remote_place(struct lz_remote *remote, struct lz_extent *rows, uint64_t count);

/* How many bytes of the remote pages from start to end have arrived (or are lost), from its start on. */
uint64_t lz_remote_arrived(const struct lz_remote *remote, uint64_t start, uint64_t end);
/* How many of the pages from an offset on the server has not said of that it does not have them. */
uint64_t lz_remote_good(const struct lz_remote *remote, uint64_t offset, uint64_t pages);
/*
 * Ask for the first pages of a run that nobody has asked for. Returns how many pages of the run, from its start, are
 * dealt with (asked now, before, or arrived); fewer than there are: try again from there. 0: nothing can be asked now.
 */
uint32_t lz_remote_ask(struct lz_remote *remote, const struct lz_worker *worker, int pid, uint64_t address,
		       uint64_t offset, uint32_t pages, bool urgent);
/* Whether a remote page was asked for, and perhaps has come. */
bool lz_remote_is_asked(const struct lz_remote *remote, uint64_t offset);
/* Whether a fault that waits for a remote page should look again. */
bool lz_remote_is_due(const struct lz_remote *remote, uint64_t offset);
/*
 * In how many pages bulk is asked for at once: servers are faster at large requests, but a fault waits behind the rest
 * of one. Where the way is short, what ends the faults soonest is the fill, so it is large even while somebody faults.
 */
uint32_t lz_remote_chunk(const struct lz_remote *remote, bool is_active);
/* How much more bulk may be asked; less while faults may come behind it. */
uint64_t lz_remote_room(const struct lz_remote *remote, bool is_active);
/* Where a page that has arrived is. *pages is shortened to what lies behind it there, too. */
const uint8_t *lz_remote_bytes(const struct lz_remote *remote, uint64_t offset, uint64_t *pages);
/*
 * Count the bytes of a TCP connection that were read and that were written, since some moment that does not change;
 * while nobody reads or writes. -errno: it cannot be known.
 */
int lz_tcp_moved(int fd, uint64_t *received, uint64_t *sent);
/* Forget pages that have arrived, are installed and are wanted by nobody else. */
void lz_remote_release(struct lz_remote *remote, uint64_t start, uint64_t end);

#endif
