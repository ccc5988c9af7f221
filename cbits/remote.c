/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE 1
#include "remote.h"

#include "engine.h"
#include "wire.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define REMOTE_BYTES (1ULL << 40)  /* the most there can be */
#define LANDING_BYTES (1ULL << 38) /* sparse: it costs what has arrived and waits, or is kept for forks */
#define REMOTE_PAGES (REMOTE_BYTES >> LZ_PAGE_SHIFT)
#define RECEIVE_BYTES (256U << 10)
#define BURSTS 16U           /* received before the socket's other side is looked at again */
#define URGENT_REQUESTS 256U /* of the ring, kept for faults */
#define FIRST_WINDOW (1U << 20)
#define LONG_TRIP_NS 500000U
/* Asked for at once, and on top of what the link holds: while nobody faults, and while somebody does, on a short way
 * and on a long one. */
#define IDLE_PAGES 256U
#define IDLE_SLACK (3U << 20)
#define SHORT_PAGES 64U
#define SHORT_SLACK (512U << 10)
#define WAKE_PAGES 128U
#define LONG_PAGES 16U
#define LONG_SLACK (128U << 10)
#define MEASURE_NS 10000000U
/* States of tcp_info; <netinet/tcp.h> has them, and an older tcp_info than the kernel's. */
#define STATE_ESTABLISHED 1
#define STATE_CLOSE_WAIT 8

static uint64_t *words_of(const struct lz_remote *remote, uint64_t offset)
{
	return LZ_AT(remote->engine->arena, uint64_t, offset);
}

static bool bit_is(const struct lz_remote *remote, uint64_t bits, uint64_t page)
{
	return __atomic_load_n(&words_of(remote, bits)[page / 64], __ATOMIC_ACQUIRE) >> (page % 64) & 1;
}

static void bits_change(const struct lz_remote *remote, uint64_t bits, uint64_t page, uint64_t pages, bool set)
{
	while (pages) {
		unsigned at = (unsigned)(page % 64);
		uint64_t n = 64 - at < pages ? 64 - at : pages;
		uint64_t mask = (n == 64 ? ~0ULL : (1ULL << n) - 1) << at;
		uint64_t *word = &words_of(remote, bits)[page / 64];

		if (set)
			__atomic_fetch_or(word, mask, __ATOMIC_RELEASE);
		else
			__atomic_fetch_and(word, ~mask, __ATOMIC_RELEASE);
		page += n;
		pages -= n;
	}
}

/* Length of the run from a page on, at most `most`, whose bits are all set, or all not. */
static uint64_t bits_run(const struct lz_remote *remote, uint64_t bits, uint64_t page, uint64_t most, bool set)
{
	uint64_t done = 0;

	while (done < most) {
		unsigned at = (unsigned)((page + done) % 64);
		uint64_t word = __atomic_load_n(&words_of(remote, bits)[(page + done) / 64], __ATOMIC_ACQUIRE);
		uint64_t stop = (set ? ~word : word) >> at;

		if (stop) {
			done += (unsigned)__builtin_ctzll(stop);
			break;
		}
		done += 64 - at;
	}
	return done < most ? done : most;
}

static uint32_t *places_of(const struct lz_remote *remote)
{
	return LZ_AT(remote->engine->arena, uint32_t, remote->link->places);
}

/* Find a place for pages in a row, and use it: its number, or -ENOSPC; under the lock. */
static int64_t take_place(struct lz_remote *remote, uint64_t page, uint64_t pages)
{
	struct lz_link *link = remote->link;
	uint64_t place = 0;

	while (place < link->used_end) {
		uint64_t room;

		place += bits_run(remote, link->used_bits, place, link->used_end - place, true);
		room = bits_run(remote, link->used_bits, place, link->used_end - place, false);
		if (room >= pages || place + room == link->used_end)
			break;
		place += room;
	}
	if (place + pages > LANDING_BYTES >> LZ_PAGE_SHIFT)
		return -ENOSPC;
	if (place + pages > link->used_end)
		link->used_end = place + pages;
	bits_change(remote, link->used_bits, place, pages, true);
	for (uint64_t i = 0; i < pages; i++)
		places_of(remote)[page + i] = (uint32_t)(place + i);
	return (int64_t)place;
}

static struct lz_request *request_at(struct lz_link *link, uint64_t number)
{
	return &link->request[number % LZ_REQUESTS];
}

