/* SPDX-License-Identifier: MIT */
/*
 * The engine against the real kernel, with a worker that can be held at named points.
 *
 * A victim process maps memory at a fixed address, registers it with its own userfaultfd and hands that to the engine
 * in this process; then its threads do what they are told, one command each at a time. What every page must hold is a
 * function of its image address, written into a memfd that plays the pages image. The engine is built with
 * -DLZ_TEST_POINTS: lz_point below stops a worker at a point until the test lets it go.
 */
#define _GNU_SOURCE 1
#include "../../cbits/abi.h"
#include "../../cbits/lz.h"
#include "../../cbits/remote.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifdef __SANITIZE_THREAD__ /* its shadow leaves little of the address space */
#define BASE 0x4000000000ULL
#define AWAY 0x5000000000ULL
#else
#define BASE 0x200000000000ULL
#define AWAY 0x210000000000ULL
#endif
#define PAGE LZ_PAGE_SIZE
#define THREADS 4

#define CHECK(condition)                                                                                               \
	do {                                                                                                           \
		if (!(condition)) {                                                                                    \
			fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, __LINE__, __func__, #condition);          \
			end_victim();                                                                                  \
			exit(1);                                                                                       \
		}                                                                                                      \
	} while (0)

enum op { NOP, READ, WRITE, DROP, FREE, WIPE, KEEP, MOVE, GROW, UNMAP, MAP, FORK, EXIT, CALL };

struct slot { /* one victim thread */
	volatile int op;
	volatile uint64_t address, to, length;
	volatile uint64_t result; /* READ: the word read; others: 0, or errno */
	volatile int done;
};

struct control {
	struct slot slot[THREADS];
	struct slot child; /* commands to the last forked child */
	volatile int ready, child_pid;
	volatile char die_at[32]; /* the named point at which the process that serves is killed */
	volatile uint64_t die_address;
	volatile int die_after; /* so many times it is passed before */
};

static struct control *control;
static pid_t victim, server, source;
static struct lz_engine *engine;

static void end_victim(void)
{
	if (control && control->child_pid > 0)
		kill(control->child_pid, SIGKILL);
	if (server > 0) {
		kill(server, SIGKILL);
		waitpid(server, NULL, 0);
	}
	server = 0;
	if (victim > 0) {
		kill(victim, SIGKILL);
		waitpid(victim, NULL, 0);
	}
	victim = 0;
	if (source > 0) {
		kill(source, SIGKILL);
		waitpid(source, NULL, 0);
	}
	source = 0;
}

static uint64_t word_at(uint64_t image_address)
{
	uint64_t x = image_address / 8 + 0x9E3779B97F4A7C15ULL;

	x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ULL;
	x = (x ^ x >> 27) * 0x94D049BB133111EBULL;
	return (x ^ x >> 31) | 1;
}

extern int lz_lacks_poison;
int lz_lacks_poison; /* this kernel is older than UFFDIO_POISON */

/* Named points: one armed at a time. */

static struct {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	const char *name;
	uint64_t address; /* 0: any */
	bool reached, released;
} point = { .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };

void lz_point(const char *name, uint64_t address);
void lz_point(const char *name, uint64_t address)
{
	if (control && !strcmp((const char *)control->die_at, name) &&
	    (!control->die_address || control->die_address == address) && !control->die_after--) {
		__atomic_store_n(&control->die_at[0], 0, __ATOMIC_RELAXED);
		kill(getpid(), SIGKILL);
		pause();
	}
	pthread_mutex_lock(&point.lock);
	if (point.name && !strcmp(point.name, name) && (!point.address || point.address == address)) {
		point.name = NULL;
		point.reached = true;
		pthread_cond_broadcast(&point.changed);
		while (!point.released)
			pthread_cond_wait(&point.changed, &point.lock);
	}
	pthread_mutex_unlock(&point.lock);
}

static void arm(const char *name, uint64_t address)
{
	pthread_mutex_lock(&point.lock);
	point.name = name;
	point.address = address;
	point.reached = point.released = false;
	pthread_mutex_unlock(&point.lock);
}

static bool reached(void)
{
	struct timespec until;
	bool result;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += 20;
	pthread_mutex_lock(&point.lock);
	while (!point.reached && !pthread_cond_timedwait(&point.changed, &point.lock, &until))
		;
	result = point.reached;
	pthread_mutex_unlock(&point.lock);
	return result;
}

static void let_go(void)
{
	pthread_mutex_lock(&point.lock);
	point.released = true;
	point.name = NULL;
	pthread_cond_broadcast(&point.changed);
	pthread_mutex_unlock(&point.lock);
}

/* The victim */

static void obey(struct slot *slot);

static void run_slot(struct slot *slot)
{
	for (;;) {
		while (slot->op == NOP)
			sched_yield();
		obey(slot);
		__sync_synchronize();
		slot->op = NOP;
		slot->done = 1;
	}
}

#ifdef __SANITIZE_THREAD__
__attribute__((no_sanitize("thread"))) /* its races are the point */
#endif
static void obey(struct slot *slot)
{
	void *at = (void *)(uintptr_t)slot->address;

	slot->result = 0;
	switch (slot->op) {
	case READ:
		slot->result = *(volatile uint64_t *)at;
		break;
	case WRITE:
		*(volatile uint64_t *)at = slot->to;
		break;
	case DROP:
		slot->result = madvise(at, slot->length, MADV_DONTNEED) ? (uint64_t)errno : 0;
		break;
	case FREE:
		slot->result = madvise(at, slot->length, MADV_FREE) ? (uint64_t)errno : 0;
		break;
	case WIPE:
		slot->result = madvise(at, slot->length, MADV_WIPEONFORK) ? (uint64_t)errno : 0;
		break;
	case KEEP:
		slot->result = madvise(at, slot->length, MADV_DONTFORK) ? (uint64_t)errno : 0;
		break;
	case MOVE: {
		void *to = mremap(at, slot->length, slot->length, MREMAP_MAYMOVE | MREMAP_FIXED,
				  (void *)(uintptr_t)slot->to);

		slot->result = to == MAP_FAILED ? (uint64_t)errno : 0;
		break;
	}
	case GROW: /* in place, from `to` bytes */
		slot->result = mremap(at, slot->to, slot->length, 0) == at ? 0 : (uint64_t)errno;
		break;
	case UNMAP:
		slot->result = munmap(at, slot->length) ? (uint64_t)errno : 0;
		break;
	case MAP: {
		void *to = mmap(at, slot->length, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

		slot->result = to == MAP_FAILED ? (uint64_t)errno : 0;
		break;
	}
	case FORK: {
		pid_t child = fork();

		if (!child) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			run_slot(&control->child);
		}
		control->child_pid = child;
		slot->result = child < 0 ? (uint64_t)errno : 0;
		break;
	}
	case CALL: { /* the kernel reads the memory, not the program */
		int pipes[2];

		if (pipe(pipes) || syscall(SYS_write, pipes[1], at, 8) != 8 ||
		    read(pipes[0], (void *)(uintptr_t)&slot->result, 8) != 8)
			slot->result = 0;
		close(pipes[0]);
		close(pipes[1]);
		break;
	}
	case EXIT:
		_exit(0);
	default:
		abort();
	}
}

