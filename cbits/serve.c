/* SPDX-License-Identifier: MIT */
/*
 * One client of a page server: GETs are answered from the page cache, dumped pages are kept.
 *
 * Each client has a thread of its own, which blocks in here: one that stalls, floods or asks for much holds up nobody
 * else, and answers come in the order of the questions by themselves. Nothing is kept of a client but one buffer of
 * input; a client that asks and does not read is not read from either.
 *
 * Bytes leave by sendfile, which hands the pages of the page cache to the network without a copy. The header waits in
 * the kernel for its pages (MSG_MORE), so that both leave in one segment; the end of an answer is pushed out at once.
 * Bytes arrive by way of a buffer that stays in a core's cache between its two copies: splice would save one of them,
 * and costs a pipe and two system calls for every page of a fragmented image.
 *
 * What the fields of a message may be is said by lazyd/wire.py alone: a message that is not plainly right is the
 * caller's, who has it parsed there.
 */
#define _GNU_SOURCE 1
#include "lz.h"
#include "wire.h"

#include <assert.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define INPUT_BYTES (256U << 10)
/* The most that one answer holds: more only means that the next question waits longer. */
#define ANSWER_BYTES (16ULL << 20)
#define ZERO_BYTES (64U << 10)
/* 400 MB of entries; an image of which every second page was dumped has as many at 128 GiB. */
#define RUNS_MAX (16ULL << 20)

static const uint8_t zeros[ZERO_BYTES];

static struct lz_message decode(const struct lz_peer *peer)
{
	return lz_wire_decode(peer->head, peer->header_bytes);
}

static void encode(struct lz_peer *peer, uint32_t flags, uint64_t pages, uint64_t address, uint64_t destination)
{
	const struct lz_message message = { PS_ADD_F, flags, pages, address, destination };

	lz_wire_encode(peer->reply_head, peer->header_bytes, &message);
	peer->reply_head_at = 0;
	peer->reply_head_left = peer->header_bytes;
}

static bool is_range(const struct lz_message *m)
{
	return m->pages && m->address % LZ_PAGE_SIZE == 0 && m->address < LZ_USER_END &&
	       m->pages <= (LZ_USER_END - m->address) >> LZ_PAGE_SHIFT;
}

/* ---- input ---- */

/* Have something in the empty buffer: 1, 0 at the end of the stream, -EAGAIN after a timeout, or -errno. */
static int fill_input(struct lz_peer *peer)
{
	ssize_t got;

	if (!peer->input && !(peer->input = malloc(INPUT_BYTES)))
		return -ENOMEM;
	do
		got = recv(peer->fd, peer->input, INPUT_BYTES, 0);
	while (got < 0 && errno == EINTR);
	if (got < 0)
		return -errno;
	peer->input_at = 0;
	peer->input_end = (uint32_t)got;
	return got > 0;
}

/* Have `bytes` of a message in head: 1; 0: LZ_PEER_ENDED; 2: a stall in the middle; or -errno. */
static int read_head(struct lz_peer *peer, uint32_t bytes)
{
	while (peer->head_filled < bytes) {
		uint32_t there = peer->input_end - peer->input_at, take = bytes - peer->head_filled;
		if (!there) {
			int result = fill_input(peer);
			if (result == -EAGAIN && peer->head_filled)
				return 2;
			if (result == -EAGAIN)
				continue; /* a client may be quiet as long as it likes between two messages */
			if (result <= 0)
				return result < 0 ? result : peer->head_filled ? -ENODATA : 0;
			continue;
		}
		if (take > there)
			take = there;
		memcpy(peer->head + peer->head_filled, peer->input + peer->input_at, take);
		peer->input_at += take;
		peer->head_filled += take;
	}
	return 1;
}

int lz_peer_peek(struct lz_peer *peer, uint32_t bytes)
{
	int result;

	assert(bytes <= sizeof(peer->head));
	result = read_head(peer, bytes);
	return result == 2 ? LZ_PEER_STALLED : result == 1 ? LZ_PEER_MESSAGE : result;
}

/* ---- answers ---- */

enum content { MISSING, ZEROS, BYTES };

struct stretch {
	enum content what;
	uint64_t bytes;
	uint64_t offset;
	int fd;
};