static void poke(struct lz_remote *remote)
{
	uint64_t one = 1;
	ssize_t written = write(remote->wake, &one, sizeof(one));

	(void)written; /* full means that it is awake */
}

void lz_remote_init(struct lz_remote *remote, struct lz_engine *engine)
{
	remote->engine = engine;
	remote->landing_fd = remote->wake = -1;
	pthread_mutex_init(&remote->lock, NULL);
	pthread_mutex_init(&remote->receive_lock, NULL);
}

int lz_tcp_moved(int fd, uint64_t *received, uint64_t *sent)
{
	struct tcp_info info = { 0 };
	uint64_t received_before, acknowledged_before;
	int unread, unacknowledged;

	/* The counters and the queues cannot be asked for at once: until nothing has moved in between. */
	do {
		socklen_t length = sizeof(info);

		received_before = info.tcpi_bytes_received;
		acknowledged_before = info.tcpi_bytes_acked;
		if (ioctl(fd, SIOCINQ, &unread) < 0 || ioctl(fd, SIOCOUTQ, &unacknowledged) < 0 ||
		    getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) < 0)
			return -errno;
	} while (info.tcpi_bytes_received != received_before || info.tcpi_bytes_acked != acknowledged_before);
	*received = (uint64_t)info.tcpi_bytes_received - (uint64_t)unread;
	*sent = (uint64_t)info.tcpi_bytes_acked + (uint64_t)unacknowledged;
	/* The end of the stream is counted like a byte, and like one that was read. After a reset nobody can tell. */
	if (info.tcpi_state == STATE_CLOSE_WAIT)
		(*received)--;
	else if (info.tcpi_state != STATE_ESTABLISHED)
		return -ENOTCONN;
	return 0;
}

/* Begin to use a connection on which nothing is on its way. */
static int begin_link(struct lz_remote *remote, int fd, uint32_t header_bytes)
{
	struct lz_link *link = remote->link;

	if (header_bytes != 24 && header_bytes != 32)
		return -EINVAL;
	if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0)
		return -errno;
	link->fd = fd;
	link->header_bytes = header_bytes;
	link->first = link->answered = link->asked;
	link->sent_bytes = link->received_bytes = 0;
	link->sent_base = link->received_base = 0;
	(void)lz_tcp_moved(fd, &link->received_base, &link->sent_base);
	link->in_flight = 0;
	link->round_trip_ns = 0;
	link->rate = 0;
	link->breaking = 0;
	__atomic_store_n(&link->error, 0, __ATOMIC_RELEASE);
	return 0;
}

int lz_engine_add_remote(struct lz_engine *engine, int fd, uint32_t header_bytes)
{
	struct lz_remote *remote = &engine->remote;
	uint64_t offset;
	int result;

	if (remote->link || engine->sources == LZ_MAX_SOURCES)
		return -EINVAL;
	remote->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (remote->wake < 0)
		return -errno;
	remote->landing_fd = memfd_create("lazyd-landing", MFD_CLOEXEC);
	if (remote->landing_fd < 0 || ftruncate(remote->landing_fd, (off_t)LANDING_BYTES) < 0)
		return -errno;
	remote->landing =
		mmap(NULL, LANDING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, remote->landing_fd, 0);
	if (remote->landing == MAP_FAILED) {
		remote->landing = NULL;
		return -errno;
	}
	offset = lz_arena_alloc(engine->arena, sizeof(*remote->link));
	if (!offset)
		return -ENOMEM;
	remote->link = LZ_AT(engine->arena, struct lz_link, offset);
	remote->link->fd = -1;
	remote->link->asked_bits = lz_arena_alloc(engine->arena, REMOTE_PAGES / 8);
	remote->link->arrived_bits = lz_arena_alloc(engine->arena, REMOTE_PAGES / 8);
	remote->link->lost_bits = lz_arena_alloc(engine->arena, REMOTE_PAGES / 8);
	remote->link->used_bits = lz_arena_alloc(engine->arena, REMOTE_PAGES / 8);
	remote->link->places = lz_arena_alloc(engine->arena, REMOTE_PAGES * sizeof(uint32_t));
	if (!remote->link->asked_bits || !remote->link->arrived_bits || !remote->link->lost_bits ||
	    !remote->link->used_bits || !remote->link->places)
		return -ENOMEM;
	result = begin_link(remote, fd, header_bytes);
	if (result < 0)
		return result;
	remote->source = engine->sources++;
	engine->source[remote->source] = (struct lz_source){
		.fd = -1,
		.map = remote->landing,
		.size = REMOTE_BYTES, /* of offsets: where a page is in the landing is another matter */
		.is_landing = true,
	};
	return (int)remote->source;
}

