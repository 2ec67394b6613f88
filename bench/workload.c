/* What every system of the benchmark does, so that only the memory under it differs; and the floor.
 *
 * Built as a shared library; system.py calls it with the address of the memory. One call is one
 * pattern: it takes its accesses, checks what it reads, and fills in a result.
 *
 * A page's content: its word w (of 512) is (page * 512 + w) ^ version(page) << 40; the versions live
 * in ordinary memory. Sequential patterns read or write whole pages; random ones one word of a page.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)

struct result {
	uint64_t accesses, nanoseconds, longest, wrong;
};

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000UL + t.tv_nsec;
}

static uint64_t mix(uint64_t x)
{
	x ^= x >> 31;
	x *= 0x9E3779B97F4A7C15UL;
	return x ^ x >> 29;
}

static __thread uint64_t seed;
static uint64_t dice(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	return seed ^= seed << 17;
}

static uint64_t *at(char *base, uint64_t page)
{
	return (uint64_t *)(base + page * PAGE);
}

static uint64_t word(uint32_t version, uint64_t page, uint64_t w)
{
	return (page * WORDS + w) ^ ((uint64_t)version << 40);
}

static void write_page(char *base, uint32_t *version, uint64_t page)
{
	uint64_t *p = at(base, page);
	for (uint64_t w = 0; w < WORDS; w++)
		p[w] = word(version[page], page, w);
}

/* Word 0 of a page alone changes in the random patterns; the low half of the version counts that. */
static uint64_t wrong_in_page(char *base, uint32_t *version, uint64_t page)
{
	uint64_t *p = at(base, page), wrong = p[0] != word(version[page], page, 0);
	uint32_t rest = version[page] & 0xFFFF0000U;
	for (uint64_t w = 1; w < WORDS; w++)
		wrong += p[w] != word(rest, page, w);
	return wrong;
}

static uint64_t read_word(char *base, uint32_t *version, uint64_t page)
{
	return *(volatile uint64_t *)at(base, page) != word(version[page], page, 0);
}

static void write_word(char *base, uint32_t *version, uint64_t page)
{
	version[page] = (version[page] & 0xFFFF0000U) | ((version[page] + 1) & 0xFFFFU);
	*(volatile uint64_t *)at(base, page) = word(version[page], page, 0);
}

/* An approximate zipf distribution (s = 1) over the pages, hot ones spread over the memory. */
static uint64_t zipf(uint64_t pages)
{
	double u = (dice() >> 11) * (1.0 / 9007199254740992.0);
	uint64_t rank = (uint64_t)__builtin_exp(u * __builtin_log((double)pages));
	return mix(rank) % pages;
}

enum { SEQ_WRITE, SEQ_READ, RANDOM_READ, RANDOM_WRITE, ZIPF, STRIDED };

struct part {
	int which;
	char *base;
	uint32_t *version;
	uint64_t pages, most, limit, seed;
	struct result r;
};

/* One thread's part of a pattern: up to `most` accesses, or for at most `limit` nanoseconds. */
static void *run(void *argument)
{
	struct part *part = argument;
	char *base = part->base;
	uint32_t *version = part->version;
	uint64_t pages = part->pages, began = now(), before = began;
	struct result r = { 0 };
	seed = part->seed;
	while (r.accesses < part->most && before - began < part->limit) {
		uint64_t n = r.accesses++, page;
		switch (part->which) {
		case SEQ_WRITE:
			version[n] = (version[n] + 0x10000U) & 0xFFFF0000U;
			write_page(base, version, n);
			break;
		case SEQ_READ:
			r.wrong += wrong_in_page(base, version, n);
			break;
		case RANDOM_READ:
			r.wrong += read_word(base, version, dice() % pages);
			break;
		case RANDOM_WRITE:
			page = dice() % pages;
			write_word(base, version, page);
			break;
		case ZIPF:
			page = zipf(pages);
			if (dice() % 5)
				r.wrong += read_word(base, version, page);
			else
				write_word(base, version, page);
			break;
		case STRIDED:
			r.wrong += read_word(base, version, n * 7 % pages);
			break;
		}
		uint64_t after = now();
		if (after - before > r.longest)
			r.longest = after - before;
		before = after;
	}
	part->r = r;
	return 0;
}

