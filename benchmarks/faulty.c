// Fails the nth operation in a folder with an error number, or all from the nth on. Counts them in a file's first bytes.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static long nth;
static int number, stays;
static volatile long *count;

void arm_faults(const char *where, const char *counter, long which, int error, int for_good) {
    int fd = open(counter, O_RDWR);
    count = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    nth = which, number = error, stays = for_good;
    strncpy(folder, where, sizeof folder - 1);
}
static int fails(const char *path) {
    if (!folder[0] || strncmp(path, folder, strlen(folder))) return 0;
    long now = __sync_add_and_fetch(count, 1);
    if (!(stays ? now >= nth : now == nth)) return 0;
    errno = number;
    return 1;
}
static int fails_for(int fd) {
    char link[64], path[4096];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(path);
}
#define REAL(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define ON_FD(type, name, declared, ...) \
    type name(int fd, declared) { REAL(name); return fails_for(fd) ? -1 : real(fd, __VA_ARGS__); }
#define AND ,
ON_FD(ssize_t, write, const void *data AND size_t size, data, size)
ON_FD(ssize_t, writev, const struct iovec *data AND int size, data, size)
ON_FD(ssize_t, pwrite, const void *data AND size_t size AND off_t at, data, size, at)
ON_FD(ssize_t, pwrite64, const void *data AND size_t size AND off64_t at, data, size, at)
ON_FD(int, ftruncate, off_t size, size)
ON_FD(int, ftruncate64, off64_t size, size)
int fsync(int fd) { REAL(fsync); return fails_for(fd) ? -1 : real(fd); }
int rename(const char *from, const char *to) { REAL(rename); return fails(to) ? -1 : real(from, to); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return fails(path) ? -1 : real(path, mode); }
#define OPENS(name, first, ...) \
    int name(first const char *path, int flags, ...) { \
        REAL(name); va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        return (flags & (O_CREAT | O_TRUNC)) && fails(path) ? -1 : real(__VA_ARGS__ path, flags, mode); }
#define NONE
OPENS(open, NONE)
OPENS(open64, NONE)
int openat(int at, const char *path, int flags, ...) {
    REAL(openat); va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more);
    return (flags & (O_CREAT | O_TRUNC)) && fails(path) ? -1 : real(at, path, flags, mode); }
