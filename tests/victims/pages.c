/* SPDX-License-Identifier: MIT */
/*
 * A task whose memory does what it is told: one command a line on stdin, one answer a line on stdout. Addresses and
 * counts are hexadecimal, lengths are pages.
 *
 * A page that is written holds one 64-bit word throughout: the command's value for the first page, one more for each
 * page after it. So a model is a dictionary of addresses and values, and what mremap moves keeps its value.
 *
 * It stands in no library's memory: what it does not do itself does not change between two dumps, but for its stack.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define UFFD_USER_MODE_ONLY 1

static uint64_t number[8];
static char text[4096];
static char *self;

static char *address(int n)
{
	return (char *)(uintptr_t)number[n];
}

static long mapped(const void *result)
{
	return result == MAP_FAILED ? -errno : 0;
}

static long done(int result)
{
	return result < 0 ? -errno : result;
}

/* map ADDRESS PAGES PROT FLAGS */
static long map(void)
{
	return mapped(mmap(address(0), number[1] * PAGE, (int)number[2],
			   (int)number[3] | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

/* mapfile ADDRESS PAGES PROT FLAGS FIRST_PAGE PATH */
static long map_file(void)
{
	int fd = open(text, O_RDWR);
	long result;

	if (fd < 0)
		return -errno;
	result = mapped(mmap(address(0), number[1] * PAGE, (int)number[2], (int)number[3] | MAP_FIXED, fd,
			     (off_t)(number[4] * PAGE)));
	close(fd);
	return result;
}

/* unmap ADDRESS PAGES */
static long unmap(void)
{
	return done(munmap(address(0), number[1] * PAGE));
}

/* write ADDRESS PAGES VALUE [STEP]: every STEPth page */
static long write_pages(void)
{
	uint64_t step = number[3] ? number[3] : 1;

	for (uint64_t page = 0; page < number[1]; page += step) {
		volatile uint64_t *words = (volatile uint64_t *)(address(0) + page * PAGE);
		for (size_t i = 0; i < PAGE / 8; i++)
			words[i] = number[2] + page;
	}
	return 0;
}

/* read ADDRESS PAGES [STEP]; answers the sum of the first words */
static long read_pages(void)
{
	uint64_t step = number[2] ? number[2] : 1, sum = 0;

	for (uint64_t page = 0; page < number[1]; page += step)
		sum += *(volatile uint64_t *)(address(0) + page * PAGE);
	return (long)(sum >> 1);
}

/* remap FROM PAGES NEW_PAGES FLAGS TO */
static long remap(void)
{
	return mapped(mremap(address(0), number[1] * PAGE, number[2] * PAGE, (int)number[3], address(4)));
}

/* advise ADDRESS PAGES ADVICE */
static long advise(void)
{
	return done(madvise(address(0), number[1] * PAGE, (int)number[2]));
}

/* protect ADDRESS PAGES PROT */
static long protect(void)
{
	return done(mprotect(address(0), number[1] * PAGE, (int)number[2]));
}

/* syscall ADDRESS BYTES: have the kernel write zeros there */
static long kernel_write(void)
{
	int fd = open("/dev/zero", O_RDONLY);
	long got = done((int)read(fd, address(0), number[1]));

	close(fd);
	return got;
}

/* uffd: open one, as another process would make it do; answers its number */
static long open_uffd(void)
{
	return done((int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY));
}

/* close FD */
static long close_fd(void)
{
	return done(close((int)number[0]));
}

/* fork ADDRESS PAGES VALUE: a child that writes there and stays until it is killed; answers its pid */
static long fork_child(void)
{
	pid_t child = fork();

	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, 9);
		write_pages();
		for (;;)
			pause();
	}
	return done(child);
}

/* reap PID */
static long reap(void)
{
	return done(waitpid((pid_t)number[0], NULL, 0));
}

/* brk PAGES: grow the heap; answers the old end */
static long grow_heap(void)
{
	void *old = sbrk((intptr_t)(number[0] * PAGE));

	return old == (void *)-1 ? -errno : (long)(uintptr_t)old;
}

/* exec: start over, with nothing left of what was mapped */
static long start_over(void)
{
	execl("/proc/self/exe", self, "again", NULL);
	return -errno;
}

static const struct {
	const char *name;
	long (*run)(void);
} commands[] = {
	{ "map", map },           { "mapfile", map_file }, { "unmap", unmap },
	{ "write", write_pages }, { "read", read_pages },  { "remap", remap },
	{ "advise", advise },     { "protect", protect },  { "syscall", kernel_write },
	{ "uffd", open_uffd },    { "close", close_fd },   { "fork", fork_child },
	{ "reap", reap },         { "brk", grow_heap },    { "exec", start_over },
};

static long run(char *line)
{
	char *name = strtok(line, " \n");
	int count = 0;

	memset(number, 0, sizeof(number));
	for (char *word = strtok(NULL, " \n"); word; word = strtok(NULL, " \n")) {
		if (*word == '/')
			snprintf(text, sizeof(text), "%s", word);
		else if (count < 8)
			number[count++] = strtoull(word, NULL, 16);
	}
	for (size_t i = 0; name && i < sizeof(commands) / sizeof(*commands); i++)
		if (strcmp(commands[i].name, name) == 0)
			return commands[i].run();
	return -ENOSYS;
}

int main(int argc, char **argv)
{
	static char line[8192];
	size_t filled = 0;

	self = argv[0];
	prctl(PR_SET_PDEATHSIG, 9);
	if (argc > 1 && strcmp(argv[1], "again") == 0)
		dprintf(1, "0\n");
	/* No stdio for input: what it reads ahead would be lost in exec. */
	while (read(0, line + filled, 1) == 1) {
		if (line[filled] != '\n' && filled + 2 < sizeof(line)) {
			filled++;
			continue;
		}
		line[filled] = 0;
		filled = 0;
		dprintf(1, "%lx\n", run(line));
	}
	return 0;
}
