// SPDX-License-Identifier: GPL-2.0
/* outboard_dma: DMA under a Mac's limits, by way of the DMA device that Outboard puts beside a passed-through slot. */
#include "odma.h"

#include <linux/bug.h>
#include <linux/module.h>

#include "quirks/quirks.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

/* The Rust half's last word. It is built so that nothing leads here. */
void __noreturn outboard_fatal(void);
void __noreturn outboard_fatal(void)
{
	BUG();
}

static int __init outboard_init(void)
{
	int error = outboard_quirks_init();

	if (error)
		return error;
	odma_debugfs_init();
	/* The notifier first: a driver that binds from here on finds its DMA operations. */
	error = odma_served_init();
	if (error)
		goto debugfs;
	error = odma_power_init();
	if (error)
		goto served;
	error = odma_companion_init();
	if (!error)
		return 0;
	odma_power_exit();
served:
	odma_served_exit();
debugfs:
	odma_debugfs_exit();
	outboard_quirks_exit();
	return error;
}

static void __exit outboard_exit(void)
{
	odma_companion_exit();
	odma_power_exit();
	odma_served_exit();
	odma_debugfs_exit();
	outboard_quirks_exit();
}

module_init(outboard_init);
module_exit(outboard_exit);
MODULE_DESCRIPTION("DMA under a Mac's limits, in an Outboard guest");
MODULE_LICENSE("GPL");