int lz_remote_place(struct lz_remote *remote, struct lz_extent *rows, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++) {
		const uint64_t bytes = (uint64_t)rows[i].pages << LZ_PAGE_SHIFT;

		if (rows[i].kind != LZ_KIND_REMOTE)
			continue;
		if (!remote->link)
			return -ENXIO;
		if (bytes > REMOTE_BYTES - remote->link->remote_bytes)
			return -ENOSPC;
		rows[i].source = (uint16_t)remote->source;
		rows[i].offset = remote->link->remote_bytes;
		remote->link->remote_bytes += bytes;
	}
	return 0;
}

static void tell(struct lz_remote *remote)
{
	const struct lz_notice notice = { .kind = LZ_NOTICE_LINK, .error = remote->link->error };

	lz_engine_notify(remote->engine, &notice);
}

/* The link is of no use any more; what comes of it is decided by whoever reads the notice. */
static void break_link(struct lz_remote *remote, int error, enum lz_link_reason reason, uint64_t found, uint64_t wanted)
{
	struct lz_link *link = remote->link;

	if (__atomic_exchange_n(&link->breaking, 1, __ATOMIC_ACQ_REL))
		return; /* sending and receiving find out at once; the first to do so says it */
	link->reason = reason;
	link->detail[0] = found;
	link->detail[1] = wanted;
	__atomic_store_n(&link->error, error, __ATOMIC_RELEASE);
	tell(remote);
}

/* Requests */

static size_t encode(const struct lz_link *link, const struct lz_request *request, uint8_t *at)
{
	const struct lz_message message = { PS_GET, PE_LAZYD, request->pages, request->address,
					    (uint64_t)request->pid };

	lz_wire_encode(at, link->header_bytes, &message);
	return link->header_bytes;
}

/* Send what is asked and not sent; under the lock. */
static void flush(struct lz_remote *remote)
{
	struct lz_link *link = remote->link;

	while (!link->error && link->sent_bytes < (link->asked - link->first) * link->header_bytes) {
		uint8_t bytes[64 * 32];
		uint64_t number = link->first + link->sent_bytes / link->header_bytes;
		size_t skip = link->sent_bytes % link->header_bytes, length = 0;
		ssize_t sent;

		for (; number < link->asked && length + 32 <= sizeof(bytes); number++)
			length += encode(link, request_at(link, number), bytes + length);
		__atomic_store_n(&link->sending, 1, __ATOMIC_SEQ_CST);
		sent = send(link->fd, bytes + skip, length - skip, MSG_DONTWAIT | MSG_NOSIGNAL);
		LZ_POINT("link-sent", 0);
		if (sent > 0)
			__atomic_store_n(&link->sent_bytes, link->sent_bytes + (uint64_t)sent, __ATOMIC_RELEASE);
		__atomic_store_n(&link->sending, 0, __ATOMIC_SEQ_CST);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && errno == EAGAIN)
			return; /* the receiver waits for room */
		if (sent < 0) {
			break_link(remote, -errno, LZ_LINK_FAILED, 0, 0);
			return;
		}
	}
}

uint32_t lz_remote_ask(struct lz_remote *remote, const struct lz_worker *worker, int pid, uint64_t address,
		       uint64_t offset, uint32_t pages, bool urgent)
{
	struct lz_link *link = remote->link;
	const uint64_t page = offset >> LZ_PAGE_SHIFT;
	const uint32_t most = urgent ? LZ_REQUESTS : LZ_REQUESTS - URGENT_REQUESTS;
	uint64_t known, wanted;
	int64_t place = -ENOSPC;
	bool unsent;

	pthread_mutex_lock(&remote->lock);
	known = bits_run(remote, link->asked_bits, page, pages, true);
	wanted = bits_run(remote, link->asked_bits, page + known, pages - known, false);
	if (wanted && !link->error && link->asked - link->answered < most)
		place = take_place(remote, page + known, wanted);
	if (place < 0) {
		pthread_mutex_unlock(&remote->lock);
		return (uint32_t)known;
	}
	*request_at(link, link->asked) = (struct lz_request){
		.address = address + (known << LZ_PAGE_SHIFT),
		.offset = offset + (known << LZ_PAGE_SHIFT),
		.asked_ns = lz_now_ns(),
		.pages = (uint32_t)wanted,
		.pid = pid,
		.worker = worker->number,
		.place = (uint32_t)place,
	};
	if (link->asked == link->answered)
		request_at(link, link->asked)->answer_start = link->received_bytes;
	__atomic_add_fetch(&link->in_flight, wanted << LZ_PAGE_SHIFT, __ATOMIC_RELAXED);
	__atomic_store_n(&link->asked, link->asked + 1, __ATOMIC_RELEASE);
	bits_change(remote, link->asked_bits, page + known, wanted, true);
	flush(remote);
	unsent = link->sent_bytes < (link->asked - link->first) * link->header_bytes;
	pthread_mutex_unlock(&remote->lock);
	if (unsent)
		poke(remote);
	return (uint32_t)(known + wanted);
}