static void *victim_thread(void *slot)
{
	run_slot(slot);
	return NULL;
}

static void send_fd(int link, int fd)
{
	char byte = 0, space[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec vector = { &byte, 1 };
	struct msghdr message = {
		.msg_iov = &vector, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof(space)
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(int));
	if (sendmsg(link, &message, 0) != 1)
		abort();
}

static int receive_fd(int link)
{
	char byte, space[CMSG_SPACE(sizeof(int))];
	struct iovec vector = { &byte, 1 };
	struct msghdr message = {
		.msg_iov = &vector, .msg_iovlen = 1, .msg_control = space, .msg_controllen = sizeof(space)
	};
	int fd = -1;

	if (recvmsg(link, &message, MSG_CMSG_CLOEXEC) != 1 || !CMSG_FIRSTHDR(&message))
		return -1;
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
	return fd;
}

static void victim_main(int link, const struct lz_vma *vmas, uint32_t count)
{
	struct uffdio_api api = { .api = UFFD_API,
				  .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP |
					      UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP };
	int through, uffd = lz_uffd_open(&through);
	pthread_t thread;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGBUS, SIG_DFL); /* a sanitizer would take it */
	signal(SIGSEGV, SIG_DFL);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		_exit(77);
	for (uint32_t i = 0; i < count; i++) {
		struct uffdio_register request = { .range = { vmas[i].start, vmas[i].end - vmas[i].start },
						   .mode = UFFDIO_REGISTER_MODE_MISSING };
		void *map = mmap((void *)(uintptr_t)vmas[i].start, vmas[i].end - vmas[i].start, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

		if (map == MAP_FAILED || ioctl(uffd, UFFDIO_REGISTER, &request))
			_exit(78);
	}
	for (int i = 1; i < THREADS; i++)
		if (pthread_create(&thread, NULL, victim_thread, &control->slot[i]))
			_exit(79);
	send_fd(link, uffd);
	close(uffd);
	close(link);
	control->ready = 1;
	run_slot(&control->slot[0]);
}

static void begin(struct slot *slot, enum op op, uint64_t address, uint64_t to, uint64_t length)
{
	slot->address = address;
	slot->to = to;
	slot->length = length;
	slot->done = 0;
	__sync_synchronize();
	slot->op = op;
}

static bool finished_within(struct slot *slot, int ms)
{
	for (int i = 0; i < ms * 10 && !slot->done; i++)
		usleep(100);
	return slot->done;
}

static uint64_t finish(struct slot *slot)
{
	CHECK(finished_within(slot, 20000));
	return slot->result;
}

static uint64_t run(int thread, enum op op, uint64_t address, uint64_t to, uint64_t length)
{
	begin(&control->slot[thread], op, address, to, length);
	return finish(&control->slot[thread]);
}

static uint64_t run_child(enum op op, uint64_t address, uint64_t to, uint64_t length)
{
	begin(&control->child, op, address, to, length);
	return finish(&control->child);
}

/* Blocked in the kernel, waiting for us: nobody else can make a thread of the victim sleep that long. */
static bool blocks(struct slot *slot)
{
	return !finished_within(slot, 20);
}

/* The engine over one victim */

struct scene {
	uint32_t pages; /* of one VMA at BASE, all dumped but page 3 (zero) and the last 8 (no entry) */
	enum lz_fill fill;
	uint32_t vmas;  /* 1, or 2: a second of the same size without image bytes at BASE + 1 GiB */
	bool guarded;   /* a copy of this process serves, see take_over */
	bool split;     /* the VMA is two, the second an eighth of it */
	uint32_t flags; /* of the VMA at BASE */
	int *source_fd; /* out, when not NULL: the pages image */
	bool remote;    /* the pages from the fifth on come from a page server */
	bool local;     /* by a connection that is not TCP */
};

static struct lz_totals totals(void)
{
	struct lz_totals now;

	lz_engine_totals(engine, &now);
	return now;
}

/* A page server over loopback: what it is asked for, in small pieces, so that pages are cut anywhere. */
static void source_main(int listener)
{
	int fd, one = 1;
	uint8_t header[24];

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	/* A copy of the userfaultfd would keep it open. */
	if (dup2(listener, 3) < 0 || syscall(SYS_close_range, 4, ~0U, 0) < 0)
		_exit(1);
	fd = accept(3, NULL, NULL);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	while (recv(fd, header, sizeof(header), MSG_WAITALL) == sizeof(header)) {
		static uint8_t answer[24 + 256 * PAGE];
		uint32_t pages, word = 6 | 4 << 16;
		uint64_t address, length;

		memcpy(&pages, header + 4, 4);
		memcpy(&address, header + 8, 8);
		memcpy(answer, header, sizeof(header));
		memcpy(answer, &word, 4);
		for (uint64_t i = 0; i < pages * PAGE / 8; i++) {
			uint64_t value = word_at(address + i * 8);
			memcpy(answer + 24 + i * 8, &value, 8);
		}
		length = 24 + pages * PAGE;
		for (uint64_t done = 0; done < length;) {
			uint64_t piece = length - done < 1500 ? length - done : 1500;
			ssize_t sent = send(fd, answer + done, piece, MSG_NOSIGNAL);

			if (sent <= 0)
				_exit(1);
			done += (uint64_t)sent;
		}
	}
	_exit(0);
}

/* Start one and connect to it. */
static int start_source_at(const struct sockaddr *name, socklen_t length)
{
	const int family = name->sa_family;
	struct sockaddr_storage address = { 0 };
	int listener = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0), fd;

	CHECK(listener >= 0 && !bind(listener, name, length) && !listen(listener, 1));
	length = sizeof(address);
	CHECK(!getsockname(listener, (struct sockaddr *)&address, &length));
	source = fork();
	if (!source)
		source_main(listener);
	close(listener);
	fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(fd >= 0 && !connect(fd, (struct sockaddr *)&address, length));
	return fd;
}

static int start_source(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };

	return start_source_at((struct sockaddr *)&address, sizeof(address));
}

/* One that no TCP counts for, as behind TLS. */
static int start_local_source(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX }; /* the kernel finds a name */

	return start_source_at((struct sockaddr *)&address, sizeof(sa_family_t));
}

