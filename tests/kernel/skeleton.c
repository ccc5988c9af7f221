/* SPDX-License-Identifier: MIT */
/*
 * skeleton: restorer and restored task in one, without CRIU. It maps memory at fixed addresses, registers it with a
 * userfaultfd as CRIU does, hands that to the daemon that listens at lazy-pages.socket in the current directory, and
 * then uses the memory in the ways named by its arguments, checking every byte against a function of the address that
 * it had in the image. The last line is the verdict: "ok" and exit 0, or what is wrong and exit 2.
 *
 *   skeleton pattern START PAGES STRIDE write the bytes of every STRIDE-th image page to stdout, and exit
 *   skeleton STEP...
 *
 * Steps, in the order given:
 *   seed N                              of all that is random
 *   vma START PAGES                     map memory; what is not named by the next two is zeros
 *   dumped START PAGES [STRIDE]         image pages; with STRIDE only every STRIDE-th page from START on
 *   prefill START PAGES                 image pages that the restorer fills itself
 *   open                                open a userfaultfd and register all that is mapped
 *   connect | finish | hangup           the connection, "restore finished", close
 *   announce PID                        send the pid (0: its own) and the userfaultfd, and close it
 *   pid PID | byte | rights N | raw HEX parts of the protocol alone: a pid, a byte, a byte with N userfaultfds, bytes
 *   say WORD | await | pause            write a line to stdout; read a line from stdin; wait for SIGUSR1
 *   sweep ORDER THREADS                 check every page: forward, backward, random
 *   storm THREADS OPERATIONS            random layout changes, reads, writes, system calls and forks
 *   race KIND                           for every image page: a thread touches it while this one does KIND to it:
 *                                       dontneed, free, write, unmap, overmap, remap, fork
 *   tree DEPTH WIDTH                    fork a tree whose members all check every page
 *   forks COUNT                         fork that many children in a row; each checks some pages
 *   bus START PAGES                     from here on these pages must raise SIGBUS
 *   drop START PAGES                    madvise(MADV_DONTNEED)
 *   grow PAGES                          mremap the last mapping to a longer one elsewhere
 *   child STEP... ready STEP... end     run the steps in a child; this process goes on when the child is ready
 *   exec                                become another program
 *   vanish                              SIGKILL
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define MAX_AREAS 512
#define MAX_THREADS 16
#define LIFETIME_S 100U
#define FRESH_BASE 0x300000000000UL
#define RACE_DELTA 0x100000000000UL

/* What a page must hold. */
enum kind { GONE, ZERO, IMAGE, OWN, BUS };

struct expect {
	uint64_t value; /* IMAGE: image address; OWN: seed */
	uint64_t patch_value;
	uint16_t patch; /* 0, or 1 + the number of a word that holds patch_value instead */
	uint8_t kind;
	uint8_t maybe_zero; /* MADV_FREE: the page may read zeros as well */
};

struct area {
	uint64_t start;
	uint64_t pages;
	struct expect *expect;
};

struct world {
	struct area area[MAX_AREAS];
	unsigned areas;
	unsigned number;
	unsigned children;
	bool split; /* an mprotect may have split VMAs for good: mremap over the cut is EFAULT, with any daemon */
	uint64_t random;
	uint64_t fresh;
	int pipe[2];
};

static struct world all;
static uint64_t seed = 1;
static int uffd = -1, peer = -1;
static const char *step_name = "start";
static char *self_path;
static __thread sigjmp_buf *volatile trap;

static void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
static void fail(const char *format, ...)
{
	char line[512];
	int used = snprintf(line, sizeof(line), "WRONG in %s (pid %d): ", step_name, (int)getpid());
	va_list arguments;

	va_start(arguments, format);
	used += vsnprintf(line + used, sizeof(line) - (size_t)used - 2, format, arguments);
	va_end(arguments);
	if ((size_t)used > sizeof(line) - 2)
		used = sizeof(line) - 2;
	line[used++] = '\n';
	if (write(1, line, (size_t)used) < 0)
		_exit(3);
	_exit(2);
}

static void check(bool good, const char *what)
{
	if (!good)
		fail("%s: %s", what, strerror(errno));
}

static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15UL;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9UL;
	x = (x ^ x >> 27) * 0x94d049bb133111ebUL;
	return x ^ x >> 31;
}

static uint64_t next_random(struct world *world)
{
	return mix(world->random++);
}

static uint64_t below(struct world *world, uint64_t limit)
{
	return limit ? next_random(world) % limit : 0;
}

/* Traps: SIGSEGV and SIGBUS end the probe that caused them, or the process. */

