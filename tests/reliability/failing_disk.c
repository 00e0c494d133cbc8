// A disk that fails: preloaded, it makes the call of a given number fail, or all writing beyond a number of bytes.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <stdarg.h>
#include <sys/types.h>
#include <unistd.h>

static long calls = -1, fail_at = -1, room = -1;
static int with;

// From now on, the call `at` fails with the error `error` (0 counts only); there is room for `bytes` bytes (-1: enough).
void disk_fails(long at, int error, long bytes) { calls = 0, fail_at = at, with = error, room = bytes; }
long disk_calls(void) { return calls; }
long disk_room(void) { return room; }

static int fails(void) {
    if (calls < 0 || ++calls != fail_at) return 0;
    errno = with;
    return 1;
}

static int is_full(size_t *size) {
    if (calls < 0 || room < 0) return 0;
    if (room == 0) return errno = ENOSPC, 1;
    if (*size > (size_t)room) *size = room;  // a short write, then none
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAILING(name, parameters, ...) \
    int name parameters { return fails() ? -1 : REAL(name)(__VA_ARGS__); }

FAILING(fsync, (int file), file)
FAILING(ftruncate64, (int file, off64_t size), file, size)
FAILING(mkdir, (const char *path, mode_t mode), path, mode)
FAILING(rename, (const char *from, const char *to), from, to)
FAILING(renameat2, (int a, const char *from, int b, const char *to, unsigned flags), a, from, b, to, flags)
FAILING(unlink, (const char *path), path)
FAILING(unlinkat, (int at, const char *path, int flags), at, path, flags)
FAILING(rmdir, (const char *path), path)

ssize_t write(int file, const void *data, size_t size) {
    if (fails() || is_full(&size)) return -1;
    ssize_t done = REAL(write)(file, data, size);
    if (calls >= 0 && room > 0 && done > 0) room -= done;
    return done;
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    if (fails() || is_full(&size)) return -1;
    ssize_t done = REAL(pwrite64)(file, data, size, at);
    if (calls >= 0 && room > 0 && done > 0) room -= done;
    return done;
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    return (flags & O_CREAT) && fails() ? -1 : REAL(open64)(path, flags, mode);
}
