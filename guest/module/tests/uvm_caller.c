// SPDX-License-Identifier: GPL-2.0
/* Plays NVIDIA's UVM: loading it makes one call with the values of its parameters; what came of it is in others. */
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/string.h>

#include "nvidia.h"

static unsigned long length, page, alignment, offset, wild;
module_param(length, ulong, 0444);
module_param(page, ulong, 0444);
module_param(alignment, ulong, 0444);
module_param(offset, ulong, 0444);
/* The structure's address instead of a real one. */
module_param(wild, ulong, 0444);

static unsigned long after[4];
module_param_array(after, ulong, NULL, 0444);
static unsigned int status;
module_param(status, uint, 0444);

static int __init call(void)
{
	struct uvm_alloc_info info = { .physical_offset = offset, .page_size = page, .alignment = alignment };
	u64 pointer = 0;

	memset(info.flags, 1, sizeof(info.flags));
	info.handle = 0x1234;
	status = nvUvmInterfaceMemoryAllocSys(&info, length, &pointer, wild ? (void *)wild : &info);
	after[0] = info.physical_offset;
	after[1] = info.page_size;
	after[2] = info.alignment;
	/* Nothing else was touched. */
	after[3] = info.handle == 0x1234 && memchr_inv(info.flags, 1, sizeof(info.flags)) == NULL;
	return 0;
}

static void __exit done(void)
{
}

module_init(call);
module_exit(done);
MODULE_DESCRIPTION("A stand-in for tests of Outboard");
MODULE_LICENSE("GPL");