static void on_trap(int number, siginfo_t *info, void *context)
{
	(void)context;
	if (trap)
		siglongjmp(*trap, number);
	fail("signal %d at %p", number, info->si_addr);
}

static volatile sig_atomic_t usr1;

static void on_usr1(int number)
{
	(void)number;
	usr1 = 1;
}

/* Read the first word of a page: 0 and *word, or the signal that it raised. */
static int probe(uint64_t address, uint64_t *word)
{
	sigjmp_buf here, *outer = trap;
	int raised = sigsetjmp(here, 1);

	if (!raised) {
		trap = &here;
		*word = *(volatile uint64_t *)address;
	}
	trap = outer;
	return raised;
}

static int probe_write(uint64_t address, uint64_t word)
{
	sigjmp_buf here, *outer = trap;
	int raised = sigsetjmp(here, 1);

	if (!raised) {
		trap = &here;
		*(volatile uint64_t *)address = word;
	}
	trap = outer;
	return raised;
}

/* Pages */

static uint64_t expected_word(const struct expect *expect, unsigned i)
{
	if (expect->patch && expect->patch == i + 1)
		return expect->patch_value;
	return expect->kind == ZERO ? 0 : mix(expect->value + 8 * i);
}

static bool holds(const uint64_t *word, const struct expect *expect)
{
	unsigned bad = WORDS;

	for (unsigned i = 0; i < WORDS && bad == WORDS; i++) {
		if (word[i] != expected_word(expect, i))
			bad = i;
	}
	if (bad == WORDS)
		return true;
	if (!expect->maybe_zero)
		return false;
	for (unsigned i = 0; i < WORDS; i++) {
		if (word[i])
			return false;
	}
	return true;
}

static void check_bytes(const void *page, uint64_t address, const struct expect *expect)
{
	const uint64_t *word = page;

	if (holds(word, expect))
		return;
	for (unsigned i = 0; i < WORDS; i++) {
		uint64_t wanted = expected_word(expect, i);

		if (word[i] != wanted)
			fail("page %#lx (%s %#lx): word %u is %#lx instead of %#lx%s", address,
			     expect->kind == IMAGE ? "image" :
			     expect->kind == OWN   ? "own" :
						     "zeros",
			     expect->value, i, word[i], wanted, expect->maybe_zero ? " or zeros" : "");
	}
}

static void check_page(const struct area *area, uint64_t page)
{
	const struct expect *expect = &area->expect[page];
	uint64_t address = area->start + page * PAGE, word;

	if (expect->kind == GONE)
		return;
	if (expect->kind == BUS) {
		if (probe(address, &word) != SIGBUS)
			fail("page %#lx was read instead of raising SIGBUS; it starts with %#lx", address, word);
		return;
	}
	check_bytes((const void *)address, address, expect);
}

static void check_area(struct world *world, const struct area *area)
{
	uint64_t at = below(world, area->pages), stride = area->pages > 7 ? 7 : 1;

	while (area->pages % stride == 0 && stride > 1)
		stride -= 2;
	if (area->pages % stride == 0)
		stride = 1;
	for (uint64_t i = 0; i < area->pages; i++) {
		check_page(area, at);
		at = (at + stride) % area->pages;
	}
}

static void check_world(struct world *world)
{
	for (unsigned i = 0; i < world->areas; i++)
		check_area(world, &world->area[i]);
}

static void set_pages(struct area *area, uint64_t page, uint64_t pages, struct expect expect)
{
	for (uint64_t i = 0; i < pages; i++)
		area->expect[page + i] = expect;
}

static struct area *add_area(struct world *world, uint64_t start, uint64_t pages, struct expect *expect)
{
	struct area *area = &world->area[world->areas++];

	if (world->areas > MAX_AREAS)
		fail("more areas than fit");
	*area = (struct area){ .start = start, .pages = pages, .expect = expect };
	if (!expect) {
		area->expect = calloc(pages, sizeof(*area->expect));
		check(area->expect, "calloc");
		set_pages(area, 0, pages, (struct expect){ .kind = ZERO });
	}
	return area;
}

/* Take pages [page, page + pages) out of an area; what is left of it stays. The numbers of areas change. */
static struct expect *cut(struct world *world, unsigned number, uint64_t page, uint64_t pages)
{
	struct area area = world->area[number];

	world->area[number] = world->area[--world->areas];
	if (page)
		add_area(world, area.start, page, area.expect);
	if (page + pages < area.pages)
		add_area(world, area.start + (page + pages) * PAGE, area.pages - page - pages,
			 area.expect + page + pages);
	return area.expect + page;
}