static void note_lost(struct lz_shelf *shelf, uint64_t page)
{
	uint64_t index = __atomic_fetch_add(&shelf->lost_count, 1, __ATOMIC_RELAXED);

	if (index < LZ_LOST_MAX)
		__atomic_store_n(&shelf->lost[index], page, __ATOMIC_RELAXED);
}

/* Cut what was found at `at` before the first page that is lost; if that is the first of it, it is missing. */
static void leave_out_lost(const struct lz_shelf *shelf, uint64_t at, struct stretch *found)
{
	uint64_t count = __atomic_load_n(&shelf->lost_count, __ATOMIC_RELAXED);

	for (uint64_t i = 0; i < count && i < LZ_LOST_MAX; i++) {
		uint64_t page = __atomic_load_n(&shelf->lost[i], __ATOMIC_RELAXED), end = page + LZ_PAGE_SIZE;
		if (page > at && page - at < found->bytes)
			found->bytes = page - at;
		if (page <= at && at < end) {
			found->what = MISSING;
			if (end - at < found->bytes)
				found->bytes = end - at;
		}
	}
}

/* Return what a table has from `at` on, at most `most` bytes of it; *row is the first that ends behind `at`. */
static struct stretch look(const struct lz_shelf *shelf, uint64_t *row, uint64_t at, uint64_t most)
{
	struct stretch found = { .what = MISSING, .bytes = most, .fd = -1 };
	const struct lz_extent *extent;
	struct stat status;
	uint64_t end;

	while (*row < shelf->count &&
	       shelf->rows[*row].start + ((uint64_t)shelf->rows[*row].pages << LZ_PAGE_SHIFT) <= at)
		(*row)++;
	if (*row == shelf->count)
		return found;
	extent = &shelf->rows[*row];
	end = extent->start + ((uint64_t)extent->pages << LZ_PAGE_SHIFT);
	if (extent->start > at)
		end = extent->start;
	if (end - at < most)
		found.bytes = end - at;
	if (extent->start > at)
		return found;
	if (extent->kind == LZ_KIND_ZERO)
		found.what = ZEROS;
	if (extent->kind != LZ_KIND_DUMPED)
		return found;
	found.fd = shelf->fds[extent->source];
	found.offset = extent->offset + (at - extent->start);
	/* An image that was cut since has no page that is not whole. */
	if (fstat(found.fd, &status) < 0)
		return found;
	end = (uint64_t)status.st_size & ~(LZ_PAGE_SIZE - 1);
	if (found.offset >= end)
		return found;
	if (end - found.offset < found.bytes)
		found.bytes = end - found.offset;
	found.what = BYTES;
	leave_out_lost(shelf, at, &found);
	return found;
}

static uint64_t first_row(const struct lz_shelf *shelf, uint64_t at)
{
	uint64_t low = 0, high = shelf->count;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		const struct lz_extent *row = &shelf->rows[middle];
		if (row->start + ((uint64_t)row->pages << LZ_PAGE_SHIFT) <= at)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

static struct lz_shelf *find_shelf(const struct lz_peer *peer, uint64_t pid)
{
	uint64_t low = 0, high = peer->shelf_count;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		if (peer->shelves[middle]->pid < pid)
			low = middle + 1;
		else
			high = middle;
	}
	return low < peer->shelf_count && peer->shelves[low]->pid == pid ? peer->shelves[low] : NULL;
}

static void set_cork(struct lz_peer *peer, int on)
{
	if (peer->is_corked == (uint32_t)on)
		return;
	/* Where it is no TCP socket, there are no segments either. */
	(void)setsockopt(peer->fd, IPPROTO_TCP, TCP_CORK, &on, sizeof(on));
	peer->is_corked = (uint32_t)on;
}

/*
 * Decide what the answer to a GET is: the run from its address on that is of one kind. To lazyd that is pages with
 * bytes, pages of zeros, or pages that are not here; to others, who know only pages with bytes, zeros are sent as such.
 */
