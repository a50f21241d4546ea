// SPDX-License-Identifier: GPL-2.0
/* Looks at the kernel's code from outside the quirk, has code of its own that the quirk should find, and tries what clears memory. */
#include <asm/page.h>
#include <linux/kprobes.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/slab.h>
#include <linux/string.h>

static unsigned long (*lookup)(const char *name);

/* What a driver might have: the question, and a DC ZVA with room. */
static noinline u64 own_question(void)
{
	u64 answer;

	asm volatile("mrs %0, dczid_el0\n"
		     "tbnz %w0, #4, 1f\n"
		     "and %0, %0, #0xf\n"
		     "1:" : "=r"(answer));
	return answer;
}

static noinline void own_clear(void *block)
{
	asm volatile("dc zva, %0\n nop\n nop\n nop\n" : : "r"(block) : "memory");
}

/* "QUESTIONS ANSWERS ZVAS": in the kernel's code, `mrs xn, dczid_el0`; `movz xn, #0x10` before a `tbnz wn, #4`; `dc zva`. */
static int show_kernel(char *buffer, const struct kernel_param *param)
{
	const u32 *word = (const u32 *)lookup("_stext"), *end = (const u32 *)lookup("_etext");
	unsigned int questions = 0, answers = 0, zvas = 0;

	for (; word + 1 < end; word++) {
		questions += (word[0] & 0xffffffe0) == 0xd53b00e0;
		answers += (word[0] & 0xffffffe0) == 0xd2800200 && (word[1] & 0xfff8001f) == (0x37200000 | (word[0] & 0x1f));
		zvas += (word[0] & 0xffffffe0) == 0xd50b7420;
	}
	return scnprintf(buffer, PAGE_SIZE, "%u %u %u\n", questions, answers, zvas);
}

/* The first word of own_question() that matters, and how many DC ZVA and stores own_clear() has. */
static int show_own(char *buffer, const struct kernel_param *param)
{
	const u32 *word = (const u32 *)own_clear;
	unsigned int zvas = 0, stores = 0;
	u64 answer = own_question();
	int i;

	for (i = 0; i < 12; i++) {
		zvas += (word[i] & 0xffffffe0) == 0xd50b7420;
		stores += (word[i] & 0xfffffc1f) == 0xa9007c1f || (word[i] & 0xfffffc1f) == 0xa9017c1f ||
			  (word[i] & 0xfffffc1f) == 0xa9027c1f || (word[i] & 0xfffffc1f) == 0xa9037c1f;
	}
	return scnprintf(buffer, PAGE_SIZE, "%llu %u %u\n", answer, zvas, stores);
}

#define AREA (4 * PAGE_SIZE)

static bool right(const u8 *area, size_t from, size_t length)
{
	return !memchr_inv(area, 0xa5, from) && !memchr_inv(area + from, 0, length) &&
	       !memchr_inv(area + from + length, 0xa5, AREA - from - length);
}

/* "good", or what was not. */
static int show_clears(char *buffer, const struct kernel_param *param)
{
	u8 *area = (u8 *)__get_free_pages(GFP_KERNEL, 2);
	const char *bad = NULL;
	size_t from, length, tried = 0;

	if (!area)
		return -ENOMEM;
	for (from = 0; from < 80 && !bad; from += 7) {
		for (length = 0; length < 3 * PAGE_SIZE && !bad; length = length * 3 / 2 + 5) {
			memset(area, 0xa5, AREA);
			memset(area + from, 0, length);
			tried++;
			if (!right(area, from, length))
				bad = "memset";
		}
	}
	memset(area, 0xa5, AREA);
	clear_page(area + PAGE_SIZE);
	if (!right(area, PAGE_SIZE, PAGE_SIZE))
		bad = "clear_page";
	memset(area, 0xa5, AREA);
	own_clear(area + 128);
	if (!right(area, 128, 64))
		bad = "dc zva";
	free_pages((unsigned long)area, 2);
	return bad ? scnprintf(buffer, PAGE_SIZE, "%s from %zu, %zu bytes\n", bad, from, length) :
		     scnprintf(buffer, PAGE_SIZE, "good %zu\n", tried);
}

static const struct kernel_param_ops kernel_ops = { .get = show_kernel }, own_ops = { .get = show_own },
				     clears_ops = { .get = show_clears };
module_param_cb(kernel, &kernel_ops, NULL, 0444);
module_param_cb(own, &own_ops, NULL, 0444);
module_param_cb(clears, &clears_ops, NULL, 0444);

static int __init find(void)
{
	struct kprobe finder = { .symbol_name = "kallsyms_lookup_name" };
	int error = register_kprobe(&finder);

	if (error)
		return error;
	lookup = (void *)finder.addr;
	unregister_kprobe(&finder);
	return 0;
}

static void __exit done(void)
{
}

module_init(find);
module_exit(done);
MODULE_DESCRIPTION("Tests of Outboard's DC ZVA quirk");
MODULE_LICENSE("GPL");
