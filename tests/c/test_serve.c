/* SPDX-License-Identifier: MIT */
/*
 * cbits/serve.c under the sanitizers: a client that sends questions and entries in any cut, some of them damaged, and
 * hangs up where it likes. What is answered and what is kept is held against an array of pages.
 */
#undef NDEBUG
#define _GNU_SOURCE 1
#include "lz.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BASE 0x7f0000000000ULL
#define PAGES 40
#define PID 77
#define IMAGE (PID << 8 | 1)
#define ROUNDS 600

static uint64_t random_state = 0x13198a2e03707344ULL;

static uint32_t any(uint32_t below)
{
	random_state = random_state * 6364136223846793005ULL + 1442695040888963407ULL;
	return (uint32_t)(random_state >> 33) % below;
}

/* What the client sends, and what it gets. */
struct talk {
	int fd;
	size_t length, received;
	uint8_t sent[256 << 10];
	uint8_t got[4 << 20];
};

static void *client(void *argument)
{
	struct talk *talk = argument;
	size_t at = 0;
	uint32_t cut = 1 + (uint32_t)talk->length / 3;

	while (at < talk->length) {
		size_t piece = talk->length - at < cut ? talk->length - at : cut;
		ssize_t sent = send(talk->fd, talk->sent + at, piece, MSG_NOSIGNAL);
		if (sent < 0)
			break;
		at += (size_t)sent;
	}
	shutdown(talk->fd, SHUT_WR);
	for (;;) {
		ssize_t got = recv(talk->fd, talk->got + talk->received, sizeof(talk->got) - talk->received, 0);
		if (got <= 0)
			break;
		talk->received += (size_t)got;
	}
	return NULL;
}

static void put(struct talk *talk, const void *bytes, size_t length)
{
	assert(talk->length + length <= sizeof(talk->sent));
	memcpy(talk->sent + talk->length, bytes, length);
	talk->length += length;
}

static void put_message(struct talk *talk, uint32_t header, uint32_t word, uint64_t address, uint64_t pages,
			uint64_t destination)
{
	uint32_t narrow[2] = { word, (uint32_t)pages }, wide[2] = { word, any(UINT32_MAX) };

	put(talk, header == 24 ? narrow : wide, 8);
	if (header == 32)
		put(talk, &pages, 8);
	put(talk, &address, 8);
	put(talk, &destination, 8);
}

/* The pages that are given: kind of each, and a table and an image of them. */
struct given {
	uint8_t kinds[PAGES]; /* 0: nothing */
	struct lz_extent rows[PAGES];
	struct lz_shelf shelf;
	int fd;
};

static void fill_page(uint8_t *page, uint64_t number)
{
	for (size_t i = 0; i < LZ_PAGE_SIZE; i += 8)
		memcpy(page + i, &(uint64_t){ number + 1 }, 8);
}

static void make_given(struct given *given)
{
	uint8_t page[LZ_PAGE_SIZE];
	uint64_t offset = 0;

	memset(given, 0, sizeof(*given));
	given->fd = memfd_create("given", MFD_CLOEXEC);
	assert(given->fd >= 0);
	given->shelf = (struct lz_shelf){ .pid = PID, .rows = given->rows, .fds = &given->fd };
	for (uint64_t i = 0; i < PAGES; i++) {
		struct lz_extent row = { .start = BASE + (i << LZ_PAGE_SHIFT), .pages = 1 };
		row.kind = given->kinds[i] = (uint8_t)any(4);
		if (row.kind == LZ_KIND_DUMPED) {
			row.offset = offset;
			fill_page(page, i);
			assert(pwrite(given->fd, page, sizeof(page), (off_t)offset) == sizeof(page));
			offset += sizeof(page);
		}
		if (row.kind)
			given->rows[given->shelf.count++] = row;
	}
}

/* Check one answer of lazyd's kind to a question for page `first`; return how long it is. */
static size_t check_answer(const struct given *given, const uint8_t *got, uint32_t header, uint64_t first)
{
	uint8_t page[LZ_PAGE_SIZE];
	uint32_t word, pages32;
	uint64_t pages, address;
	bool present;

	memcpy(&word, got, 4);
	memcpy(&pages32, got + 4, 4);
	memcpy(&pages, got + 8, 8);
	if (header == 24)
		pages = pages32;
	memcpy(&address, got + (header == 24 ? 8 : 16), 8);
	assert(address == BASE + (first << LZ_PAGE_SHIFT) && pages);
	present = word >> 16 & 4;
	for (uint64_t i = 0; i < pages; i++) {
		uint8_t kind = first + i < PAGES ? given->kinds[first + i] : 0;
		assert(present == (kind == LZ_KIND_DUMPED));
		assert(!(word >> 16 & 6) == (kind == LZ_KIND_ZERO));
		fill_page(page, first + i);
		if (present)
			assert(memcmp(got + header + (i << LZ_PAGE_SHIFT), page, sizeof(page)) == 0);
	}
	return header + (present ? pages << LZ_PAGE_SHIFT : 0);
}