static int begin_reply(struct lz_peer *peer, struct lz_shelf *shelf, const struct lz_message *m)
{
	bool is_lazyd = m->flags & PE_LAZYD;
	uint64_t wanted = m->pages << LZ_PAGE_SHIFT, bytes = 0, row = first_row(shelf, m->address), first = row;
	enum content what = MISSING;
	unsigned int stretches = 0;

	while (bytes < wanted) {
		struct stretch next = look(shelf, &row, m->address + bytes, wanted - bytes);
		enum content is = !is_lazyd && next.what == ZEROS ? BYTES : next.what;
		if (stretches && is != what)
			break;
		what = is;
		bytes += next.bytes;
		stretches++;
		if (what == BYTES && wanted > ANSWER_BYTES)
			wanted = ANSWER_BYTES;
		if (bytes > wanted)
			bytes = wanted;
	}
	peer->address = m->address;
	peer->task = m->destination;
	peer->reply_left = 0;
	peer->answers++;
	if (what == BYTES) {
		encode(peer, PE_PRESENT | (is_lazyd ? PE_LAZYD : 0), bytes >> LZ_PAGE_SHIFT, m->address,
		       m->destination);
		peer->reply_shelf = shelf;
		peer->reply_row = first;
		peer->reply_at = m->address;
		peer->reply_left = bytes;
		set_cork(peer, stretches > 1);
		return 0;
	}
	if (is_lazyd)
		encode(peer, PE_LAZYD | (what == MISSING ? PE_LAZY : 0), bytes >> LZ_PAGE_SHIFT, m->address,
		       m->destination);
	else
		encode(peer, PE_PRESENT, 0, 0, m->destination);
	if (what == ZEROS) {
		peer->zero_bytes += bytes;
		return 0;
	}
	return peer->missing_answers++ == 0 ? LZ_PEER_MISSING : 0;
}

static int send_head(struct lz_peer *peer)
{
	while (peer->reply_head_left) {
		int more = peer->reply_left ? MSG_MORE : 0;
		ssize_t sent = send(peer->fd, peer->reply_head + peer->reply_head_at, peer->reply_head_left,
				    MSG_NOSIGNAL | more);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			return errno == EAGAIN ? LZ_PEER_STALLED : -errno;
		peer->reply_head_at += (uint32_t)sent;
		peer->reply_head_left -= (uint32_t)sent;
	}
	return 0;
}

/* Send some of a stretch: the bytes, or -errno; 0: its image has ended. */
static ssize_t send_some(struct lz_peer *peer, const struct stretch *from)
{
	off_t offset = (off_t)from->offset;
	size_t bytes = from->bytes < ZERO_BYTES ? from->bytes : ZERO_BYTES;
	ssize_t sent;

	if (from->what == BYTES)
		sent = sendfile(peer->fd, from->fd, &offset, from->bytes);
	else
		sent = send(peer->fd, zeros, bytes, MSG_NOSIGNAL | (bytes < peer->reply_left ? MSG_MORE : 0));
	return sent < 0 ? -errno : sent;
}

/* Send what is left of the answer: 0, an event, or -errno. */
static int send_reply(struct lz_peer *peer)
{
	int result = send_head(peer);

	while (result == 0 && peer->reply_left) {
		struct stretch next = look(peer->reply_shelf, &peer->reply_row, peer->reply_at, peer->reply_left);
		ssize_t sent = next.what == MISSING ? 0 : send_some(peer, &next);
		if (sent == -EINTR)
			continue;
		if (sent == -EAGAIN)
			return LZ_PEER_STALLED;
		if (sent == -EIO || sent == 0) {
			peer->code = sent ? EIO : 0;
			peer->address = peer->reply_at & ~(LZ_PAGE_SIZE - 1);
			if (sent)
				note_lost(peer->reply_shelf, peer->address);
			return LZ_PEER_UNREADABLE;
		}
		if (sent < 0)
			return (int)sent;
		if (next.what == ZEROS)
			peer->zero_bytes += (uint64_t)sent;
		peer->sent_bytes += (uint64_t)sent;
		peer->reply_at += (uint64_t)sent;
		peer->reply_left -= (uint64_t)sent;
	}
	if (result == 0)
		set_cork(peer, 0);
	return result;
}

/* ---- entries ---- */

