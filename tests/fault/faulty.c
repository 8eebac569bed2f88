/* Preloaded, it counts the calls that change files under one directory and spoils one of them.
   inject.py arms it in forked children: kind 0 only counts. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { COUNT, NO_SPACE, IO_ERROR, SHORT, TORN, CRASH_BEFORE, CRASH_AFTER };

static char directory[PATH_MAX];
static int kind, target, seen, journal = -1;

/* From here on, the `which`th call (from 1) is spoilt; each is told to the descriptor `log`. */
void arm(const char *path, int which, int how, int log)
{
    strncpy(directory, path, sizeof directory - 1);
    target = which, kind = how, seen = 0, journal = log;
}

static int here(const char *path)
{
    return directory[0] && path && !strncmp(path, directory, strlen(directory));
}

static int here_fd(int fd)
{
    char link[64], path[PATH_MAX] = "";
    if (!directory[0] || fd < 0 || fd == journal)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return readlink(link, path, sizeof path - 1) > 0 && here(path);
}

/* What is to be done to this call: 0, or a kind. */
static int spoil(const char *name)
{
    int how = ++seen == target ? kind : COUNT;
    if (journal >= 0)
        dprintf(journal, "%s\n", name);
    if (how == CRASH_BEFORE)
        _exit(99);
    if (how == NO_SPACE || how == IO_ERROR)
        errno = how == NO_SPACE ? ENOSPC : EIO;
    return how;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CALL(matches, name, call)                     \
    do {                                              \
        int how = (matches) ? spoil(name) : COUNT;    \
        if (how == NO_SPACE || how == IO_ERROR)       \
            return -1;                                \
        __typeof__(call) result = call;               \
        if (how == CRASH_AFTER)                       \
            _exit(99);                                \
        return result;                                \
    } while (0)

ssize_t write(int fd, const void *data, size_t size)
{
    static __typeof__(&write) real;
    if (!real)
        real = REAL(write);
    int how = here_fd(fd) ? spoil("write") : COUNT;
    if (how == NO_SPACE || how == IO_ERROR)
        return -1;
    if (how == SHORT || how == TORN) {
        ssize_t part = real(fd, data, size / 2 ? size / 2 : size);
        target += how == TORN, kind = how == TORN ? NO_SPACE : COUNT; /* and the rest fails */
        return part;
    }
    ssize_t result = real(fd, data, how == CRASH_AFTER && size > 1 ? size / 2 : size);
    if (how == CRASH_AFTER)
        _exit(99);
    return result;
}

#define OPEN(function)                                                             \
    int function(const char *path, int flags, ...)                                 \
    {                                                                              \
        va_list rest;                                                              \
        va_start(rest, flags);                                                     \
        mode_t mode = va_arg(rest, mode_t);                                        \
        va_end(rest);                                                              \
        CALL(here(path) && (flags & (O_CREAT | O_WRONLY | O_RDWR)), "open",        \
             REAL(function)(path, flags, mode));                                   \
    }
OPEN(open)
OPEN(open64)

int fsync(int fd) { CALL(here_fd(fd), "fsync", REAL(fsync)(fd)); }
int rename(const char *from, const char *to) { CALL(here(to), "rename", REAL(rename)(from, to)); }
int mkdir(const char *path, mode_t mode) { CALL(here(path), "mkdir", REAL(mkdir)(path, mode)); }
int ftruncate64(int fd, off64_t size)
{
    CALL(here_fd(fd), "ftruncate", REAL(ftruncate64)(fd, size));
}