static void set_up(const struct scene *scene)
{
	uint64_t length = scene->pages * PAGE;
	struct lz_vma vmas[2] = { { BASE, BASE + length, scene->flags },
				  { BASE + (1 << 30), BASE + (1 << 30) + length, 0 } };
	struct lz_extent extents[] = {
		{ .start = BASE, .pages = 3, .kind = LZ_KIND_DUMPED, .lazy = 1 },
		{ .start = BASE + 3 * PAGE, .pages = 1, .kind = LZ_KIND_ZERO, .lazy = 1 },
		{ .start = BASE + 4 * PAGE,
		  .offset = 3 * PAGE,
		  .pages = scene->pages - 12,
		  .kind = LZ_KIND_DUMPED,
		  .lazy = 1 },
	};
	struct lz_config config = { .workers = 1, .fill = scene->fill, .fault_around_pages = 1 };
	int link[2], image, error, number, uffd;

	control = mmap(NULL, sizeof(*control), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(control != MAP_FAILED);
	if (scene->split) {
		vmas[0].end = vmas[1].start = BASE + length / 8 * 7;
		vmas[1].end = BASE + length;
	}
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, link));
	victim = fork();
	if (!victim)
		victim_main(link[1], vmas, scene->vmas);
	close(link[1]);
	uffd = receive_fd(link[0]);
	CHECK(uffd >= 0);
	close(link[0]);

	image = memfd_create("pages", MFD_CLOEXEC);
	for (uint64_t page = 0; page < scene->pages - 8; page++) {
		uint64_t words[PAGE / 8];

		if (page == 3)
			continue;
		for (uint32_t i = 0; i < PAGE / 8; i++)
			words[i] = word_at(BASE + page * PAGE + i * 8);
		CHECK(pwrite(image, words, PAGE, (off_t)((page > 3 ? page - 1 : page) * PAGE)) == (ssize_t)PAGE);
	}
	engine = lz_engine_new(&config, &error);
	CHECK(engine);
	CHECK(lz_engine_add_source(engine, image) == 0);
	if (scene->source_fd)
		*scene->source_fd = image;
	else
		close(image);
	if (scene->remote) {
		extents[2].kind = LZ_KIND_REMOTE;
		extents[2].offset = 0;
		CHECK(lz_engine_add_remote(engine, scene->local ? start_local_source() : start_source(), 24) == 1);
	}
	number = lz_engine_prepare(engine, victim, extents, 3, vmas, scene->vmas);
	CHECK(number == 0);
	if (scene->guarded) {
		server = lz_fork_keeping_fds();
		CHECK(server >= 0);
		if (!server) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			if (lz_engine_start(engine) || lz_engine_attach(engine, 0, uffd, victim))
				_exit(1);
			lz_engine_finish_restore(engine);
			for (;;)
				pause();
		}
		while (!control->ready || !lz_engine_is_finished(engine))
			usleep(100);
		return;
	}
	CHECK(!lz_engine_start(engine));
	CHECK(!lz_engine_attach(engine, 0, uffd, victim));
	while (!control->ready)
		usleep(100);
}

static void tear_down(void)
{
	end_victim();
	lz_engine_free(engine);
	engine = NULL;
	munmap(control, sizeof(*control));
	control = NULL;
}

static void wait_served(uint32_t serving)
{
	for (int i = 0; i < 20000 && totals().serving != serving; i++)
		usleep(1000);
	CHECK(totals().serving == serving);
}

/* The first word of every page of [0, pages) at `at`, where the image has it at `image`; skip: dropped pages. */
static void check_pages(uint64_t at, uint64_t image, uint32_t first, uint32_t pages, uint32_t total)
{
	for (uint32_t i = first; i < pages; i++) {
		uint64_t want = i == 3 || i >= total - 8 ? 0 : word_at(image + i * PAGE);
		uint64_t got = run(0, READ, at + i * PAGE, 0, 0);

		if (got != want)
			fprintf(stderr, "page %u: %#lx instead of %#lx\n", i, got, want);
		CHECK(got == want);
	}
}

#define PLAIN(fill_mode) (&(struct scene){ .pages = 64, .fill = fill_mode, .vmas = 1 })

static void test_on_demand(void)
{
	set_up(PLAIN(LZ_FILL_OFF));
	lz_engine_finish_restore(engine);
	check_pages(BASE, BASE, 0, 64, 64);
	CHECK(totals().fault_copied_pages == 55 && totals().fill_copied_pages == 0);
	CHECK(run(1, CALL, BASE + 8, 0, 0) == word_at(BASE + 8));
	wait_served(0); /* all of it is in: closed */
	tear_down();
}

static void test_no_fill_before_finished(void)
{
	set_up(PLAIN(LZ_FILL_FULL));
	CHECK(run(0, READ, BASE + 9 * PAGE, 0, 0) == word_at(BASE + 9 * PAGE));
	usleep(100000);
	CHECK(totals().fill_copied_pages == 0 && totals().left_pages == 54);
	lz_engine_finish_restore(engine);
	wait_served(0);
	CHECK(totals().fill_copied_pages == 54 && totals().left_pages == 0);
	check_pages(BASE, BASE, 0, 64, 64);
	tear_down();
}

static uint64_t resident_pages(void)
{
	char path[64];
	unsigned long pages = 0;
	FILE *statm;

	snprintf(path, sizeof(path), "/proc/%d/statm", victim);
	statm = fopen(path, "re");
	CHECK(statm && fscanf(statm, "%*u %lu", &pages) == 1);
	fclose(statm);
	return pages;
}

/* Memory that no image covers: a stream of writes gets pages, a stream of reads the zero page, neither many faults. */
static void test_fresh_memory(void)
{
	struct scene scene = { .pages = 2048, .fill = LZ_FILL_OFF, .vmas = 2 };
	const uint64_t written = BASE + (1 << 30), read = written + 1024 * PAGE;
	uint64_t before;

	set_up(&scene); /* not finished: a VMA without image pages stays ours */
	before = resident_pages();
	for (uint64_t i = 0; i < 600; i++)
		CHECK(run(0, WRITE, written + i * PAGE, i + 1, 0) == 0);
	CHECK(resident_pages() >= before + 600);
	CHECK(totals().faults < 60);
	before = resident_pages();
	for (uint64_t i = 0; i < 600; i++)
		CHECK(run(0, READ, read + i * PAGE, 0, 0) == 0);
	CHECK(resident_pages() < before + 100);
	CHECK(totals().faults < 120);
	for (uint64_t i = 0; i < 1024; i++) {
		CHECK(run(0, READ, written + i * PAGE, 0, 0) == (i < 600 ? i + 1 : 0));
		CHECK(run(0, READ, written + i * PAGE + 8, 0, 0) == 0);
	}
	tear_down();
}

/* A page dropped while its copy is on the way: the copy must not land, and the page must read zeros. */
static void race_copy_and_drop(enum op drop)
{
	struct slot *reader;

	set_up(PLAIN(LZ_FILL_OFF));
	reader = &control->slot[0];
	arm("before-copy", BASE + 20 * PAGE);
	begin(reader, READ, BASE + 20 * PAGE, 0, 0);
	CHECK(reached());
	begin(&control->slot[1], drop, BASE + 16 * PAGE, 0, 8 * PAGE);
	CHECK(blocks(&control->slot[1]));
	let_go();
	CHECK(finish(&control->slot[1]) == 0);
	CHECK(finish(reader) == 0);
	CHECK(totals().again > 0 && totals().removes == 1);
	for (uint32_t i = 16; i < 24; i++)
		CHECK(run(0, READ, BASE + i * PAGE, 0, 0) == 0);
	CHECK(run(0, READ, BASE + 15 * PAGE, 0, 0) == word_at(BASE + 15 * PAGE));
	CHECK(run(0, READ, BASE + 24 * PAGE, 0, 0) == word_at(BASE + 24 * PAGE));
	tear_down();
}

