/* SPDX-License-Identifier: MIT */
/*
 * A program to stop, look into and let go: steady DIR KIND...
 *
 * Each KIND is a thread that does one thing for ever and notices when anything is not as it should be; the first runs
 * in the main thread. It creates DIR/ready, goes on until DIR/go is there, and writes one line to DIR/result: "ok", or
 * what was wrong. No call may come back with EINTR: no thread but `handler` ever gets a signal.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "registers.h"

static char dir[1024];
static atomic_int wrong;

static void path_of(char *out, size_t size, const char *name)
{
	snprintf(out, size, "%s/%s", dir, name);
}

static void say(const char *line)
{
	char path[1200];
	path_of(path, sizeof(path), "result");
	int fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
	if (fd < 0 || write(fd, line, strlen(line)) < 0)
		_exit(4);
	close(fd);
}

__attribute__((format(printf, 1, 2))) static void bad(const char *format, ...)
{
	char text[400];
	va_list args;
	va_start(args, format);
	vsnprintf(text, sizeof(text) - 1, format, args);
	va_end(args);
	strcat(text, "\n");
	if (!atomic_exchange(&wrong, 1))
		say(text);
	__atomic_store_n(&registers_stop, 1, __ATOMIC_RELAXED);
}

static pthread_barrier_t all_begun;

/* What a thread sets up it has set up: from here on the task's descriptors and handlers are what they stay. */
static void begun(void)
{
	pthread_barrier_wait(&all_begun);
}

static bool stopped(void)
{
	return __atomic_load_n(&registers_stop, __ATOMIC_RELAXED) != 0;
}

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000U + (uint64_t)t.tv_nsec;
}

static void do_registers(void)
{
	begun();
	uint64_t number = registers_hold(registers_has_avx());
	if (number)
		bad("register %lu changed", number);
}

static void do_memory(void)
{
	/* Every page of its own is as it was, while it is written to. */
	enum { WORDS = 1 << 16 };
	uint64_t *words = mmap(NULL, WORDS * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	begun();
	for (uint64_t round = 1; !stopped(); round++) {
		for (size_t i = 0; i < WORDS; i++)
			words[i] = round * i;
		for (size_t i = 0; i < WORDS; i++)
			if (words[i] != round * i)
				bad("word %zu changed", i);
	}
}

static void do_calls(void)
{
	pid_t pid = getpid();
	begun();
	while (!stopped())
		if (syscall(SYS_getpid) != pid)
			bad("getpid: not %d", pid);
}

static void do_nanosleep(void)
{
	begun();
	while (!stopped()) {
		struct timespec t = { 0, 30000000 };
		uint64_t start = now();
		if (syscall(SYS_nanosleep, &t, &t))
			bad("nanosleep: %s", strerror(errno));
		if (now() - start < 30000000)
			bad("nanosleep: came back after %lu ns", now() - start);
	}
}

static void do_poll(void)
{
	begun();
	while (!stopped()) {
		uint64_t start = now();
		if (syscall(SYS_poll, NULL, 0, 30))
			bad("poll: %s", strerror(errno));
		if (now() - start < 29000000)
			bad("poll: came back after %lu ns", now() - start);
	}
}

static void do_ppoll(void)
{
	begun();
	while (!stopped()) {
		struct timespec t = { 0, 20000000 };
		sigset_t mask;
		sigfillset(&mask);
		if (syscall(SYS_ppoll, NULL, 0, &t, &mask, 8))
			bad("ppoll: %s", strerror(errno));
	}
}

static void do_futex(void)
{
	uint32_t word = 0;
	begun();
	while (!stopped()) {
		struct timespec t = { 0, 30000000 };
		if (!syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &t) || errno != ETIMEDOUT)
			bad("futex: %s", strerror(errno));
	}
}

static void do_read(void)
{
	int pipes[2];
	char byte = 'x';
	if (pipe(pipes))
		bad("pipe: %s", strerror(errno));
	if (!fork()) {
		/* A child, because a thread would be stopped too. */
		for (;;) {
			usleep(15000);
			if (write(pipes[1], &byte, 1) != 1 || getppid() == 1)
				_exit(0);
		}
	}
	begun();
	while (!stopped())
		if (read(pipes[0], &byte, 1) != 1)
			bad("read: %s", strerror(errno));
	close(pipes[0]);
}

static atomic_ulong handled;

static void on_signal(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	if (info->si_code != SI_TIMER && info->si_code != SI_TKILL)
		bad("a signal from nowhere: code %d", info->si_code);
	atomic_fetch_add(&handled, 1);
}

static timer_t start_timer(int number, long period)
{
	timer_t timer;
	struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = number };
	event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
	struct itimerspec times = { { 0, period }, { 0, period } };
	if (timer_create(CLOCK_MONOTONIC, &event, &timer) || timer_settime(timer, 0, &times, NULL))
		bad("timer: %s", strerror(errno));
	return timer;
}

static void handle(int number, sigset_t *others)
{
	struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO };
	sigfillset(&action.sa_mask);
	sigaction(number, &action, NULL);
	sigfillset(others);
	sigdelset(others, number);
}

