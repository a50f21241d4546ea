// SPDX-License-Identifier: GPL-2.0
/* AMD: no DC ZVA in the kernel and its modules, because it faults on a GPU's memory (core/src/quirks/zva.rs says why and what is rewritten). */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <asm/page.h>
#include <asm/sysreg.h>
#include <linux/cpu.h>
#include <linux/cpuhotplug.h>
#include <linux/kernel.h>
#include <linux/kprobes.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "core.h"
#include "quirks.h"

static int quirk_dczva = -1;
module_param(quirk_dczva, int, 0444);
MODULE_PARM_DESC(quirk_dczva, "Rewrite the kernel's DC ZVA: 1 yes, 0 no, -1 where an AMD GPU is served (default)");

/* More places than this are not what is known. Debian's kernels have five. */
#define MAX_SITES 64
/* DCZID_EL0: bits 3:0 are the block's size, log2 in words of 4 bytes; bit 4 says not to use DC ZVA. */
#define DCZID_SIZE 0xful
#define DCZID_BLOCK_64 4
#define DCZID_PROHIBITED BIT(4)

struct site {
	u32 *place;
	struct module *module; /* null in the kernel itself */
	struct odma_zva_site is;
};

static struct site sites[MAX_SITES];
static unsigned int site_count;
static unsigned int uncovered;
static bool running;
/* DC ZVA clears 64 bytes on these CPUs. */
static bool stores;
static int hotplug_state;

/* The kernel's own, none of them exported. */
static unsigned long (*lookup)(const char *name);
static int (*patch_text)(void *places[], u32 instructions[], int count);
static void (*wait_for_tasks)(void);

static int find_functions(void)
{
	struct kprobe finder = { .symbol_name = "kallsyms_lookup_name" };
	int error = register_kprobe(&finder);

	if (error)
		return error;
	lookup = (void *)finder.addr;
	unregister_kprobe(&finder);
	patch_text = (void *)lookup("aarch64_insn_patch_text");
	wait_for_tasks = (void *)lookup("synchronize_rcu_tasks");
	return patch_text ? 0 : -ENOENT;
}

/* Writes `words` instructions at each place; with all other CPUs held, and their caches told. */
static int write_all(unsigned int from, unsigned int to, bool back, bool halfway)
{
	void **places = kmalloc_array(MAX_SITES * ODMA_ZVA_WORDS, sizeof(*places), GFP_KERNEL);
	u32 *words = kmalloc_array(MAX_SITES * ODMA_ZVA_WORDS, sizeof(*words), GFP_KERNEL);
	int error = places && words ? 0 : -ENOMEM;
	int count = 0;
	unsigned int i, w;

	for (i = from; !error && i < to; i++) {
		const struct odma_zva_site *is = &sites[i].is;

		if (halfway && is->words == 1)
			continue;
		for (w = 0; w < is->words; w++) {
			/* Halfway back: stores, and the old instruction last. */
			u32 word = halfway ? (w == is->words - 1 ? is->old[0] : is->new[w]) : back ? is->old[w] : is->new[w];

			places[count] = sites[i].place + w;
			words[count++] = word;
		}
	}
	if (!error && count) {
		/* It stops the other CPUs by way of stop_machine_cpuslocked(). */
		cpus_read_lock();
		error = patch_text(places, words, count);
		cpus_read_unlock();
	}
	kfree(places);
	kfree(words);
	return error;
}

/* Puts sites from `from` on back as they were, in memory and in the table. False if something stays rewritten (which is harmless). */
static bool put_back(unsigned int from)
{
	bool several = false;
	unsigned int i;
	int error;

	for (i = from; i < site_count; i++)
		several |= sites[i].is.words > 1;
	/* A task that was preempted between two stores must not go on between three NOPs: first both do the whole, and only when no task can be
	 * in between any more, the old sequence. Without preemption in the kernel no task ever is.
	 */
	if (several && IS_ENABLED(CONFIG_PREEMPTION)) {
		if (!wait_for_tasks || write_all(from, site_count, false, true))
			return false;
		wait_for_tasks();
	}
	error = write_all(from, site_count, true, false);
	if (!error)
		site_count = from;
	return !error;
}