static void test_copy_and_drop(void)
{
	race_copy_and_drop(DROP);
	race_copy_and_drop(FREE);
}

/* The range moves while a copy to its old place is on the way. */
static void test_copy_and_move(void)
{
	set_up(PLAIN(LZ_FILL_OFF));
	lz_engine_finish_restore(engine);
	arm("before-copy", BASE + 20 * PAGE);
	begin(&control->slot[0], CALL, BASE + 20 * PAGE, 0, 0); /* a system call: it may fail, not die */
	CHECK(reached());
	begin(&control->slot[1], MOVE, BASE + 16 * PAGE, AWAY, 8 * PAGE);
	CHECK(blocks(&control->slot[1]));
	let_go();
	CHECK(finish(&control->slot[1]) == 0);
	CHECK(finish(&control->slot[0]) == 0); /* EFAULT: its address is gone */
	CHECK(totals().again > 0 && totals().remaps == 1);
	for (uint32_t i = 0; i < 8; i++)
		CHECK(run(0, READ, AWAY + i * PAGE, 0, 0) == word_at(BASE + (16 + i) * PAGE));
	check_pages(BASE, BASE, 0, 16, 64);
	check_pages(BASE, BASE, 24, 64, 64);
	tear_down();
}

/* The range goes and another mapping comes while a copy is on the way: nothing of the image may land in it. */
static void test_copy_and_unmap(void)
{
	set_up(PLAIN(LZ_FILL_OFF));
	arm("before-copy", BASE + 20 * PAGE);
	begin(&control->slot[0], CALL, BASE + 20 * PAGE, 0, 0);
	CHECK(reached());
	begin(&control->slot[1], UNMAP, BASE + 16 * PAGE, 0, 8 * PAGE);
	CHECK(blocks(&control->slot[1]));
	for (int i = 0; i < 5000 && run(2, MAP, BASE + 16 * PAGE, 0, 8 * PAGE) == EEXIST; i++)
		usleep(1000); /* a machine under load may not have come to the munmap yet */
	CHECK(control->slot[2].result == 0);
	CHECK(run(2, READ, BASE + 21 * PAGE, 0, 0) == 0);
	let_go();
	CHECK(finish(&control->slot[1]) == 0);
	CHECK(finish(&control->slot[0]) == 0);
	for (uint32_t i = 16; i < 24; i++)
		CHECK(run(0, READ, BASE + i * PAGE, 0, 0) == 0);
	check_pages(BASE, BASE, 0, 16, 64);
	check_pages(BASE, BASE, 24, 64, 64);
	tear_down();
}

/* A fork while a copy to the parent is on the way: both get the page. */
static void test_copy_and_fork(void)
{
	set_up(PLAIN(LZ_FILL_OFF));
	lz_engine_finish_restore(engine);
	arm("before-copy", BASE + 20 * PAGE);
	begin(&control->slot[0], READ, BASE + 20 * PAGE, 0, 0);
	CHECK(reached());
	begin(&control->slot[1], FORK, 0, 0, 0);
	CHECK(blocks(&control->slot[1]));
	let_go();
	CHECK(finish(&control->slot[1]) == 0);
	CHECK(finish(&control->slot[0]) == word_at(BASE + 20 * PAGE));
	CHECK(totals().forks == 1 && totals().serving == 2);
	for (uint32_t i = 0; i < 64; i++) {
		uint64_t want = i == 3 || i >= 56 ? 0 : word_at(BASE + i * PAGE);

		CHECK(run_child(READ, BASE + i * PAGE, 0, 0) == want);
	}
	/* What one writes the other does not see, and what one drops the other keeps. */
	CHECK(run_child(WRITE, BASE + 30 * PAGE, 42, 0) == 0);
	CHECK(run_child(DROP, BASE + 31 * PAGE, 0, PAGE) == 0);
	CHECK(run_child(READ, BASE + 31 * PAGE, 0, 0) == 0);
	check_pages(BASE, BASE, 0, 64, 64);
	tear_down();
}

/* Dropped first, forked then: zeros in both; forked first, dropped then: the child has the bytes. */
static void test_drop_and_fork(void)
{
	set_up(PLAIN(LZ_FILL_OFF));
	CHECK(run(0, DROP, BASE + 8 * PAGE, 0, 4 * PAGE) == 0);
	CHECK(run(0, FORK, 0, 0, 0) == 0);
	CHECK(run(0, DROP, BASE + 12 * PAGE, 0, 4 * PAGE) == 0);
	for (uint32_t i = 8; i < 16; i++) {
		CHECK(run(0, READ, BASE + i * PAGE, 0, 0) == 0);
		CHECK(run_child(READ, BASE + i * PAGE, 0, 0) == (i < 12 ? 0 : word_at(BASE + i * PAGE)));
	}
	tear_down();
}

/* A VMA loses its end, grows again and is forked before anything has settled: in the child that end is new memory. */
static void test_shrink_grow_and_fork(void)
{
	set_up(PLAIN(LZ_FILL_OFF));
	arm("event-kept", UFFD_EVENT_UNMAP);
	begin(&control->slot[0], UNMAP, BASE + 40 * PAGE, 0, 24 * PAGE);
	CHECK(reached());
	CHECK(finish(&control->slot[0]) == 0);
	CHECK(run(0, GROW, BASE, 40 * PAGE, 64 * PAGE) == 0);
	begin(&control->slot[0], FORK, 0, 0, 0);
	CHECK(blocks(&control->slot[0]));
	let_go();
	CHECK(finish(&control->slot[0]) == 0);
	for (uint32_t i = 36; i < 64; i++)
		CHECK(run_child(READ, BASE + i * PAGE, 0, 0) == (i < 40 ? word_at(BASE + i * PAGE) : 0));
	tear_down();
}

/* A child changes its memory, and its parent the same, before it is known what the child has: that is all but this. */
static void test_fork_and_unmap_in_both(void)
{
	set_up(PLAIN(LZ_FILL_OFF));
	arm("event-kept", UFFD_EVENT_FORK);
	begin(&control->slot[0], FORK, 0, 0, 0);
	CHECK(reached());
	CHECK(finish(&control->slot[0]) == 0);
	begin(&control->child, UNMAP, BASE + 20 * PAGE, 0, PAGE);
	CHECK(blocks(&control->child));
	begin(&control->slot[1], UNMAP, BASE + 20 * PAGE, 0, 8 * PAGE);
	CHECK(blocks(&control->slot[1]));
	let_go();
	CHECK(finish(&control->child) == 0);
	CHECK(finish(&control->slot[1]) == 0);
	for (uint32_t i = 21; i < 32; i++)
		CHECK(run_child(READ, BASE + i * PAGE, 0, 0) == word_at(BASE + i * PAGE));
	check_pages(BASE, BASE, 0, 20, 64);
	check_pages(BASE, BASE, 28, 64, 64);
	tear_down();
}