uint64_t lz_remote_arrived(const struct lz_remote *remote, uint64_t start, uint64_t end)
{
	const uint64_t page = start >> LZ_PAGE_SHIFT;

	return bits_run(remote, remote->link->arrived_bits, page, (end >> LZ_PAGE_SHIFT) - page, true) << LZ_PAGE_SHIFT;
}

uint64_t lz_remote_good(const struct lz_remote *remote, uint64_t offset, uint64_t pages)
{
	if (!remote->link->any_lost)
		return pages;
	return bits_run(remote, remote->link->lost_bits, offset >> LZ_PAGE_SHIFT, pages, false);
}

bool lz_remote_is_asked(const struct lz_remote *remote, uint64_t offset)
{
	return bit_is(remote, remote->link->asked_bits, offset >> LZ_PAGE_SHIFT);
}

bool lz_remote_is_due(const struct lz_remote *remote, uint64_t offset)
{
	const struct lz_link *link = remote->link;
	const uint64_t page = offset >> LZ_PAGE_SHIFT;

	if (bit_is(remote, link->arrived_bits, page))
		return true;
	return !__atomic_load_n(&link->error, __ATOMIC_ACQUIRE) && !bit_is(remote, link->asked_bits, page) &&
	       link->asked - link->answered < LZ_REQUESTS;
}

static bool is_long(const struct lz_link *link)
{
	return __atomic_load_n(&link->round_trip_ns, __ATOMIC_RELAXED) >= LONG_TRIP_NS;
}

uint32_t lz_remote_chunk(const struct lz_remote *remote, bool is_active)
{
	if (!is_active)
		return IDLE_PAGES;
	return is_long(remote->link) ? LONG_PAGES : SHORT_PAGES;
}

uint64_t lz_remote_room(const struct lz_remote *remote, bool is_active)
{
	const struct lz_link *link = remote->link;
	const uint64_t rate = __atomic_load_n(&link->rate, __ATOMIC_RELAXED);
	const uint64_t trip = __atomic_load_n(&link->round_trip_ns, __ATOMIC_RELAXED);
	const uint64_t holds = (uint64_t)((double)rate * 1e-9 * (double)trip);
	uint64_t window = holds + (is_active ? SHORT_SLACK : IDLE_SLACK);
	uint64_t in_flight = __atomic_load_n(&link->in_flight, __ATOMIC_RELAXED);

	if (__atomic_load_n(&link->error, __ATOMIC_ACQUIRE))
		return 0;
	if (is_active && is_long(link)) /* a link, and two machines, that are not quite busy hold up no fault */
		window = holds - holds / 8 + LONG_SLACK;
	if (!rate)
		window = FIRST_WINDOW;
	return window > in_flight ? window - in_flight : 0;
}

const uint8_t *lz_remote_bytes(const struct lz_remote *remote, uint64_t offset, uint64_t *pages)
{
	const uint32_t *places = places_of(remote) + (offset >> LZ_PAGE_SHIFT);
	uint64_t together = 1;

	while (together < *pages && places[together] == places[0] + together)
		together++;
	*pages = together;
	return remote->landing + ((uint64_t)places[0] << LZ_PAGE_SHIFT);
}

void lz_remote_release(struct lz_remote *remote, uint64_t start, uint64_t end)
{
	const uint64_t page = start >> LZ_PAGE_SHIFT, pages = (end - start) >> LZ_PAGE_SHIFT;

	/* First: whoever should want them after all asks again, and gets nobody else's bytes. */
	bits_change(remote, remote->link->arrived_bits, page, pages, false);
	bits_change(remote, remote->link->asked_bits, page, pages, false);
	for (uint64_t done = 0; done < pages;) {
		uint64_t together = pages - done;
		uint64_t place = (uint64_t)(lz_remote_bytes(remote, start + (done << LZ_PAGE_SHIFT), &together) -
					    remote->landing) >>
				 LZ_PAGE_SHIFT;

		bits_change(remote, remote->link->used_bits, place, together, false);
		done += together;
	}
}