/* Rewrites what is in `count` instructions at `text`. */
static int rewrite(u32 *text, size_t count, struct module *module)
{
	struct odma_zva_site *found = kcalloc(MAX_SITES, sizeof(*found), GFP_KERNEL);
	unsigned int i, first = site_count, room = MAX_SITES - site_count;
	struct odma_zva_seen seen = {};
	int error;

	if (!found)
		return -ENOMEM;
	odma_core_zva_scan(text, count, stores, found, room, &seen);
	if (seen.unreported) {
		kfree(found);
		return -E2BIG;
	}
	for (i = 0; i < seen.tests + seen.roomy; i++)
		sites[site_count++] = (struct site){ .place = text + found[i].at, .module = module, .is = found[i] };
	kfree(found);
	error = write_all(first, site_count, false, false);
	if (error) {
		put_back(first);
		site_count = first;
		return error;
	}
	uncovered += seen.uncovered;
	return 0;
}

static int rewrite_module(struct module *module)
{
#ifdef ODMA_HAVE_MODULE_MEM
	return rewrite(module->mem[MOD_TEXT].base, module->mem[MOD_TEXT].size / sizeof(u32), module);
#else
	return rewrite(module->core_layout.base, module->core_layout.text_size / sizeof(u32), module);
#endif
}

/* All modules but this one. The list's head is not exported: the ring is walked from here to here, past what is no module. */
static int rewrite_modules(void)
{
	struct module *module, **held = kcalloc(512, sizeof(*held), GFP_KERNEL);
	unsigned int i, count = 0;
	int error = 0;

	if (!held)
		return -ENOMEM;
	preempt_disable();
	list_for_each_entry_rcu(module, &THIS_MODULE->list, list) {
		/* True of a whole module, and of the head only by a miracle. One that comes has this only when the notifiers are through with
		 * it, so it will not report itself any more.
		 */
		if (READ_ONCE(module->mkobj.mod) != module || READ_ONCE(module->state) == MODULE_STATE_GOING)
			continue;
		if (count == 512)
			error = -E2BIG;
		else if (try_module_get(module))
			held[count++] = module;
	}
	preempt_enable();
	for (i = 0; i < count; i++) {
		if (!error)
			error = rewrite_module(held[i]);
		module_put(held[i]);
	}
	kfree(held);
	return error;
}

/* Do the kernel's own functions still do what they are for? */
static bool clears(void)
{
	u8 *pages = (u8 *)__get_free_pages(GFP_KERNEL, 1);
	bool good = pages;

	if (!pages)
		return false;
	memset(pages, 0xa5, 2 * PAGE_SIZE);
	memset(pages + 64, 0, 2 * PAGE_SIZE - 128);
	good &= !memchr_inv(pages, 0xa5, 64) && !memchr_inv(pages + 64, 0, 2 * PAGE_SIZE - 128);
	good &= !memchr_inv(pages + 2 * PAGE_SIZE - 64, 0xa5, 64);
	memset(pages, 0xa5, 2 * PAGE_SIZE);
	clear_page(pages);
	good &= !memchr_inv(pages, 0, PAGE_SIZE) && !memchr_inv(pages + PAGE_SIZE, 0xa5, PAGE_SIZE);
	free_pages((unsigned long)pages, 1);
	return good;
}

/*
 * Asked on each CPU, and on each that comes: one whose DC ZVA clears another number of bytes than the stores that stand in its place is not let in.
 * What was rewritten needs nothing else of it: its instruction cache is empty.
 */