/* Memory that a fork wipes: zeros in the child, whether its page was in or not; the parent keeps its own. */
static void test_wiped_on_fork(void)
{
	struct scene scene = { .pages = 64, .fill = LZ_FILL_OFF, .vmas = 1, .flags = LZ_REGION_WIPED_ON_FORK };

	set_up(&scene);
	CHECK(run(0, WIPE, BASE, 0, 64 * PAGE) == 0);
	CHECK(run(0, READ, BASE + 5 * PAGE, 0, 0) == word_at(BASE + 5 * PAGE));
	CHECK(run(0, FORK, 0, 0, 0) == 0);
	for (uint32_t i = 0; i < 64; i++)
		CHECK(run_child(READ, BASE + i * PAGE, 0, 0) == 0);
	check_pages(BASE, BASE, 0, 64, 64);
	tear_down();
	/* Asked for after the restore, of a page that is in: no image says so, and the child must not hang. */
	scene.flags = 0;
	set_up(&scene);
	CHECK(run(0, READ, BASE + 5 * PAGE, 0, 0) == word_at(BASE + 5 * PAGE));
	CHECK(run(0, WIPE, BASE, 0, 64 * PAGE) == 0);
	CHECK(run(0, FORK, 0, 0, 0) == 0);
	CHECK(run_child(READ, BASE + 5 * PAGE, 0, 0) == 0);
	tear_down();
}

/* A VMA without image bytes goes back to the kernel at once; the task's memory stays right. */
/* A thread keeps memory from its child, forks, and unmaps that and what is behind it: the child has what is behind. */
static void test_kept_from_the_child(void)
{
	set_up(PLAIN(LZ_FILL_OFF));
	lz_engine_finish_restore(engine);
	CHECK(run(0, KEEP, BASE + 16 * PAGE, 0, 4 * PAGE) == 0);
	arm("event-kept", UFFD_EVENT_FORK);
	begin(&control->slot[0], FORK, 0, 0, 0);
	CHECK(reached());
	CHECK(finish(&control->slot[0]) == 0);
	begin(&control->slot[0], UNMAP, BASE + 16 * PAGE, 0, 8 * PAGE);
	CHECK(blocks(&control->slot[0]));
	let_go();
	CHECK(finish(&control->slot[0]) == 0);
	for (uint32_t page = 20; page < 56; page++)
		CHECK(run_child(READ, BASE + page * PAGE, 0, 0) == word_at(BASE + page * PAGE));
	tear_down();
}

/* What cannot be read, on a kernel that cannot poison: who touches it waits, and so does the child of a fork. */
static void test_held_back_and_fork(void)
{
	int fd;
	struct scene scene = { .pages = 64, .fill = LZ_FILL_FULL, .vmas = 1, .source_fd = &fd };

	lz_lacks_poison = 1;
	set_up(&scene);
	CHECK(!ftruncate(fd, 40 * PAGE));
	lz_engine_finish_restore(engine);
	begin(&control->slot[1], READ, BASE + 50 * PAGE, 0, 0);
	CHECK(blocks(&control->slot[1]));
	CHECK(run(0, FORK, 0, 0, 0) == 0);
	CHECK(run_child(READ, BASE + 20 * PAGE, 0, 0) == word_at(BASE + 20 * PAGE));
	begin(&control->child, READ, BASE + 51 * PAGE, 0, 0);
	CHECK(blocks(&control->child));
	lz_lacks_poison = 0;
	tear_down();
	close(fd);
}

static void test_hand_back(void)
{
	struct scene scene = { .pages = 64, .fill = LZ_FILL_OFF, .vmas = 2 };
	const uint64_t empty = BASE + (1 << 30);

	set_up(&scene);
	CHECK(run(0, READ, empty + PAGE, 0, 0) == 0);
	CHECK(totals().faults == 1);
	lz_engine_finish_restore(engine);
	for (int i = 0; i < 20000 && !totals().unregistered_pages; i++)
		usleep(1000);
	CHECK(totals().unregistered_pages == 64);
	for (uint32_t i = 0; i < 64; i++)
		CHECK(run(0, READ, empty + i * PAGE, 0, 0) == 0);
	CHECK(totals().faults == 1);
	check_pages(BASE, BASE, 0, 64, 64);
	tear_down();
}

/* Memory with missing pages is moved into a range while that range is handed back: its bytes must still come. */
static void race_hand_back_and_move(const char *where)
{
	struct scene scene = { .pages = 64, .fill = LZ_FILL_OFF, .vmas = 2 };
	const uint64_t empty = BASE + (1 << 30);

	set_up(&scene);
	arm(where, empty);
	lz_engine_finish_restore(engine);
	CHECK(reached());
	begin(&control->slot[1], MOVE, BASE + 16 * PAGE, empty, 8 * PAGE);
	CHECK(blocks(&control->slot[1]) || !strcmp(where, "after-unregister"));
	let_go();
	CHECK(finish(&control->slot[1]) == 0);
	for (uint32_t i = 0; i < 8; i++)
		CHECK(run(0, READ, empty + i * PAGE, 0, 0) == word_at(BASE + (16 + i) * PAGE));
	for (uint32_t i = 8; i < 64; i++)
		CHECK(run(0, READ, empty + i * PAGE, 0, 0) == 0);
	check_pages(BASE, BASE, 0, 16, 64);
	check_pages(BASE, BASE, 24, 64, 64);
	tear_down();
}

static void test_hand_back_and_move(void)
{
	race_hand_back_and_move("before-unregister");
	race_hand_back_and_move("after-unregister");
}

/* The pages image is cut while it is served: the pages beyond raise SIGBUS, the others are right. */
static void test_source_cut(void)
{
	int image, status;
	struct scene scene = { .pages = 64, .fill = LZ_FILL_OFF, .vmas = 1, .source_fd = &image };

	set_up(&scene);
	lz_engine_finish_restore(engine);
	/* inside page 39 of the image, which is page 40 of the memory */
	CHECK(!ftruncate(image, 39 * (off_t)PAGE + 100));
	check_pages(BASE, BASE, 0, 40, 64);
	CHECK(run(0, READ, BASE + 60 * PAGE, 0, 0) == 0);
	begin(&control->slot[0], READ, BASE + 40 * PAGE, 0, 0);
	CHECK(waitpid(victim, &status, 0) == victim);
	victim = 0;
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
	CHECK(totals().poisoned_pages > 0);
	close(image);
	tear_down();
}

