/* SPDX-License-Identifier: MIT */
/*
 * A link with a delay: relay LISTEN_ADDRESS LISTEN_PORT TO_ADDRESS TO_PORT DELAY_US
 *
 * Accepts connections, makes one to TO for each, and holds every byte back for DELAY_US in either direction. What is in
 * flight is not limited: bytes wait in pipes, of which there are as many as it takes, and they get there and away by
 * splice, so that they are not copied. It prints the port that it listens at; it ends with its parent.
 *
 * An end of input comes out as an end of input, and a reset as a reset, after the same delay.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
	RING = 1 << 16, /* moments in flight: each is at least MERGE_NS after the one before */
	PIPES = 2048,
	PIPE_BYTES = 1 << 20,
	MERGE_NS = 20000, /* what comes within this is let go together */
	AT_ONCE = 1 << 20,
};

enum what { BYTES, END, RESET };

struct moment {
	int64_t due;
	size_t bytes;
	int pipe;
	enum what what;
};

/* One direction. Moments and pipes are first in, first out. */
struct direction {
	int in, out;
	int64_t delay;
	struct moment ring[RING];
	size_t head, tail;
	int pipes[PIPES][2];
	size_t held[PIPES];
	int free_pipes[PIPES], free_count, pipe_count;
	int filling;
	bool at_end, is_blocked;
};

static struct sockaddr_in target;
static int64_t delay_ns;

static int64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void die(const char *what)
{
	fprintf(stderr, "relay: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* A disconnect of an established connection sends a reset; the descriptor stays, for the other direction's thread. */
static void reset(int fd)
{
	struct sockaddr nobody = { .sa_family = AF_UNSPEC };
	connect(fd, &nobody, sizeof(nobody));
}

static int take_pipe(struct direction *d)
{
	if (d->free_count)
		return d->free_pipes[--d->free_count];
	if (d->pipe_count == PIPES)
		die("more in flight than it has pipes for");
	if (pipe2(d->pipes[d->pipe_count], O_NONBLOCK | O_CLOEXEC))
		die("pipe2");
	fcntl(d->pipes[d->pipe_count][1], F_SETPIPE_SZ, PIPE_BYTES);
	return d->pipe_count++;
}

static void note(struct direction *d, enum what what, size_t bytes)
{
	int64_t due = now_ns() + d->delay;
	if (d->head != d->tail && what == BYTES) {
		struct moment *last = &d->ring[(d->tail - 1) % RING];
		if (last->what == BYTES && last->pipe == d->filling && due - last->due < MERGE_NS) {
			last->bytes += bytes;
			return;
		}
	}
	if (d->tail - d->head == RING)
		die("more moments in flight than it can hold");
	d->ring[d->tail++ % RING] = (struct moment){ due, bytes, d->filling, what };
}

/* Returns whether there may be more. */
static bool take_in(struct direction *d)
{
	char probe;
	unsigned flags = SPLICE_F_MOVE | SPLICE_F_NONBLOCK;
	ssize_t n = splice(d->in, NULL, d->pipes[d->filling][1], NULL, AT_ONCE, flags);
	if (n > 0) {
		d->held[d->filling] += (size_t)n;
		note(d, BYTES, (size_t)n);
		return true;
	}
	if (n == 0) {
		d->at_end = true;
		note(d, END, 0);
		return false;
	}
	if (errno != EAGAIN && errno != EINTR) {
		d->at_end = true;
		note(d, RESET, 0);
		return false;
	}
	/* Is nothing there, or is the pipe full? */
	if (recv(d->in, &probe, 1, MSG_PEEK | MSG_DONTWAIT) <= 0 || d->held[d->filling] == 0)
		return false;
	d->filling = take_pipe(d);
	return true;
}

/* Returns false once the direction is over. */
static bool let_out(struct direction *d)
{
	d->is_blocked = false;
	while (d->head != d->tail) {
		struct moment *m = &d->ring[d->head % RING];
		if (m->due > now_ns())
			return true;
		if (m->what == END) {
			shutdown(d->out, SHUT_WR);
			return false;
		}
		if (m->what == RESET) {
			reset(d->out);
			return false;
		}
		ssize_t n =
			splice(d->pipes[m->pipe][0], NULL, d->out, NULL, m->bytes, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
		if (n < 0 && errno == EAGAIN) {
			d->is_blocked = true;
			return true;
		}
		if (n <= 0) {
			reset(d->in); /* nobody takes them any more */
			return false;
		}
		m->bytes -= (size_t)n;
		d->held[m->pipe] -= (size_t)n;
		if (m->bytes)
			continue;
		if (!d->held[m->pipe] && m->pipe != d->filling)
			d->free_pipes[d->free_count++] = m->pipe;
		d->head++;
	}
	return true;
}

static void *run(void *argument)
{
	struct direction *d = argument;
	prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
	d->filling = take_pipe(d);
	while (let_out(d)) {
		bool more = !d->at_end && take_in(d);
		if (more)
			continue;
		struct timespec wait = { 0, 0 }, *limit = NULL;
		if (d->head != d->tail && !d->is_blocked) {
			int64_t left = d->ring[d->head % RING].due - now_ns();
			if (left <= 0)
				continue;
			wait.tv_sec = left / 1000000000;
			wait.tv_nsec = left % 1000000000;
			limit = &wait;
		}
		struct pollfd fds[2] = { { d->at_end ? -1 : d->in, POLLIN, 0 },
					 { d->is_blocked ? d->out : -1, POLLOUT, 0 } };
		ppoll(fds, 2, limit, NULL);
	}
	for (int i = 0; i < d->pipe_count; i++) {
		close(d->pipes[i][0]);
		close(d->pipes[i][1]);
	}
	return NULL;
}

static struct direction *direction(int in, int out)
{
	struct direction *d = calloc(1, sizeof(*d));
	if (!d)
		die("calloc");
	d->in = in;
	d->out = out;
	d->delay = delay_ns;
	return d;
}

struct ends {
	int client, server;
};

static void *serve(void *argument)
{
	struct ends *ends = argument;
	int client = ends->client, server = ends->server, one = 1;
	free(ends);
	if (server < 0) {
		reset(client);
	} else {
		pthread_t thread;
		struct direction *to = direction(client, server), *from = direction(server, client);
		setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		fcntl(client, F_SETFL, O_NONBLOCK);
		fcntl(server, F_SETFL, O_NONBLOCK);
		if (pthread_create(&thread, NULL, run, to))
			die("pthread_create");
		run(from);
		pthread_join(thread, NULL);
		free(to);
		free(from);
	}
	close(client);
	if (server >= 0)
		close(server);
	return NULL;
}

static struct sockaddr_in address(const char *host, const char *port)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port)) };
	if (inet_pton(AF_INET, host, &to.sin_addr) != 1)
		die(host);
	return to;
}

