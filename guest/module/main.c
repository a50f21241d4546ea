// SPDX-License-Identifier: GPL-2.0
/* outboard_dma: DMA under a Mac's limits, by way of the DMA device that Outboard puts beside a passed-through slot. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bug.h>
#include <linux/module.h>

#include "quirks/quirks.h"

/* The Rust half's last word. It is built so that nothing leads here. */
void __noreturn outboard_fatal(void);
void __noreturn outboard_fatal(void)
{
	BUG();
}

static int __init outboard_init(void)
{
	return outboard_quirks_init();
}

static void __exit outboard_exit(void)
{
	outboard_quirks_exit();
}

module_init(outboard_init);
module_exit(outboard_exit);
MODULE_DESCRIPTION("DMA under a Mac's limits, in an Outboard guest");
MODULE_LICENSE("GPL");