/* Given up: what is missing raises SIGBUS, what is there stays. */
static void test_abandon(void)
{
	int status;

	set_up(PLAIN(LZ_FILL_OFF));
	lz_engine_finish_restore(engine);
	CHECK(run(0, READ, BASE + 9 * PAGE, 0, 0) == word_at(BASE + 9 * PAGE));
	lz_engine_abandon(engine);
	CHECK(totals().poisoned_pages == 54 && totals().serving == 0);
	CHECK(run(0, READ, BASE + 9 * PAGE, 0, 0) == word_at(BASE + 9 * PAGE));
	CHECK(run(0, READ, BASE + 60 * PAGE, 0, 0) == 0);
	begin(&control->slot[0], READ, BASE + 10 * PAGE, 0, 0);
	CHECK(waitpid(victim, &status, 0) == victim);
	victim = 0;
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
	tear_down();
}

/* A task that dies is noticed without any event. */
static void test_task_exits(void)
{
	struct lz_notice notice = { 0 };

	set_up(PLAIN(LZ_FILL_OFF));
	lz_engine_finish_restore(engine);
	begin(&control->slot[0], EXIT, 0, 0, 0);
	CHECK(waitpid(victim, NULL, 0) == victim);
	victim = 0;
	wait_served(0);
	while (lz_engine_next_notice(engine, &notice) && notice.kind != LZ_NOTICE_TASK_GONE)
		;
	CHECK(notice.kind == LZ_NOTICE_TASK_GONE);
	tear_down();
}

/* A descriptor limit that leaves no room: the fork is served from the reserve. */
static void test_fork_without_descriptors(void)
{
	int *filled = calloc(1 << 20, sizeof(int)), count = 0;

	CHECK(filled);
	set_up(PLAIN(LZ_FILL_OFF));
	lz_engine_finish_restore(engine);
	while (count < 1 << 20 && (filled[count] = dup(0)) >= 0)
		count++;
	CHECK(errno == EMFILE);
	CHECK(run(0, FORK, 0, 0, 0) == 0);
	CHECK(run_child(READ, BASE + 5 * PAGE, 0, 0) == word_at(BASE + 5 * PAGE));
	while (count)
		close(filled[--count]);
	free(filled);
	tear_down();
}

/* The helper is inside a copy when the task drops the range: the event may not be read before it is out. */
static void test_helper_and_drop(void)
{
	struct scene scene = { .pages = 4096, .fill = LZ_FILL_FULL, .vmas = 1 };

	set_up(&scene);
	arm("helper-copy", 0);
	lz_engine_finish_restore(engine);
	if (!reached()) { /* one processor, or all of them busy for seconds */
		let_go();
		tear_down();
		return;
	}
	begin(&control->slot[0], DROP, BASE, 0, scene.pages * PAGE);
	CHECK(blocks(&control->slot[0]));
	CHECK(totals().removes == 0);
	let_go();
	CHECK(finish(&control->slot[0]) == 0);
	for (uint32_t i = 0; i < scene.pages; i += 7)
		CHECK(run(0, READ, BASE + i * PAGE, 0, 0) == 0);
	wait_served(0);
	for (uint32_t i = 0; i < scene.pages; i += 5)
		CHECK(run(0, READ, BASE + i * PAGE, 0, 0) == 0);
	tear_down();
}

/* Faults on what the helper is copying: each page comes once, from one of the two, and all are accounted for. */
static void test_faults_where_the_helper_is(void)
{
	struct scene scene = { .pages = 4096, .fill = LZ_FILL_FULL, .vmas = 1 };

	set_up(&scene);
	lz_engine_finish_restore(engine);
	for (uint32_t i = scene.pages / 2; i < scene.pages - 8; i++)
		CHECK(run(0, READ, BASE + i * PAGE, 0, 0) == word_at(BASE + i * PAGE));
	wait_served(0);
	check_pages(BASE, BASE, 0, scene.pages, scene.pages);
	CHECK(totals().left_pages == 0);
	CHECK(totals().fault_copied_pages + totals().fill_copied_pages + totals().present_pages >= scene.pages - 9);
	tear_down();
}

/* The process that serves is dead, and nothing was closed: go on from the arena. */
static void take_over(int expected)
{
	int status;

	CHECK(waitpid(server, &status, 0) == server);
	server = 0;
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	CHECK(lz_engine_is_finished(engine));
	CHECK(lz_engine_resume(engine) == expected);
	CHECK(!lz_engine_start(engine));
}

static void die_at(const char *name, uint64_t address)
{
	control->die_address = address;
	strcpy((char *)control->die_at, name);
}

/* Killed in the middle of a copy, before it or just after: the page comes, and every other. */
static void test_killed_at_copy(void)
{
	static const char *const points[] = { "before-copy", "after-copy" };

	for (int i = 0; i < 2; i++) {
		struct scene scene = { .pages = 64, .fill = LZ_FILL_OFF, .vmas = 1, .guarded = true };

		set_up(&scene);
		CHECK(run(0, READ, BASE + 9 * PAGE, 0, 0) == word_at(BASE + 9 * PAGE));
		die_at(points[i], BASE + 20 * PAGE);
		begin(&control->slot[0], READ, BASE + 20 * PAGE, 0, 0);
		take_over(1);
		CHECK(finish(&control->slot[0]) == word_at(BASE + 20 * PAGE));
		check_pages(BASE, BASE, 0, 64, 64);
		tear_down();
	}
}

/* Killed while the helper has pages of a VMA that the fill has passed: they are missing again, and come. */
static void test_killed_behind_the_helper(void)
{
	struct scene scene = { .pages = 4096, .fill = LZ_FILL_FULL, .vmas = 2, .guarded = true, .split = true };

	arm("helper-copy", 0); /* in the process that serves: its helper stays there */
	set_up(&scene);
	let_go();
	usleep(300000); /* long enough for the fill to come to where nothing is left but what the helper has */
	kill(server, SIGKILL);
	take_over((int)totals().serving); /* none where the worker was faster than any helper */
	wait_served(0);
	check_pages(BASE, BASE, 0, scene.pages, scene.pages);
	CHECK(totals().left_pages == 0);
	tear_down();
}

/* Killed with an event read and not kept, kept and not applied: it is not lost, and the task goes on. */
static void test_killed_at_event(void)
{
	static const char *const points[] = { "event-read", "event-kept" };

	for (int i = 0; i < 2; i++) {
		struct scene scene = { .pages = 64, .fill = LZ_FILL_OFF, .vmas = 1, .guarded = true };

		set_up(&scene);
		die_at(points[i], 0);
		begin(&control->slot[0], DROP, BASE + 8 * PAGE, 0, 4 * PAGE);
		take_over(1);
		CHECK(finish(&control->slot[0]) == 0);
		for (uint32_t page = 8; page < 12; page++)
			CHECK(run(0, READ, BASE + page * PAGE, 0, 0) == 0);
		check_pages(BASE, BASE, 12, 64, 64);
		tear_down();

		set_up(&scene);
		die_at(points[i], 0);
		begin(&control->slot[0], MOVE, BASE + 16 * PAGE, AWAY, 8 * PAGE);
		take_over(1);
		CHECK(finish(&control->slot[0]) == 0);
		for (uint32_t page = 0; page < 8; page++)
			CHECK(run(0, READ, AWAY + page * PAGE, 0, 0) == word_at(BASE + (16 + page) * PAGE));
		check_pages(BASE, BASE, 0, 16, 64);
		check_pages(BASE, BASE, 24, 64, 64);
		tear_down();

		set_up(&scene);
		die_at(points[i], 0);
		begin(&control->slot[0], FORK, 0, 0, 0);
		take_over(1);
		CHECK(finish(&control->slot[0]) == 0);
		for (uint32_t page = 0; page < 56; page++)
			CHECK(run_child(READ, BASE + page * PAGE, 0, 0) ==
			      (page == 3 ? 0 : word_at(BASE + page * PAGE)));
		check_pages(BASE, BASE, 0, 64, 64);
		tear_down();
	}
}

