// SPDX-License-Identifier: GPL-2.0
/* A stand-in for NVIDIA's driver: a module of its name with the symbol that UVM allocates system memory through, and with the resource
 * manager's answer to large pages at addresses that are not aligned to them (NV_ERR_INVALID_OFFSET).
 */
#include <linux/module.h>

#include "nvidia.h"

u32 nvUvmInterfaceMemoryAllocSys(void *space, u64 length, u64 *pointer, struct uvm_alloc_info *info)
{
	/* So that the compiler keeps a function that can be watched. */
	barrier();
	if (!space || (unsigned long)info < PAGE_SIZE)
		return NV_ERR_INVALID_ARGUMENT;
	if (info->page_size == SZ_64K || info->page_size == SZ_2M)
		return NV_ERR_INVALID_OFFSET;
	*pointer = length;
	return 0;
}
EXPORT_SYMBOL(nvUvmInterfaceMemoryAllocSys);

MODULE_DESCRIPTION("A stand-in for tests of Outboard; not NVIDIA's");
MODULE_LICENSE("GPL");