/* Answers */

/* Pages of a request that will not come: they may be asked for again. */
static void forget_pages(struct lz_remote *remote, const struct lz_request *request, uint64_t from)
{
	bits_change(remote, remote->link->asked_bits, (request->offset >> LZ_PAGE_SHIFT) + from, request->pages - from,
		    false);
	bits_change(remote, remote->link->used_bits, request->place + from, request->pages - from, false);
	__atomic_sub_fetch(&remote->link->in_flight, (request->pages - from) << LZ_PAGE_SHIFT, __ATOMIC_RELAXED);
	__atomic_add_fetch(&remote->link->generation, 1, __ATOMIC_RELEASE);
}

static void arrive(struct lz_remote *remote, const struct lz_request *request, uint64_t from, uint64_t pages)
{
	if (!pages)
		return;
	bits_change(remote, remote->link->arrived_bits, (request->offset >> LZ_PAGE_SHIFT) + from, pages, true);
	__atomic_sub_fetch(&remote->link->in_flight, pages << LZ_PAGE_SHIFT, __ATOMIC_RELAXED);
	__atomic_add_fetch(&remote->link->total_bytes, pages << LZ_PAGE_SHIFT, __ATOMIC_RELAXED);
	/* Not for every piece of a large answer: what nobody waits for is installed as well a little later. */
	if (request->answer_pages <= WAKE_PAGES || from + pages == request->answer_pages ||
	    (from + pages) / WAKE_PAGES != from / WAKE_PAGES)
		lz_engine_wake_worker(&remote->engine->worker[request->worker]);
}

int lz_answer_read(const uint8_t *header, uint32_t header_bytes, const struct lz_question *question,
		   struct lz_answer *answer)
{
	const struct lz_message message = lz_wire_decode(header, header_bytes);
	const uint32_t known = PE_PRESENT | PE_LAZY | PE_LAZYD;

	*answer = (struct lz_answer){ .pages = message.pages };
	if (message.command != PS_ADD_F || message.flags & ~known || !(message.flags & (PE_PRESENT | PE_LAZYD))) {
		answer->found = message.command | message.flags << 16;
		answer->wanted = PS_ADD_F | PE_PRESENT << 16;
		return LZ_LINK_COMMAND;
	}
	if (message.destination != (uint64_t)question->pid) {
		answer->found = message.destination;
		answer->wanted = (uint64_t)question->pid;
		return LZ_LINK_PID;
	}
	if (message.address != question->address) {
		answer->found = message.address;
		answer->wanted = question->address;
		return LZ_LINK_ADDRESS;
	}
	if (!message.pages || message.pages > question->pages) {
		answer->found = message.pages;
		answer->wanted = question->pages;
		return LZ_LINK_PAGES;
	}
	answer->speaks_lazyd = !!(message.flags & PE_LAZYD);
	if (message.flags & PE_PRESENT)
		answer->kind = LZ_ANSWER_BYTES;
	else
		answer->kind = message.flags & PE_LAZY ? LZ_ANSWER_NOTHING : LZ_ANSWER_ZEROS;
	return 0;
}

/* Read the header of an answer. False: the link is broken. */
static bool take_header(struct lz_remote *remote, struct lz_request *request)
{
	struct lz_link *link = remote->link;
	const struct lz_question question = { request->address, request->pages, request->pid };
	struct lz_answer answer;
	int reason = lz_answer_read(link->header, link->header_bytes, &question, &answer);

	if (reason) {
		break_link(remote, -EPROTO, (enum lz_link_reason)reason, answer.found, answer.wanted);
		return false;
	}
	if (answer.speaks_lazyd)
		__atomic_store_n(&link->speaks_lazyd, 1, __ATOMIC_RELEASE);
	if (answer.pages < request->pages)
		forget_pages(remote, request, answer.pages);
	if (answer.kind == LZ_ANSWER_NOTHING) {
		bits_change(remote, link->lost_bits, request->offset >> LZ_PAGE_SHIFT, answer.pages, true);
		link->any_lost = 1;
	}
	if (answer.kind != LZ_ANSWER_BYTES) /* what was there before is somebody else's */
		memset(remote->landing + ((uint64_t)request->place << LZ_PAGE_SHIFT), 0, answer.pages << LZ_PAGE_SHIFT);
	request->answer_bytes = answer.kind == LZ_ANSWER_BYTES ? (uint32_t)answer.pages << LZ_PAGE_SHIFT : 0;
	__atomic_store_n(&request->answer_pages, (uint32_t)answer.pages, __ATOMIC_RELEASE);
	return true;
}