static struct area *find_area(uint64_t address, uint64_t *page)
{
	for (unsigned i = 0; i < all.areas; i++) {
		struct area *area = &all.area[i];

		if (address >= area->start && address < area->start + area->pages * PAGE) {
			*page = (address - area->start) / PAGE;
			return area;
		}
	}
	fail("nothing is mapped at %#lx", address);
}

static void *map_at(uint64_t start, uint64_t pages, int flags)
{
	void *map = mmap((void *)start, pages * PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);

	check(map != MAP_FAILED, "mmap");
	return map;
}

/* Children */

/* Children have the process group of their ancestors, by which the harness ends them all. */
static pid_t fork_child(void)
{
	pid_t child = fork();

	check(child >= 0, "fork");
	if (!child)
		alarm(LIFETIME_S);
	return child;
}

static void check_status(pid_t child, int status)
{
	if (!WIFEXITED(status) || WEXITSTATUS(status))
		fail("child %d ended with status %#x", (int)child, (unsigned)status);
}

/* Threads may reap each other's children: that one failed is all that counts. */
static bool reap_any(void)
{
	int status;
	pid_t child = wait(&status);

	if (child < 0)
		return false;
	check_status(child, status);
	return true;
}

static void reap_one(pid_t child)
{
	int status;

	check(waitpid(child, &status, 0) == child, "waitpid");
	check_status(child, status);
}

/* The restorer's half */

static void open_uffd(void)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_UNMAP |
			    UFFD_FEATURE_EVENT_REMOVE,
	};

	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	check(uffd >= 0, "userfaultfd");
	check(!ioctl(uffd, UFFDIO_API, &api), "UFFDIO_API");
	for (unsigned i = 0; i < all.areas; i++) {
		struct uffdio_register range = {
			.range = { .start = all.area[i].start, .len = all.area[i].pages * PAGE },
			.mode = UFFDIO_REGISTER_MODE_MISSING,
		};

		check(!ioctl(uffd, UFFDIO_REGISTER, &range), "UFFDIO_REGISTER");
	}
}

static void connect_daemon(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX, .sun_path = "lazy-pages.socket" };

	peer = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	check(peer >= 0, "socket");
	check(!connect(peer, (struct sockaddr *)&address, sizeof(address)), "connect");
}

static void send_bytes(const void *bytes, size_t length)
{
	check(send(peer, bytes, length, MSG_NOSIGNAL) == (ssize_t)length, "send");
}

static void send_rights(unsigned count)
{
	union {
		char space[CMSG_SPACE(sizeof(int) * 8)];
		struct cmsghdr align;
	} control;
	struct iovec byte = { .iov_base = "", .iov_len = 1 };
	struct msghdr message = { .msg_iov = &byte, .msg_iovlen = 1 };
	struct cmsghdr *header;

	if (count) {
		message.msg_control = control.space;
		message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
		header = CMSG_FIRSTHDR(&message);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(int) * count);
		for (unsigned i = 0; i < count; i++)
			memcpy(CMSG_DATA(header) + i * sizeof(int), &uffd, sizeof(int));
	}
	check(sendmsg(peer, &message, MSG_NOSIGNAL) == 1, "sendmsg");
}

static void announce(int32_t pid)
{
	send_bytes(&pid, sizeof(pid));
	send_rights(1);
	close(uffd);
	uffd = -1;
}

/* Sweeps */

enum order { FORWARD, BACKWARD, RANDOM };

struct sweep {
	enum order order;
	uint64_t random;
};

static void *sweep(void *argument)
{
	const struct sweep *how = argument;
	struct world self = { .random = how->random };
	uint64_t pages = 0, *list, at = 0;

	for (unsigned i = 0; i < all.areas; i++)
		pages += all.area[i].pages;
	list = malloc(pages * sizeof(*list));
	check(list, "malloc");
	for (unsigned i = 0; i < all.areas; i++) {
		for (uint64_t page = 0; page < all.area[i].pages; page++)
			list[at++] = (uint64_t)i << 40 | page;
	}
	for (uint64_t i = pages; how->order == RANDOM && i > 1; i--) {
		uint64_t other = below(&self, i), kept = list[i - 1];

		list[i - 1] = list[other];
		list[other] = kept;
	}
	for (uint64_t i = 0; i < pages; i++) {
		uint64_t item = list[how->order == BACKWARD ? pages - 1 - i : i];

		check_page(&all.area[item >> 40], item & ((1UL << 40) - 1));
	}
	free(list);
	return NULL;
}

static void sweep_all(enum order order, unsigned threads)
{
	struct sweep how[MAX_THREADS];
	pthread_t thread[MAX_THREADS];

	for (unsigned i = 0; i < threads; i++) {
		how[i] = (struct sweep){ order, mix(seed + i) };
		check(!pthread_create(&thread[i], NULL, sweep, &how[i]), "pthread_create");
	}
	for (unsigned i = 0; i < threads; i++)
		pthread_join(thread[i], NULL);
}

