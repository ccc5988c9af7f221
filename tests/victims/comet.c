// SPDX-License-Identifier: MIT
// A program that is never the same process for long: comet STATE
//
// Its child makes a child and ends, and so does that, again and again. Each adds a byte to STATE/trail-N, where N is
// its network namespace: so it is seen where one runs.

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static void leave_a_trail(const char *state)
{
	struct stat here;
	char name[4096];
	if (stat("/proc/self/ns/net", &here))
		exit(1);
	snprintf(name, sizeof(name), "%s/trail-%lu", state, (unsigned long)here.st_ino);
	int file = open(name, O_WRONLY | O_CREAT | O_APPEND, 0644);
	if (file < 0 || write(file, ".", 1) != 1)
		exit(1);
	close(file);
}

int main(int count, char **words)
{
	char name[4096];
	if (count != 2)
		return 2;
	if (!fork()) {
		for (;;) {
			if (fork())
				_exit(0);
			leave_a_trail(words[1]);
			usleep(200);
		}
	}
	snprintf(name, sizeof(name), "%s/ready", words[1]);
	close(open(name, O_WRONLY | O_CREAT, 0644));
	for (;;) { // it is the init of its namespace: what is left comes to it
		if (waitpid(-1, NULL, 0) < 0)
			pause();
	}
}