/* Where the next bytes go, and how many. */
static uint64_t next_place(struct lz_remote *remote, uint8_t **place)
{
	struct lz_link *link = remote->link;
	struct lz_request *request = request_at(link, link->answered);
	uint64_t in;

	*place = link->header;
	if (link->answered == __atomic_load_n(&link->asked, __ATOMIC_ACQUIRE))
		return 1; /* nothing may come but the end */
	in = link->received_bytes - request->answer_start;
	if (in < link->header_bytes) {
		*place = link->header + in;
		return link->header_bytes - in;
	}
	in -= link->header_bytes;
	*place = remote->landing + ((uint64_t)request->place << LZ_PAGE_SHIFT) + in;
	return request->answer_bytes - in < RECEIVE_BYTES ? request->answer_bytes - in : RECEIVE_BYTES;
}

/*
 * Act on what has been received: the header of the answer that is coming in, the pages behind it from `had` on, its
 * end. Each step may be the last of this process, and may be done again by the next.
 */
static void settle(struct lz_remote *remote, uint64_t had)
{
	struct lz_link *link = remote->link;
	struct lz_request *request = request_at(link, link->answered);
	uint64_t in = link->received_bytes - request->answer_start, has;

	if (in < link->header_bytes || (!request->answer_pages && !take_header(remote, request)))
		return;
	in -= link->header_bytes;
	has = request->answer_bytes ? in >> LZ_PAGE_SHIFT : request->answer_pages;
	LZ_POINT("link-received", has);
	arrive(remote, request, had, has - had);
	if (in < request->answer_bytes)
		return;
	pthread_mutex_lock(&remote->lock);
	if (link->answered + 1 < link->asked)
		request_at(link, link->answered + 1)->answer_start = link->received_bytes;
	__atomic_store_n(&link->answered, link->answered + 1, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&remote->lock);
}

/* Note that bytes have come to where next_place() has said. */
static void take_bytes(struct lz_remote *remote, uint64_t length)
{
	struct lz_link *link = remote->link;
	const struct lz_request *request = request_at(link, link->answered);
	uint64_t in = link->received_bytes - request->answer_start;

	if (link->answered == __atomic_load_n(&link->asked, __ATOMIC_ACQUIRE)) {
		break_link(remote, -EPROTO, LZ_LINK_UNASKED, 0, 0);
		return;
	}
	if (!in) {
		uint64_t trip = lz_now_ns() - request->asked_ns;

		if (!link->round_trip_ns || trip < link->round_trip_ns)
			__atomic_store_n(&link->round_trip_ns, trip, __ATOMIC_RELAXED);
	}
	__atomic_store_n(&link->received_bytes, link->received_bytes + length, __ATOMIC_RELEASE);
	settle(remote, in > link->header_bytes ? (in - link->header_bytes) >> LZ_PAGE_SHIFT : 0);
}

/* How fast the link is, measured while something is on its way all the time. */
static void measure(struct lz_remote *remote)
{
	struct lz_link *link = remote->link;
	uint64_t now = lz_now_ns(), rate;

	if (remote->measured_ns && now - remote->measured_ns < MEASURE_NS)
		return;
	if (remote->measured_ns) {
		rate = (uint64_t)((double)(link->total_bytes - remote->measured_bytes) * 1e9 /
				  (double)(now - remote->measured_ns));
		/* The best of late: less may be due to what was asked for. */
		if (rate < link->rate - link->rate / 16)
			rate = link->rate - link->rate / 16;
		__atomic_store_n(&link->rate, rate, __ATOMIC_RELAXED);
	}
	remote->measured_ns = now;
	remote->measured_bytes = link->total_bytes;
}

