/* Threads that write and check every page of a memory, as fast as they can.
 *
 * Each thread owns one word of each page, and knows what it last wrote there. A word that is something
 * else is a lost update.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define WORDS 512
#define HOT 48

struct thread {
	pthread_t id;
	volatile uint64_t *base;
	uint64_t pages, until, number, wrong, steps;
};

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000UL + t.tv_nsec;
}

static void *work(void *argument)
{
	struct thread *t = argument;
	uint64_t *last = calloc(t->pages, sizeof *last), dice = t->number * 0x9E3779B97F4A7C15UL + 1;
	uint64_t hot = 0;
	while (now() < t->until) {
		dice ^= dice << 13, dice ^= dice >> 7, dice ^= dice << 17;
		/* One page from anywhere drives pages out; HOT pages are used all the time, those that are
		 * just leaving too. Even ones are written often, odd ones rarely: the first write of a page
		 * that was clean for long comes at any moment. */
		uint64_t page = dice % t->pages;
		for (int n = 0; n < 512; n++) {
			volatile uint64_t *word = t->base + page * WORDS + t->number;
			if (*word != last[page]) {
				t->wrong++;
				last[page] = *word;
			}
			dice = dice * 6364136223846793005UL + 1442695040888963407UL;
			if (!(dice >> 33 & (page & 1 ? 4095 : 1)))
				*word = ++last[page];
			t->steps++;
			page = (hot + (dice >> 48) % HOT) % t->pages;
		}
		hot += 1;
	}
	for (uint64_t page = 0; page < t->pages; page++)
		t->wrong += t->base[page * WORDS + t->number] != last[page];
	free(last);
	return 0;
}

/* How many words were wrong; *steps says how many were looked at. */
uint64_t stress(uint64_t *base, uint64_t pages, uint64_t threads, double seconds, uint64_t *steps)
{
	struct thread *all = calloc(threads, sizeof *all);
	uint64_t wrong = 0, until = now() + (uint64_t)(seconds * 1e9);
	*steps = 0;
	for (uint64_t n = 0; n < threads; n++) {
		all[n] = (struct thread){ .base = base, .pages = pages, .until = until, .number = n };
		pthread_create(&all[n].id, 0, work, &all[n]);
	}
	for (uint64_t n = 0; n < threads; n++) {
		pthread_join(all[n].id, 0);
		wrong += all[n].wrong;
		*steps += all[n].steps;
	}
	free(all);
	return wrong;
}