/* Storms */

static uint64_t fresh_range(struct world *world, uint64_t pages)
{
	uint64_t start = world->fresh;

	world->fresh += (pages + 1 + below(world, 64)) * PAGE;
	return start;
}

static void through_pipe_out(struct world *world, const struct area *area, uint64_t page)
{
	const struct expect *expect = &area->expect[page];
	uint64_t address = area->start + page * PAGE;
	char copy[PAGE];

	check(write(world->pipe[1], (const void *)address, PAGE) == (ssize_t)PAGE, "write from lazy memory");
	check(read(world->pipe[0], copy, PAGE) == (ssize_t)PAGE, "read");
	check_bytes(copy, address, expect);
}

static void through_pipe_in(struct world *world, struct area *area, uint64_t page)
{
	uint64_t address = area->start + page * PAGE, value = next_random(world), copy[WORDS];

	area->expect[page] = (struct expect){ .kind = OWN, .value = value };
	for (unsigned i = 0; i < WORDS; i++)
		copy[i] = mix(value + 8 * i);
	check(write(world->pipe[1], copy, PAGE) == (ssize_t)PAGE, "write");
	check(read(world->pipe[0], (void *)address, PAGE) == (ssize_t)PAGE, "read into lazy memory");
}

static void write_page(struct world *world, struct area *area, uint64_t page)
{
	uint64_t *word = (uint64_t *)(area->start + page * PAGE), value = next_random(world);

	area->expect[page] = (struct expect){ .kind = OWN, .value = value };
	for (unsigned i = 0; i < WORDS; i++)
		word[i] = mix(value + 8 * i);
}

static void patch_page(struct world *world, struct area *area, uint64_t page)
{
	struct expect *expect = &area->expect[page];
	unsigned i = (unsigned)below(world, WORDS);

	if (expect->maybe_zero) {
		check_page(area, page);
		return;
	}
	if (expect->patch && expect->patch != i + 1)
		i = expect->patch - 1U;
	expect->patch = (uint16_t)(i + 1);
	expect->patch_value = next_random(world);
	((uint64_t *)(area->start + page * PAGE))[i] = expect->patch_value;
}

static void vm_read(const struct area *area, uint64_t page)
{
	uint64_t address = area->start + page * PAGE;
	char copy[PAGE];
	struct iovec local = { copy, PAGE }, remote = { (void *)address, PAGE };

	check(process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == (ssize_t)PAGE, "process_vm_readv");
	check_bytes(copy, address, &area->expect[page]);
}

static void move(struct world *world, unsigned number, uint64_t page, uint64_t pages, uint64_t to)
{
	uint64_t from = world->area[number].start + page * PAGE;
	struct expect *expect = cut(world, number, page, pages);
	void *moved = mremap((void *)from, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)to);

	check(moved == (void *)to, "mremap");
	add_area(world, to, pages, expect);
}

static void storm_child(struct world *world, unsigned depth);

