/* To preload: one fsync or fdatasync fails with EIO when the file named by FAIL_ONE_SYNC exists, and that file is removed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static int fails(void)
{
	const char *file = getenv("FAIL_ONE_SYNC");
	if (!file || unlink(file))
		return 0;
	errno = EIO;
	return 1;
}

int fdatasync(int fd)
{
	int (*real)(int) = dlsym(RTLD_NEXT, "fdatasync");
	return fails() ? -1 : real(fd);
}

int fsync(int fd)
{
	int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
	return fails() ? -1 : real(fd);
}