static int cpu_comes(unsigned int cpu)
{
	unsigned long dczid = read_sysreg(dczid_el0);

	if (!stores || (dczid & DCZID_PROHIBITED) || (dczid & DCZID_SIZE) == DCZID_BLOCK_64)
		return 0;
	pr_warn("quirk dczva: CPU %u clears %lu bytes at a time, the others 64\n", cpu, 4UL << (dczid & DCZID_SIZE));
	return -EINVAL;
}

static bool needed_by(struct pci_dev *pdev)
{
	return pdev->vendor == PCI_VENDOR_ID_ATI && pdev->class >> 16 == PCI_BASE_CLASS_DISPLAY;
}

static void report(struct outboard_quirk *quirk)
{
	if (uncovered)
		outboard_quirk_say(quirk, "on: %u places rewritten; %u DC ZVA remain that are not of a known form", site_count, uncovered);
	else
		outboard_quirk_say(quirk, "on: %u places rewritten", site_count);
}

static void start(struct outboard_quirk *quirk)
{
	unsigned long dczid = read_sysreg(dczid_el0);
	u32 *first, *end;
	int error;

	if (dczid & DCZID_PROHIBITED) {
		outboard_quirk_say(quirk, "off: not needed, this CPU says not to use DC ZVA");
		return;
	}
	stores = (dczid & DCZID_SIZE) == DCZID_BLOCK_64;
	error = find_functions();
	if (error) {
		outboard_quirk_say(quirk, "off: this kernel does not let its code be changed (error %d)", error);
		return;
	}
	hotplug_state = cpuhp_setup_state(CPUHP_AP_ONLINE_DYN, "outboard/dczva:online", cpu_comes, NULL);
	if (hotplug_state < 0) {
		outboard_quirk_say(quirk, "off: not every CPU is alike (error %d)", hotplug_state);
		hotplug_state = 0;
		return;
	}
	first = (u32 *)lookup("_stext");
	end = (u32 *)lookup("_etext");
	if (!first || end <= first) {
		outboard_quirk_say(quirk, "off: the kernel's code was not found");
		return;
	}
	error = rewrite(first, end - first, NULL);
	if (!error && !site_count)
		error = -ENODATA;
	if (!error)
		error = rewrite_modules();
	if (!error && !clears())
		error = -EILSEQ;
	if (!error) {
		running = true;
		report(quirk);
	} else if (put_back(0)) {
		outboard_quirk_say(quirk, "off: the kernel's code is not as known (error %d); nothing is changed", error);
	} else {
		outboard_quirk_say(quirk, "off: the kernel's code is not as known (error %d); %u places stay rewritten", error, site_count);
	}
}

static void stop(struct outboard_quirk *quirk)
{
	unsigned int count = site_count;

	if (hotplug_state > 0)
		cpuhp_remove_state(hotplug_state);
	hotplug_state = 0;
	if (!running)
		return;
	running = false;
	if (put_back(0))
		pr_info("quirk %s: %u places as they were\n", quirk->name, count);
	else
		pr_warn("quirk %s: %u places stay rewritten, which does no harm\n", quirk->name, site_count);
}

static void module_comes(struct outboard_quirk *quirk, struct module *module)
{
	unsigned int before = site_count, open = uncovered;
	int error;

	if (!running)
		return;
	error = rewrite_module(module);
	if (error)
		pr_warn("quirk %s: the code of %s is not as known and stays (error %d)\n", quirk->name, module->name, error);
	else if (site_count != before || uncovered != open)
		report(quirk);
}

static void module_goes(struct outboard_quirk *quirk, struct module *module)
{
	unsigned int i, kept = 0;

	/* Its code goes with it. */
	for (i = 0; i < site_count; i++) {
		if (sites[i].module != module)
			sites[kept++] = sites[i];
	}
	site_count = kept;
}

struct outboard_quirk outboard_quirk_dczva = {
	.name = "dczva",
	.wanted = &quirk_dczva,
	.needed_by = needed_by,
	.needs = "no AMD GPU is served",
	.start = start,
	.stop = stop,
	.module_comes = module_comes,
	.module_goes = module_goes,
};
