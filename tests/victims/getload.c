/* SPDX-License-Identifier: MIT */
/*
 * A load of redis GETs: getload SOCKET KEYS REQUESTS SIZE
 *
 * Asks for keys key:0 ... key:KEYS-1 in random order, DEPTH requests in flight on one connection, and prints the
 * seconds until the first answer and until the last, both from its start. Connecting is retried while nobody listens.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { DEPTH = 16 };

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int dial(const char *path)
{
	struct sockaddr_un to = { .sun_family = AF_UNIX };
	snprintf(to.sun_path, sizeof(to.sun_path), "%s", path);
	for (int attempt = 0; attempt < 100000; attempt++) {
		int fd = socket(AF_UNIX, SOCK_STREAM, 0);
		if (connect(fd, (struct sockaddr *)&to, sizeof(to)) == 0)
			return fd;
		close(fd);
		usleep(200);
	}
	exit(3);
}

int main(int argc, char **argv)
{
	if (argc != 5)
		return 2;
	double begin = now(), first = 0;
	uint64_t keys = (uint64_t)atol(argv[2]), state = 88172645463325252ULL;
	long requests = atol(argv[3]), size = atol(argv[4]), sent = 0, answered = 0;
	int fd = dial(argv[1]), head;
	char header[32];
	head = snprintf(header, sizeof(header), "$%ld\r\n", size);
	size_t answer = (size_t)head + (size_t)size + 2, held = 0, room = 4 * DEPTH * answer;
	char *input = malloc(room);
	while (answered < requests) {
		char output[DEPTH * 64];
		size_t length = 0;
		while (sent < requests && sent - answered < DEPTH) {
			char key[32];
			state ^= state << 13;
			state ^= state >> 7;
			state ^= state << 17;
			int n = snprintf(key, sizeof(key), "key:%lu", state % keys);
			length += (size_t)sprintf(output + length, "*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n", n, key);
			sent++;
		}
		for (size_t at = 0; at < length;) {
			ssize_t n = write(fd, output + at, length - at);
			if (n <= 0)
				return 4;
			at += (size_t)n;
		}
		ssize_t n = read(fd, input + held, room - held);
		if (n <= 0)
			return 4;
		held += (size_t)n;
		size_t at = 0;
		for (; held - at >= answer; at += answer) {
			if (memcmp(input + at, header, (size_t)head) != 0) {
				fprintf(stderr, "getload: not a value of %ld bytes: %.40s\n", size, input + at);
				return 5;
			}
			if (answered++ == 0)
				first = now() - begin;
		}
		memmove(input, input + at, held - at);
		held -= at;
	}
	printf("{\"first\": %.6f, \"seconds\": %.6f}\n", first, now() - begin);
	return 0;
}