static void storm_one(struct world *world, unsigned depth)
{
	unsigned number = (unsigned)below(world, world->areas), what = (unsigned)below(world, 100);
	struct area *area = &world->area[number];
	uint64_t page = below(world, area->pages), room = area->pages - page, pages;

	/* Mostly a few pages, now and then many. */
	pages = 1 + below(world, below(world, 8) ? 16 : 4096);
	if (pages > room)
		pages = room;
	if (world->areas > MAX_AREAS - 8 && what >= 60)
		what = 0;
	if (what < 25) {
		for (uint64_t i = 0; i < pages && i < 16; i++)
			check_page(area, page + i);
	} else if (what < 30) {
		write_page(world, area, page);
	} else if (what < 35) {
		patch_page(world, area, page);
	} else if (what < 38) {
		through_pipe_out(world, area, page);
	} else if (what < 41) {
		through_pipe_in(world, area, page);
	} else if (what < 43) {
		vm_read(area, page);
	} else if (what < 45) {
		check(!madvise((void *)(area->start + page * PAGE), pages * PAGE, MADV_POPULATE_READ),
		      "madvise(MADV_POPULATE_READ)");
	} else if (what < 53) {
		check(!madvise((void *)(area->start + page * PAGE), pages * PAGE, MADV_DONTNEED),
		      "madvise(MADV_DONTNEED)");
		set_pages(area, page, pages, (struct expect){ .kind = ZERO });
	} else if (what < 56) {
		check(!madvise((void *)(area->start + page * PAGE), pages * PAGE, MADV_FREE), "madvise(MADV_FREE)");
		for (uint64_t i = 0; i < pages; i++)
			area->expect[page + i].maybe_zero = 1;
	} else if (what < 60) {
		void *start = (void *)(area->start + page * PAGE);

		if (seed % 2)
			return;
		world->split = true;
		check(!mprotect(start, pages * PAGE, PROT_READ), "mprotect");
		check_page(area, page);
		check(!mprotect(start, pages * PAGE, PROT_READ | PROT_WRITE), "mprotect");
	} else if (what < 68) {
		move(world, number, page, pages, fresh_range(world, pages));
	} else if (what < 72) { /* onto another area: what was there is unmapped by the same call */
		unsigned other = (unsigned)below(world, world->areas);
		struct area target = world->area[other];

		if (other == number || target.pages < pages)
			return;
		page = below(world, target.pages - pages + 1);
		cut(world, other, page, pages);
		for (number = 0; number < world->areas; number++) {
			if (world->area[number].pages >= pages)
				break;
		}
		if (number < world->areas) {
			move(world, number, below(world, world->area[number].pages - pages + 1), pages,
			     target.start + page * PAGE);
		} else {
			check(!munmap((void *)(target.start + page * PAGE), pages * PAGE), "munmap");
		}
	} else if (what < 76) {
		uint64_t from = area->start + page * PAGE, to = fresh_range(world, pages);
		struct expect *expect = cut(world, number, page, pages);

		check(mremap((void *)from, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP,
			     (void *)to) == (void *)to,
		      "mremap(MREMAP_DONTUNMAP)");
		add_area(world, to, pages, expect);
		add_area(world, from, pages, NULL);
	} else if (what < 80) { /* grow, elsewhere or in place */
		uint64_t grown = area->pages + 1 + below(world, 64), to = 0;
		bool moves = below(world, 2);
		struct area *bigger;
		void *result;

		if (moves) {
			to = fresh_range(world, grown);
			result = mremap((void *)area->start, area->pages * PAGE, grown * PAGE,
					MREMAP_MAYMOVE | MREMAP_FIXED, (void *)to);
			if (result == MAP_FAILED && errno == EFAULT && world->split)
				return;
			check(result == (void *)to, "mremap to grow and move");
		} else {
			to = area->start;
			result = mremap((void *)area->start, area->pages * PAGE, grown * PAGE, 0);
			if (result == MAP_FAILED && (errno == ENOMEM || (errno == EFAULT && world->split)))
				return; /* something is behind it */
			check(result == (void *)to, "mremap to grow in place");
			if (world->fresh < to + (grown + 1) * PAGE && to >= FRESH_BASE)
				world->fresh = to + (grown + 1) * PAGE;
		}
		pages = area->pages;
		struct expect *expect = cut(world, number, 0, pages);

		bigger = add_area(world, to, grown, NULL);
		memcpy(bigger->expect, expect, pages * sizeof(*expect));
	} else if (what < 83) {
		if (area->pages < 2)
			return;
		pages = 1 + below(world, area->pages - 1);
		check(mremap((void *)area->start, area->pages * PAGE, pages * PAGE, 0) == (void *)area->start,
		      "mremap to shrink");
		area->pages = pages;
	} else if (what < 87) {
		uint64_t start = area->start + page * PAGE;

		if (world->areas == 1 && pages == area->pages)
			return;
		cut(world, number, page, pages);
		check(!munmap((void *)start, pages * PAGE), "munmap");
		if (below(world, 2)) {
			map_at(start, pages, MAP_FIXED_NOREPLACE);
			add_area(world, start, pages, NULL);
		}
	} else if (what < 90) {
		uint64_t start = area->start + page * PAGE;

		cut(world, number, page, pages);
		map_at(start, pages, MAP_FIXED);
		add_area(world, start, pages, NULL);
	} else if (what < 91 && depth < 3) {
		storm_child(world, depth);
	}
}

static void storm_child(struct world *world, unsigned depth)
{
	pid_t child;

	if (world->children >= 4 && reap_any())
		world->children--;
	child = fork_child();
	if (child) {
		world->children++;
		return;
	}
	world->children = 0;
	world->random ^= mix((uint64_t)getpid());
	check(!pipe(world->pipe), "pipe");
	if (below(world, 2)) {
		for (unsigned i = 0; i < 40; i++)
			storm_one(world, depth + 1);
	}
	check_world(world);
	while (reap_any())
		;
	_exit(0);
}

static unsigned storm_operations;

static void *storm(void *argument)
{
	struct world *world = argument;

	for (unsigned i = 0; i < storm_operations && world->areas; i++)
		storm_one(world, 0);
	check_world(world);
	return NULL;
}