/* Killed while what is known of the task is being changed: the change is made once, by the next. */
static void test_killed_while_applying(void)
{
	static const char *const points[] = { "changing", "changed" };

	for (int i = 0; i < 2; i++) {
		struct scene scene = { .pages = 64, .fill = LZ_FILL_OFF, .vmas = 1, .guarded = true };

		set_up(&scene);
		die_at(points[i], 0);
		begin(&control->slot[0], MOVE, BASE + 16 * PAGE, AWAY, 8 * PAGE);
		take_over(1);
		CHECK(finish(&control->slot[0]) == 0);
		for (uint32_t page = 0; page < 8; page++)
			CHECK(run(0, READ, AWAY + page * PAGE, 0, 0) == word_at(BASE + (16 + page) * PAGE));
		check_pages(BASE, BASE, 0, 16, 64);
		check_pages(BASE, BASE, 24, 64, 64);
		tear_down();

		set_up(&scene);
		die_at("changed", 0);
		begin(&control->slot[0], FORK, 0, 0, 0);
		take_over(2);
		CHECK(finish(&control->slot[0]) == 0);
		for (uint32_t page = 0; page < 56; page++)
			CHECK(run_child(READ, BASE + page * PAGE, 0, 0) ==
			      (page == 3 ? 0 : word_at(BASE + page * PAGE)));
		check_pages(BASE, BASE, 0, 64, 64);
		CHECK(totals().tasks == 2);
		tear_down();
	}
}

/* Killed while a range is handed back: what is moved there meanwhile is still served. */
static void test_killed_at_hand_back(void)
{
	struct scene scene = { .pages = 64, .fill = LZ_FILL_OFF, .vmas = 2, .guarded = true };
	const uint64_t empty = BASE + (1 << 30);

	scene.fill = LZ_FILL_OFF;
	set_up(&scene);
	kill(server, SIGKILL);
	take_over(1);
	CHECK(run(0, MOVE, BASE + 16 * PAGE, empty, 8 * PAGE) == 0);
	for (uint32_t i = 0; i < 8; i++)
		CHECK(run(0, READ, empty + i * PAGE, 0, 0) == word_at(BASE + (16 + i) * PAGE));
	check_pages(BASE, BASE, 24, 64, 64);
	tear_down();
}

static void test_remote(void)
{
	struct lz_link_info link;
	struct scene scene = { .pages = 64, .fill = LZ_FILL_FULL, .vmas = 1, .remote = true };

	set_up(&scene);
	lz_engine_finish_restore(engine);
	check_pages(BASE, BASE, 0, 64, 64);
	wait_served(0);
	lz_engine_link(engine, &link);
	CHECK(link.bytes == 52 * PAGE && !link.error && !link.waiting);
	tear_down();
}

/* A fork while a page is on its way: both get it, and it is asked for once. */
static void test_remote_and_fork(void)
{
	struct lz_link_info link;
	struct scene scene = { .pages = 64, .fill = LZ_FILL_OFF, .vmas = 1, .remote = true };

	set_up(&scene);
	lz_engine_finish_restore(engine);
	arm("link-received", 0);
	begin(&control->slot[0], READ, BASE + 20 * PAGE, 0, 0);
	CHECK(reached());
	CHECK(run(1, FORK, 0, 0, 0) == 0);
	let_go();
	CHECK(finish(&control->slot[0]) == word_at(BASE + 20 * PAGE));
	CHECK(run_child(READ, BASE + 20 * PAGE, 0, 0) == word_at(BASE + 20 * PAGE));
	check_pages(BASE, BASE, 0, 64, 64);
	for (uint32_t page = 4; page < 56; page++)
		CHECK(run_child(READ, BASE + page * PAGE, 0, 0) == word_at(BASE + page * PAGE));
	lz_engine_link(engine, &link);
	CHECK(link.bytes == 52 * PAGE);
	tear_down();
}

/* What TCP says was read and written is what was, while more comes all the time, and when the other side has ended. */
static void test_tcp_moved(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), fd, pair[2];
	uint64_t received, sent, had = 0, gave = 0, received_base, sent_base;
	char bytes[4096] = { 0 };
	pid_t sender;

	CHECK(!bind(listener, (struct sockaddr *)&address, length) && !listen(listener, 1));
	CHECK(!getsockname(listener, (struct sockaddr *)&address, &length));
	fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(!connect(fd, (struct sockaddr *)&address, length));
	CHECK(!lz_tcp_moved(fd, &received_base, &sent_base));
	sender = fork();
	if (!sender) {
		int peer = accept(listener, NULL, NULL);

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (uint32_t i = 0; i < 40000; i++) { /* as many bytes come back as go, in pieces of all lengths */
			if (send(peer, bytes, 1 + i % 700, MSG_NOSIGNAL) < 0)
				_exit(1);
			while (recv(peer, bytes, sizeof(bytes), MSG_DONTWAIT) > 0)
				;
		}
		shutdown(peer, SHUT_WR);
		pause();
		_exit(0);
	}
	close(listener);
	for (uint32_t i = 0; had < 13985000; i++) {
		ssize_t got = recv(fd, bytes, 1 + i % 1500, 0), put = send(fd, bytes, 1 + i % 50, MSG_DONTWAIT);

		CHECK(got > 0);
		had += (uint64_t)got;
		gave += put > 0 ? (uint64_t)put : 0;
		CHECK(!lz_tcp_moved(fd, &received, &sent));
		CHECK(received - received_base == had && sent - sent_base == gave);
	}
	for (ssize_t got = 1; got > 0;) { /* the end is there, behind the bytes that are unread, and then it is read */
		struct pollfd end = { .fd = fd, .events = POLLRDHUP };

		CHECK(poll(&end, 1, 10000) == 1);
		CHECK(!lz_tcp_moved(fd, &received, &sent) && received - received_base == had);
		got = recv(fd, bytes, 1000, 0);
		had += got > 0 ? (uint64_t)got : 0;
	}
	CHECK(!lz_tcp_moved(fd, &received, &sent) && received - received_base == had);
	kill(sender, SIGKILL);
	CHECK(waitpid(sender, NULL, 0) == sender);
	CHECK(lz_tcp_moved(fd, &received, &sent) < 0 || received - received_base == had);
	close(fd);
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	CHECK(lz_tcp_moved(pair[0], &received, &sent) < 0);
	close(pair[0]);
	close(pair[1]);
}

