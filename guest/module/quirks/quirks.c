// SPDX-License-Identifier: GPL-2.0
/* Quirks of drivers that meet a Mac from inside a virtual machine. */
#include <linux/kernel.h>

#include "quirks.h"

int outboard_quirks_init(void)
{
	return 0;
}

void outboard_quirks_exit(void)
{
}