static void storm_all(unsigned threads, unsigned operations)
{
	struct world *world = calloc(threads, sizeof(*world));
	pthread_t thread[MAX_THREADS];

	check(world, "calloc");
	storm_operations = operations;
	for (unsigned i = 0; i < threads; i++) {
		world[i].number = i;
		world[i].random = mix(seed * 1000 + i);
		world[i].fresh = FRESH_BASE + ((uint64_t)i << 40);
		check(!pipe(world[i].pipe), "pipe");
	}
	for (unsigned i = 0; i < all.areas; i++)
		add_area(&world[i % threads], all.area[i].start, all.area[i].pages, all.area[i].expect);
	for (unsigned i = 0; i < threads; i++)
		check(!pthread_create(&thread[i], NULL, storm, &world[i]), "pthread_create");
	for (unsigned i = 0; i < threads; i++)
		pthread_join(thread[i], NULL);
	all.areas = 0;
	for (unsigned i = 0; i < threads; i++) {
		for (unsigned k = 0; k < world[i].areas && all.areas < MAX_AREAS; k++)
			add_area(&all, world[i].area[k].start, world[i].area[k].pages, world[i].area[k].expect);
	}
	while (reap_any())
		;
}

/* Races: one thread touches a page while another does something to it. */

enum race { RACE_DONTNEED, RACE_FREE, RACE_WRITE, RACE_UNMAP, RACE_OVERMAP, RACE_REMAP, RACE_FORK, RACES };

static const char *const race_name[RACES] = { "dontneed", "free", "write", "unmap", "overmap", "remap", "fork" };

static struct {
	uint64_t round, done; /* atomic */
	uint64_t address;
	uint64_t word;
	uint64_t delay;
	int raised;
	bool writes;
} touch;

static void pause_for(uint64_t turns)
{
	for (volatile uint64_t i = 0; i < turns; i++)
		;
}

static void *toucher(void *argument)
{
	uint64_t round = 0;

	(void)argument;
	for (;;) {
		while (__atomic_load_n(&touch.round, __ATOMIC_ACQUIRE) == round)
			;
		round++;
		if (!touch.address)
			return NULL;
		pause_for(touch.delay);
		touch.raised = touch.writes ? probe_write(touch.address, round) : probe(touch.address, &touch.word);
		__atomic_store_n(&touch.done, round, __ATOMIC_RELEASE);
	}
}

static bool all_zero(const uint64_t *word, unsigned from)
{
	for (unsigned i = from; i < WORDS; i++) {
		if (word[i])
			return false;
	}
	return true;
}

static void race_one(struct world *world, enum race race, struct area *area, uint64_t page, uint64_t round)
{
	struct expect *expect = &area->expect[page];
	uint64_t address = area->start + page * PAGE, image = mix(expect->value);
	pid_t child = 0;

	touch.address = address;
	touch.delay = below(world, 400);
	touch.writes = race == RACE_WRITE;
	touch.word = 0;
	__atomic_store_n(&touch.round, round, __ATOMIC_RELEASE);
	pause_for(below(world, below(world, 2) ? 400 : 20000));
	switch (race) {
	case RACE_DONTNEED:
	case RACE_WRITE:
		check(!madvise((void *)address, PAGE, MADV_DONTNEED), "madvise(MADV_DONTNEED)");
		break;
	case RACE_FREE:
		check(!madvise((void *)address, PAGE, MADV_FREE), "madvise(MADV_FREE)");
		break;
	case RACE_UNMAP:
		check(!munmap((void *)address, PAGE), "munmap");
		break;
	case RACE_OVERMAP:
		map_at(address, 1, MAP_FIXED);
		break;
	case RACE_REMAP:
		check(mremap((void *)address, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			     (void *)(address + RACE_DELTA)) == (void *)(address + RACE_DELTA),
		      "mremap");
		break;
	case RACE_FORK:
		child = fork_child();
		if (!child) {
			check_page(area, page);
			_exit(0);
		}
		break;
	default:
		fail("no such race");
	}
	while (__atomic_load_n(&touch.done, __ATOMIC_ACQUIRE) != round)
		;
	if (touch.raised && (touch.raised != SIGSEGV || (race != RACE_UNMAP && race != RACE_REMAP)))
		fail("touching %#lx raised signal %d", address, touch.raised);
	if (!touch.raised && !touch.writes && touch.word != image &&
	    (touch.word || race == RACE_FORK || race == RACE_REMAP || race == RACE_UNMAP))
		fail("touching %#lx gave %#lx instead of %#lx", address, touch.word, image);
	switch (race) {
	case RACE_DONTNEED:
	case RACE_OVERMAP:
		*expect = (struct expect){ .kind = ZERO };
		break;
	case RACE_WRITE: {
		const uint64_t *word = (const uint64_t *)address;

		if (!all_zero(word, 1) || (word[0] && word[0] != round))
			fail("page %#lx holds %#lx %#lx after it was dropped", address, word[0], word[1]);
		*expect = (struct expect){ .kind = ZERO, .patch = 1, .patch_value = word[0] };
		break;
	}
	case RACE_FREE:
		expect->maybe_zero = 1;
		break;
	case RACE_UNMAP:
		expect->kind = GONE;
		break;
	case RACE_REMAP: {
		check_bytes((const void *)(address + RACE_DELTA), address + RACE_DELTA, expect);
		expect->kind = GONE;
		break;
	}
	default:
		reap_one(child);
	}
	check_page(area, page);
}

