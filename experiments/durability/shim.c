/* Counts the calls that change the disk; at a chosen one it kills the process or fills the disk.

   cc -shared -fPIC -O1 -o shim.so shim.c -ldl; LD_PRELOAD=shim.so python ...; shim_arm by ctypes.
   Modes: 0 count; 1 die before call k; 2 die in the middle of it (half of the bytes of a write);
   3 from call k on, whatever needs space fails with ENOSPC. Streams 0 to 2 are left alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int armed, mode;
static long calls, point;

void shim_arm(int new_mode, long new_point) {
    mode = new_mode, point = new_point, calls = 0, armed = 1;
}
long shim_disarm(void) {
    armed = 0;
    return calls;
}

enum verdict { GO, HALF, FULL };

static enum verdict count(int needs_space) {
    if (!armed) return GO;
    calls++;
    if (mode == 1 && calls == point) _exit(137);
    if (mode == 2 && calls == point) return HALF;
    if (mode == 3 && calls >= point && needs_space) {
        errno = ENOSPC;
        return FULL;
    }
    return GO;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* A call of one effect: before it, after it. */
#define WHOLE(name, needs_space, ...) \
    REAL(name); \
    enum verdict verdict = count(needs_space); \
    if (verdict == FULL) return -1; \
    if (verdict == HALF) { real(__VA_ARGS__); _exit(137); } \
    return real(__VA_ARGS__)

static int changes(int flags) { return flags & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC); }

#define OPEN(name, ...) \
    mode_t rights = 0; \
    if (flags & O_CREAT) { \
        va_list list; \
        va_start(list, flags); \
        rights = va_arg(list, mode_t); \
        va_end(list); \
    } \
    REAL(name); \
    if (!changes(flags)) return real(__VA_ARGS__, flags, rights); \
    enum verdict verdict = count(flags & O_CREAT); \
    if (verdict == FULL) return -1; \
    if (verdict == HALF) { real(__VA_ARGS__, flags, rights); _exit(137); } \
    return real(__VA_ARGS__, flags, rights)

int open(const char *path, int flags, ...) { OPEN(open, path); }
int open64(const char *path, int flags, ...) { OPEN(open64, path); }
int openat(int at, const char *path, int flags, ...) { OPEN(openat, at, path); }
int openat64(int at, const char *path, int flags, ...) { OPEN(openat64, at, path); }

#define FOPEN(name) \
    REAL(name); \
    if (!strpbrk(how, "wa+")) return real(path, how); \
    enum verdict verdict = count(1); \
    if (verdict == FULL) return NULL; \
    if (verdict == HALF) { real(path, how); _exit(137); } \
    return real(path, how)

FILE *fopen(const char *path, const char *how) { FOPEN(fopen); }
FILE *fopen64(const char *path, const char *how) { FOPEN(fopen64); }

#define WRITE(name, half, ...) \
    REAL(name); \
    if (file <= 2) return real(__VA_ARGS__); \
    enum verdict verdict = count(1); \
    if (verdict == FULL) return -1; \
    if (verdict == HALF) { half; _exit(137); } \
    return real(__VA_ARGS__)

ssize_t write(int file, const void *bytes, size_t size) {
    WRITE(write, real(file, bytes, size / 2), file, bytes, size);
}
ssize_t pwrite(int file, const void *bytes, size_t size, off_t at) {
    WRITE(pwrite, real(file, bytes, size / 2, at), file, bytes, size, at);
}
ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t at) {
    WRITE(pwrite64, real(file, bytes, size / 2, at), file, bytes, size, at);
}
ssize_t writev(int file, const struct iovec *parts, int n) {
    WRITE(writev, real(file, parts, n / 2), file, parts, n);
}

int fsync(int file) { WHOLE(fsync, 0, file); }
int fdatasync(int file) { WHOLE(fdatasync, 0, file); }
int ftruncate(int file, off_t size) { WHOLE(ftruncate, 1, file, size); }
int ftruncate64(int file, off64_t size) { WHOLE(ftruncate64, 1, file, size); }
int truncate(const char *path, off_t size) { WHOLE(truncate, 0, path, size); }
int rename(const char *old, const char *new) { WHOLE(rename, 0, old, new); }
int renameat(int a, const char *old, int b, const char *new) { WHOLE(renameat, 0, a, old, b, new); }
int mkdir(const char *path, mode_t rights) { WHOLE(mkdir, 1, path, rights); }
int mkdirat(int at, const char *path, mode_t rights) { WHOLE(mkdirat, 1, at, path, rights); }
int unlink(const char *path) { WHOLE(unlink, 0, path); }
int unlinkat(int at, const char *path, int flags) { WHOLE(unlinkat, 0, at, path, flags); }
int rmdir(const char *path) { WHOLE(rmdir, 0, path); }