int main(int argc, char **argv)
{
	if (argc != 6)
		return 2;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGPIPE, SIG_IGN);
	struct rlimit files;
	getrlimit(RLIMIT_NOFILE, &files);
	files.rlim_cur = files.rlim_max;
	setrlimit(RLIMIT_NOFILE, &files);
	target = address(argv[3], argv[4]);
	delay_ns = atol(argv[5]) * 1000;
	struct sockaddr_in here = address(argv[1], argv[2]);
	socklen_t length = sizeof(here);
	int one = 1, listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(listening, (struct sockaddr *)&here, sizeof(here)) || listen(listening, 16))
		die("listen");
	getsockname(listening, (struct sockaddr *)&here, &length);
	printf("%d\n", ntohs(here.sin_port));
	fflush(stdout);
	for (;;) {
		pthread_t thread;
		int client = accept4(listening, NULL, NULL, SOCK_CLOEXEC);
		if (client < 0)
			continue;
		struct ends *ends = malloc(sizeof(*ends));
		if (!ends)
			die("malloc");
		/* Here, one after the other: to the target they come in the order in which they came. */
		*ends = (struct ends){ client, socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0) };
		if (connect(ends->server, (struct sockaddr *)&target, sizeof(target))) {
			close(ends->server);
			ends->server = -1;
		}
		if (pthread_create(&thread, NULL, serve, ends))
			die("pthread_create");
		pthread_detach(thread);
	}
}