static void race_all(enum race race)
{
	struct world world = { .random = mix(seed) };
	uint64_t round = 0;
	pthread_t thread;

	check(!pthread_create(&thread, NULL, toucher, NULL), "pthread_create");
	for (unsigned i = 0; i < all.areas; i++) {
		for (uint64_t page = 0; page < all.area[i].pages; page++) {
			if (all.area[i].expect[page].kind == IMAGE)
				race_one(&world, race, &all.area[i], page, ++round);
		}
	}
	touch.address = 0;
	__atomic_store_n(&touch.round, round + 1, __ATOMIC_RELEASE);
	pthread_join(thread, NULL);
	check_world(&all);
}

/* Forks */

static void tree(unsigned depth, unsigned width)
{
	pid_t child[MAX_THREADS];

	for (unsigned i = 0; depth && i < width; i++) {
		child[i] = fork_child();
		if (!child[i]) {
			seed = mix(seed + i);
			all.random = seed;
			tree(depth - 1, width);
			_exit(0);
		}
	}
	check_world(&all);
	for (unsigned i = 0; depth && i < width; i++)
		reap_one(child[i]);
}

static void forks(unsigned count)
{
	for (unsigned i = 0; i < count; i++) {
		pid_t child = fork_child();

		if (!child) {
			for (unsigned k = 0; k < 32; k++) {
				struct area *area = &all.area[below(&all, all.areas)];

				check_page(area, below(&all, area->pages));
			}
			_exit(0);
		}
		all.random++;
		if (i % 2)
			check_page(&all.area[0], below(&all, all.area[0].pages));
		reap_one(child);
	}
	check_world(&all);
}

/* Steps */

static char **argument;
static int ready_fd = -1;

static char *word(void)
{
	if (!*argument)
		fail("an argument is missing");
	return *argument++;
}

static uint64_t number(void)
{
	char *end, *text = word();
	uint64_t value = strtoull(text, &end, 0);

	if (*end || !*text)
		fail("%s: not a number", text);
	return value;
}

static void set_image(uint64_t start, uint64_t pages, uint64_t stride)
{
	for (uint64_t i = 0; i < pages; i += stride) {
		uint64_t page, address = start + i * PAGE;
		struct area *area = find_area(address, &page);

		area->expect[page] = (struct expect){ .kind = IMAGE, .value = address };
	}
}

static void run_child(void)
{
	int pipes[2], nested = 1;
	pid_t child;
	char byte;

	check(!pipe2(pipes, O_CLOEXEC), "pipe2");
	child = fork_child();
	if (!child) {
		close(pipes[0]);
		ready_fd = pipes[1];
		return;
	}
	close(pipes[1]);
	if (read(pipes[0], &byte, 1) != 1)
		fail("child %d did not get ready", (int)child);
	close(pipes[0]);
	for (; nested; argument++) {
		if (!*argument)
			fail("child without end");
		nested += !strcmp(*argument, "child");
		nested -= !strcmp(*argument, "end");
	}
}

