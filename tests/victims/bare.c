/* SPDX-License-Identifier: MIT */
/*
 * The least that can serve one task: bare SOCKET EXTENTS PAGES
 *
 * A bound for scripts/bench. It takes the userfaultfd of one task from the restorer and then does nothing but answer
 * faults with UFFDIO_COPY, never blocking: the page and what follows of its window, then, when nobody waits, the next
 * run in order of address. No layout events, no checks, no zero pages beyond a single one for what is not there.
 * EXTENTS is a text file with lines "start pages offset", sorted; PAGES is the pages image.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { PAGE = 4096, WINDOW = 16 * PAGE, CHUNK = 64 * PAGE };

struct extent {
	uint64_t start, length, offset, filled;
};

static struct extent *extents;
static size_t count;
static char *pages;
static int uffd = -1;

static uint64_t copy(uint64_t to, uint64_t from, uint64_t length)
{
	struct uffdio_copy c = { .dst = to, .src = (uint64_t)(uintptr_t)pages + from, .len = length };
	if (ioctl(uffd, UFFDIO_COPY, &c) == 0)
		return length;
	if (c.copy > 0)
		return (uint64_t)c.copy;
	if (c.copy == -EEXIST || errno == EEXIST) {
		struct uffdio_range r = { to, PAGE };
		ioctl(uffd, UFFDIO_WAKE, &r);
		return PAGE;
	}
	return errno == EAGAIN ? 0 : length;
}

static void answer(uint64_t address)
{
	size_t low = 0, high = count;
	while (low < high) {
		size_t middle = (low + high) / 2;
		if (extents[middle].start + extents[middle].length <= address)
			low = middle + 1;
		else
			high = middle;
	}
	if (low == count || extents[low].start > address) {
		struct uffdio_zeropage z = { .range = { address, PAGE } };
		ioctl(uffd, UFFDIO_ZEROPAGE, &z);
		return;
	}
	struct extent *e = &extents[low];
	uint64_t into = address - e->start, window = e->length - into < WINDOW ? e->length - into : WINDOW;
	if (copy(address, e->offset + into, window) == 0)
		copy(address, e->offset + into, PAGE);
}

static int receive(int connection)
{
	char byte, control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = { &byte, 1 };
	struct msghdr m = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)
	};
	int32_t pid;
	if (recv(connection, &pid, 4, MSG_WAITALL) != 4 || recvmsg(connection, &m, 0) != 1)
		return -1;
	int fd = -1;
	if (CMSG_FIRSTHDR(&m))
		memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(fd));
	return fd;
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	FILE *list = fopen(argv[2], "r");
	struct extent e = { 0 };
	while (list && fscanf(list, "%lu %lu %lu", &e.start, &e.length, &e.offset) == 3) {
		extents = realloc(extents, (count + 1) * sizeof(e));
		e.length *= PAGE;
		extents[count++] = e;
	}
	int image = open(argv[3], O_RDONLY);
	struct stat st;
	if (image < 0 || fstat(image, &st))
		return 3;
	pages = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, image, 0);
	struct sockaddr_un where = { .sun_family = AF_UNIX };
	snprintf(where.sun_path, sizeof(where.sun_path), "%s", argv[1]);
	int listener = socket(AF_UNIX, SOCK_STREAM, 0);
	if (pages == MAP_FAILED || bind(listener, (struct sockaddr *)&where, sizeof(where)) || listen(listener, 1))
		return 3;
	int connection = accept(listener, NULL, NULL);
	uffd = receive(connection);
	if (uffd < 0)
		return 3;
	size_t next = 0;
	int finished = 0;
	while (next < count || !finished) {
		struct uffd_msg messages[16];
		ssize_t n = read(uffd, messages, sizeof(messages));
		for (ssize_t i = 0; i < n / (ssize_t)sizeof(messages[0]); i++)
			if (messages[i].event == UFFD_EVENT_PAGEFAULT)
				answer(messages[i].arg.pagefault.address & ~(uint64_t)(PAGE - 1));
		uint32_t word;
		if (!finished && recv(connection, &word, 4, MSG_DONTWAIT) == 4)
			finished = 1;
		if (n > 0 || !finished || next == count)
			continue;
		struct extent *now = &extents[next];
		uint64_t left = now->length - now->filled, run = left < CHUNK ? left : CHUNK;
		now->filled += copy(now->start + now->filled, now->offset + now->filled, run);
		if (now->filled >= now->length)
			next++;
	}
	return 0;
}