/* Run a peer to its end, as a caller would that knows no other messages. */
static int run(struct lz_peer *peer)
{
	for (;;) {
		int result = lz_peer_run(peer);
		if (result != LZ_PEER_MISSING)
			return result;
	}
}

static void test_questions(bool damaged)
{
	struct talk *talk = calloc(1, sizeof(*talk));
	struct given given;
	uint64_t asked[30];
	uint32_t header = any(2) ? 24 : 32, questions = any(30), i;
	int pair[2];
	pthread_t thread;
	size_t at = 0;

	assert(talk && socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	make_given(&given);
	for (i = 0; i < questions; i++) {
		asked[i] = any(PAGES + 3);
		put_message(talk, header, 0x80000007, BASE + (asked[i] << LZ_PAGE_SHIFT), 1 + any(PAGES), PID);
	}
	if (damaged && talk->length)
		for (i = any(4); i < 4; i++)
			talk->sent[any((uint32_t)talk->length)] = (uint8_t)any(256);
	if (damaged && talk->length)
		talk->length -= any((uint32_t)talk->length);
	talk->fd = pair[0];
	assert(pthread_create(&thread, NULL, client, talk) == 0);
	struct lz_shelf *shelves[] = { &given.shelf };
	struct lz_peer peer = { .fd = pair[1], .header_bytes = header, .shelves = shelves, .shelf_count = 1 };
	int result = run(&peer);
	lz_peer_free(&peer);
	close(pair[1]);
	pthread_join(thread, NULL);
	close(pair[0]);
	if (!damaged) {
		assert(result == LZ_PEER_ENDED && peer.answers == questions);
		for (i = 0; i < questions; i++)
			at += check_answer(&given, talk->got + at, header, asked[i]);
		assert(at == talk->received);
	}
	close(given.fd);
	free(talk);
}

static void test_entries(bool damaged)
{
	struct talk *talk = calloc(1, sizeof(*talk));
	uint32_t header = any(2) ? 24 : 32, flags[] = { 0, 1, 3, 4, 6 };
	struct lz_page_pipe pipe = { 0 }, expected = { 0 };
	uint8_t kinds[] = { LZ_PAGE_ZERO, LZ_PAGE_PARENT, LZ_PAGE_PARENT, LZ_PAGE_DUMPED, LZ_PAGE_DUMPED };
	uint8_t page[LZ_PAGE_SIZE], read_back[LZ_PAGE_SIZE];
	uint64_t at = 0, kept = 0, numbers[PAGES];
	int pair[2], out = memfd_create("out", MFD_CLOEXEC);
	pthread_t thread;

	assert(talk && out >= 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	while (at < PAGES) {
		uint32_t which = any(5), pages = 1 + any(3);
		put_message(talk, header, 6 | flags[which] << 16, BASE + (at << LZ_PAGE_SHIFT), pages, IMAGE);
		assert(lz_pipe_add(&expected, BASE + (at << LZ_PAGE_SHIFT), pages, kinds[which],
				   (flags[which] & 2) != 0) == 0);
		for (uint32_t i = 0; i < pages && kinds[which] == LZ_PAGE_DUMPED; i++) {
			fill_page(page, at + i);
			put(talk, page, sizeof(page));
			assert(kept < PAGES);
			numbers[kept++] = at + i;
		}
		at += pages + any(3);
		if (at + 3 > PAGES)
			break;
	}
	if (damaged)
		for (uint32_t i = any(4); i < 4; i++)
			talk->sent[any(any(2) ? header : (uint32_t)talk->length)] = (uint8_t)any(256);
	if (damaged)
		talk->length -= any((uint32_t)talk->length);
	talk->fd = pair[0];
	assert(pthread_create(&thread, NULL, client, talk) == 0);
	struct lz_peer peer = { .fd = pair[1], .header_bytes = header, .pipe = &pipe, .image = IMAGE, .out = out };
	int result = lz_peer_peek(&peer, 24) == LZ_PEER_MESSAGE ? run(&peer) : -ENODATA;
	lz_peer_free(&peer);
	close(pair[1]);
	pthread_join(thread, NULL);
	close(pair[0]);
	if (!damaged) {
		assert(result == LZ_PEER_ENDED && peer.written_bytes == kept << LZ_PAGE_SHIFT);
		assert(pipe.count == expected.count);
		assert(memcmp(pipe.runs, expected.runs, pipe.count * sizeof(*pipe.runs)) == 0);
		for (uint64_t i = 0; i < kept; i++) {
			fill_page(page, numbers[i]);
			assert(pread(out, read_back, sizeof(page), (off_t)(i << LZ_PAGE_SHIFT)) == sizeof(page));
			assert(memcmp(page, read_back, sizeof(page)) == 0);
		}
	}
	lz_pipe_free(&pipe);
	lz_pipe_free(&expected);
	close(out);
	free(talk);
}

/* A pages image that cannot be written to: said once, and the rest is read. */
static void test_unwritable(void)
{
	struct talk *talk = calloc(1, sizeof(*talk));
	struct lz_page_pipe pipe = { 0 };
	uint8_t page[LZ_PAGE_SIZE] = { 1 };
	int pair[2];
	pthread_t thread;

	assert(talk && socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	for (uint64_t i = 0; i < 20; i++) {
		put_message(talk, 24, 6 | 4U << 16, BASE + (i << LZ_PAGE_SHIFT), 1, IMAGE);
		put(talk, page, sizeof(page));
	}
	talk->fd = pair[0];
	assert(pthread_create(&thread, NULL, client, talk) == 0);
	struct lz_peer peer = { .fd = pair[1], .header_bytes = 24, .pipe = &pipe, .image = IMAGE, .out = -1 };
	assert(lz_peer_run(&peer) == LZ_PEER_UNWRITTEN && peer.code == EBADF && peer.broken == EBADF);
	assert(lz_peer_run(&peer) == LZ_PEER_ENDED && peer.received_bytes == 20 * LZ_PAGE_SIZE);
	lz_peer_free(&peer);
	close(pair[1]);
	pthread_join(thread, NULL);
	close(pair[0]);
	lz_pipe_free(&pipe);
	free(talk);
}

/* Stands before the C library's, and cannot read one page of an image. */
static off_t bad_offset = -1;

ssize_t sendfile(int out, int in, off_t *offset, size_t bytes)
{
	if (bad_offset >= 0 && *offset <= bad_offset && (off_t)(*offset + (off_t)bytes) > bad_offset) {
		bytes = (size_t)(bad_offset - *offset);
		if (!bytes) {
			errno = EIO;
			return -1;
		}
	}
	return syscall(SYS_sendfile, out, in, offset, bytes);
}

/* A page that cannot be read ends the connection that has begun to send it, and is missing for those that follow. */
static void test_unreadable(void)
{
	struct talk *talk = calloc(1, sizeof(*talk));
	struct lz_extent row = { .start = BASE, .pages = 8, .kind = LZ_KIND_DUMPED };
	int pair[2], fd = memfd_create("given", MFD_CLOEXEC), events[] = { LZ_PEER_UNREADABLE, LZ_PEER_ENDED };
	struct lz_shelf shelf = { .pid = PID, .rows = &row, .count = 1, .fds = &fd }, *shelves[] = { &shelf };
	uint64_t expected[] = { 24 + 3 * LZ_PAGE_SIZE, 3 * 24 + 7 * LZ_PAGE_SIZE };
	pthread_t thread;

	assert(talk && fd >= 0 && ftruncate(fd, 8 << LZ_PAGE_SHIFT) == 0);
	bad_offset = 3 << LZ_PAGE_SHIFT;
	for (int round = 0; round < 2; round++) {
		assert(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
		talk->length = talk->received = 0;
		put_message(talk, 24, 0x80000007, BASE, 8, PID);
		for (uint64_t at = 3; round && at < 5; at++)
			put_message(talk, 24, 0x80000007, BASE + (at << LZ_PAGE_SHIFT), 5, PID);
		talk->fd = pair[0];
		assert(pthread_create(&thread, NULL, client, talk) == 0);
		struct lz_peer peer = { .fd = pair[1], .header_bytes = 24, .shelves = shelves, .shelf_count = 1 };
		assert(run(&peer) == events[round]);
		assert(peer.missing_answers == (uint64_t)round);
		if (!round)
			assert(peer.code == EIO && peer.address == BASE + (3 << LZ_PAGE_SHIFT) && peer.task == PID);
		lz_peer_free(&peer);
		close(pair[1]);
		pthread_join(thread, NULL);
		close(pair[0]);
		assert(talk->received == expected[round]);
	}
	bad_offset = -1;
	close(fd);
	free(talk);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	for (int i = 0; i < ROUNDS; i++) {
		test_questions(i % 2);
		test_entries(i % 2);
	}
	test_unwritable();
	test_unreadable();
	return 0;
}