static void run_step(const char *name)
{
	uint64_t start, pages;

	step_name = name;
	if (!strcmp(name, "seed")) {
		seed = number();
		all.random = mix(seed);
	} else if (!strcmp(name, "vma")) {
		start = number();
		pages = number();
		map_at(start, pages, MAP_FIXED_NOREPLACE);
		add_area(&all, start, pages, NULL);
	} else if (!strcmp(name, "dumped")) {
		char *end;

		start = number();
		pages = number();
		uint64_t stride = *argument ? strtoull(*argument, &end, 0) : 0;

		if (stride)
			argument++;
		set_image(start, pages, stride ? stride : 1);
	} else if (!strcmp(name, "prefill")) {
		start = number();
		pages = number();
		set_image(start, pages, 1);
		for (uint64_t i = 0; i < pages * WORDS; i++)
			((uint64_t *)start)[i] = mix(start + 8 * i);
	} else if (!strcmp(name, "open")) {
		open_uffd();
	} else if (!strcmp(name, "connect")) {
		connect_daemon();
	} else if (!strcmp(name, "announce")) {
		int32_t pid = (int32_t)number();

		announce(pid ? pid : getpid());
	} else if (!strcmp(name, "pid")) {
		int32_t pid = (int32_t)number();

		send_bytes(&pid, sizeof(pid));
	} else if (!strcmp(name, "byte")) {
		send_rights(0);
	} else if (!strcmp(name, "rights")) {
		send_rights((unsigned)number());
	} else if (!strcmp(name, "raw")) {
		char *text = word();
		unsigned byte;

		for (; sscanf(text, "%2x", &byte) == 1; text += 2)
			send_bytes(&(unsigned char){ (unsigned char)byte }, 1);
	} else if (!strcmp(name, "finish")) {
		send_bytes(&(uint32_t){ 0x52535446 }, 4);
	} else if (!strcmp(name, "hangup")) {
		close(peer);
		peer = -1;
	} else if (!strcmp(name, "say")) {
		char *text = word();

		check(dprintf(1, "%s\n", text) > 0, "write");
	} else if (!strcmp(name, "await")) {
		char byte;

		do
			check(read(0, &byte, 1) == 1, "read from stdin");
		while (byte != '\n');
	} else if (!strcmp(name, "pause")) {
		while (!usr1)
			poll(NULL, 0, 10);
		usr1 = 0;
	} else if (!strcmp(name, "sweep")) {
		char *order = word();

		sweep_all(*order == 'f' ? FORWARD : *order == 'b' ? BACKWARD : RANDOM, (unsigned)number());
	} else if (!strcmp(name, "storm")) {
		unsigned threads = (unsigned)number();

		storm_all(threads, (unsigned)number());
	} else if (!strcmp(name, "race")) {
		char *kind = word();
		unsigned race = 0;

		while (race < RACES && strcmp(race_name[race], kind))
			race++;
		race_all(race);
	} else if (!strcmp(name, "tree")) {
		unsigned depth = (unsigned)number();

		tree(depth, (unsigned)number());
	} else if (!strcmp(name, "forks")) {
		forks((unsigned)number());
	} else if (!strcmp(name, "bus") || !strcmp(name, "drop")) {
		uint64_t page;
		struct area *area;

		start = number();
		pages = number();
		area = find_area(start, &page);
		if (*name == 'd')
			check(!madvise((void *)start, pages * PAGE, MADV_DONTNEED), "madvise");
		set_pages(area, page, pages, (struct expect){ .kind = *name == 'b' ? BUS : ZERO });
	} else if (!strcmp(name, "grow")) {
		struct area area = all.area[--all.areas], *bigger;

		pages = area.pages + number();
		bigger = add_area(&all, FRESH_BASE, pages, NULL);
		memcpy(bigger->expect, area.expect, area.pages * sizeof(*area.expect));
		check(mremap((void *)area.start, area.pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			     (void *)FRESH_BASE) == (void *)FRESH_BASE,
		      "mremap");
	} else if (!strcmp(name, "child")) {
		run_child();
	} else if (!strcmp(name, "ready")) {
		check(write(ready_fd, "", 1) == 1, "write");
		close(ready_fd);
	} else if (!strcmp(name, "end")) {
		_exit(0);
	} else if (!strcmp(name, "exec")) {
		execl(self_path, self_path, (char *)NULL);
		check(false, "exec");
	} else if (!strcmp(name, "vanish")) {
		raise(SIGKILL);
	} else {
		fail("no such step");
	}
}

static int print_pattern(uint64_t start, uint64_t pages, uint64_t stride)
{
	uint64_t words[WORDS];

	for (uint64_t page = 0; page < pages; page += stride) {
		for (unsigned i = 0; i < WORDS; i++)
			words[i] = mix(start + page * PAGE + 8 * i);
		if (fwrite(words, PAGE, 1, stdout) != 1)
			return 1;
	}
	return fflush(stdout) ? 1 : 0;
}

int main(int count, char **arguments)
{
	struct sigaction action = { .sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_NODEFER };

	self_path = arguments[0];
	if (count == 5 && !strcmp(arguments[1], "pattern"))
		return print_pattern(strtoull(arguments[2], NULL, 0), strtoull(arguments[3], NULL, 0),
				     strtoull(arguments[4], NULL, 0));
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	alarm(LIFETIME_S);
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	signal(SIGUSR1, on_usr1);
	all.random = mix(seed);
	for (argument = arguments + 1; *argument;)
		run_step(word());
	step_name = "end";
	while (reap_any())
		;
	return dprintf(1, "ok\n") > 0 ? 0 : 3;
}
