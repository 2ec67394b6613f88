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

struct thread {
	pthread_t id;
	volatile uint64_t *base;
	uint64_t pages, used, until, number, wrong, steps;
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
	for (; t->steps % 64 || now() < t->until; t->steps++) {
		/* `used` pages are in use all the time, the same ones in all threads. They are more than may
		 * be here, so pages leave while they are in use. Now and then one comes from anywhere. */
		dice = dice * 6364136223846793005UL + 1442695040888963407UL;
		uint64_t page = t->steps % 64 ? (dice >> 40) % t->used : (dice >> 40) % t->pages;
		volatile uint64_t *word = t->base + page * WORDS + t->number;
		if (*word != last[page]) {
			t->wrong++;
			last[page] = *word;
		}
		/* Even pages are written often. Odd ones are clean for long, as long as they are here: so
		 * their first write comes at any moment of an eviction. */
		if (!(dice >> 33 & (page & 1 ? 15 : 1)))
			*word = ++last[page];
	}
	for (uint64_t page = 0; page < t->pages; page++)
		t->wrong += t->base[page * WORDS + t->number] != last[page];
	free(last);
	return 0;
}

/* How many words were wrong; *steps says how many were looked at. */
uint64_t stress(uint64_t *base, uint64_t pages, uint64_t used, uint64_t threads, double seconds,
		uint64_t *steps)
{
	struct thread *all = calloc(threads, sizeof *all);
	uint64_t wrong = 0, until = now() + (uint64_t)(seconds * 1e9);
	*steps = 0;
	for (uint64_t n = 0; n < threads; n++) {
		all[n] = (struct thread){ .base = base, .pages = pages, .used = used,
				    .until = until, .number = n };
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