/* Receive what is there, a bounded amount. */
static void receive(struct lz_remote *remote)
{
	struct lz_link *link = remote->link;

	for (uint32_t i = 0; i < BURSTS && !link->error; i++) {
		uint8_t *place;
		uint64_t length = next_place(remote, &place);
		ssize_t got;

		__atomic_store_n(&link->receiving, 1, __ATOMIC_SEQ_CST);
		got = recv(link->fd, place, length, MSG_DONTWAIT);
		LZ_POINT("link-taken", got > 0 ? (uint64_t)got : 0);
		if (got > 0)
			take_bytes(remote, (uint64_t)got);
		__atomic_store_n(&link->receiving, 0, __ATOMIC_SEQ_CST);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0 && errno == EAGAIN)
			break;
		if (got <= 0)
			break_link(remote, got < 0 ? -errno : -EPIPE, got < 0 ? LZ_LINK_FAILED : LZ_LINK_ENDED, 0, 0);
	}
	if (link->answered == __atomic_load_n(&link->asked, __ATOMIC_ACQUIRE))
		remote->measured_ns = 0;
	else
		measure(remote);
}

static void *receiver_main(void *argument)
{
	struct lz_remote *remote = argument;
	struct lz_link *link = remote->link;

	while (!__atomic_load_n(&remote->stopping, __ATOMIC_ACQUIRE)) {
		struct pollfd fds[2] = { { .fd = remote->wake, .events = POLLIN }, { .fd = -1, .events = POLLIN } };
		uint64_t token;

		if (!__atomic_load_n(&link->error, __ATOMIC_ACQUIRE)) {
			pthread_mutex_lock(&remote->lock);
			fds[1].fd = link->fd;
			if (link->sent_bytes < (link->asked - link->first) * link->header_bytes)
				fds[1].events |= POLLOUT;
			pthread_mutex_unlock(&remote->lock);
		}
		if (poll(fds, 2, -1) < 0)
			continue;
		if (fds[0].revents) {
			ssize_t got = read(remote->wake, &token, sizeof(token));

			(void)got;
		}
		if (fds[1].revents & POLLOUT) {
			pthread_mutex_lock(&remote->lock);
			flush(remote);
			pthread_mutex_unlock(&remote->lock);
		}
		if (fds[1].revents & ~POLLOUT) {
			pthread_mutex_lock(&remote->receive_lock);
			receive(remote);
			pthread_mutex_unlock(&remote->receive_lock);
		}
	}
	return NULL;
}

int lz_remote_start(struct lz_remote *remote)
{
	int error;

	if (!remote->link)
		return 0;
	remote->stopping = 0;
	remote->measured_ns = 0;
	error = pthread_create(&remote->receiver, NULL, receiver_main, remote);
	remote->running = !error;
	return -error;
}

void lz_remote_stop(struct lz_remote *remote)
{
	if (!remote->running)
		return;
	__atomic_store_n(&remote->stopping, 1, __ATOMIC_RELEASE);
	poke(remote);
	pthread_join(remote->receiver, NULL);
	remote->running = false;
}

/* Forget what is on its way: it will not come. Under the lock, or while no thread runs. */
static void forget_requests(struct lz_remote *remote)
{
	struct lz_link *link = remote->link;

	for (; link->answered < link->asked; link->answered++) {
		const struct lz_request *request = request_at(link, link->answered);
		uint64_t in = link->received_bytes - request->answer_start, has = 0;

		if (request->answer_pages && in > link->header_bytes)
			has = (in - link->header_bytes) >> LZ_PAGE_SHIFT;
		if (has < request->pages)
			forget_pages(remote, request, has);
	}
	link->in_flight = 0;
}

/* Say anew what is asked for: what is on its way, and what has come. */
static void find_asked(struct lz_remote *remote)
{
	struct lz_link *link = remote->link;
	uint64_t *asked = words_of(remote, link->asked_bits), in_flight = 0;
	const uint64_t *arrived = words_of(remote, link->arrived_bits);

	memset(words_of(remote, link->used_bits), 0, (link->used_end + 63) / 64 * 8);
	for (uint64_t i = 0; i < (link->remote_bytes >> LZ_PAGE_SHIFT);) {
		if (i % 64 == 0 && asked[i / 64] != arrived[i / 64])
			asked[i / 64] = arrived[i / 64];
		if (i % 64 == 0 && !arrived[i / 64]) {
			i += 64;
			continue;
		}
		if (bit_is(remote, link->arrived_bits, i))
			bits_change(remote, link->used_bits, places_of(remote)[i], 1, true);
		i++;
	}
	for (uint64_t i = link->answered; i < link->asked; i++) {
		const struct lz_request *request = request_at(link, i);
		uint64_t page = request->offset >> LZ_PAGE_SHIFT;
		uint64_t pages = request->answer_pages ? request->answer_pages : request->pages;

		for (uint64_t k = 0; k < pages; k++)
			in_flight += !bit_is(remote, link->arrived_bits, page + k);
		bits_change(remote, link->asked_bits, page, pages, true);
		bits_change(remote, link->used_bits, request->place, pages, true);
	}
	link->in_flight = in_flight << LZ_PAGE_SHIFT;
	link->generation++;
}