static void do_handler(void)
{
	/* Signals come all the time, while it computes. */
	sigset_t mask;
	handle(SIGUSR1, &mask);
	pthread_sigmask(SIG_SETMASK, &mask, NULL);
	start_timer(SIGUSR1, 1000000);
	begun();
	for (uint64_t x = 1, y = 1; !stopped(); x = x * 6364136223846793005U + 1, y = y * 6364136223846793005U + 1)
		if (x != y)
			bad("the handler harmed who it interrupted");
}

static void do_sigsuspend(void)
{
	/* Each sigsuspend ends by the signal that only it lets through; a lost one would leave it there. */
	sigset_t mask;
	handle(SIGUSR2, &mask);
	timer_t timer = start_timer(SIGUSR2, 10000000);
	begun();
	while (!stopped()) {
		sigset_t now_blocked;
		unsigned long before = atomic_load(&handled);
		if (sigsuspend(&mask) != -1 || errno != EINTR)
			bad("sigsuspend: %s", strerror(errno));
		if (atomic_load(&handled) == before)
			bad("sigsuspend came back without its signal");
		pthread_sigmask(SIG_SETMASK, NULL, &now_blocked);
		if (!sigismember(&now_blocked, SIGUSR2))
			bad("the mask is not the one from before sigsuspend");
	}
	timer_delete(timer);
}

static void do_pending(void)
{
	/* What waits for it stays there, in order. */
	for (int i = 0; i < 5; i++) {
		siginfo_t info = { .si_code = SI_QUEUE };
		info.si_value.sival_int = i;
		syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), SIGRTMIN + 3, &info);
	}
	begun();
	while (!stopped())
		usleep(1000);
	sigset_t one;
	sigemptyset(&one);
	sigaddset(&one, SIGRTMIN + 3);
	for (int i = 0; i < 5; i++) {
		siginfo_t info;
		struct timespec zero = { 0, 0 };
		if (sigtimedwait(&one, &info, &zero) < 0 || info.si_value.sival_int != i)
			bad("signal %d of 5 is not there", i);
	}
}

/* 4 MiB that stand empty until DIR/served is there. From then on each word of the first half is its own address. */
#define LAZY_BASE 0x200000000000UL
#define LAZY_WORDS (1UL << 19)

static void do_lazy(void)
{
	char served[1200];
	path_of(served, sizeof(served), "served");
	uint64_t *words = mmap((void *)LAZY_BASE, LAZY_WORDS * 8, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	if (words != (void *)LAZY_BASE)
		bad("lazy: %s", strerror(errno));
	begun();
	while (access(served, F_OK) && !stopped())
		usleep(1000);
	while (!stopped()) {
		for (size_t i = 0; i < LAZY_WORDS; i += 64) {
			uint64_t expected = i < LAZY_WORDS / 2 ? (uint64_t)(words + i) : 0;
			if (words[i] != expected)
				bad("word %zu is %lx, not %lx", i, words[i], expected);
		}
		usleep(1000);
	}
}

static const struct {
	const char *name;
	void (*run)(void);
} kinds[] = {
	{ "registers", do_registers },   { "memory", do_memory },   { "calls", do_calls },
	{ "nanosleep", do_nanosleep },   { "poll", do_poll },       { "ppoll", do_ppoll },
	{ "futex", do_futex },           { "read", do_read },       { "handler", do_handler },
	{ "sigsuspend", do_sigsuspend }, { "pending", do_pending }, { "lazy", do_lazy },
};

static void (*find(const char *name))(void)
{
	for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
		if (!strcmp(kinds[i].name, name))
			return kinds[i].run;
	fprintf(stderr, "steady: no kind %s\n", name);
	exit(2);
}

static void *run(void *kind)
{
	((void (*)(void))kind)();
	return NULL;
}

static void *watch(void *nothing)
{
	char ready[1200], go[1200];
	path_of(ready, sizeof(ready), "ready");
	path_of(go, sizeof(go), "go");
	begun();
	if (mknod(ready, S_IFREG | 0644, 0)) /* without a descriptor, that is */
		_exit(4);
	while (access(go, F_OK))
		usleep(2000);
	__atomic_store_n(&registers_stop, 1, __ATOMIC_RELAXED);
	return nothing;
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	snprintf(dir, sizeof(dir), "%s", argv[1]);
	for (int fd = 3; fd < 256; fd++)
		close(fd);
	pthread_t threads[512];
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, NULL);
	int count = 0;
	pthread_barrier_init(&all_begun, NULL, (unsigned)argc - 1); /* a KIND each, and who watches */
	for (int i = 3; i < argc && count < 500; i++)
		pthread_create(&threads[count++], NULL, run, (void *)find(argv[i]));
	pthread_create(&threads[count++], NULL, watch, NULL);
	find(argv[2])();
	for (int i = 0; i < count; i++)
		pthread_join(threads[i], NULL);
	if (!atomic_load(&wrong))
		say("ok\n");
	return atomic_load(&wrong);
}
