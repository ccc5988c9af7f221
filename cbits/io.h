/* SPDX-License-Identifier: MIT */
/*
 * Bytes that are not in the page cache yet.
 *
 * A COPY from a mapping whose page is not in memory blocks its worker on the disk, and with it every other fault. So
 * a worker asks first (mincore: about 0.3 µs for a fault, once a MiB for a fill), lets a reader thread wait for the
 * disk, and serves what is there meanwhile. The answer may be out of date when the copy is made; then it blocks, which
 * is slow and right. mincore tells the truth only to the owner of a file and to those who may write it, and calls
 * everything resident otherwise: then nothing is lost but the overlap.
 */
#ifndef LZ_IO_H
#define LZ_IO_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct lz_engine;
struct lz_worker;

#define LZ_READERS 2U
#define LZ_READS 128U
#define LZ_NO_READ UINT32_MAX

enum lz_read_state { LZ_READ_FREE, LZ_READ_QUEUED, LZ_READ_RUNNING, LZ_READ_DONE };

struct lz_read {
	struct lz_worker *worker; /* woken when it is done */
	uint64_t start, end;      /* bytes of the source */
	uint64_t turn;
	uint16_t source;
	bool urgent; /* a fault waits: before all that is not; its slot is freed by lz_io_take */
	enum lz_read_state state;
};

struct lz_io {
	struct lz_engine *engine;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	pthread_t reader[LZ_READERS];
	pthread_t mapper; /* maps what is in memory already, once */
	bool maps;
	uint32_t readers;
	bool stopping;
	uint32_t ahead_running; /* reads that are not urgent and on their way */
	uint64_t turn;
	struct lz_read read[LZ_READS];
};

void lz_io_init(struct lz_io *io, struct lz_engine *engine);
int lz_io_start(struct lz_io *io);
/* Begin to map; once, between start and stop, when all threads have what they need to begin. */
void lz_io_map(struct lz_io *io);
/* Ends the readers; a read that waits for a disk is waited for. */
void lz_io_stop(struct lz_io *io);
/* Forget what was asked, while no reader runs, so that it may be started again. */
void lz_io_reset(struct lz_io *io);
/* Have bytes of a source read for a fault. Returns the read's number, or LZ_NO_READ when there are too many. */
uint32_t lz_io_fetch(struct lz_io *io, struct lz_worker *worker, uint16_t source, uint64_t start, uint64_t end);
/* True, and the number is free again, when a read that lz_io_fetch began is done. */
bool lz_io_take(struct lz_io *io, uint32_t number);
/* Whether a read that holds this byte of a source is queued or on its way. */
bool lz_io_is_reading(struct lz_io *io, uint16_t source, uint64_t offset);
/* Have bytes read for background fill, unless the same are being read. */
void lz_io_ahead(struct lz_io *io, struct lz_worker *worker, uint16_t source, uint64_t start, uint64_t end);

#endif