static void *relink_main(void *fd)
{
	CHECK(!lz_engine_relink(engine, *(int *)fd, 24));
	return NULL;
}

/* The link is mended while bytes of the old connection are taken: they are not counted on the new one. */
static void test_relink_while_receiving(void)
{
	struct lz_link_info link;
	struct scene scene = { .pages = 64, .fill = LZ_FILL_OFF, .vmas = 1, .remote = true };
	pid_t before;
	pthread_t thread;
	int fd;

	set_up(&scene);
	lz_engine_finish_restore(engine);
	before = source;
	fd = start_source();
	arm("link-taken", 24);
	begin(&control->slot[0], READ, BASE + 20 * PAGE, 0, 0);
	CHECK(reached());
	lz_engine_link(engine, &link);
	CHECK(!shutdown(link.fd, SHUT_WR));
	begin(&control->slot[1], READ, BASE + 40 * PAGE, 0, 0); /* which cannot be asked for */
	for (uint32_t i = 0; i < 1000 && !link.error; i++) {
		usleep(1000);
		lz_engine_link(engine, &link);
	}
	CHECK(link.error == -EPIPE);
	CHECK(!pthread_create(&thread, NULL, relink_main, &fd));
	usleep(20000);
	let_go();
	CHECK(!pthread_join(thread, NULL));
	CHECK(finish(&control->slot[0]) == word_at(BASE + 20 * PAGE));
	CHECK(finish(&control->slot[1]) == word_at(BASE + 40 * PAGE));
	check_pages(BASE, BASE, 0, 64, 64);
	lz_engine_link(engine, &link);
	CHECK(!link.error && !link.in_flight && !link.waiting);
	kill(before, SIGKILL);
	CHECK(waitpid(before, NULL, 0) == before);
	tear_down();
}

/*
 * Killed between a system call on the link and the note of it, or between two notes: TCP knows what was done, every
 * page comes, and what had come is not asked for again.
 */
static void test_killed_at_link(void)
{
	static const char *const points[] = { "link-sent", "link-taken", "link-received" };

	for (uint32_t i = 0; i < 18; i++) {
		struct lz_link_info link;
		struct scene scene = { .pages = 64, .fill = LZ_FILL_OFF, .vmas = 1, .guarded = true, .remote = true };
		uint32_t page = 40;

		set_up(&scene);
		control->die_after = (int)i / 3 % (i % 3 ? 8 : 4); /* few requests ask for all there is */
		die_at(points[i % 3], 0);
		begin(&control->slot[0], READ, BASE + page * PAGE, 0, 0);
		for (uint32_t k = 0; k < 20 && control->die_at[0]; k++) {
			if (finished_within(&control->slot[0], 100) && control->die_at[0]) {
				CHECK(finish(&control->slot[0]) == word_at(BASE + page * PAGE));
				page = page == 40 ? 4 : page + 1;
				begin(&control->slot[0], READ, BASE + page * PAGE, 0, 0);
			}
		}
		take_over(1);
		CHECK(finish(&control->slot[0]) == word_at(BASE + page * PAGE));
		check_pages(BASE, BASE, 0, 64, 64);
		lz_engine_link(engine, &link);
		CHECK(!link.error && link.in_flight == 0 && link.waiting == 0);
		tear_down();
	}
}

/*
 * Killed in the middle of a receive that nobody counts for: the link is of no use then, and another one takes its
 * place. What was noted has come, and the rest is asked for again.
 */
static void test_killed_and_relinked(void)
{
	static const char *const points[] = { "link-sent", "link-taken", "link-received" };

	for (uint32_t i = 0; i < 12; i++) {
		struct scene scene = {
			.pages = 64, .fill = LZ_FILL_OFF, .vmas = 1, .guarded = true, .remote = true, .local = true
		};
		struct lz_link_info link;
		uint64_t touched = BASE + 4 * PAGE;
		pid_t before;
		int fd;

		set_up(&scene);
		before = source;
		control->die_after = (int)i / 3;
		die_at(points[i % 3], 0);
		begin(&control->slot[0], READ, touched, 0, 0);
		while (finished_within(&control->slot[0], 100) && control->die_at[0]) {
			CHECK(finish(&control->slot[0]) == word_at(touched));
			touched += PAGE;
			begin(&control->slot[0], READ, touched, 0, 0);
		}
		CHECK(!control->die_at[0]);
		take_over(1);
		lz_engine_link(engine, &link);
		if (link.error) {
			fd = start_local_source();
			CHECK(!lz_engine_relink(engine, fd, 24));
		}
		CHECK(finish(&control->slot[0]) == word_at(touched));
		check_pages(BASE, BASE, 0, 64, 64);
		lz_engine_link(engine, &link);
		CHECK(!link.error && link.in_flight == 0 && link.waiting == 0);
		if (before != source) {
			kill(before, SIGKILL);
			CHECK(waitpid(before, NULL, 0) == before);
		}
		tear_down();
	}
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} tests[] = {
#define TEST(name) { #name, name }
		TEST(test_on_demand),
		TEST(test_no_fill_before_finished),
		TEST(test_fresh_memory),
		TEST(test_copy_and_drop),
		TEST(test_copy_and_move),
		TEST(test_copy_and_unmap),
		TEST(test_copy_and_fork),
		TEST(test_drop_and_fork),
		TEST(test_shrink_grow_and_fork),
		TEST(test_fork_and_unmap_in_both),
		TEST(test_wiped_on_fork),
		TEST(test_kept_from_the_child),
		TEST(test_held_back_and_fork),
		TEST(test_hand_back),
		TEST(test_hand_back_and_move),
		TEST(test_source_cut),
		TEST(test_abandon),
		TEST(test_task_exits),
		TEST(test_fork_without_descriptors),
		TEST(test_helper_and_drop),
		TEST(test_faults_where_the_helper_is),
		TEST(test_killed_at_copy),
		TEST(test_killed_behind_the_helper),
		TEST(test_killed_at_event),
		TEST(test_killed_while_applying),
		TEST(test_killed_at_hand_back),
		TEST(test_remote),
		TEST(test_remote_and_fork),
		TEST(test_tcp_moved),
		TEST(test_relink_while_receiving),
		TEST(test_killed_at_link),
		TEST(test_killed_and_relinked),
	};
	int rounds = argc > 1 ? atoi(argv[1]) : 1;
	int through, uffd = lz_uffd_open(&through);

	if (uffd < 0) {
		fprintf(stderr, "skipped: no userfaultfd for this user: %s\n", strerror(-uffd));
		return 77;
	}
	close(uffd);
	for (int round = 0; round < rounds; round++) {
		for (size_t i = 0; i < sizeof(tests) / sizeof(tests[0]); i++) {
			if (argc > 2 && !strstr(tests[i].name, argv[2]))
				continue;
			if (rounds == 1)
				printf("%s\n", tests[i].name);
			fflush(stdout);
			tests[i].run();
		}
	}
	printf("engine: all well, %d round%s\n", rounds, rounds == 1 ? "" : "s");
	return 0;
}