/* Run a pattern in so many threads, at most 4, each on its own part of the memory. The caller is one
 * of them. The result: all accesses, the time until the last thread ended, the longest access. */
void pattern(int which, int threads, char *base, uint32_t *version, uint64_t pages, uint64_t most,
	     uint64_t limit, struct result *result)
{
	struct part part[4];
	pthread_t thread[4];
	struct result all = { 0 };
	uint64_t began = now(), share = pages / threads;
	for (int i = threads - 1; i >= 0; i--) {
		part[i] = (struct part){ which, base + i * share * PAGE, version + i * share, share,
					 most / threads, limit, mix(1 + which * 4 + i), { 0 } };
		if (i == 0)
			run(&part[i]);
		else if (pthread_create(&thread[i], 0, run, &part[i]))
			abort();
	}
	for (int i = 0; i < threads; i++) {
		if (i > 0)
			pthread_join(thread[i], 0);
		all.accesses += part[i].r.accesses;
		all.wrong += part[i].r.wrong;
		if (part[i].r.longest > all.longest)
			all.longest = part[i].r.longest;
	}
	all.nanoseconds = now() - began;
	*result = all;
}

/* ---------------------------------------------------------------- the floor: a pager in C */

static struct {
	char *base, *local;
	uint64_t pages, faults;
	int fd, spin;
} floor_;

static void *handler(void *unused)
{
	struct pollfd p = { .fd = floor_.fd, .events = POLLIN };
	struct uffd_msg m;
	for (;;) {
		if (!floor_.spin)
			poll(&p, 1, -1);
		if (read(floor_.fd, &m, sizeof m) != sizeof m)
			continue;
		floor_.faults++;
		uint64_t page = (m.arg.pagefault.address - (uintptr_t)floor_.base) / PAGE;
		struct uffdio_copy c = {
			.dst = (uintptr_t)floor_.base + page * PAGE,
			.src = (uintptr_t)floor_.local + page * PAGE,
			.len = PAGE,
		};
		if (ioctl(floor_.fd, UFFDIO_COPY, &c)) {
			struct uffdio_range w = { c.dst, PAGE };
			ioctl(floor_.fd, UFFDIO_WAKE, &w);
		}
	}
	return unused;
}

/* Memory whose faults one thread answers from `local`. Returns its address, or 0. */
char *floor_open(uint64_t pages, int spin)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	pthread_t thread;
	floor_.fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (floor_.fd < 0 || ioctl(floor_.fd, UFFDIO_API, &api))
		return 0;
	floor_.pages = pages, floor_.spin = spin;
	int memfd = memfd_create("floor", 0);
	if (ftruncate(memfd, pages * PAGE))
		return 0;
	floor_.base = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	floor_.local = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (uint64_t page = 0; page < pages; page++)
		for (uint64_t w = 0; w < WORDS; w++)
			at(floor_.local, page)[w] = word(0, page, w);
	reg.range.start = (uintptr_t)floor_.base, reg.range.len = pages * PAGE;
	if (ioctl(floor_.fd, UFFDIO_REGISTER, &reg) || pthread_create(&thread, 0, handler, 0))
		return 0;
	return floor_.base;
}

/* How many faults were resolved so far. */
uint64_t floor_faults(void)
{
	return __atomic_load_n(&floor_.faults, __ATOMIC_RELAXED);
}

/* Between patterns: what was written goes to `local`, and all but one page of `keep` leaves. */
void floor_forget(uint64_t keep)
{
	unsigned char *present = malloc(floor_.pages);
	mincore(floor_.base, floor_.pages * PAGE, present);
	for (uint64_t page = 0; page < floor_.pages; page++)
		if (present[page] & 1)
			memcpy(floor_.local + page * PAGE, floor_.base + page * PAGE, PAGE);
	free(present);
	madvise(floor_.base, floor_.pages * PAGE, MADV_REMOVE);
	for (uint64_t page = 0; keep && page < floor_.pages; page++)
		if (mix(page) % keep == 0) {
			struct uffdio_copy c = {
				.dst = (uintptr_t)floor_.base + page * PAGE,
				.src = (uintptr_t)floor_.local + page * PAGE,
				.len = PAGE,
			};
			ioctl(floor_.fd, UFFDIO_COPY, &c);
		}
}