void lz_remote_resume(struct lz_remote *remote)
{
	struct lz_link *link = remote->link;
	const uint64_t was_sending = link ? link->sending : 0, was_receiving = link ? link->receiving : 0;
	uint64_t received, sent, length;
	uint8_t *place;

	if (!link)
		return;
	remote->stopping = 0;
	remote->running = false;
	pthread_mutex_init(&remote->lock, NULL);
	pthread_mutex_init(&remote->receive_lock, NULL);
	link->sending = link->receiving = 0;
	if (!link->error)
		link->breaking = 0; /* it died before it could say why */
	if (!link->error && !lz_tcp_moved(link->fd, &received, &sent)) {
		received -= link->received_base;
		length = next_place(remote, &place);
		if (received - link->received_bytes > length) {
			break_link(remote, -EPROTO, LZ_LINK_UNCOUNTED, received - link->received_bytes, length);
		} else {
			link->sent_bytes = sent - link->sent_base;
			link->received_bytes = received;
		}
	} else if (!link->error && (was_sending || was_receiving)) {
		break_link(remote, -ECONNABORTED, LZ_LINK_UNCOUNTED, 0, 0);
	}
	/* Also where the link is of no use any more: what was noted as received is not asked for again. */
	if (link->answered < link->asked)
		settle(remote, 0);
	find_asked(remote);
}

void lz_remote_free(struct lz_remote *remote)
{
	lz_remote_stop(remote);
	if (remote->landing)
		munmap(remote->landing, LANDING_BYTES);
	if (remote->landing_fd >= 0)
		close(remote->landing_fd);
	if (remote->wake >= 0)
		close(remote->wake);
	pthread_mutex_destroy(&remote->lock);
	pthread_mutex_destroy(&remote->receive_lock);
}

int lz_engine_relink(struct lz_engine *engine, int fd, uint32_t header_bytes)
{
	struct lz_remote *remote = &engine->remote;
	struct lz_link *link = remote->link;
	int before, result;

	if (!link || !link->error)
		return -EINVAL;
	pthread_mutex_lock(&remote->receive_lock);
	pthread_mutex_lock(&remote->lock);
	before = link->fd;
	forget_requests(remote);
	remote->measured_ns = 0;
	result = begin_link(remote, fd, header_bytes);
	pthread_mutex_unlock(&remote->lock);
	pthread_mutex_unlock(&remote->receive_lock);
	if (result < 0)
		return result;
	if (before >= 0)
		close(before);
	poke(remote);
	for (uint32_t i = 0; i < engine->workers; i++)
		lz_engine_wake_worker(&engine->worker[i]);
	return 0;
}

void lz_engine_link(struct lz_engine *engine, struct lz_link_info *info)
{
	const struct lz_link *link = engine->remote.link;
	uint64_t answered;

	memset(info, 0, sizeof(*info));
	info->fd = -1;
	if (!link)
		return;
	/* In this order: what is asked in between makes it more, what is answered must not make it less than nothing.
	 */
	answered = __atomic_load_n(&link->answered, __ATOMIC_ACQUIRE);
	*info = (struct lz_link_info){
		.bytes = __atomic_load_n(&link->total_bytes, __ATOMIC_RELAXED),
		.in_flight = __atomic_load_n(&link->in_flight, __ATOMIC_RELAXED),
		.requests = __atomic_load_n(&link->asked, __ATOMIC_RELAXED),
		.round_trip_ns = __atomic_load_n(&link->round_trip_ns, __ATOMIC_RELAXED),
		.rate = __atomic_load_n(&link->rate, __ATOMIC_RELAXED),
		.error = __atomic_load_n(&link->error, __ATOMIC_ACQUIRE),
		.speaks_lazyd = __atomic_load_n(&link->speaks_lazyd, __ATOMIC_RELAXED),
		.header_bytes = link->header_bytes,
		.fd = link->fd,
	};
	info->waiting = info->requests - answered;
	if (info->error) {
		info->reason = link->reason;
		info->detail[0] = link->detail[0];
		info->detail[1] = link->detail[1];
	}
}