/* Say what an entry is: 0 and *kind and *lazy, or -EINVAL: it is the caller's to refuse. */
static int entry_kind(const struct lz_message *m, int *kind, int *lazy)
{
	*lazy = 0;
	if (!is_range(m))
		return -EINVAL;
	if ((m->command == PS_ADD || m->command == PS_HOLE) && m->flags == 0) {
		*kind = m->command == PS_ADD ? LZ_PAGE_DUMPED : LZ_PAGE_PARENT;
		return 0;
	}
	if (m->command != PS_ADD_F)
		return -EINVAL;
	*lazy = (m->flags & PE_LAZY) != 0;
	switch (m->flags & ~PE_LAZY) {
	case PE_PRESENT:
		*kind = LZ_PAGE_DUMPED;
		return 0;
	case PE_PARENT:
		*kind = LZ_PAGE_PARENT;
		return 0;
	case 0:
		*kind = LZ_PAGE_ZERO;
		return *lazy ? -EINVAL : 0;
	default:
		return -EINVAL;
	}
}

static int take_entry(struct lz_peer *peer, const struct lz_message *m, int kind, int lazy)
{
	int result = 0;

	if (kind == LZ_PAGE_DUMPED)
		peer->data_left = m->pages << LZ_PAGE_SHIFT;
	if (peer->broken)
		return 0;
	if (peer->pipe->count == RUNS_MAX)
		return LZ_PEER_CROWDED;
	result = lz_pipe_add(peer->pipe, m->address, m->pages, kind, lazy);
	peer->address = m->address;
	return result == -EINVAL ? LZ_PEER_UNSORTED : result;
}

static int keep(struct lz_peer *peer, const uint8_t *bytes, size_t length)
{
	while (length) {
		ssize_t wrote = pwrite(peer->out, bytes, length, (off_t)peer->written_bytes);
		if (wrote < 0 && errno == EINTR)
			continue;
		if (wrote < 0)
			return -errno;
		bytes += wrote;
		length -= (size_t)wrote;
		peer->written_bytes += (uint64_t)wrote;
	}
	return 0;
}

/* Take the pages of the last entry: 0, an event, or -errno. */
static int take_data(struct lz_peer *peer)
{
	while (peer->data_left) {
		uint64_t there = peer->input_end - peer->input_at;
		int result;
		if (!there) {
			result = fill_input(peer);
			if (result == -EAGAIN)
				return LZ_PEER_STALLED;
			if (result <= 0)
				return result < 0 ? result : -ENODATA;
			continue;
		}
		if (there > peer->data_left)
			there = peer->data_left;
		result = peer->broken ? 0 : keep(peer, peer->input + peer->input_at, there);
		peer->input_at += (uint32_t)there;
		peer->data_left -= there;
		peer->received_bytes += there;
		if (result < 0) {
			peer->broken = peer->code = -result;
			return LZ_PEER_UNWRITTEN;
		}
	}
	return 0;
}

/* ---- both ---- */

/* Work on the message in head: 0: done; else an event or -errno. */
static int take_message(struct lz_peer *peer)
{
	struct lz_message m = decode(peer);
	int kind, lazy;

	if (m.command == PS_GET && !(m.flags & ~PE_LAZYD) && is_range(&m)) {
		struct lz_shelf *shelf = find_shelf(peer, m.destination);
		return shelf ? begin_reply(peer, shelf, &m) : LZ_PEER_MESSAGE;
	}
	if (peer->pipe && m.destination == peer->image && entry_kind(&m, &kind, &lazy) == 0)
		return take_entry(peer, &m, kind, lazy);
	return LZ_PEER_MESSAGE;
}

int lz_peer_run(struct lz_peer *peer)
{
	assert(peer->header_bytes == 24 || peer->header_bytes == 32);
	for (;;) {
		int result = send_reply(peer);
		if (result == 0)
			result = take_data(peer);
		if (result)
			return result;
		if (!peer->retry) {
			result = read_head(peer, peer->header_bytes);
			if (result != 1)
				return result == 2 ? LZ_PEER_STALLED : result;
		}
		peer->retry = 0;
		peer->head_filled = 0;
		result = take_message(peer);
		if (result)
			return result;
	}
}

void lz_peer_free(struct lz_peer *peer)
{
	free(peer->input);
	peer->input = NULL;
}
