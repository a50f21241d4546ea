// SPDX-License-Identifier: GPL-2.0
/* What a worker does in any context: maps and unmaps, and checks what comes back. */
#include "stress.h"

#include <linux/mm.h>
#include <linux/sched/task_stack.h>
#include <linux/vmalloc.h>

/* The device reads and writes nothing. Mapped to be read, a page may be mapped several times: DMA_API_DEBUG objects otherwise. */
#define DIRECTION DMA_TO_DEVICE

u32 stress_random(struct worker *worker, u32 below)
{
	return prandom_u32_state(&worker->random) % below;
}

static void wrong(struct worker *worker, const char *what)
{
	if (!worker->wrong)
		worker->wrong = what;
}

/* Whether a page is of the stack in use. No driver may map that, says DMA_API_DEBUG. */
static bool on_stack(unsigned long pfn)
{
	struct vm_struct *area = task_stack_vm_area(current);
	unsigned int i;

	if (!area)
		return object_is_on_stack(page_address(pfn_to_page(pfn)));
	for (i = 0; i < area->nr_pages; i++)
		if (page_to_pfn(area->pages[i]) == pfn)
			return true;
	return false;
}

void stress_map(struct worker *worker, phys_addr_t phys, u32 len)
{
	dma_addr_t bus;

	if (worker->count == worker->most)
		return;
	/* The page before it instead: RAM does not begin with a stack. */
	while (on_stack(PHYS_PFN(phys)))
		phys -= PAGE_SIZE;
	bus = dma_map_page_attrs(worker->dev, pfn_to_page(PHYS_PFN(phys)), offset_in_page(phys), len,
				 DIRECTION, DMA_ATTR_NO_WARN);
	if (dma_mapping_error(worker->dev, bus)) {
		worker->failed++;
		return;
	}
	/* The host maps in units of 16 KiB, so the place within one stays. */
	if ((bus ^ phys) & (SZ_16K - 1))
		wrong(worker, "a bus address at another place of its 16 KiB than the memory");
	worker->mapped++;
	worker->live[worker->count++] = (struct mapping){ .bus = bus, .phys = phys, .len = len };
}

void stress_unmap(struct worker *worker, u32 index)
{
	struct mapping *gone = &worker->live[index];

	dma_unmap_page_attrs(worker->dev, gone->bus, gone->len, DIRECTION, 0);
	*gone = worker->live[--worker->count];
}

/* The segments must cover the entries in order, each byte once. */
static void check_list(struct worker *worker, struct list *list, int segments)
{
	struct scatterlist *sg, *segment = list->table.sgl;
	u64 left = sg_dma_len(segment), bus = sg_dma_address(segment);
	int i, used = 1;

	for_each_sg(list->table.sgl, sg, list->nents, i) {
		if (!left && used < segments) {
			segment = sg_next(segment);
			left = sg_dma_len(segment);
			bus = sg_dma_address(segment);
			used++;
		}
		if (left < sg->length)
			wrong(worker, "a list's segments do not cover its entries");
		if ((bus ^ sg_phys(sg)) & (SZ_16K - 1))
			wrong(worker, "a list's entry at another place of its 16 KiB than the memory");
		bus += sg->length;
		left -= sg->length;
	}
	if (left || used != segments)
		wrong(worker, "a list's segments are longer than its entries");
}

void stress_map_list(struct worker *worker, struct list *list)
{
	u64 pages = (stress_ram_end - stress_ram_start) >> PAGE_SHIFT;
	u64 pfn = PHYS_PFN(stress_ram_start);
	struct scatterlist *sg;
	int i, segments, nents = 1 + stress_random(worker, LIST_ENTRIES);
	u64 at = stress_random(worker, pages);

	for_each_sg(list->table.sgl, sg, nents, i) {
		/* Runs of neighbours, as drivers have them, and jumps. */
		at = stress_random(worker, 4) ? at + 1 : stress_random(worker, pages);
		while (on_stack(pfn + at % pages))
			at++;
		sg_set_page(sg, pfn_to_page(pfn + at % pages), PAGE_SIZE, 0);
	}
	segments = dma_map_sg_attrs(worker->dev, list->table.sgl, nents, DIRECTION,
				    DMA_ATTR_NO_WARN);
	if (!segments) {
		worker->lists_failed++;
		return;
	}
	list->nents = nents;
	worker->lists_mapped++;
	worker->entries += nents;
	worker->segments += segments;
	check_list(worker, list, segments);
}

void stress_unmap_list(struct worker *worker, struct list *list)
{
	dma_unmap_sg_attrs(worker->dev, list->table.sgl, list->nents, DIRECTION, 0);
	list->nents = 0;
}

/* A handful of random calls. */
void stress_mixed_step(struct worker *worker)
{
	u32 pages = (stress_ram_end - stress_ram_start) >> PAGE_SHIFT;
	int i;

	for (i = 0; i < 32; i++) {
		struct list *list = &worker->lists[stress_random(worker, LISTS)];
		phys_addr_t phys = stress_ram_start + ((u64)stress_random(worker, pages - 64) << PAGE_SHIFT);

		switch (stress_random(worker, 8)) {
		case 0:
			if (list->nents)
				stress_unmap_list(worker, list);
			else
				stress_map_list(worker, list);
			break;
		case 1:
			/* Straddles windows, and is mapped several times over. */
			stress_map(worker, phys + stress_random(worker, PAGE_SIZE),
				   1 + stress_random(worker, 63 * PAGE_SIZE));
			break;
		case 2: case 3: case 4:
			stress_map(worker, phys & ~((phys_addr_t)SZ_1M - SZ_64K), PAGE_SIZE);
			break;
		default:
			if (worker->count)
				stress_unmap(worker, stress_random(worker, worker->count));
		}
	}
}

void stress_release_all(struct worker *worker)
{
	int i;

	while (worker->count)
		stress_unmap(worker, stress_random(worker, worker->count));
	for (i = 0; i < LISTS; i++)
		if (worker->lists[i].nents)
			stress_unmap_list(worker, &worker->lists[i]);
}

/* Runs the worker's step in a context of that kind, on this CPU, and waits for its end. */
void stress_run_in(struct worker *worker, enum place place)
{
	unsigned long flags;

	worker->places[place]++;
	switch (place) {
	case IRQS_OFF:
		local_irq_save(flags);
		worker->step(worker);
		local_irq_restore(flags);
		break;
	case IN_SOFTIRQ:
		tasklet_schedule(&worker->tasklet);
		wait_for_completion(&worker->stepped);
		break;
	case IN_HARDIRQ:
		irq_work_queue(&worker->irq_work);
		wait_for_completion(&worker->stepped);
		break;
	default:
		worker->step(worker);
	}
}
