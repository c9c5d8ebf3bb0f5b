/* load.c: a lean NBD client for one run of equal requests.

   load SOCKET OP PATTERN BLOCK_LEN DEPTH START LEN [RUN_MAX]

   OP is write, read, zero, nohole (WRITE_ZEROES without and with NO_HOLE), trim or none. The requests cover LEN
   bytes from START once, in order (seq) or in an order that jumps (rand), DEPTH of them in flight, at most
   RUN_MAX of them; then comes a FLUSH.  Prints the requests, the seconds until the last answer, and the
   seconds that the FLUSH took on top.  Any error ends it with a message. */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { READ = 0, WRITE = 1, FLUSH = 3, TRIM = 4, WRITE_ZEROES = 6, NO_HOLE = 2 };

struct __attribute__((packed)) request {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t len;
};

static int sock;

static void die(const char *what) {
    fprintf(stderr, "load: %s (%s)\n", what, strerror(errno));
    exit(1);
}

static void get(void *to, size_t len) {
    for (char *at = to; len > 0;) {
        ssize_t got = read(sock, at, len);
        if (got <= 0) die("the server has hung up");
        at += got, len -= (size_t)got;
    }
}

static void put(struct iovec *parts, int count) {
    while (count > 0) {
        ssize_t done = writev(sock, parts, count);
        if (done < 0) die("cannot send");
        while (count > 0 && (size_t)done >= parts->iov_len) done -= (ssize_t)parts->iov_len, parts++, count--;
        if (count > 0) parts->iov_base = (char *)parts->iov_base + done, parts->iov_len -= (size_t)done;
    }
}

static void handshake(const char *path) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    strncpy(to.sun_path, path, sizeof to.sun_path - 1);
    sock = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(sock, (void *)&to, sizeof to)) die("cannot connect");
    char hello[18], rest[10];
    get(hello, sizeof hello);
    /* NBD_FLAG_C_FIXED_NEWSTYLE and NO_ZEROES; then NBD_OPT_EXPORT_NAME of the default export. */
    struct __attribute__((packed)) { uint32_t flags; uint64_t magic; uint32_t option, len; } choice =
        {htobe32(3), htobe64(0x49484156454F5054ULL), htobe32(1), 0};
    put(&(struct iovec){&choice, sizeof choice}, 1);
    get(rest, sizeof rest);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void ask(uint16_t flags, uint16_t type, uint64_t offset, uint32_t len, char *payload) {
    struct request r = {htobe32(0x25609513), htobe16(flags), htobe16(type), offset, htobe64(offset), htobe32(len)};
    struct iovec parts[2] = {{&r, sizeof r}, {payload, len}};
    put(parts, type == WRITE ? 2 : 1);
}

/* Takes in at least one answer, each of `answer` bytes; returns how many. */
static uint64_t answers(char *buf, size_t room, size_t *held, size_t answer) {
    ssize_t got = read(sock, buf + *held, room - *held);
    if (got <= 0) die("the server has hung up");
    *held += (size_t)got;
    uint64_t count = 0;
    size_t at = 0;
    for (; at + answer <= *held; at += answer, count++) {
        uint32_t error;
        memcpy(&error, buf + at + 4, 4);
        if (error) errno = (int)be32toh(error), die("the server says no");
    }
    memmove(buf, buf + at, *held - at);
    *held -= at;
    return count;
}

int main(int argc, char **argv) {
    if (argc < 8) die("usage: load SOCKET OP PATTERN BLOCK_LEN DEPTH START LEN [RUN_MAX]");
    const char *op = argv[2];
    int jump = !strcmp(argv[3], "rand");
    uint64_t block = strtoull(argv[4], 0, 0), depth = strtoull(argv[5], 0, 0), start = strtoull(argv[6], 0, 0);
    uint64_t count = strtoull(argv[7], 0, 0) / block, most = argc > 8 ? strtoull(argv[8], 0, 0) : UINT64_MAX;
    uint16_t type = !strcmp(op, "write") ? WRITE : !strcmp(op, "read") ? READ : !strcmp(op, "trim") ? TRIM : WRITE_ZEROES;
    uint16_t flags = !strcmp(op, "nohole") ? NO_HOLE : 0;
    handshake(argv[1]);
    char *payload = malloc(block);
    if (type == WRITE) memset(payload, 0x5a, block);
    size_t answer = 16 + (type == READ ? block : 0), room = answer * (depth + 1), held = 0;
    char *buf = malloc(room);
    /* A step without common factor with the count visits every block once. */
    uint64_t step = jump ? count * 0.6180339887 : 1;
    for (uint64_t a = step, b = count; jump && step < count;) {
        while (b) { uint64_t rest = a % b; a = b, b = rest; }
        if (a == 1) break;
        a = ++step, b = count;
    }
    uint64_t sent = 0, done = 0, index = 0, requests = !strcmp(op, "none") ? 0 : count < most ? count : most;
    double begin = now();
    while (done < requests) {
        for (; sent < requests && sent - done < depth; sent++, index = (index + step) % count)
            ask(flags, type, start + index * block, (uint32_t)block, payload);
        done += answers(buf, room, &held, answer);
    }
    double answered = now();
    ask(0, FLUSH, 0, 0, 0);
    while (!answers(buf, room, &held, 16)) {}
    printf("%llu %.6f %.6f\n", (unsigned long long)requests, answered - begin, now() - answered);
    ask(0, 2, 0, 0, 0);
    return 0;
}
